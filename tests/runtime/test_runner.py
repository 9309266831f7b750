"""A runner's logits equal those of the model without a cache; its executor can be replaced."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from specdec.core.interfaces import run_eager
from specdec.runtime.cuda_graphs import Graphs
from specdec.runtime.runner import ModelRunner
from tests.helpers.families import CACHE_FAMILIES, VOCAB_SIZE, family


@pytest.mark.parametrize("model_type", CACHE_FAMILIES)
@torch.no_grad()
def test_ragged_logits_equal_those_of_each_row_alone_with_garbage_in_rejected_slots(model_type: str) -> None:
    model, generator = family(model_type), torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB_SIZE, (3, 40), generator=generator)
    lengths = torch.tensor([1, 9, 17])
    runner = ModelRunner(model)
    runner.begin(3)
    runner.prefill(ids, lengths - 2)
    for width, accepted in (
        (4, [3, 0, 2]),
        (6, [0, 5, 1]),
        (1, [0, 0, 0]),
        (3, [2, 1, 0]),
        (2, [0, 0, 0]),
        (4, [3, 3, 3]),
    ):
        columns = torch.arange(width)
        positions = lengths[:, None] - 1 + columns
        garbage = torch.randint(VOCAB_SIZE, (3, width), generator=generator)
        window = torch.where(columns <= torch.tensor(accepted)[:, None], ids.gather(1, positions), garbage)
        logits = runner.forward(window, positions).logits
        for row, count in enumerate(accepted):
            want = model(input_ids=ids[[row], : lengths[row] + count], use_cache=False).logits[0, -count - 1 :]
            torch.testing.assert_close(logits[row, : count + 1], want, rtol=1e-3, atol=1e-3)
        lengths += torch.tensor(accepted) + 1


def test_a_cache_is_freed_when_the_next_call_begins() -> None:
    runner = ModelRunner(family("llama"))
    runner.begin(1)
    runner.feed(torch.zeros(1, 8, dtype=torch.int64), torch.tensor([5]), 4)
    keys = weakref.ref(runner.cache.layers[0].keys)
    gc.disable()
    try:
        runner.begin(0)
        assert keys() is None
    finally:
        gc.enable()


class Constant:
    """A compiled forward whose logits are all the same; for models that have not changed, where is_current says so."""

    any_width = False

    def __init__(self) -> None:
        self.is_current = True

    def renew(self, unchanged: object) -> bool:
        return self.is_current

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, last_only: bool, cache: object) -> torch.Tensor:
        return torch.ones(*ids.shape, VOCAB_SIZE)


@torch.no_grad()
def test_a_compiled_forward_serves_decoding_windows_of_the_calls_that_it_is_current_for() -> None:
    runner, compiled = ModelRunner(family("llama")), Constant()
    ids = torch.randint(VOCAB_SIZE, (1, 80), generator=torch.Generator().manual_seed(0))

    def is_served(width: int) -> bool:
        return bool((runner.forward(ids[:, :width], torch.arange(width)[None]).logits == 1).all())

    runner.compiled = compiled
    runner.begin(1)
    assert runner.compiled is compiled
    assert [is_served(width) for width in (1, 64, 65)] == [True, True, False]
    assert runner.spare().compiled is compiled
    compiled.is_current = False
    runner.begin(1)
    assert runner.compiled is None
    assert not is_served(1)
    compiled.is_current = True
    runner.begin(1)
    assert runner.compiled is compiled


def test_graphs_and_a_compiled_forward_replace_each_other() -> None:
    runner, graphs = ModelRunner(family("llama")), Graphs(torch.device("cpu"))
    assert runner.run is run_eager
    runner.graphs = graphs
    assert (runner.graphs, runner.compiled, runner.run) == (graphs, None, graphs.run)
    runner.compiled = compiled = Constant()
    assert (runner.graphs, runner.compiled, runner.run) == (None, compiled, run_eager)
    runner.graphs = None
    assert (runner.graphs, runner.compiled) == (None, None)


def test_buffers_stay_in_place_between_calls_of_one_batch_size_where_steps_are_recorded() -> None:
    runner = ModelRunner(family("llama"))
    runner.graphs = Graphs(torch.device("cpu"))
    ids = torch.zeros(2, 8, dtype=torch.int64)

    def place(batch_size: int, max_slots: int) -> int:
        runner.begin(batch_size, max_slots)
        runner.prefill(ids[:batch_size], torch.full((batch_size,), 5))
        return runner.cache.buffers()[0].data_ptr()

    first, cache = place(2, 40), runner.cache
    assert place(2, 30) == first
    assert runner.cache is cache
    place(1, 40)
    assert runner.cache is not cache
    runner.begin(0)
    assert runner.cache.buffers() == []
