"""What quantizing costs: the 4-bit model against the original, token by token of a text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.quant.batch_invariant import MAX_WINDOW
from specdec.runtime.runner import ModelRunner


@dataclass
class Quality:
    """Sums over the positions seen so far; both models read the same text."""

    positions: int = 0
    predicted: int = 0  # positions with a next token to predict
    kl: float = 0.0
    same_top1: int = 0
    nll: float = 0.0
    original_nll: float = 0.0

    @property
    def mean_kl(self) -> float:
        """KL(original || 4-bit) in nats, mean over positions."""
        return self.kl / max(self.positions, 1)

    @property
    def top1_agreement(self) -> float:
        return self.same_top1 / max(self.positions, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / max(self.predicted, 1))

    @property
    def original_perplexity(self) -> float:
        return math.exp(self.original_nll / max(self.predicted, 1))


def compare(original: PreTrainedModel, quantized: PreTrainedModel, texts: Iterable[Tensor]) -> Iterator[Quality]:
    """Read ids [1, L] with both models; yields the sums so far, after every 64 positions.

    Both run in windows of up to 64 positions, so that the 4-bit layers go the way that they go when they generate.
    """
    quality = Quality()
    runners = ModelRunner(original), ModelRunner(quantized)
    for ids in texts:
        for runner in runners:
            runner.begin(1)
        for positions in torch.arange(ids.shape[1])[None].split(MAX_WINDOW, dim=1):
            window = ids.gather(1, positions)
            before, after = (
                runner.forward(window.to(runner.model.device), positions.to(runner.model.device))
                .logits[0]
                .cpu()
                .log_softmax(-1)
                for runner in runners
            )
            _add(quality, before, after, ids[0, positions[0, 0] + 1 : positions[0, -1] + 2])
            yield quality


def _add(quality: Quality, original: Tensor, quantized: Tensor, targets: Tensor) -> None:
    """Add log-probabilities [W, V] of both, and the ids [<= W] that came next."""
    quality.positions += len(original)
    quality.predicted += len(targets)
    terms = original.exp() * (original - quantized)
    quality.kl += terms.where(original > -torch.inf, torch.zeros(())).double().sum().item()
    quality.same_top1 += int((original.argmax(-1) == quantized.argmax(-1)).sum())
    for name, logprobs in (("nll", quantized), ("original_nll", original)):
        nll = -logprobs[: len(targets)].gather(1, targets[:, None]).double().sum().item()
        setattr(quality, name, getattr(quality, name) + nll)
