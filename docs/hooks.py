"""MkDocs hook: pages outside docs/ join the site, and links to other files of the repository become plain text.

So each page is written once, with links that work in the repository and on the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {  # file of the repository -> page of the site
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/LOG.md": "benchmarks-log.md",
    "kernels/README.md": "kernels.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    uri = page.file.src_uri
    source = SOURCES.get(uri, f"docs/{uri}")

    def relink(match: re.Match[str]) -> str:
        text, link, anchor = match[1], match[2], match[3] or ""
        if ":" in link:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        target = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if target is not None:
            return f"[{text}]({posixpath.relpath(target, posixpath.dirname(uri) or '.')}{anchor})"
        return text if (ROOT / path).exists() else match[0]  # a broken link stays one, for --strict to find

    return LINK.sub(relink, markdown)
