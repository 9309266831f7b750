"""The attention kernel is the formula, whatever the shapes; and a query's result does not depend on what is beside it."""

from __future__ import annotations

import contextlib
import copy
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from specdec_kernels import counters as meeting
from specdec_kernels.attention import attention, reference
from specdec_kernels.configuration import interpreting
from torch import Tensor, library
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import specdec
import specdec.runtime.attention.select as hook
from specdec.quant.batch_invariant import ATTENTION
from specdec.runtime.kv_cache.ragged import attention_masks, seen_slots
from specdec.runtime.runner import ModelRunner
from tests.helpers.drafters import Random
from tests.helpers.families import FAMILIES, VOCAB_SIZE, family, make_model, prompts

kernel = pytest.importorskip("specdec_kernels.attention.kernel", exc_type=ImportError)

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]  # on the CPU in Triton's interpreter, where bfloat16 is wrong


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """torch.empty hands out NaN, so nothing that was not written passes; the counters of every launch, to look at afterwards."""
    empty, kept = torch.empty, []

    def full_of_nan(*size: int, **options: Any) -> Tensor:
        made = empty(*size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    def recorded(count: int, device: torch.device) -> Tensor:
        kept.append(meeting.counters(count, device))
        return kept[-1]

    monkeypatch.setattr(torch, "empty", full_of_nan)
    monkeypatch.setattr(kernel, "counters", recorded)
    return kept


def tensors(
    batch: int, heads: int, kv_heads: int, width: int, length: int, dim: int, value_dim: int | None = None,
    device: str = "cpu", dtype: torch.dtype = torch.float16, capacity: int | None = None, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Query, key, value as a model has them: heads behind positions, and a buffer of NaN behind its first `length` slots."""
    generator = torch.Generator().manual_seed(seed)

    def buffer(size: int) -> Tensor:
        room = torch.full((batch, kv_heads, capacity or length + 37, size), torch.nan, dtype=dtype)
        room[:, :, :length] = torch.randn(batch, kv_heads, length, size, generator=generator).to(dtype)
        return room.to(device)[:, :, :length]

    query = torch.randn(batch, width, heads, dim, generator=generator).to(dtype).to(device).transpose(1, 2)
    return query, buffer(dim), buffer(value_dim or dim)


def formula(query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor, scale: float) -> Tensor:
    """Query by query, in float64."""
    batch, heads, width, _ = query.shape
    out = torch.zeros(batch, width, heads, value.shape[3], dtype=torch.float64, device=query.device)
    group = heads // key.shape[1]
    for b in range(batch):
        for w in range(width):
            seen = slice(max(int(first[b, w]), 0), min(int(last[b, w]) + 1, key.shape[2]))
            for h in range(heads if seen.stop > seen.start else 0):
                k, v = key[b, h // group, seen].double(), value[b, h // group, seen].double()
                out[b, w, h] = (query[b, h, w].double() @ k.T * scale).softmax(-1) @ v
    return out


def hide(first: Tensor, last: Tensor, *states: Tensor) -> None:
    """NaN before the first and behind the last slot that a query of the row sees."""
    for state in states:
        for row in range(len(first)):
            seeing = first[row] <= last[row]
            state[row, :, : first[row][seeing].min().clamp(min=0)] = torch.nan
            state[row, :, last[row][seeing].max() + 1 :] = torch.nan


def windows(starts: list[int], width: int, kind: str = "full", size: int = 0) -> tuple[Tensor, Tensor]:
    """first, last [B, W] int32 of consecutive positions from each row's start on."""
    last = torch.tensor(starts)[:, None] + torch.arange(width)
    first = {
        "full": torch.zeros_like(last),
        "sliding": (last - size + 1).clamp(min=0),
        "chunked": last // size * size if size else last,
    }[kind]
    return first.int(), last.int()


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


# heads, kv_heads, dim, value_dim, starts, width, kind, size
SHAPES = [
    (4, 2, 64, 64, [0, 250], 6, "full", 0),
    (4, 2, 64, 64, [699 - 5, 3], 6, "full", 0),
    (8, 1, 20, 20, [40, 0, 66], 17, "full", 0),  # 136 rows, in five blocks
    (3, 3, 80, 64, [100], 1, "full", 0),
    (6, 2, 64, 32, [7, 255, 256], 3, "full", 0),
    (4, 1, 16, 16, [400, 20], 5, "sliding", 100),
    (4, 4, 64, 64, [511, 300], 3, "sliding", 9),
    (6, 2, 32, 32, [254, 515], 6, "chunked", 256),
    (2, 1, 8, 8, [30, 95], 4, "chunked", 33),
    (2, 2, 256, 256, [60, 270], 2, "full", 0),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_and_the_reference_are_the_formula(
    shape: tuple[Any, ...], device: str, poisoned: list[Tensor]
) -> None:
    heads, kv_heads, dim, value_dim, starts, width, kind, size = shape
    first, last = (limit.to(device) for limit in windows(starts, width, kind, size))
    states = tensors(len(starts), heads, kv_heads, width, int(last.max()) + 1, dim, value_dim, device)
    hide(first, last, *states[1:])
    want = formula(*states, first, last, scale := dim**-0.5)
    assert_close(kernel.launch(*states, first, last, scale), want, torch.float16)
    assert_close(reference.attention(*states, first, last, scale), want, torch.float16)
    exact = [state.float() for state in states]
    assert_close(attention(*exact, first, last, scale), formula(*exact, first, last, scale), torch.float32)
    assert all((count == 0).all() for count in poisoned)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_is_the_formula_in_bfloat16(shape: tuple[Any, ...], device: str) -> None:
    heads, kv_heads, dim, value_dim, starts, width, kind, size = shape
    first, last = (limit.to(device) for limit in windows(starts, width, kind, size))
    states = tensors(len(starts), heads, kv_heads, width, int(last.max()) + 1, dim, value_dim, device, torch.bfloat16)
    hide(first, last, *states[1:])
    assert_close(attention(*states, first, last, 0.1), formula(*states, first, last, 0.1), torch.bfloat16)


@pytest.mark.parametrize("device", DEVICES)
def test_many_chunks_are_added_up_by_groups(device: str, poisoned: list[Tensor]) -> None:
    length = (2 * kernel.GROUP + 1) * kernel.CHUNK + 5
    first = torch.tensor([[0, length - 300], [5000, 3]], dtype=torch.int32, device=device)
    last = torch.tensor([[length - 1, length - 1], [5300, 700]], dtype=torch.int32, device=device)
    states = tensors(2, 2, 1, 2, length, 16, device=device)
    got = kernel.launch(*states, first, last, 0.3)
    assert_close(got, formula(*states, first, last, 0.3), torch.float16)
    for b in range(2):
        for w in range(2):
            alone = [state[b : b + 1] for state in (states[0][:, :, w : w + 1], *states[1:])]
            limits = [limit[b : b + 1, w : w + 1].contiguous() for limit in (first, last)]
            assert kernel.launch(*alone, *limits, 0.3).equal(got[b : b + 1, w : w + 1])
    assert all((count == 0).all() for count in poisoned)


@pytest.mark.skipif(not interpreting(), reason="a device's own order differs from launch to launch")
def test_the_order_in_which_blocks_end_is_nothing_to_the_result(
    monkeypatch: pytest.MonkeyPatch, poisoned: list[Tensor]
) -> None:
    from triton.runtime.interpreter import interpreter_builder

    first, last = windows([6000, 5000], 2)
    states = tensors(2, 2, 1, 2, 6002, 16)
    want = kernel.launch(*states, first, last, 0.3)
    chunks = math.ceil(6002 / kernel.CHUNK)
    place = interpreter_builder.set_grid_idx
    shuffled = torch.randperm(chunks, generator=torch.Generator().manual_seed(0)).tolist()
    for order in (list(range(chunks))[::-1], shuffled):
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z, order=order: place(x, order[y], z))
        assert kernel.launch(*states, first, last, 0.3).equal(want)
    assert all((count == 0).all() for count in poisoned)


@pytest.mark.parametrize("device", DEVICES)
def test_empty_and_hostile_intervals(device: str) -> None:
    """Rows of one block that see nothing, one slot, far apart stretches, or more than there is."""
    first = torch.tensor([[5, 0, 0, 600, -7, 580, 300]], dtype=torch.int32, device=device)
    last = torch.tensor([[4, 0, -1, 601, 9, 9999, 300]], dtype=torch.int32, device=device)
    states = tensors(1, 4, 2, 7, 620, 16, device=device)
    hide(first, last, *states[1:])
    got = kernel.launch(*states, first, last, 0.3)
    assert_close(got, formula(*states, first, last, 0.3), torch.float16)
    assert (got[:, [0, 2]] == 0).all()
    nothing = torch.full_like(first, -1)
    assert (kernel.launch(*states, torch.zeros_like(first), nothing, 0.3) == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (6, 1, 16)])
@pytest.mark.parametrize(("kind", "size"), [("full", 0), ("sliding", 90), ("chunked", 100)])
def test_a_query_is_the_same_bits_in_any_window_batch_and_length(
    heads: int, kv_heads: int, dim: int, kind: str, size: int, device: str
) -> None:
    states = query, key, value = tensors(3, heads, kv_heads, 9, 700, dim, device=device)
    first, last = (limit.to(device) for limit in windows([250, 33, 500], 9, kind, size))
    whole = kernel.launch(*states, first, last, 0.2)
    for row, at, width, length in (
        (0, 0, 1, 251),
        (0, 2, 6, 700),
        (0, 8, 1, 259),
        (1, 0, 9, 42),
        (1, 3, 1, 640),
        (2, 4, 5, 512),
    ):
        rows, columns = slice(row, row + 1), slice(at, at + width)
        part = query[rows, :, columns], key[rows, :, :length], value[rows, :, :length]
        got = kernel.launch(*part, first[rows, columns].contiguous(), last[rows, columns].contiguous(), 0.2)
        assert got.equal(whole[rows, columns]), (row, at, width, length)
    order = torch.tensor([2, 0, 1, 0], device=device)
    neighbours = kernel.launch(*(state[order] for state in states), first[order], last[order], 0.2)
    assert neighbours.equal(whole[order])


@pytest.mark.parametrize("device", DEVICES)
def test_other_queries_of_a_block_leave_a_query_alone(device: str) -> None:
    """What a block reads for its other rows is nothing to a row: tiles and chunks that it does not see."""
    query, key, value = tensors(1, 2, 1, 5, 900, 16, device=device)
    first = torch.tensor([[300, 0, 890, 310, 1]], dtype=torch.int32, device=device)
    last = torch.tensor([[420, 899, 899, 312, 0]], dtype=torch.int32, device=device)
    together = kernel.launch(query, key, value, first, last, 0.3)
    for w in range(5):
        one = slice(w, w + 1)
        alone = kernel.launch(query[:, :, one], key, value, first[:, one].contiguous(), last[:, one].contiguous(), 0.3)
        assert alone.equal(together[:, one])


def test_a_row_that_sees_little_reads_and_counts_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch with a long row, a short row's other chunks are not read, not written and not counted."""
    first, last = windows([3, 1000], 2)
    states = tensors(2, 2, 1, 2, 1002, 16)
    hide(first, last, *states[1:])
    parts: list[Tensor] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: parts.append(empty(*size, **options)) or parts[-1])
    kernel.launch(*states, first, last, 0.3)
    written = ~parts[2].isnan().view(2, 5, 4).any(2)  # the maxima: [B * H', 4 chunks + 1 group, rows]
    assert written.tolist() == [[True] + 4 * [False], 4 * [True] + [False]]


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_in_nothing_out(device: str) -> None:
    for batch, width, length in ((0, 3, 9), (2, 0, 9), (2, 3, 0)):
        states = tensors(batch, 4, 2, width, length, 16, device=device)
        limits = torch.zeros(batch, width, dtype=torch.int32, device=device)
        for call in (attention, kernel.launch):
            got = call(*states, limits, limits, 0.3)
            assert got.shape == (batch, width, 4, 16)
            assert (got == 0).all()


