"""The K that the first rank of a tensor-parallel model chooses, on every rank."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.core.stats import Choice
from specdec.core.steps import RowStep
from specdec.draft_length.adaptive import AdaptiveK
from specdec.runtime.tensor_parallel import Ranks


class SynchronizedPolicy:
    """The K that the first rank chooses, on every rank. auto: what chooses it; None on the other ranks."""

    def __init__(self, ranks: Ranks, auto: AdaptiveK | None, most: int) -> None:
        self.ranks = ranks
        self.auto = auto
        self.max_draft_tokens = most

    def next(self) -> int:
        return self.ranks.broadcast(self.auto.next() if self.auto else 0)

    def observe(self, steps: Sequence[RowStep | None]) -> None:
        if self.auto:
            self.auto.observe(steps)

    def end(self) -> Choice | None:
        return self.ranks.broadcast_choice(self.auto.end() if self.auto else None)
