"""A draft model whose drafts are accepted no more often than chance has a mistake in it: one warning says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from specdec.core.stats import Stats

MIN_TRIED = 300  # draft ids, over all calls, before anything is said
NUM_SIGMAS = 3.0


@dataclass
class AcceptanceWatch:
    """What an enabled model's calls have shown of one draft model.

    tried: draft ids whose preceding draft ids were all accepted. accepted: of them, expected. by_chance: what ids drawn
    from the answers' own frequencies would have reached.
    """

    tried: int = 0
    accepted: float = 0.0
    by_chance: float = 0.0
    is_decided: bool = False

    def add(self, stats: Stats) -> str | None:
        """Count a call: -> the warning, once, where there is reason for it."""
        overlap = [value for row in stats.per_row for step in row.steps for value in step.overlap]
        return self.count(overlap, stats.chance_acceptance)

    def count(self, overlap: Sequence[float], chance_acceptance: float | None) -> str | None:
        """The same from a call's chances of acceptance and that of a random id; None: its answers are too short."""
        if self.is_decided or chance_acceptance is None:
            return None
        self.tried += len(overlap)
        self.accepted += sum(overlap)
        self.by_chance += len(overlap) * chance_acceptance
        if self.tried < MIN_TRIED:
            return None
        self.is_decided = True
        if self.accepted > self.by_chance + NUM_SIGMAS * math.sqrt(self.by_chance + 1):
            return None
        return (
            f"the draft model is of no use: {self.accepted / self.tried:.1%} of {self.tried} draft tokens were"
            f" accepted, and tokens drawn from the text at random would reach {self.by_chance / self.tried:.1%}; check"
            " that its weights, its dtype and its tokenizer are those it was trained with, that prompts have the chat"
            " template that both models know and, of a draft head, that it was trained for this target and its"
            " config.json names the layers and norms of its training (specdec audit head tries others)"
        )
