"""From logits to the distribution that is sampled from: the call's processors, then one-hot (greedy) or softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from specdec_kernels import cpu
from torch import Tensor

Verification = Literal["block", "token"]  # how a sampled call verifies drafts that have probabilities
VERIFICATIONS: tuple[Verification, ...] = ("block", "token")


@dataclass(frozen=True, slots=True)
class Processor:
    """One stateless logits processor: function(input_ids [B, L], scores [B, V]) -> scores [B, V].

    needs_prefix: False where the result depends on the scores alone (temperature, top-k, top-p, …), so one call
    processes all positions.
    """

    function: Callable[..., Tensor]
    needs_prefix: bool = True


class Prefixes(Protocol):
    """The texts that processors read; `Sequences` provides them."""

    stop_ids: Tensor | None  # [S] int64, ids that end a row

    @property
    def padded_lengths(self) -> Tensor:
        """[B] int64: input_ids.shape[1] of plain decoding at the row's length."""

    def padded(self, width: int) -> Tensor:
        """[B, width] int64: each row's left-padded prompt and ids, cut or filled to one width."""


class Sampling:
    """The distribution of one call. Target and drafter share it, so p and q pass through the same processors.

    verification: see verification.py.
    cache_key: equal for calls whose processors are of the same classes with the same plain settings.
    """

    def __init__(
        self, processors: Sequence[Processor] = (), *, do_sample: bool = False, verification: Verification = "block"
    ) -> None:
        self.do_sample = do_sample
        self.verification = verification
        self.processors = list(processors)
        self.needs_prefix = any(processor.needs_prefix for processor in processors)
        self.cache_key = (do_sample, verification, *map(_cache_key, processors))

    def scores(
        self,
        logits: Tensor,
        prefixes: Prefixes,
        *,
        skip: int = 0,
        used: Tensor | None = None,
        draft_ids: Tensor | None = None,
    ) -> Tensor:
        """Process logits [B, W, V] float32 -> [B, W, V]; column w follows the committed ids and skip + w further ones.

        used: [B] int64, the number of columns of each row that count, W where None; the others may stay unprocessed.
        draft_ids: [B, W - 1] int64, the further ids, where the window follows a draft.
        """
        if not self.processors:
            return logits
        if self.needs_prefix:
            return self._by_prefix(logits, prefixes, skip, used, draft_ids)
        flat = logits.flatten(0, 1)
        any_ids = flat.new_zeros(len(flat), 1, dtype=torch.int64)
        for processor in self.processors:
            flat = processor.function(any_ids, flat)
        return flat.view_as(logits)

    def _by_prefix(
        self, logits: Tensor, prefixes: Prefixes, skip: int, used: Tensor | None, draft_ids: Tensor | None
    ) -> Tensor:
        """Process once for each distinct prefix length, always with the full batch: some processors keep state per row.

        Rows of another length take part with a prefix cut or filled to fit, and their result is dropped. No processor
        is called beyond a draft id that ends the row or that the target cannot choose, as in plain decoding.
        """
        num_columns = logits.shape[1]
        first = prefixes.padded_lengths + skip
        used = torch.full_like(first, num_columns) if used is None else used
        rows = torch.arange(len(first), device=logits.device)
        columns = torch.arange(num_columns, device=logits.device)
        result = logits.clone()
        for width in (first[:, None] + columns)[columns < used[:, None]].unique().tolist():
            column = width - first
            matches = (column >= 0) & (column < used)
            if not matches.any():
                continue
            column = column.clamp(0, num_columns - 1)
            scores = logits[rows, column]
            input_ids = prefixes.padded(width)
            for processor in self.processors:
                scores = processor.function(input_ids, scores)
            result[rows[matches], column[matches]] = scores[matches]
            if draft_ids is not None and draft_ids.shape[1]:
                drafted = draft_ids[rows, column.clamp(max=draft_ids.shape[1] - 1)]
                last = (
                    scores.gather(1, drafted[:, None])[:, 0] == -torch.inf
                    if self.do_sample
                    else drafted != scores.argmax(-1)
                )
                if prefixes.stop_ids is not None:
                    last |= torch.isin(drafted, prefixes.stop_ids)
                used = torch.where(matches & last, column + 1, used)
        return result

    def probs(self, scores: Tensor) -> Tensor:
        """The distribution itself: scores [..., V] -> [..., V] float32; one-hot when greedy."""
        if self.do_sample:
            return scores.softmax(-1, dtype=torch.float32)
        return torch.zeros_like(scores, dtype=torch.float32).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)


def greedy_ids(scores: Tensor) -> Tensor:
    """The id of the largest score, the first of several: [B, W, V] -> [B, W] int64."""
    if scores.dtype == torch.float32 and cpu.works_on(scores.device):
        ids: Tensor = torch.ops.specdec.greedy_ids(scores)
        return ids
    return scores.argmax(-1)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw ids by inverting the distribution function: [..., V], [...] float64 in [0, 1) -> [...] int64.

    In float64, so that rare ids keep their chance and an id with probability 0 is never drawn.
    """
    ids: Tensor
    if probs.dtype == torch.float32 and cpu.works_on(probs.device):
        ids = torch.ops.specdec.draw(probs, uniforms)
        return ids
    cdf = probs.double().cumsum(-1)
    total = cdf[..., -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    ids = torch.searchsorted(cdf, torch.minimum(uniforms[..., None] * total, below_total), right=True)[..., 0]
    return ids.clamp(max=probs.shape[-1] - 1)  # V only where probs are NaN, which is reported with the step's result


def uniforms(*shape: int, device: torch.device) -> Tensor:
    """Float64 uniforms in [0, 1) from torch's default generator, which torch.manual_seed sets."""
    return torch.rand(*shape, dtype=torch.float64, device=device)


def _cache_key(processor: Processor) -> object:
    """The function's class and settings where those are plain values, else the function itself."""
    function = processor.function
    settings = getattr(function, "__dict__", {})
    if (
        isinstance(function, type)
        or not settings
        or not all(isinstance(value, PLAIN_TYPES) for value in settings.values())
    ):
        return function
    return type(function), *sorted(settings.items())


PLAIN_TYPES = (bool, int, float, str, type(None))
