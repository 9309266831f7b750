"""The text that each id adds to the ones before it."""

from __future__ import annotations

from typing import Any

UNFINISHED = "\ufffd"  # what decoders write for a character that more ids are needed for


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """One piece of text an id, "" where its character ends in a later one; joined they are the whole text.

    Each is the difference of two short decodings, which begin one piece earlier: many tokenizers write a first id otherwise.
    """
    result: list[str] = []
    start = done = 0  # ids before `done` have their text; decoding begins at `start`
    for end in range(1, len(ids) + 1):
        text, before = tokenizer.decode(ids[start:end]), tokenizer.decode(ids[start:done])
        if text.endswith(UNFINISHED) and end < len(ids):
            result.append("")
            continue
        result.append(text[len(before) :])
        start, done = done, end
    return result
