"""Pages of HTML: one environment for their templates, one style sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

STYLES = Path(__file__).parent  # of style.css, which templates include


def environment(templates: Path) -> Any:
    """The jinja2 environment of the templates in a folder. Raises ValueError where jinja2 is missing."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ValueError('a report page needs jinja2; pip install "specdec-lossless[experiments]"') from error
    return Environment(
        loader=FileSystemLoader([templates, STYLES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
