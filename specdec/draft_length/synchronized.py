"""The policy of a tensor-parallel model: all ranks use the K that the first rank chooses."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.core.stats import Choice
from specdec.core.steps import RowStep
from specdec.draft_length.adaptive import AdaptiveK
from specdec.runtime.tensor_parallel import Ranks


class SynchronizedPolicy:
    """The first rank's K on every rank. policy: chooses it on the first rank; None on the others."""

    def __init__(self, ranks: Ranks, policy: AdaptiveK | None, max_draft_tokens: int) -> None:
        self.ranks = ranks
        self.policy = policy
        self.max_draft_tokens = max_draft_tokens

    def next(self) -> int:
        return self.ranks.broadcast(self.policy.next() if self.policy else 0)

    def extend_plain(self, limit: int) -> int:
        return 1

    def observe(self, steps: Sequence[RowStep | None], num_together: int = 1) -> None:
        if self.policy:
            self.policy.observe(steps, num_together)

    def end(self) -> Choice | None:
        return self.ranks.broadcast_choice(self.policy.end() if self.policy else None)
