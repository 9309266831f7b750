"""Do logits depend on how many positions and rows are computed together? One text, at all widths and batch sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.generation.inspection import spare_runner, stock_loop
from specdec.runtime.runner import ModelRunner

WIDTHS = tuple(range(1, 17))
BATCHES = (1, 16, 2, 4, 8, *(batch for batch in range(3, 16) if batch not in (4, 8)))  # the most telling ones first


@dataclass
class BatchLogits:
    """How far the logits of one batch size lie from those of width 1 and batch 1, in units of rounding.

    A unit is the distance between neighbouring numbers of the model's dtype at the largest logit. differences: the
    largest, by width. stock: of transformers' own forward, a position at a time; None for other batch sizes than 1.
    total_variation: the largest distance between two laws of temperature 1. change: the largest difference as a share
    of the largest logit.
    """

    batch: int
    differences: list[float]
    stock: float | None
    total_variation: float
    change: float
    unit: float


@dataclass
class Widths:
    """Logits over widths and batch sizes. differences: by batch size, then by width, as in BatchLogits."""

    widths: list[int]
    batches: list[int]
    differences: list[list[float]]
    stock: float
    total_variation: float
    change: float
    unit: float

    @property
    def is_invariant(self) -> bool:
        """Whether all logits that were measured are equal, bit for bit."""
        return self.largest == 0

    @property
    def largest(self) -> float:
        return max([self.stock, *(value for row in self.differences for value in row)])


def combine(widths: Sequence[int], measured: Iterable[dict[str, Any]]) -> Widths | None:
    """What was measured of all batch sizes, each a BatchLogits as a dictionary; None of none."""
    rows = sorted((BatchLogits(**row) for row in measured), key=lambda row: row.batch)
    if not rows:
        return None
    return Widths(
        list(widths),
        [row.batch for row in rows],
        [row.differences for row in rows],
        stock=max(row.stock or 0.0 for row in rows),
        total_variation=max(row.total_variation for row in rows),
        change=max(row.change for row in rows),
        unit=rows[0].unit,
    )


def window_logits(
    runner: ModelRunner, ids: Tensor, first: int, width: int, batch: int, generator: torch.Generator
) -> Tensor:
    """Logits [L - first, V] float32 at positions from `first` on of ids [L], `width` at a time, in a batch.

    The other rows hold random ids; the row of the text is random too.
    """
    row = int(torch.randint(batch, (), generator=generator))
    rows = torch.randint(runner.num_embeddings, (batch, len(ids)), generator=generator).to(ids.device)
    rows[row] = ids
    runner.begin(batch, len(ids))
    runner.prefill(rows, torch.full((batch,), first - 1, device=ids.device))
    logits = []
    for start in range(first, len(ids), width):
        positions = torch.arange(start, min(start + width, len(ids)), device=ids.device).expand(batch, -1)
        runner.reserve(int(positions[0, -1]) + 1)
        logits.append(runner.forward(rows.gather(1, positions), positions).logits[row].clone())
    runner.begin(0)
    return torch.cat(logits)


@torch.inference_mode()
def stock_logits(model: PreTrainedModel, ids: Tensor, first: int) -> Tensor:
    """Logits [L - first, V] float32 of plain decoding: transformers' own forward, a position at a time."""
    found = []
    with stock_loop(model):
        output = model(input_ids=ids[None, :first], use_cache=True)
        for position in range(first, len(ids)):
            cache = output.cache if "cache" in output else output.past_key_values
            name = "cache" if "cache" in output else "past_key_values"
            output = model(input_ids=ids[None, position, None], use_cache=True, **{name: cache})
            found.append(output.logits[0, -1].float())
    return torch.stack(found)


@torch.inference_mode()
def measure_batch(
    model: PreTrainedModel, ids: Tensor, first: int, widths: Sequence[int], batch: int, *, seed: int = 0
) -> BatchLogits:
    """Compare the logits of an enabled model in one batch size, at all widths.

    ids: [L] int64, a text whose positions from `first` on are compared.
    """
    runner = spare_runner(model)
    generator = torch.Generator().manual_seed(seed)
    reference = window_logits(runner, ids, first, 1, 1, generator)
    largest = float(reference.abs().max())
    unit = torch.finfo(model.dtype).eps * 2.0 ** (math.frexp(largest)[1] - 1)
    changes: list[float] = []
    variations: list[float] = []

    def difference(logits: Tensor) -> float:
        changes.append(float((logits - reference).abs().max()))
        variations.append(float((logits.softmax(-1) - reference.softmax(-1)).abs().sum(-1).max()) / 2)
        return changes[-1] / unit

    stock = difference(stock_logits(model, ids, first)) if batch == 1 else None
    differences = [difference(window_logits(runner, ids, first, width, batch, generator)) for width in widths]
    return BatchLogits(batch, differences, stock, max(variations), max(changes) / largest, unit)
