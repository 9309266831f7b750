"""Griffe extension: the lines `name: meaning` of a docstring become list items of its API page.

Markdown joins the lines of a paragraph; so each name starts an item, and what is raised a paragraph of its own.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ITEM = re.compile(r"^([a-z]\w*(?:\[i\])?(?:, \w+)*)((?: \([^)]*\))?): (?=\S)")
RAISES = re.compile(r"(?<=[.)]) (?=Raises [A-Z])")


class ArgumentLines(griffe.Extension):
    """Rewrites docstrings as they are loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = "\n\n".join(map(as_list, obj.docstring.value.split("\n\n")))


def as_list(paragraph: str) -> str:
    """A paragraph with `name: meaning` lines as a Markdown list; another one as it is."""
    items: list[str] = []
    for line in paragraph.splitlines():
        if ITEM.match(line):
            items.append(ITEM.sub(r"- **`\1`**\2: ", line))
        elif items and items[-1].startswith("- "):
            items[-1] += f" {line.strip()}"
        else:
            items.append(line)
    if not any(item.startswith("- ") for item in items):
        return paragraph
    first = next(index for index, item in enumerate(items) if item.startswith("- "))
    last, *raises = RAISES.split(items[-1], maxsplit=1)
    listed = "\n".join([*items[first:-1], last])
    return "\n\n".join(["\n".join(items[:first]), listed, *raises]).lstrip()
