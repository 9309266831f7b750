"""Texts of ids."""

from __future__ import annotations

from typing import Any

INCOMPLETE = "\ufffd"  # decoders write this for a character that needs further ids


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each id adds, "" where its character ends in a later id; joined, they are the whole text.

    Each is the difference of two short decodings that begin one piece earlier, since many tokenizers decode a first id
    differently.
    """
    result: list[str] = []
    start = done = 0  # ids before `done` have their piece; decoding begins at `start`
    for end in range(1, len(ids) + 1):
        text, previous = tokenizer.decode(ids[start:end]), tokenizer.decode(ids[start:done])
        if text.endswith(INCOMPLETE) and end < len(ids):
            result.append("")
            continue
        result.append(text[len(previous) :])
        start, done = done, end
    return result
