"""Texts of ids."""

from __future__ import annotations

from typing import Any

INCOMPLETE = "\ufffd"  # decoders write this for a character that needs further ids


class PieceDecoder:
    """The text that each id adds, as ids come; joined, they are the whole text.

    Each piece is the difference of two short decodings that begin one piece earlier, since many tokenizers decode a
    first id differently.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = False) -> None:
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._ids: list[int] = []  # of the last piece, and of the one to come
        self._num_done = 0

    def add(self, token: int) -> str:
        """The piece of an id, "" where its character ends in a later one."""
        self._ids.append(token)
        piece = self._next_piece()
        if piece.endswith(INCOMPLETE):
            return ""
        self._ids = self._ids[self._num_done :]
        self._num_done = len(self._ids)
        return piece

    def flush(self) -> str:
        """What is left at the end of the text, "" or an incomplete character."""
        return self._next_piece() if len(self._ids) > self._num_done else ""

    def _next_piece(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._num_done])) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)
        return text


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each id adds, as PieceDecoder does; an incomplete character at the end belongs to the last id."""
    decoder = PieceDecoder(tokenizer)
    result = [decoder.add(token) for token in ids]
    if result:
        result[-1] += decoder.flush()
    return result