def test_the_launch_is_a_shipped_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launch passes by name and place is what its Configuration describes, and what is built ahead of time."""
    launched: dict[str, Any] = {}

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: launched.update(grid=grid, args=args, kwargs=kwargs)

    names = kernel._attention_kernel.arg_names
    assert kernel.CONFIGURATIONS[0].name == "bf16_d128"
    for shipped in kernel.CONFIGURATIONS:
        assert set(names) == set(shipped.signature) | set(shipped.constants)
        assert set(shipped.divisible) < set(shipped.signature)
        dim = shipped.constants["D"]
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[shipped.name[:4]]
        states = tensors(2, 8, 2, 6, 300, dim, dtype=dtype, capacity=512)
        first, last = windows([30, 290], 6)
        with monkeypatch.context() as patch:
            patch.setattr(type(shipped), "kernel", Recorder(), raising=False)
            described = kernel.configuration(dtype, dim, dim)
            object.__setattr__(described, "kernel", Recorder())
            kernel.launch(*states, first, last, 0.3)
            object.__setattr__(described, "kernel", kernel._attention_kernel)
        assert launched["grid"] == (1, 2, 4)
        assert launched["kwargs"] == shipped.constants | shipped.options
        for name, value in zip(names, launched["args"], strict=False):
            if isinstance(value, Tensor):
                short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32"}
                assert shipped.signature[name] == f"*{short[str(value.dtype).removeprefix('torch.')]}"
            else:
                assert shipped.signature[name] == ("fp32" if name == "scale" else "i32")
            if name in kernel.STRIDES:
                assert name in shipped.divisible
                assert value % 16 == 0


def test_it_is_an_operator_of_torch() -> None:
    states = [state.float() for state in tensors(2, 4, 2, 3, 40, 16)]
    first, last = windows([5, 30], 3)
    library.opcheck(torch.ops.specdec.runtime.attention.select.default, (*states, first, last, 0.25))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert compiled(*states, first, last, 0.25).equal(attention(*states, first, last, 0.25))


@pytest.mark.parametrize("device", DEVICES[1:])
def test_it_goes_into_a_cuda_graph(device: str) -> None:
    states = tensors(2, 8, 2, 6, 3000, 128, device=device, dtype=torch.bfloat16)
    first, last = (limit.to(device) for limit in windows([5, 2990], 6))
    want = attention(*states, first, last, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attention(*states, first, last, 0.1)
    for _ in range(3):
        got.fill_(torch.nan)
        graph.replay()
        assert got.equal(want)


def test_what_does_not_fit_is_refused() -> None:
    query, key, value = tensors(2, 4, 2, 3, 40, 16)
    first, last = windows([5, 30], 3)

    def refused(match: str, **other: Tensor) -> None:
        given = {"query": query, "key": key, "value": value, "first": first, "last": last} | other
        with pytest.raises(ValueError, match=f"attention: .*{match}"):
            attention(**given, scale=1.0)

    refused("must be .B, H, W, D., .B, H', S, D.", query=query[0])
    refused("do not fit together", key=key[..., :8])
    refused("do not fit together", key=key[:1])
    refused("do not fit together", value=value[:, :, :9])
    refused(
        "4 query heads cannot share 3 key heads",
        key=key.repeat(1, 2, 1, 1)[:, :3],
        value=value.repeat(1, 2, 1, 1)[:, :3],
    )
    refused(r"first \[2, 2\] and last \[2, 3\] must be \[B, W\] = \[2, 3\]", first=first[:, :2])
    refused("first is torch.int64", first=first.long())
    refused("last torch.int64", last=last.long())
    refused("one floating dtype", value=value.float())
    refused("one floating dtype", query=query.int(), key=key.int(), value=value.int())
    refused("on cpu, meta; move them to one device", first=first.to("meta"))
    refused(r"key has a stride of 2 in its last dimension; call .contiguous\(\)", key=key.repeat(1, 1, 1, 2)[..., ::2])
    refused(r"last has a stride of 2 in its last dimension; call .contiguous\(\)", last=last.T.contiguous().T)


def test_scores_far_from_zero_do_not_overflow() -> None:
    query, key, value = tensors(1, 2, 2, 2, 300, 16)
    first, last = windows([298], 2)
    got = kernel.launch(query * 50, key * 50, value, first, last, 1.0)
    assert_close(got, formula(query * 50, key * 50, value, first, last, 1.0), torch.float16)
    assert math.isfinite(got.float().abs().max())


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Models take the way they take on a CUDA device, through the operator; the shape of each query that comes there."""
    shapes: list[tuple[int, ...]] = []

    def recorded(query: Tensor, *rest: Any) -> Tensor:
        shapes.append(tuple(query.shape))
        return attention(query, *rest)

    monkeypatch.setattr(hook, "serves", lambda device, dtype: True)
    monkeypatch.setattr(hook, "SDPA_STAYS", ())
    monkeypatch.setattr(hook, "attention", recorded)
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
    for width, kept in ((4, [3, 0, 2]), (1, [1, 1, 1]), (6, [0, 5, 1])):
        positions = lengths[:, None] - 1 + torch.arange(width)
        logits.append(runner.forward(ids.gather(1, positions), positions).logits)
        lengths = lengths + torch.tensor(kept)
    return logits


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_models_compute_the_same_with_intervals(
    model_type: str, fused: list[tuple[int, ...]], monkeypatch: Any
) -> None:
    model = family(model_type)
    before = model.config._attn_implementation
    got = ragged_logits(model)
    in_reach = before == "sdpa" and model._supports_attention_backend
    assert {shape[2] for shape in fused} == ({4, 1, 6} if in_reach else set())
    assert model.config._attn_implementation == before
    monkeypatch.setattr(hook, "serves", lambda device, dtype: False)
    for one, other in zip(got, ragged_logits(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text", "llama4_text", "deepseek_v3"])
def test_models_run_on_the_kernel(
    model_type: str, fused: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "attention", in_half)
    got = ragged_logits(family(model_type))
    monkeypatch.setattr(hook, "serves", lambda device, dtype: False)
    for one, other in zip(got, ragged_logits(family(model_type)), strict=True):
        assert (one - other).norm() / other.norm() < 1e-2


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text", "llama4_text"])
def test_texts_are_those_of_the_stock_loop(model_type: str, fused: list[tuple[int, ...]]) -> None:
    model = copy.deepcopy(family(model_type))
    call = {"max_new_tokens": 14, "do_sample": False}  # beyond the windows of 9
    want = model.generate(**prompts(4), **call)
    assert not fused  # a stock call of an sdpa model is left alone
    for drafter in ("prompt_lookup", family(model_type)):
        specdec.enable(model, drafter, num_draft_tokens=3)
        assert model.generate(**prompts(4), **call).equal(want)
        specdec.disable(model)
    assert fused
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.filterwarnings("ignore:specdec keeps in full precision")
@pytest.mark.parametrize(("model_type", "prompt_length"), [("llama", 6), ("mistral", 70)])
def test_stock_and_speculative_decoding_of_a_4bit_model_are_the_same_bits(
    model_type: str, prompt_length: int, fused: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain generate() gives no mask, so the kernel sees up to the last key; a window of ours hands over its intervals."""
    monkeypatch.setattr(hook, "attention", in_half)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512}
    model = make_model(model_type, **sizes)
    specdec.quantize(model, specdec.Int4Config(group_size=32))
    ids = torch.randint(3, 512, (1, prompt_length), generator=torch.Generator().manual_seed(0))
    call = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    stock = model.generate(ids, **call)
    for drafter in ("none", Random(seed=1, vocab_size=512)):
        specdec.enable(model, drafter, num_draft_tokens=4)
        ours = model.generate(ids, **call)
        specdec.disable(model)
        assert torch.stack(ours.logits).equal(torch.stack(stock.logits)), drafter


def module(group: int = 1, **values: Any) -> SimpleNamespace:
    return SimpleNamespace(is_causal=True, training=False, num_key_value_groups=group, **values)


def test_stock_calls_get_what_sdpa_gives(fused: list[tuple[int, ...]]) -> None:
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
    for given, mask, keywords, kernel_s in calls:
        fused.clear()
        got, _ = hook.row_attention(module(), *given, mask, **keywords)
        want, _ = sdpa_attention_forward(module(), *given, mask, **keywords)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert bool(fused) == kernel_s
        assert got.requires_grad == want.requires_grad
    fused.clear()
    with contextlib.suppress(ValueError):  # sdpa refuses it in newer versions of transformers
        hook.row_attention(module(), *states, None, softcap=30.0)
    assert not fused
    dropped, _ = hook.row_attention(module(), *states, None, dropout=1.0)
    assert (dropped == 0).all()


def test_intervals_without_a_kernel_are_a_mask(fused: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = torch.randn(2, 4, 70, 16), *torch.randn(2, 2, 2, 90, 16).unbind(0)
    config = SimpleNamespace(sliding_window=30)
    for width in (6, 70):
        positions = torch.tensor([[3], [20]]) + torch.arange(width)
        forms = [
            attention_masks(positions, 90, config, ["sliding_attention"], dtype) for dtype in (torch.int32, torch.bool)
        ]
        assert forms[0].shape == (2, 2, width, 1)
        assert seen_slots(forms[0], 90).equal(forms[1])
        given = module(group=2), query[:, :, :width], key, value
        want, _ = sdpa_attention_forward(*given, forms[1])
        for served in (True, False):
            monkeypatch.setattr(hook, "serves", lambda device, dtype, served=served: served)
            for keywords in ({}, {"is_causal": False}):
                got, _ = hook.row_attention(*given, forms[0], **keywords)
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert {shape[2] for shape in fused} == {6, 1}  # of a wide window the last position


def test_the_last_position_of_a_prefill_is_the_kernels(
    fused: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "attention", in_half)
    query, key, value = torch.randn(3, 1, 2, 100, 16).unbind(0)
    whole, _ = hook.row_attention(module(), query, key, value, None)
    alone, _ = hook.row_attention(module(), query[:, :, -1:], key, value, None)
    assert whole[:, -1:].equal(alone)
    torch.testing.assert_close(
        whole, sdpa_attention_forward(module(), query, key, value, None)[0], rtol=1e-2, atol=1e-2
    )


def test_a_config_is_lent_until_its_last_forward_ends() -> None:
    config = copy.deepcopy(family("llama").config)
    before = config.to_dict()
    with hook.attention_override(config):
        with contextlib.suppress(KeyError), hook.attention_override(config):
            assert config._attn_implementation == ATTENTION
            raise KeyError
        assert config._attn_implementation == ATTENTION
    assert config._attn_implementation == "sdpa"
    assert config.to_dict() == before


def test_threads_share_a_model(fused: list[tuple[int, ...]]) -> None:
    """Our forwards and stock ones of one model at the same time."""
    model = copy.deepcopy(family("llama"))
    ids = prompts(4)["input_ids"]

    def forward(ours: bool) -> Tensor:
        if ours:
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
    assert not hook.serves(torch.device(device), dtype)
