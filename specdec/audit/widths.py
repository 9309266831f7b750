"""Do logits depend on how many positions and rows are computed together? One text, at all widths and batch sizes."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.generation.inspection import spare_runner, stock_loop
from specdec.runtime.runner import ModelRunner

WIDTHS = tuple(range(1, 17))
BATCHES = tuple(range(1, 17))


@dataclass
class Widths:
    """Largest differences of logits from those of width 1 and batch 1, in units of rounding.

    A unit is the distance between neighbouring numbers of the model's dtype at the largest logit. differences: by
    batch size, then by width; None where it was not measured. stock: of transformers' own forward, a position at a
    time. total_variation: the largest distance between two laws of temperature 1, of all that were measured.
    change: the largest difference as a share of the largest logit.
    """

    widths: list[int]
    batches: list[int]
    differences: list[list[float | None]] = field(default_factory=list)
    stock: float = 0.0
    total_variation: float = 0.0
    change: float = 0.0
    unit: float = 0.0

    @property
    def is_invariant(self) -> bool:
        """Whether all logits that were measured are equal, bit for bit."""
        return self.stock == 0 and not any(value for row in self.differences for value in row)

    @property
    def largest(self) -> float:
        return max([self.stock, *(value for row in self.differences for value in row if value is not None)])


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
def measure_widths(
    model: PreTrainedModel,
    ids: Tensor,
    first: int,
    widths: Sequence[int] = WIDTHS,
    batches: Sequence[int] = BATCHES,
    *,
    seconds: float = math.inf,
    seed: int = 0,
) -> Widths:
    """Compare the logits of an enabled model at all widths and batch sizes, powers of two first.

    ids: [L] int64, a text whose positions from `first` on are compared. seconds: after which no further one is begun.
    """
    runner = spare_runner(model)
    generator = torch.Generator().manual_seed(seed)
    deadline = time.monotonic() + seconds
    reference = window_logits(runner, ids, first, 1, 1, generator)
    largest = float(reference.abs().max())
    unit = torch.finfo(model.dtype).eps * 2.0 ** (math.frexp(largest)[1] - 1)
    result = Widths(list(widths), list(batches), [[None] * len(widths) for _ in batches], unit=unit)

    def difference(logits: Tensor) -> float:
        change = (logits - reference).abs()
        variation = (logits.softmax(-1) - reference.softmax(-1)).abs().sum(-1) / 2
        result.total_variation = max(result.total_variation, float(variation.max()))
        result.change = max(result.change, float(change.max()) / largest)
        return float(change.max()) / unit

    result.stock = difference(stock_logits(model, ids, first))
    cells = list(itertools.product(range(len(batches)), range(len(widths))))
    cells.sort(key=lambda cell: (batches[cell[0]].bit_count() > 1) + (widths[cell[1]].bit_count() > 1))
    for row, column in cells:
        if time.monotonic() > deadline:
            break
        logits = window_logits(runner, ids, first, widths[column], batches[row], generator)
        result.differences[row][column] = difference(logits)
    return result
