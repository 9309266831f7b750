"""Trials of a fast forward against the eager one, on a batch of rows of uneven length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.runtime.runner import ModelRunner

TRIAL_SLOTS = 16  # positions of the longest text of a trial


class RaggedBatch:
    """Random ids [B, TRIAL_SLOTS], of which each row has its own length in the KV cache.

    lengths: positions of each row that `prefill` feeds. generator: on the CPU, so that every device gets the same ids.
    """

    def __init__(self, runner: ModelRunner, lengths: Sequence[int], generator: torch.Generator) -> None:
        device = runner.model.device
        self.lengths = torch.tensor(lengths, device=device)
        self.ids = torch.randint(runner.vocab_size, (len(lengths), TRIAL_SLOTS), generator=generator).to(device)

    def prefill(self, runner: ModelRunner) -> None:
        runner.prefill(self.ids, self.lengths - 1)

    def window(self, width: int, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Ids and positions, [B, width] each, that start `offset` positions after the prefilled ones."""
        positions = (self.lengths + offset)[:, None] + torch.arange(width, device=self.lengths.device)
        return self.ids.gather(1, positions), positions
