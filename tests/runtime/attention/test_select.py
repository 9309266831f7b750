"""Which backend computes an attention call, and that models compute the same by each of them."""

from __future__ import annotations

import contextlib
import copy
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from specdec_kernels.attention import attention
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import specdec
from specdec.quant.batch_invariant import ATTENTION
from specdec.runtime.attention import fused, select
from specdec.runtime.attention.override import attention_override
from specdec.runtime.attention.select import Backend, batch_invariant_attention, select_backend
from specdec.runtime.kv_cache.masks import attention_masks, seen_slots
from specdec.runtime.runner import ModelRunner
from tests.helpers.drafters import Random
from tests.helpers.families import FAMILIES, VOCAB_SIZE, family, make_model, prompts
from tests.helpers.poison import poison_empty

kernel = pytest.importorskip("specdec_kernels.attention.kernel", exc_type=ImportError)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty(monkeypatch)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("is_standard", "can_fuse", "has_bool_mask", "on_cpu", "on_cuda"),
    [
        (True, True, True, Backend.FUSED, Backend.FUSED),
        (True, False, True, Backend.BLOCKS, Backend.STOCK),
        (True, False, False, Backend.STOCK, Backend.STOCK),
        (False, True, True, Backend.STOCK, Backend.STOCK),
    ],
)
def test_the_backend_follows_from_the_device_and_the_call(
    is_standard: bool, can_fuse: bool, has_bool_mask: bool, on_cpu: Backend, on_cuda: Backend, device: str
) -> None:
    expected = {"cpu": on_cpu, "cuda": on_cuda}[device]
    assert select_backend(torch.device(device), is_standard, can_fuse, has_bool_mask) == expected


@pytest.fixture
def fused_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Models run the fused backend, as on a CUDA device: -> the shape of each query that the operator gets."""
    shapes: list[tuple[int, ...]] = []

    def recorded(query: Tensor, *rest: Any) -> Tensor:
        shapes.append(tuple(query.shape))
        return attention(query, *rest)

    monkeypatch.setattr(fused, "has_kernel", lambda device, dtype: True)
    monkeypatch.setattr(select, "KEEP_SDPA", ())
    monkeypatch.setattr(fused, "attention", recorded)
    return shapes


def in_half(query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor, scale: float) -> Tensor:
    return kernel.launch(query.half(), key.half(), value.half(), first, last, scale).to(query.dtype)


@torch.no_grad()
def ragged_logits(model: PreTrainedModel) -> list[Tensor]:
    """Logits of decoding windows at uneven positions, with rejected entries left behind, after a prefill."""
    ids = torch.randint(VOCAB_SIZE, (3, 110), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([1, 19, 97])
    runner = ModelRunner(model)
    runner.prefill(ids, lengths - 2)
    logits = []
    for width, accepted in ((4, [3, 0, 2]), (1, [1, 1, 1]), (6, [0, 5, 1])):
        positions = lengths[:, None] - 1 + torch.arange(width)
        logits.append(runner.forward(ids.gather(1, positions), positions).logits)
        lengths = lengths + torch.tensor(accepted)
    return logits


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_models_compute_the_same_with_intervals(
    model_type: str, fused_shapes: list[tuple[int, ...]], monkeypatch: Any
) -> None:
    model = family(model_type)
    before = model.config._attn_implementation
    got = ragged_logits(model)
    can_override = before == "sdpa" and model._supports_attention_backend
    assert {shape[2] for shape in fused_shapes} == ({4, 1, 6} if can_override else set())
    assert model.config._attn_implementation == before
    monkeypatch.setattr(fused, "has_kernel", lambda device, dtype: False)
    for one, other in zip(got, ragged_logits(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text", "llama4_text", "deepseek_v3"])
def test_models_run_on_the_kernel(
    model_type: str, fused_shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "attention", in_half)
    got = ragged_logits(family(model_type))
    monkeypatch.setattr(fused, "has_kernel", lambda device, dtype: False)
    for one, other in zip(got, ragged_logits(family(model_type)), strict=True):
        assert (one - other).norm() / other.norm() < 1e-2


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text", "llama4_text"])
def test_texts_are_those_of_the_stock_loop(model_type: str, fused_shapes: list[tuple[int, ...]]) -> None:
    model = copy.deepcopy(family(model_type))
    call = {"max_new_tokens": 14, "do_sample": False}  # beyond the windows of 9
    want = model.generate(**prompts(4), **call)
    assert not fused_shapes  # a stock call of an sdpa model is left alone
    for drafter in ("prompt_lookup", family(model_type)):
        specdec.enable(model, drafter, num_draft_tokens=3)
        assert model.generate(**prompts(4), **call).equal(want)
        specdec.disable(model)
    assert fused_shapes
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.filterwarnings("ignore:specdec keeps in full precision")
@pytest.mark.parametrize(("model_type", "prompt_length"), [("llama", 6), ("mistral", 70)])
def test_stock_and_speculative_decoding_of_a_4bit_model_are_the_same_bits(
    model_type: str, prompt_length: int, fused_shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain generate() gives no mask, so the kernel reads all keys; a verification window gives intervals."""
    monkeypatch.setattr(fused, "attention", in_half)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512}
    model = make_model(model_type, **sizes)
    specdec.quantize(model, specdec.Int4Config(group_size=32))
    ids = torch.randint(3, 512, (1, prompt_length), generator=torch.Generator().manual_seed(0))
    call = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    stock = model.generate(ids, **call)
    for drafter in ("none", Random(seed=1, vocab_size=512)):
        specdec.enable(model, drafter, num_draft_tokens=4)
        speculative = model.generate(ids, **call)
        specdec.disable(model)
        assert torch.stack(speculative.logits).equal(torch.stack(stock.logits)), drafter


