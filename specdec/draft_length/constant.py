"""A policy that drafts the same number of ids in every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdec.core.steps import RowStep


@dataclass(frozen=True, slots=True)
class ConstantK:
    """The same K in every step. K = 0 is plain decoding."""

    max_draft_tokens: int

    def next(self) -> int:
        return self.max_draft_tokens

    def extend_plain(self, limit: int) -> int:
        return limit

    def observe(self, steps: Sequence[RowStep | None], num_together: int = 1) -> None:
        pass

    def end(self) -> None:
        pass
