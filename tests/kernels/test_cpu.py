"""The CPU kernels against PyTorch's formulas; a row does not depend on the other rows."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from specdec_kernels import cpu
from specdec_kernels.attention import reference
from torch import Tensor

from specdec.quant.int4 import Int4Tensor, pack
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("cpu_kernels")
OPS = torch.ops.specdec
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_weight(rows: int, columns: int, group_size: int, asymmetric: bool, dtype: torch.dtype) -> Int4Tensor:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(16, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (0.01 + 0.1 * torch.rand(rows, columns // group_size, generator=generator)).to(dtype)
    zero = torch.randint(16, scale.shape, generator=generator, dtype=torch.uint8) if asymmetric else None
    return Int4Tensor(pack(codes), scale, zero)


def rounded(x: Tensor, group_size: int) -> Tensor:
    """x [..., K] as layers with int8_inputs see it, in float64."""
    groups = x.double().unflatten(-1, (-1, math.gcd(group_size, 64)))
    largest = groups.abs().amax(-1, keepdim=True)
    codes = (groups.float() * (127 / largest.float())).nan_to_num().round()  # to even
    return (codes * largest / 127).flatten(-2)


def check(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error < TOLERANCE[got.dtype]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("int8_inputs", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"),
    [(64, 128, 64), (130, 96, 96), (3, 64, 32), (200, 256, 128), (64, 512, 256), (65, 24, 24), (65, 48, 16)],
)
def test_int4_linear(
    rows: int,
    columns: int,
    group_size: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    asymmetric: bool,
    int8_inputs: bool,
) -> None:
    int4 = random_weight(rows, columns, group_size, asymmetric, scale_dtype)
    packed, scale = cpu.pack(int4.codes(), int4.scale, int4.zero)
    assert cpu.unpack(packed)[:rows].equal(int4.codes())
    x = random(2, 7, columns).bfloat16().to(dtype)  # the kernel rounds its inputs where the CPU multiplies bfloat16
    [got] = OPS.int4_linear(x, [packed], [scale], [rows], int8_inputs)
    assert got.dtype == dtype
    inputs = rounded(x, group_size) if int8_inputs else x.double()
    check(got, inputs @ int4.dequantize(torch.float64).T)


@pytest.mark.parametrize("int8_inputs", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (70, 48), (3, 16), (1, 96), (9, 320)])
def test_int8_linear(rows: int, columns: int, dtype: torch.dtype, scale_dtype: torch.dtype, int8_inputs: bool) -> None:
    weight = torch.randint(-127, 128, (rows, columns), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    weight[0] = 127  # sums of neighboring products as large as they get
    scale = random(rows, dtype=scale_dtype, seed=2)
    x = random(2, 7, columns, dtype=dtype)
    x[0, 0] = 3.0
    got = OPS.int8_linear(x, weight, scale, int8_inputs)
    assert got.dtype == dtype
    inputs = rounded(x, columns) if int8_inputs else x.double()
    check(got, inputs @ (weight.double() * scale.double()[:, None]).T)


def test_int8_linear_refuses_widths_that_it_cannot_read() -> None:
    with pytest.raises(RuntimeError, match="a multiple of 16 columns"):
        OPS.int8_linear(random(1, 24), torch.zeros(4, 24, dtype=torch.int8), torch.ones(4), True)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("group_size", [8, 16, 32, 64])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_inputs_that_are_not_finite_give_nan_in_their_row_alone(value: float, group_size: int, rows: int) -> None:
    int4 = random_weight(65, 128, group_size, False, torch.bfloat16)
    packed, scale = cpu.pack(int4.codes(), int4.scale, int4.zero)
    x = random(rows, 128)
    x[1, 70] = value
    for y in (
        OPS.int4_linear(x, [packed], [scale], [65], True)[0],
        OPS.int8_linear(x, torch.ones(5, 128, dtype=torch.int8), torch.ones(5), True),
    ):
        assert y[1].isnan().all()
        assert y[0].isfinite().all()
        assert y[2:].isfinite().all()


def test_inputs_of_zeros_give_zeros() -> None:
    int4 = random_weight(65, 128, 64, True, torch.bfloat16)
    packed, scale = cpu.pack(int4.codes(), int4.scale, int4.zero)
    assert not OPS.int4_linear(torch.zeros(2, 128), [packed], [scale], [65], True)[0].any()


def test_weights_in_large_pages_are_copies_that_outlive_each_other() -> None:
    sources = [random(*shape, dtype=dtype) for shape in ((3,), (64, 33), (1500, 1000)) for dtype in cpu.DTYPES]
    sources += [random(2000, 3000).t(), torch.arange(7), torch.empty(0, 4)]  # a whole chunk more, other dtypes, nothing
    copies = [cpu.in_huge_pages(source) for source in sources]
    for source, copied in zip(sources, copies, strict=True):
        assert copied.is_contiguous()
        assert copied.dtype == source.dtype
        assert copied.equal(source)
        assert not copied.numel() or copied.data_ptr() % 64 == 0
    copies[0].fill_(7)
    kept = copies[1::2]
    del copies
    for source, copied in zip(sources[1::2], kept, strict=True):
        assert copied.equal(source)


def test_results_that_live_at_once_share_no_memory() -> None:
    """Small results are in blocks that are used again; more of them live here than are kept, of several sizes."""
    weight = torch.ones(40, 16)
    for _ in range(2):
        results = [OPS.linear(torch.full((rows, 16), float(i)), weight, None) for i in range(40) for rows in (1, 3, 70)]
        for i, result in enumerate(results):
            assert (result == 16.0 * (i // 3)).all()
        del result, results  # so that the next ones are made of their blocks


def results() -> tuple[Tensor, ...]:
    """Results of both layers that multiply bytes, of few rows and many, and of attention."""
    int4 = random_weight(70, 256, 64, True, torch.float32)
    packed, scale = cpu.pack(int4.codes(), int4.scale, int4.zero)
    weight = torch.randint(-127, 128, (70, 256), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    weight[0] = 127
    x = random(40, 256)
    x[0] = 1.0
    narrow, wide = (
        (random(1, 4, 9, dim), random(1, 1, 50, dim, seed=1), random(1, 1, 50, dim, seed=2)) for dim in (40, 64)
    )
    last = torch.arange(30, 39, dtype=torch.int32)[None]
    return (
        OPS.int4_linear(x[:5], [packed], [scale], [70], True)[0],
        OPS.int4_linear(x, [packed], [scale], [70], True)[0],
        OPS.int8_linear(x, weight, torch.ones(70), True),
        OPS.attention(*narrow, last // 2, last, 0.125),
        OPS.attention(*(states.bfloat16() for states in narrow), last // 2, last, 0.125),
        OPS.attention(*(states.bfloat16() for states in wide), last // 2, last, 0.125),
    )


ON_ANOTHER_CPU = """
import sys, torch
from specdec_kernels import cpu
from tests.kernels.test_cpu import results
replaced = {"-march=native": sys.argv[2], "-O3": "-O1"}  # -O1 compiles in a third of the time
cpu.FLAGS = tuple(replaced.get(flag, flag) for flag in cpu.FLAGS)
cpu.build()
torch.save(results(), sys.argv[1])
"""


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="flags of x86 compilers")
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param("-march=x86-64", marks=pytest.mark.full),
        pytest.param(
            "-march=haswell",
            marks=pytest.mark.skipif(
                torch.backends.cpu.get_cpu_capability() == "AVX2", reason="the kernels of this CPU are those"
            ),
        ),
    ],
)
def test_kernels_for_other_cpus_give_the_same_numbers(flags: str, tmp_path: Path) -> None:
    """Without AMX, VNNI and AVX-512: bytes are multiplied by other instructions, and their sums are exact.

    Attention on 64 dimensions in bfloat16, the last result, rounds the weights of slots on a CPU with AMX alone.
    """
    command = [sys.executable, "-c", ON_ANOTHER_CPU, str(tmp_path / "results.pt"), flags]
    subprocess.run(command, env=os.environ | {"SPECDEC_CACHE": str(tmp_path / "cache")}, cwd=ROOT, check=True)
    others, natives = torch.load(tmp_path / "results.pt"), results()
    for index, (other, native) in enumerate(zip(others, natives, strict=True)):
        rtol = 1e-5 if native.dtype == torch.float32 else 1e-2
        atol = 5e-3 if index == len(natives) - 1 else 1e-3
        torch.testing.assert_close(other, native, rtol=rtol, atol=atol)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_weights_in_one_call_give_the_result_of_each_alone(scale_dtype: torch.dtype, threads: int) -> None:
    weights = [random_weight(rows, 256, 64, rows == 70, scale_dtype) for rows in (64, 70, 3, 500)]
    packed, scales = map(list, zip(*(cpu.pack(int4.codes(), int4.scale, int4.zero) for int4 in weights), strict=True))
    columns = [64, 70, 3, 500]
    x = random(2, 5, 256)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        alone = [OPS.int4_linear(x, [p], [s], [n], True)[0] for p, s, n in zip(packed, scales, columns, strict=True)]
        together = OPS.int4_linear(x, packed, scales, columns, True)
        assert all(got.equal(want) for got, want in zip(together, alone, strict=True))
    finally:
        torch.set_num_threads(before)


def test_weights_that_cannot_share_a_call_are_refused() -> None:
    packed, scales = zip(
        *(
            cpu.pack(w.codes(), w.scale, w.zero)
            for w in (random_weight(8, 64, g, False, torch.float32) for g in (32, 64))
        ),
        strict=True,
    )
    with pytest.raises(RuntimeError, match="weights of one kind"):
        OPS.int4_linear(random(1, 64), list(packed), list(scales), [8, 8], True)
    with pytest.raises(RuntimeError, match="lists of one length"):
        OPS.int4_linear(random(1, 64), list(packed), list(scales), [8], True)


def test_all_float16_scales_are_exact() -> None:
    scale = torch.arange(-(1 << 15), 1 << 15).short().view(torch.float16)
    scale = scale[scale.isfinite()]
    codes = torch.full((len(scale), cpu.WORD), 9, dtype=torch.uint8)  # one more than the zero point
    packed, packed_scale = cpu.pack(codes, scale[:, None], None)
    assert packed_scale.dtype == torch.float16
    [got] = OPS.int4_linear(torch.eye(cpu.WORD)[:1], [packed], [packed_scale], [len(scale)], False)
    assert got[0].equal(scale.float())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (70, 50), (3, 7), (1, 16), (9, 300)])
def test_linear(rows: int, columns: int, dtype: torch.dtype, with_bias: bool) -> None:
    x, weight = random(2, 7, columns, dtype=dtype), random(rows, columns, dtype=dtype, seed=1)
    bias = random(rows, dtype=dtype, seed=2) if with_bias else None
    want = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    check(OPS.linear(x, weight, bias), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim"),
    [(4, 1, 64, 64), (4, 4, 40, 24), (6, 2, 8, 128), (2, 1, 16, 7), (14, 2, 32, 96), (4, 4, 96, 32)],
)
def test_attention(heads: int, kv_heads: int, dim: int, value_dim: int, dtype: torch.dtype) -> None:
    query, key = random(2, heads, 5, dim, dtype=dtype), random(2, kv_heads, 61, dim, dtype=dtype, seed=1)
    value = random(2, kv_heads, 61, value_dim, dtype=dtype, seed=2)
    last = torch.tensor([[0, 1, 17, 30, 60], [5, 6, 7, 8, -1]], dtype=torch.int32)
    first = torch.tensor([[0, 0, 9, 0, 60], [5, 0, 3, 0, 0]], dtype=torch.int32)
    got = OPS.attention(query, key, value, first, last, dim**-0.5)
    assert got.dtype == dtype
    assert not got[1, 4].any(), "a query without slots"
    check(got, reference.attention(query.double(), key.double(), value.double(), first, last, dim**-0.5))


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 16), (torch.bfloat16, 64)])
def test_attention_accepts_any_strides_and_does_not_read_slots_that_no_query_attends_to(
    dtype: torch.dtype, dim: int
) -> None:
    query, key, value = (
        random(2, slots, heads, dim, dtype=dtype, seed=heads).transpose(1, 2)
        for slots, heads in ((5, 4), (90, 2), (90, 2))
    )
    last = torch.tensor([[43, 44, 45, 46, 47], [70, 71, 72, 73, 74]], dtype=torch.int32)
    first = last - 8
    want = reference.attention(query, key, value, first, last, 0.25)
    for states in (key, value):
        states[0, :, :35], states[0, :, 48:], states[1, :, :62], states[1, :, 75:] = (torch.nan,) * 4
    check(OPS.attention(query, key, value, first, last, 0.25), want)


def test_attention_in_another_dtype_goes_through_float32() -> None:
    query, key, value = random(1, 2, 3, 8), random(1, 2, 9, 8, seed=1), random(1, 2, 9, 8, seed=2)
    last = torch.tensor([[4, 5, 6]], dtype=torch.int32)
    arguments = (torch.zeros_like(last), last, 0.3)
    want = OPS.attention(query, key, value, *arguments)
    got = OPS.attention(query.double(), key.double(), value.double(), *arguments)
    assert got.dtype == torch.float64
    assert got.float().equal(want)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, in PyTorch's operators."""
    values = x.float()
    return weight * (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("columns", [1, 16, 40, 64, 100, 257, 576, 1000, 2048, 5120])
def test_norms_give_the_bits_of_pytorch(columns: int, dtype: torch.dtype) -> None:
    weight = random(columns, dtype=dtype, seed=1)
    for rows in (1, 3, 70):
        x, y = 3 * random(rows, columns, dtype=dtype), random(rows, columns, dtype=dtype, seed=2)
        assert OPS.rms_norm(x, weight, 1e-5).equal(rms_norm(x, weight, 1e-5))
        total, normed = OPS.add_rms_norm(x, y, weight, 1e-6)
        assert total.equal(x + y)
        assert normed.equal(rms_norm(x + y, weight, 1e-6))
        assert OPS.rms_norm(x.T.contiguous().T, weight, 1e-5).equal(rms_norm(x, weight, 1e-5))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition of the rotary embedding of x [B, H, W, D], by halves."""
    low, high = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim"),
    [(4, 1, 64, 64), (4, 4, 40, 24), (6, 2, 8, 128), (2, 1, 16, 7), (14, 2, 32, 96), (4, 4, 96, 32)],
)
@pytest.mark.parametrize(("batch", "width"), [(1, 1), (3, 5), (1, 70)])
def test_rotary_attention_gives_the_bits_of_its_parts(
    batch: int, width: int, heads: int, kv_heads: int, dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    query, key, value = (
        random(batch, width, count * size, dtype=dtype, seed=count)
        for count, size in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    )
    cos, sin = random(2, batch, width, dim, dtype=dtype)
    positions = torch.arange(width) + 3 * torch.arange(batch)[:, None]
    intervals = torch.stack([positions // 2, positions], dim=1)[..., None].int()
    keys, values = (random(batch, kv_heads, 90, size, dtype=dtype, seed=3) for size in (dim, value_dim))

    states = [x.unflatten(2, (-1, size)).transpose(1, 2) for x, size in ((query, dim), (key, dim), (value, value_dim))]
    want_keys, want_values = keys.clone(), values.clone()
    rows = torch.arange(batch)[:, None]
    want_keys[rows, :, positions] = rotated(states[1], cos, sin).transpose(1, 2)
    want_values[rows, :, positions] = states[2].transpose(1, 2)
    first, last = intervals[..., 0].unbind(1)
    want = OPS.attention(rotated(states[0], cos, sin), want_keys, want_values, first, last, 0.125)

    got = OPS.rotary_attention(query, key, value, cos, sin, positions, intervals, keys, values, 0.125)
    assert got.equal(want.flatten(2))
    assert keys.equal(want_keys)
    assert values.equal(want_values)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize(("batch", "width"), [(1, 1), (3, 5), (1, 70)])
def test_blocks_give_the_bits_of_their_parts(batch: int, width: int, dtype: torch.dtype, is_dense: bool) -> None:
    hidden, heads, kv_heads, dim, value_dim, inner = 64, 4, 2, 16, 8, 96
    x, residual = random(2, batch, width, hidden, dtype=dtype)
    norm = random(hidden, dtype=dtype, seed=4)

    def layers(*shapes: tuple[int, int]) -> tuple[list[Tensor], list[Tensor], list[int], bool]:
        columns = [rows for rows, _ in shapes]
        if is_dense:
            return (
                [random(*shape, dtype=dtype, seed=index) / 8 for index, shape in enumerate(shapes)],
                [],
                columns,
                False,
            )
        int4 = [random_weight(*shape, 16, False, dtype) for shape in shapes]
        packed, scales = zip(*(cpu.pack(one.codes(), one.scale, one.zero) for one in int4), strict=True)
        return list(packed), list(scales), columns, True

    def linear(x: Tensor, layers: tuple[list[Tensor], list[Tensor], list[int], bool], index: int) -> Tensor:
        weights, scales, columns, int8_inputs = layers
        if is_dense:
            return OPS.linear(x, weights[index], None)
        return OPS.int4_linear(x, [weights[index]], [scales[index]], [columns[index]], int8_inputs)[0]

    qkvo = layers(
        (heads * dim, hidden), (kv_heads * dim, hidden), (kv_heads * value_dim, hidden), (hidden, heads * value_dim)
    )
    cos, sin = random(2, batch, width, dim, dtype=dtype)
    positions = torch.arange(width) + 3 * torch.arange(batch)[:, None]
    intervals = torch.stack([positions // 2, positions], dim=1)[..., None].int()
    keys, values = (random(batch, kv_heads, 90, size, dtype=dtype, seed=3) for size in (dim, value_dim))
    want_keys, want_values = keys.clone(), values.clone()
    states = [linear(x, qkvo, index) for index in range(3)]
    mixed = OPS.rotary_attention(*states, cos, sin, positions, intervals, want_keys, want_values, 0.25)
    want = OPS.add_rms_norm(residual, linear(mixed, qkvo, 3), norm, 1e-5)
    got = OPS.attention_block(x, residual, *qkvo, cos, sin, positions, intervals, keys, values, 0.25, norm, 1e-5)
    assert all(one.equal(other) for one, other in zip(got, want, strict=True))
    assert keys.equal(want_keys)
    assert values.equal(want_values)

    mlp = layers((inner, hidden), (inner, hidden), (hidden, inner))
    product = torch.nn.functional.silu(linear(x, mlp, 0)) * linear(x, mlp, 1)
    want = OPS.add_rms_norm(residual, linear(product, mlp, 2), norm, 1e-5)
    got = OPS.mlp_block(x, residual, *mlp, norm, 1e-5)
    assert all(one.equal(other) for one, other in zip(got, want, strict=True))


def test_silu_has_the_bits_of_pytorch_for_every_bfloat16() -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)[:, None]
    one, zero = torch.ones(1, 1, dtype=x.dtype), torch.zeros_like(x)
    total, _ = OPS.mlp_block(x, zero, [one, one, one], [], [1, 1, 1], False, one[0], 1e-5)
    want = torch.nn.functional.silu(x) * x + 0
    assert total[~want.isnan()].equal(want[~want.isnan()])
    assert total[want.isnan()].isnan().all()


@pytest.mark.usefixtures("threads")
def test_several_threads_call_at_once() -> None:
    """One of them has the pool's threads at a time, the others compute alone: the same bits."""
    weight = random_weight(2048, 256, 64, False, torch.bfloat16)
    packed, scale = cpu.pack(weight.codes(), weight.scale, weight.zero)
    inputs = [random(24, 256, dtype=torch.bfloat16, seed=seed) for seed in range(8)]

    def outputs(x: Tensor) -> list[Tensor]:
        return [OPS.int4_linear(x, [packed], [scale], [2048], True)[0] for _ in range(20)]

    want = [outputs(x)[0] for x in inputs]
    with ThreadPoolExecutor(4) as executor:
        for got, expected in zip(executor.map(outputs, inputs), want, strict=True):
            assert all(one.equal(expected) for one in got)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_wait_for_its_parents_threads() -> None:
    code = """
import os, torch
from specdec_kernels import cpu
assert cpu.load()
torch.set_num_threads(2)
x, w = torch.randn(64, 256), torch.randn(4096, 256)
want = torch.ops.specdec.linear(x, w, None)
pid = os.fork()
got = torch.ops.specdec.linear(x, w, None)
assert got.equal(want)
if pid == 0:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_position_beyond_the_cache_is_refused() -> None:
    states, rotation = random(1, 1, 8), random(1, 1, 8)
    buffers = random(1, 1, 4, 8), random(1, 1, 4, 8)
    for position in (-1, 4):
        positions = torch.tensor([[position]])
        intervals = torch.zeros(1, 2, 1, 1, dtype=torch.int32)
        with pytest.raises(RuntimeError, match=f"position {position} of a cache of 4 slots"):
            OPS.rotary_attention(states, states, states, rotation, rotation, positions, intervals, *buffers, 1.0)


def test_the_library_has_the_declared_c_functions() -> None:
    functions = ctypes.CDLL(str(cpu.built_at()))
    for operator, declarations in cpu.c_shims().items():
        for declaration in declarations:
            name = declaration.partition("(")[0].split()[-1]
            assert getattr(functions, name)
            assert name == f"aoti_torch_cpu_{operator.overloadpacket.__name__}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    query, key = 100 * random(1, 1, 2, 32, dtype=dtype), 100 * random(1, 1, 50, 32, dtype=dtype, seed=1)
    value = random(1, 1, 50, 32, dtype=dtype, seed=2)
    last = torch.tensor([[30, 49]], dtype=torch.int32)
    got = OPS.attention(query, key, value, torch.zeros_like(last), last, 1.0)
    check(got, reference.attention(query.double(), key.double(), value.double(), torch.zeros_like(last), last, 1.0))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_a_row_does_not_depend_on_the_other_rows(dtype: torch.dtype) -> None:
    int4 = random_weight(1030, 256, 64, True, torch.bfloat16)
    packed, scale = cpu.pack(int4.codes(), int4.scale, int4.zero)
    weight, codes, row_scale = random(1030, 256, dtype=dtype, seed=1), random(1030, 256, seed=2), random(1030, seed=3)
    codes = (30 * codes).clamp(-127, 127).to(torch.int8)
    rows = random(64, 256, dtype=dtype)
    layers = [
        lambda x: OPS.int4_linear(x, [packed], [scale], [1030], False)[0],
        lambda x: OPS.int4_linear(x, [packed], [scale], [1030], True)[0],
        lambda x: OPS.int8_linear(x, codes, row_scale, False),
        lambda x: OPS.int8_linear(x, codes, row_scale, True),
        lambda x: OPS.linear(x[:, :250], weight[:, :250].contiguous(), None),
    ]
    for layer in layers:
        alone = torch.cat([layer(row) for row in rows.split(1)])
        for count in (2, 3, 4, 5, 6, 7, 8, 9, 13, 64):
            for start in {0, 64 - count, (64 - count) // 2}:
                at = slice(start, start + count)
                assert layer(rows[at]).equal(alone[at])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("columns", "group_size"), [(256, 64), (1408, 128)])
def test_many_rows_have_the_bits_of_one(columns: int, group_size: int, asymmetric: bool) -> None:
    """A CPU with AMX multiplies six rows or more in tiles, of which several share what is unpacked of 1,024 columns.

    300 rows are more than are prepared at a time.
    """
    int4 = random_weight(200, columns, group_size, asymmetric, torch.bfloat16)
    packed, scale = cpu.pack(int4.codes(), int4.scale, int4.zero)
    rows = random(300, columns)
    rows[3], rows[20, 64:128], rows[40, 7] = 1.0, 0.0, 1e4  # the largest sums, the smallest and large differences
    alone = torch.cat([OPS.int4_linear(row, [packed], [scale], [200], True)[0] for row in rows.split(1)])
    for count in (6, 7, 8, 16, 17, 33, 64, 70, 300):
        assert OPS.int4_linear(rows[:count], [packed], [scale], [200], True)[0].equal(alone[:count])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("width", [6, 50])
@pytest.mark.parametrize("heads", [2, 4, 6, 14])
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_a_query_does_not_depend_on_the_other_queries(dtype: torch.dtype, heads: int, width: int) -> None:
    query, key, value = (
        random(3, heads, width, 64, dtype=dtype),
        random(3, 2, 700, 64, dtype=dtype, seed=1),
        random(3, 2, 700, 64, dtype=dtype),
    )
    last = torch.randint(700, (3, width), generator=torch.Generator().manual_seed(3)).int()
    first = last // 3
    whole = OPS.attention(query, key, value, first, last, 0.125)
    for row in range(3):
        for column in range(width):
            slots = int(last[row, column]) + 1
            at = slice(row, row + 1), slice(column, column + 1)
            alone = OPS.attention(
                query[at[0], :, at[1]], key[at[0], :, :slots], value[at[0], :, :slots], first[at], last[at], 0.125
            )
            assert alone.equal(whole[at])


def test_operators_of_pytorch_give_its_results() -> None:
    x = random(3, 5, 32)
    assert OPS.mean(x).equal(x.mean(-1, keepdim=True))
    assert OPS.cos(x).equal(x.cos())
    assert OPS.sin(x).equal(x.sin())
    assert OPS.tanh(x).equal(x.tanh())
    for approximate in ("none", "tanh"):
        assert OPS.gelu(x, approximate).equal(torch.nn.functional.gelu(x, approximate=approximate))
    weight, bias = random(32, seed=1), random(32, seed=2)
    assert OPS.layer_norm(x, weight, bias, 1e-6).equal(torch.nn.functional.layer_norm(x, (32,), weight, bias, 1e-6))


def test_without_a_compiler_build_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "_IS_LOADED", None)
    assert not cpu.load()
    monkeypatch.setattr(cpu, "_IS_LOADED", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler was found"):
        cpu.build()
    assert list(tmp_path.iterdir()) == []


def test_a_broken_library_is_not_loaded_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "_IS_LOADED", None)
    cpu.built_at().write_bytes(b"torn")
    with pytest.warns(UserWarning, match="does not load.*delete it to build it again"):
        assert not cpu.load()


def test_a_compiler_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "_IS_LOADED", None)
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main() { return nothing; }\n", encoding="utf-8")
    monkeypatch.setattr(cpu, "SOURCES", (broken,))
    with pytest.raises(RuntimeError, match=r"could not build broken.cpp: .*nothing"):
        cpu.build()
    assert list((tmp_path / "cache").iterdir()) == []
    assert not cpu.load()