def module(group: int = 1, **values: Any) -> SimpleNamespace:
    return SimpleNamespace(is_causal=True, training=False, num_key_value_groups=group, **values)


def test_stock_calls_get_what_sdpa_gives(fused_shapes: list[tuple[int, ...]]) -> None:
    states = query, key, value = torch.randn(3, 2, 4, 9, 16).unbind(0)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None] & (torch.arange(9) > 0) | torch.eye(
        9, dtype=torch.bool
    )
    short, one = query[:, :, :5], query[:, :, :1]
    calls: list[tuple[tuple[Tensor, ...], Tensor | None, dict[str, Any], bool]] = [
        (states, None, {}, True),
        ((short, key, value), None, {}, True),  # a static cache that was empty: the first query stands at the first key
        ((one, key, value), None, {"scaling": 0.7}, True),
        (states, mask, {}, False),
        (states, torch.zeros(9, 9).masked_fill(~mask, -1e9), {}, False),
        (states, None, {"is_causal": False}, False),
        ((short, key, value), None, {"position_bias": torch.randn(1, 4, 5, 9)}, False),
        ((query.clone().requires_grad_(), key, value), None, {}, False),
        (tuple(state.repeat(1, 1, 1, 17) for state in states), None, {"scaling": 0.1}, False),  # heads of 272
    ]
    for given, mask, keywords, is_fused in calls:
        fused_shapes.clear()
        got, _ = batch_invariant_attention(module(), *given, mask, **keywords)
        want, _ = sdpa_attention_forward(module(), *given, mask, **keywords)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert bool(fused_shapes) == is_fused
        assert got.requires_grad == want.requires_grad
    fused_shapes.clear()
    with contextlib.suppress(ValueError):  # sdpa refuses it in newer versions of transformers
        batch_invariant_attention(module(), *states, None, softcap=30.0)
    assert not fused_shapes
    dropped, _ = batch_invariant_attention(module(), *states, None, dropout=1.0)
    assert (dropped == 0).all()


def test_intervals_without_a_kernel_are_a_mask(
    fused_shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = torch.randn(2, 4, 70, 16), *torch.randn(2, 2, 2, 90, 16).unbind(0)
    config = SimpleNamespace(sliding_window=30)
    for width in (6, 70):
        positions = torch.tensor([[3], [20]]) + torch.arange(width)
        intervals, mask = (
            attention_masks(positions, 90, config, ["sliding_attention"], dtype) for dtype in (torch.int32, torch.bool)
        )
        assert intervals.shape == (2, 2, width, 1)
        assert seen_slots(intervals, 90).equal(mask)
        given = module(group=2), query[:, :, :width], key, value
        want, _ = sdpa_attention_forward(*given, mask)
        for has_kernel in (True, False):
            monkeypatch.setattr(fused, "has_kernel", lambda device, dtype, has_kernel=has_kernel: has_kernel)
            for keywords in ({}, {"is_causal": False}):
                got, _ = batch_invariant_attention(*given, intervals, **keywords)
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert {shape[2] for shape in fused_shapes} == {6, 1}  # in a wide window, only the last position is


def test_the_kernel_computes_the_last_position_of_a_prefill(
    fused_shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "attention", in_half)
    query, key, value = torch.randn(3, 1, 2, 100, 16).unbind(0)
    whole, _ = batch_invariant_attention(module(), query, key, value, None)
    alone, _ = batch_invariant_attention(module(), query[:, :, -1:], key, value, None)
    assert whole[:, -1:].equal(alone)
    torch.testing.assert_close(
        whole, sdpa_attention_forward(module(), query, key, value, None)[0], rtol=1e-2, atol=1e-2
    )


def test_a_config_is_overridden_until_its_last_forward_ends() -> None:
    config = copy.deepcopy(family("llama").config)
    before = config.to_dict()
    with attention_override(config):
        with contextlib.suppress(KeyError), attention_override(config):
            assert config._attn_implementation == ATTENTION
            raise KeyError
        assert config._attn_implementation == ATTENTION
    assert config._attn_implementation == "sdpa"
    assert config.to_dict() == before


def test_threads_share_a_model(fused_shapes: list[tuple[int, ...]]) -> None:
    """Runners' forwards and stock ones of one model at the same time."""
    model = copy.deepcopy(family("llama"))
    ids = prompts(4)["input_ids"]

    def forward(by_runner: bool) -> Tensor:
        if by_runner:
            return ModelRunner(model).forward(ids, torch.arange(11).expand(4, -1)).logits
        with torch.no_grad():
            return model(ids).logits

    want = forward(False)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(forward, [True, False] * 20):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float32, "cuda"), (torch.float16, "cpu"), (torch.bfloat16, "meta")]
)
def test_no_kernel_where_there_is_none(dtype: torch.dtype, device: str) -> None:
    assert not fused.has_kernel(torch.device(device), dtype)
