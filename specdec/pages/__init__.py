"""Pages of HTML: one environment for their templates, one style sheet."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

STYLES = Path(__file__).parent  # of style.css, which templates include


def require_jinja2() -> None:
    """Raise ValueError where jinja2 is missing: for work that ends with a page, before it begins."""
    if find_spec("jinja2") is None:
        raise ValueError('a report page needs jinja2; pip install "specdec-lossless[experiments]"')


def environment(templates: Path) -> Any:
    """The jinja2 environment of the templates in a folder. Raises ValueError where jinja2 is missing."""
    require_jinja2()
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader([templates, STYLES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
