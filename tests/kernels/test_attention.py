"""The attention kernel equals the formula, for all shapes, and a query's result is batch-invariant."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from specdec_kernels import counters
from specdec_kernels.attention import attention, reference
from specdec_kernels.configuration import interpreting
from torch import Tensor, library

from tests.helpers.poison import poison_empty

kernel = pytest.importorskip("specdec_kernels.attention.kernel", exc_type=ImportError)

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]  # on the CPU in Triton's interpreter, where bfloat16 is wrong


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """torch.empty returns NaN. -> the counters of every launch, which must be zero again after it."""
    launched = []

    def recorded(count: int, device: torch.device) -> Tensor:
        launched.append(counters.counters(count, device))
        return launched[-1]

    poison_empty(monkeypatch)
    monkeypatch.setattr(kernel, "counters", recorded)
    return launched


def tensors(
    batch: int, heads: int, kv_heads: int, width: int, length: int, dim: int, value_dim: int | None = None,
    device: str = "cpu", dtype: torch.dtype = torch.float16, capacity: int | None = None, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Query, key, value as a model has them: positions before heads in memory; slots from `length` on are NaN."""
    generator = torch.Generator().manual_seed(seed)

    def buffer(size: int) -> Tensor:
        slots = torch.full((batch, kv_heads, capacity or length + 37, size), torch.nan, dtype=dtype)
        slots[:, :, :length] = torch.randn(batch, kv_heads, length, size, generator=generator).to(dtype)
        return slots.to(device)[:, :, :length]

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
    """Set slots to NaN before the first and after the last slot that any query of the row sees."""
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
def test_the_result_does_not_depend_on_the_order_in_which_blocks_end(
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
    """Rows of one block that see nothing, one slot, distant intervals, or more slots than there are."""
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
    reordered = kernel.launch(*(state[order] for state in states), first[order], last[order], 0.2)
    assert reordered.equal(whole[order])


@pytest.mark.parametrize("device", DEVICES)
def test_a_query_does_not_depend_on_other_queries_of_its_block(device: str) -> None:
    """Tiles and chunks that a block reads only for its other rows do not change a row's result."""
    query, key, value = tensors(1, 2, 1, 5, 900, 16, device=device)
    first = torch.tensor([[300, 0, 890, 310, 1]], dtype=torch.int32, device=device)
    last = torch.tensor([[420, 899, 899, 312, 0]], dtype=torch.int32, device=device)
    together = kernel.launch(query, key, value, first, last, 0.3)
    for w in range(5):
        one = slice(w, w + 1)
        alone = kernel.launch(query[:, :, one], key, value, first[:, one].contiguous(), last[:, one].contiguous(), 0.3)
        assert alone.equal(together[:, one])


def test_a_row_that_sees_little_reads_and_counts_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch with a long row, chunks that a short row does not see are not read, written or counted."""
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
def test_empty_inputs_give_empty_or_zero_outputs(device: str) -> None:
    for batch, width, length in ((0, 3, 9), (2, 0, 9), (2, 3, 0)):
        states = tensors(batch, 4, 2, width, length, 16, device=device)
        limits = torch.zeros(batch, width, dtype=torch.int32, device=device)
        for call in (attention, kernel.launch):
            got = call(*states, limits, limits, 0.3)
            assert got.shape == (batch, width, 4, 16)
            assert (got == 0).all()


def test_the_launch_is_a_shipped_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch passes the arguments that its Configuration describes, which is what is compiled ahead of time."""
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
    library.opcheck(torch.ops.specdec.attention.default, (*states, first, last, 0.25))
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


def test_inputs_that_do_not_fit_are_refused() -> None:
    query, key, value = tensors(2, 4, 2, 3, 40, 16)
    first, last = windows([5, 30], 3)

    def refused(match: str, **other: Tensor) -> None:
        given = {"query": query, "key": key, "value": value, "first": first, "last": last} | other
        with pytest.raises(ValueError, match=f"attention: .*{match}"):
            attention(**given, scale=1.0)

    refused("must be .B, H, W, D., .B, H', S, D.", query=query[0])
    refused("do not match", key=key[..., :8])
    refused("do not match", key=key[:1])
    refused("do not match", value=value[:, :, :9])
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
