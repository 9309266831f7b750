"""From logits to the distribution that is sampled from: the call's processors, then one-hot (greedy) or softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

ScoreFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Processor:
    """One logits processor: function(input_ids [B, L], scores [B, V]) -> scores [B, V].

    needs_prefix: False where the scores alone decide (temperature, top-k, top-p, …), so all positions go through at once.
    """

    function: ScoreFunction
    needs_prefix: bool = True


class Prefixes(Protocol):
    """The texts that processors look at (`Sequences` is one)."""

    @property
    def padded_lengths(self) -> Tensor:
        """[B] int64: what plain decoding would call input_ids.shape[1] if it stood where the row stands."""

    def padded(self, width: int) -> Tensor:
        """[B, width] int64: each row's left-padded prompt and its ids so far, cut or filled to one width."""


class Sampling:
    """The distribution of one call. Target and drafter share it, so p and q went through the same processors."""

    def __init__(self, processors: Sequence[Processor] = (), *, do_sample: bool = False) -> None:
        self.do_sample = do_sample
        self.groups = [
            (needs_prefix, [p.function for p in group]) for needs_prefix, group in groupby(processors, lambda p: p.needs_prefix)
        ]

    def scores(self, logits: Tensor, prefixes: Prefixes, *, skip: int = 0, used: Tensor | None = None) -> Tensor:
        """Process logits [B, W, V] float32 -> [B, W, V]; column w of a row follows its committed ids and skip + w further ones.

        used: [B] int64, the number of columns of each row that count, W where None; the others may stay unprocessed.
        """
        scores = logits
        for needs_prefix, functions in self.groups:
            if needs_prefix:
                scores = _with_prefixes(functions, scores, prefixes, skip, used)
            else:
                flat = scores.flatten(0, 1)
                any_ids = flat.new_zeros(len(flat), 1, dtype=torch.int64)
                for function in functions:
                    flat = function(any_ids, flat)
                scores = flat.view_as(logits)
        return scores

    def probs(self, scores: Tensor) -> Tensor:
        """The distribution itself: scores [..., V] -> [..., V] float32; one-hot when greedy."""
        if self.do_sample:
            return scores.softmax(-1, dtype=torch.float32)
        return torch.zeros_like(scores, dtype=torch.float32).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw ids by inverting the distribution function: [..., V], [...] float64 in [0, 1) -> [...] int64.

    In float64, so that rare ids keep their chance and an id with probability 0 is never drawn.
    """
    cdf = probs.double().cumsum(-1)
    total = cdf[..., -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(cdf, torch.minimum(uniforms[..., None] * total, below_total), right=True)[..., 0]


def uniforms(*shape: int, device: torch.device) -> Tensor:
    """Float64 uniforms in [0, 1) from torch's default generator, which torch.manual_seed sets."""
    return torch.rand(*shape, dtype=torch.float64, device=device)


def check_finite(best: Tensor, who: str) -> None:
    """Raise where best (the largest score, or any one probability, of each distribution) is NaN: NaN spreads to both."""
    if best.isnan().any():
        raise ValueError(
            f"the {who} returned NaN logits (or its processors excluded every token), so nothing can be sampled;"
            " check its weights and dtype (float16 overflows where bfloat16 and float32 do not)"
        )


def _with_prefixes(functions: list[ScoreFunction], scores: Tensor, prefixes: Prefixes, skip: int, used: Tensor | None) -> Tensor:
    """Call each function once for every distinct prefix length, always with the full batch: some keep per-row state.

    Rows of another length take part with a prefix cut or filled to fit, and their result is dropped.
    """
    num_columns = scores.shape[1]
    first = prefixes.padded_lengths + skip
    columns = torch.arange(num_columns, device=scores.device)
    counts = columns < (num_columns if used is None else used[:, None])
    widths = (first[:, None] + columns)[counts.expand(len(first), -1)].unique().tolist()
    rows = torch.arange(len(first), device=scores.device)
    result = scores.clone()
    for width in widths:
        column = width - first
        matches = (column >= 0) & (column < num_columns)
        column = column.clamp(0, num_columns - 1)
        processed = scores[rows, column]
        input_ids = prefixes.padded(width)
        for function in functions:
            processed = function(input_ids, processed)
        result[rows[matches], column[matches]] = processed[matches]
    return result
