"""When a draft model stops: once its next id is too unlikely to be accepted for what it costs.

As in SpecDec++ (Huang and others, 2024, arXiv 2405.19715), a draft ends where the chance that all of its ids are
accepted falls below a threshold. There a trained head predicts acceptance; here it is the share of earlier ids that
were accepted, by the largest probability of the distribution that an id is drawn from. Since that depends on the ids
before alone, and no drawn id is dropped, the text keeps its distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.core.steps import RowStep

NUM_BINS = 8  # of equal width, by the largest probability
PRIOR_WEIGHT = 8  # in ids, of the acceptance that a bin starts with: halfway from its largest probability to 1


class AcceptanceByConfidence:
    """The expected acceptance of draft ids of one model, by the largest probability of the distribution.

    Calls at the same time share it. acceptance: [NUM_BINS] float64.
    """

    def __init__(self) -> None:
        centers = (torch.arange(NUM_BINS) + 0.5) / NUM_BINS
        self._tried = torch.full((NUM_BINS,), PRIOR_WEIGHT, dtype=torch.float64)
        self._accepted = PRIOR_WEIGHT * (1 + centers.double()) / 2
        self.acceptance = self._accepted / self._tried

    def of(self, largest_probs: Tensor) -> Tensor:
        """The expected acceptance of ids from distributions with these largest probabilities, [B] -> [B] float64."""
        bins = (largest_probs.nan_to_num(0.0) * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        return self.acceptance[bins]

    def observe(self, largest_probs: Sequence[Sequence[float]], steps: Sequence[RowStep | None]) -> None:
        """Add what verification found, from the largest probabilities at each row's draft ids."""
        for row, step in zip(largest_probs, steps, strict=True):
            if step is None:
                continue
            for prob, chance in zip(row, step.overlap, strict=False):  # there is no overlap after a rejection
                index = min(int(prob * NUM_BINS), NUM_BINS - 1)
                self._tried[index] += 1
                self._accepted[index] += chance
        self.acceptance = self._accepted / self._tried


class StopRule:
    """Ends the drafts of one step, of all rows together, since a target's forward takes as long as its longest draft.

    chances: [B] float64, that all of a row's draft ids so far are accepted. largest_probs: of each id, [B] each.
    """

    def __init__(self, expected: AcceptanceByConfidence, limit: Tensor, min_chance: float) -> None:
        """limit: [B] int64, the most draft ids of each row. min_chance: on average over the rows that go on."""
        self.expected, self.limit, self.min_chance = expected, limit, min_chance
        self.chances = torch.ones(len(limit), dtype=torch.float64)
        self.largest_probs: list[Tensor] = []

    def add(self, probs: Tensor) -> bool:
        """Add the distributions of the next draft ids [B, 1, V]: -> whether the draft ends with these."""
        self.largest_probs.append(probs.amax(-1)[:, 0])
        self.chances = self.chances * self.expected.of(self.largest_probs[-1])
        chances = self.chances[self.limit > len(self.largest_probs)]
        return len(chances) > 0 and chances.mean().item() < self.min_chance
