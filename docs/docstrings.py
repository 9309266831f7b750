"""Griffe extension: the lines `name: meaning` of a docstring become list items of its API page."""

from __future__ import annotations

import re
from typing import Any

import griffe

ITEM = re.compile(r"^(\w+(?:\[i\])?(?:, \w+)*)((?: \([^)]*\))?): (?=\S)", flags=re.MULTILINE)


class ArgumentLines(griffe.Extension):
    """Markdown joins the lines of a paragraph, so each name starts a list item of its own."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        lines = []
        for line in obj.docstring.value.splitlines():
            item = ITEM.match(line)
            if item is not None:
                previous = lines[-1] if lines else ""
                if previous and not previous.startswith(("- ", "  ")):
                    lines.append("")
                lines.append(ITEM.sub(r"- **`\1`**\2: ", line))
            elif line and lines and lines[-1].startswith(("- ", "  ")):
                lines.append(f"  {line.strip()}")
            else:
                lines.append(line)
        obj.docstring.value = "\n".join(lines)
