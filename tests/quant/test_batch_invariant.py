"""Batch invariance of a 4-bit model: a position's result does not depend on the rest of the forward, bit for bit."""

from __future__ import annotations

import copy
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import specdec
from specdec.quant.batch_invariant import ATTENTION, MAX_WINDOW, BatchInvariantLinear, by_phase
from specdec.quant.layers import linear_layers
from specdec.runtime.attention.blocks import KEY_BLOCK
from specdec.runtime.attention.select import batch_invariant_attention
from specdec.runtime.kv_cache.masks import attention_masks
from tests.helpers.drafters import Random
from tests.helpers.families import make_model

MODULE = SimpleNamespace(is_causal=True, training=False)


def attend(query: Tensor, key: Tensor, value: Tensor, positions: Tensor | None) -> Tensor:
    """[B, H, W, D] queries at positions [B, W] (None: the last ones, no mask given) -> [B, W, H, D]."""
    mask = None
    if positions is not None:
        mask = attention_masks(positions, key.shape[2], LlamaConfig(), {"full_attention"}, torch.bool)
    return batch_invariant_attention(MODULE, query, key, value, mask)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 32), (4, 1, 64), (8, 2, 16)])
def test_attention_agrees_with_sdpa(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, heads, 70, dim, dtype=dtype)
    key, value = torch.randn(2, 2, kv_heads, 300, dim, dtype=dtype)
    for start, width in ((290, 1), (200, 6), (0, 20), (230, 70)):
        positions = torch.arange(start, start + width).expand(2, -1)
        mask = (torch.arange(300) <= positions[0][:, None])[None, None]
        repeated = (t.repeat_interleave(heads // kv_heads, 1) for t in (key, value))
        expected = F.scaled_dot_product_attention(query[:, :, :width], *repeated, attn_mask=mask).transpose(1, 2)
        module = SimpleNamespace(is_causal=True, training=False, num_key_value_groups=heads // kv_heads)
        got, _ = batch_invariant_attention(module, query[:, :, :width], key, value, mask)
        assert (got - expected).norm() / expected.norm() < (1e-5 if dtype == torch.float32 else 2e-2), (start, width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_is_the_same_in_any_window_batch_and_length(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads, dim, length = 4, 32, 1024
    query = torch.randn(3, heads, length, dim, dtype=dtype)
    key, value = torch.randn(2, 3, 1, length, dim, dtype=dtype)
    module = SimpleNamespace(is_causal=True, training=False, num_key_value_groups=heads)
    for first in (5, 120, 187, 250, 505, 700):
        at = torch.arange(first, first + 17)
        alone = []  # as in plain decoding: one query, a cache that ends with it, no mask
        for position in at.tolist():
            end = position + 1
            alone.append(
                batch_invariant_attention(
                    module, query[:1, :, position:end], key[:1, :, :end], value[:1, :, :end], None
                )[0]
            )
        expected = torch.cat(alone, dim=1)
        for width in (2, 6, 9, 17):
            for end in (-(-(first + 17) // KEY_BLOCK) * KEY_BLOCK, length):
                mask = (torch.arange(end) <= at[:width, None])[None, None]
                windowed = batch_invariant_attention(
                    module, query[:, :, first : first + width], key[:, :, :end], value[:, :, :end], mask
                )[0]
                assert windowed[:1].equal(expected[:, :width]), (first, width, end)
        start = first + 1 - MAX_WINDOW - 5
        if start >= 0:  # the last position of a prefill
            last = query[:1, :, start : first + 1], key[:1, :, : first + 1], value[:1, :, : first + 1]
            mask = (torch.arange(first + 1) <= torch.arange(start, first + 1)[:, None])[None, None]
            assert batch_invariant_attention(module, *last, mask)[0][:, -1:].equal(expected[:, :1])


def test_without_a_mask_attention_is_causal() -> None:
    query, key, value = torch.randn(3, 1, 2, 9, 16)
    positions = torch.arange(9)[None]
    assert attend(query, key, value, None).equal(attend(query, key, value, positions))


def test_a_row_that_sees_nothing_is_finite() -> None:
    """Left padding: a query before the first token of its row."""
    query, key, value = torch.randn(3, 1, 2, 5, 16)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None] & (torch.arange(5) >= 2)
    assert batch_invariant_attention(MODULE, query, key, value, mask)[0].isfinite().all()


def test_layers_in_full_precision_count_as_linear_layers_still() -> None:
    """Their class changes when a model is quantized; a checkpoint or a second quantization finds them all the same."""
    model = make_model("llama", hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    specdec.quantize(model, specdec.Int4Config(32, head=None))
    assert type(model.lm_head) is BatchInvariantLinear
    assert list(linear_layers(model)) == ["lm_head"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_is_the_same_at_any_number_of_rows(dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(256, 1000, dtype=dtype).eval()
    layer.__class__ = BatchInvariantLinear
    x = torch.randn(1, 70, 256, dtype=dtype)
    alone = torch.cat([layer(row) for row in x.split(1, dim=1)], dim=1)
    for width in (2, 6, 8, 13, MAX_WINDOW):
        assert layer(x[:, :width]).equal(alone[:, :width])
    assert layer(x)[:, -1].equal(alone[:, -1])
    expected = F.linear(x, layer.weight, layer.bias)
    assert (layer(x) - expected).norm() / expected.norm() < (1e-6 if dtype == torch.float32 else 1e-2)


def test_wide_windows_are_prefill_but_for_their_last_position() -> None:
    seen: list[tuple[str, int]] = []

    def path(name: str) -> object:
        return lambda x: seen.append((name, x.shape[1])) or x.clone()

    for width in (1, MAX_WINDOW, MAX_WINDOW + 1):
        by_phase(torch.randn(2, width, 4), path("decode"), path("prefill"))
    assert seen == [("decode", 1), ("decode", MAX_WINDOW), ("prefill", MAX_WINDOW + 1), ("decode", 1)]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """A llama whose widths are multiples of 32, as those of real models: others make element-wise functions vary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return specdec.quantize(model, specdec.Int4Config(group_size=32))


SLIDING = {"use_sliding_window": True, "sliding_window": 96, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.filterwarnings("ignore:specdec keeps in full precision")
@pytest.mark.parametrize(
    ("model_type", "values"), [("mistral", {"sliding_window": 96}), ("qwen3", SLIDING), ("gemma3_text", SLIDING)]
)
@pytest.mark.parametrize("prompt_length", [70, 100, 150])
def test_a_sliding_window_is_read_in_the_same_blocks(
    model_type: str, values: dict[str, object], prompt_length: int
) -> None:
    """The stock loop's sliding cache has the last keys alone, specdec's cache has all of them and a mask."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    sizes |= {"head_dim": 32, "vocab_size": 512, "max_position_embeddings": 512}
    model = make_model(model_type, **sizes | values)
    specdec.quantize(model, specdec.Int4Config(group_size=32))
    assert model.config._attn_implementation == ATTENTION
    ids = torch.randint(3, 512, (1, prompt_length), generator=torch.Generator().manual_seed(0))
    call = {"max_new_tokens": 60, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    stock = model.generate(ids, **call)
    for drafter, k in (("none", 1), (model, 5)):
        specdec.enable(model, drafter, num_draft_tokens=k)
        result = model.generate(ids, **call)
        specdec.disable(model)
        assert torch.stack(result.logits).equal(torch.stack(stock.logits)), (drafter, k)


@pytest.mark.filterwarnings("ignore:specdec keeps in full precision")
def test_long_prompts_give_the_logits_of_the_stock_loop(llama: LlamaForCausalLM) -> None:
    ids = torch.randint(3, 512, (1, 1100), generator=torch.Generator().manual_seed(0))
    call = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    stock = llama.generate(ids, **call)
    specdec.enable(llama, "prompt_lookup", num_draft_tokens=4)
    result = llama.generate(ids, **call)
    specdec.disable(llama)
    assert torch.stack(result.logits).equal(torch.stack(stock.logits))


@pytest.mark.filterwarnings("ignore:specdec keeps in full precision")
def test_encoders_are_not_causal() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = BertModel(BertConfig(vocab_size=512, **sizes)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    specdec.quantize(model, specdec.Int4Config(group_size=32))
    ids = torch.randint(3, 512, (2, 20))
    got = model(ids).last_hidden_state
    model.set_attn_implementation("sdpa")
    expected = model(ids).last_hidden_state
    assert (got - expected).norm() / expected.norm() < 1e-2


@pytest.mark.filterwarnings("ignore:specdec keeps in full precision")
def test_a_window_as_wide_as_a_prompt_is_refused(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="num_draft_tokens=64 makes a window that a 4-bit model takes for a prompt"):
        specdec.enable(llama, "prompt_lookup", num_draft_tokens=64)


@pytest.fixture(params=["cold", "on kernels", "compiled"])
def machine(request: pytest.FixtureRequest) -> str:
    """How a CPU computes: with PyTorch's operators, with specdec's kernels, with a compiled forward around them."""
    if request.param != "cold":
        request.getfixturevalue("cpu_kernels")
    return str(request.param)


@cache
def llama_of(machine: str, llama: LlamaForCausalLM) -> LlamaForCausalLM:
    return copy.deepcopy(llama)


@pytest.mark.filterwarnings("ignore:specdec keeps in full precision")
@pytest.mark.parametrize(
    ("prompt_length", "num_draft_tokens"), [(1, 9), (30, 5), (MAX_WINDOW, 2), (MAX_WINDOW + 1, 5), (150, 9)]
)
def test_logits_of_stock_plain_and_speculative_decoding_are_the_same_bits(
    llama: LlamaForCausalLM, machine: str, prompt_length: int, num_draft_tokens: int
) -> None:
    llama = llama_of(machine, llama)
    ids = torch.randint(3, 512, (1, prompt_length), generator=torch.Generator().manual_seed(prompt_length))
    call = {"max_new_tokens": 40, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    stock = llama.generate(ids, **call)
    for drafter in ("none", "prompt_lookup", Random(seed=1, vocab_size=512), llama):
        specdec.enable(llama, drafter, num_draft_tokens=num_draft_tokens, compile=machine == "compiled")
        assert (llama.__dict__["_specdec_state"].target.compiled is not None) == (machine == "compiled")
        result = llama.generate(ids, **call)
        specdec.disable(llama)
        assert result.sequences.equal(stock.sequences)
        assert torch.stack(result.logits).equal(torch.stack(stock.logits)), drafter
