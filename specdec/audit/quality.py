"""The loss of quality by quantization: a 4-bit model compared with the original, position by position of a text."""

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
    """Sums over the positions that both models have read so far.

    predicted: positions that have a next token in the text. kl: KL(original || quantized) in nats. same_top1: positions
    where both models have the same most likely token. nll, original_nll: negative log-likelihood of the next tokens in
    nats, of the quantized model and of the original.
    """

    positions: int = 0
    predicted: int = 0
    kl: float = 0.0
    same_top1: int = 0
    nll: float = 0.0
    original_nll: float = 0.0

    @property
    def mean_kl(self) -> float:
        """KL(original || quantized) in nats, mean over positions."""
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


def compare_quality(
    original: PreTrainedModel, quantized: PreTrainedModel, texts: Iterable[Tensor]
) -> Iterator[Quality]:
    """Run both models over texts, ids [1, L] each; yields the sums so far after every window.

    A window has up to MAX_WINDOW positions, so that the 4-bit layers compute as they do in generation.
    """
    quality = Quality()
    runners = ModelRunner(original), ModelRunner(quantized)
    for ids in texts:
        for runner in runners:
            runner.begin(1)
        for positions in torch.arange(ids.shape[1])[None].split(MAX_WINDOW, dim=1):
            window = ids.gather(1, positions)
            original_logprobs, logprobs = (_logprobs(runner, window, positions) for runner in runners)
            _add(quality, original_logprobs, logprobs, ids[0, positions[0, 0] + 1 : positions[0, -1] + 2])
            yield quality


def _logprobs(runner: ModelRunner, ids: Tensor, positions: Tensor) -> Tensor:
    """Log-probabilities [W, V] float32 on the CPU, of a window [1, W]."""
    device = runner.model.device
    return runner.forward(ids.to(device), positions.to(device)).logits[0].cpu().log_softmax(-1)


def _add(quality: Quality, original: Tensor, quantized: Tensor, targets: Tensor) -> None:
    """Add a window: log-probabilities [W, V] of both models, and the next ids [W], or [W - 1] at the end of a text."""
    quality.positions += len(original)
    quality.predicted += len(targets)
    terms = original.exp() * (original - quantized)
    quality.kl += terms.where(original > -torch.inf, torch.zeros(())).double().sum().item()
    quality.same_top1 += int((original.argmax(-1) == quantized.argmax(-1)).sum())
    for name, logprobs in (("nll", quantized), ("original_nll", original)):
        nll = -logprobs[: len(targets)].gather(1, targets[:, None]).double().sum().item()
        setattr(quality, name, getattr(quality, name) + nll)
