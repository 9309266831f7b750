"""The ragged cache: entries of any positions, buffers that grow, and their ends."""

from __future__ import annotations

import pytest
import torch

from specdec.runtime.kv_cache.layers import grown_capacity, static_capacity
from specdec.runtime.runner import ModelRunner
from tests.helpers.families import VOCAB_SIZE, family


@pytest.mark.parametrize("batch_size", [1, 2])
@torch.no_grad()
def test_a_window_that_comes_back_to_its_first_position_leaves_the_cache_right(batch_size: int) -> None:
    model, runner = family("llama"), ModelRunner(family("llama"))
    ids = torch.randint(VOCAB_SIZE, (batch_size, 12), generator=torch.Generator().manual_seed(0))
    runner.prefill(ids, torch.full((batch_size,), 6))
    for positions in ([7, 8, 7, 7], [9, 9, 9], [10, 11]):
        window = torch.tensor(positions).expand(batch_size, -1)
        want = model(input_ids=ids, use_cache=False).logits[:, positions]
        torch.testing.assert_close(runner.forward(ids.gather(1, window), window).logits, want, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_growing_cache_keeps_its_content() -> None:
    model, runner = family("llama"), ModelRunner(family("llama"))
    ids = torch.randint(VOCAB_SIZE, (2, 1400), generator=torch.Generator().manual_seed(0))
    want = model(input_ids=ids, use_cache=False).logits
    for last, width in (
        ([200, 250], 251),
        ([254, 300], 54),
        ([300, 520], 220),
        ([1100, 1395], 875),
    ):  # over 256, 512, 1024 slots
        got = runner.feed(ids, torch.tensor(last), width)
        assert got is not None
        torch.testing.assert_close(got.logits[:, 0], want[torch.arange(2), last], rtol=1e-3, atol=1e-3)


def test_a_calls_buffers_end_at_its_longest_text() -> None:
    runner = ModelRunner(family("llama"))
    ids = torch.randint(VOCAB_SIZE, (2, 700), generator=torch.Generator().manual_seed(0))
    runner.begin(2, 600)
    for last, slots in (
        ([90, 100], 256),
        ([255, 255], 256),
        ([256, 200], 512),
        ([511, 511], 512),
        ([512, 9], 600),
        ([599, 9], 600),
    ):
        runner.feed(ids, torch.tensor(last), 4)
        assert runner.cache.layers[0].keys.shape[2] == slots
    assert grown_capacity(600, 640, 600) == 640  # a text that exceeds its limit is not cut


@pytest.mark.parametrize(
    ("max_slots", "context", "slots"),
    [(40, None, 256), (256, None, 256), (257, 4096, 512), (40, 128, 128), (500, 500, 500), (140, 128, 140)],
)
def test_static_buffers_end_at_a_block_but_within_the_context(max_slots: int, context: int | None, slots: int) -> None:
    assert static_capacity(max_slots, context) == slots
