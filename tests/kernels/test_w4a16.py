"""The 4-bit matmul: layout, PTX, the kernel under Triton's interpreter (or on a GPU), the operator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

pytest.importorskip("triton")

from specdec_kernels import w4a16
from specdec_kernels.w4a16 import dequantize, kernel, layout, reference
from specdec_kernels.w4a16.layout import E2M1, TILE, PackedWeight, prepack

from tests.helpers.ptx import halves, run_ptx

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# N, K, group size: whole and partial blocks, all group sizes, one and several splits
SHAPES = [
    (128, 256, 128),
    (130, 512, 256),
    (70, 384, 64),
    (33, 160, 32),
    (20, 200, 200),
    (300, 1280, 128),
    (257, 1152, 32),
]
KINDS = ("symmetric", "asymmetric", "e2m1")


def random_weight(
    rows: int, columns: int, group_size: int, kind: str = "symmetric", scale_dtype: torch.dtype = torch.float16
) -> tuple[PackedWeight, Tensor]:
    """A packed weight, and W [N, K] float32 by the formula."""
    codes = torch.randint(16, (rows, columns), dtype=torch.uint8)
    scale = (0.01 + 0.02 * torch.rand(rows, columns // group_size)).to(scale_dtype)
    zero = torch.randint(16, scale.shape, dtype=torch.uint8) if kind == "asymmetric" else None
    codebook = torch.tensor(E2M1) if kind == "e2m1" else None
    if codebook is not None:
        scale = torch.randint(90, 122, scale.shape, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        values = codebook[codes.int()]
    else:
        values = codes.float() - (8 if zero is None else zero.float().repeat_interleave(group_size, dim=1))
    weight = prepack(codes, scale, zero, codebook)
    assert weight is not None
    return to_device(weight), values * scale.float().repeat_interleave(group_size, dim=1)


def to_device(weight: PackedWeight) -> PackedWeight:
    return replace(weight, tiles=weight.tiles.to(DEVICE), scale=weight.scale.to(DEVICE))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison new tensors with NaN; run E2M1 on float16, since the interpreter's bfloat16 arithmetic is wrong."""
    empty = torch.empty

    def poisoned_empty(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(kernel.torch, "empty", poisoned_empty)
    if DEVICE == "cpu":
        chosen = kernel.BY_NAME["bf16-e2m1-32-bf16-m16"]
        monkeypatch.setitem(kernel.BY_NAME, "fp16-e2m1-32-bf16-m16", replace(chosen, name="fp16-e2m1-32-bf16-m16"))


def launch(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    padding = weight.tiles.shape[0] * TILE - x.shape[1]
    return kernel.launch(F.pad(x, (0, padding)), weight, bias)


def dtype_of(kind: str) -> torch.dtype:
    """The input dtype of a kind: E2M1 is shipped for bfloat16."""
    return torch.bfloat16 if kind == "e2m1" and DEVICE == "cuda" else torch.float16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_packed_weight_dequantizes_to_the_weight(shape: tuple[int, int, int], kind: str) -> None:
    rows, columns, group_size = shape
    for scale_dtype in (torch.float16, torch.bfloat16):
        if kind == "e2m1" and group_size != 32:
            return
        weight, expected = random_weight(rows, columns, group_size, kind, scale_dtype)
        assert weight.tiles.is_contiguous()
        assert weight.tiles.shape == (
            -(-columns // 128),
            -(-rows // layout.block_n(group_size)) * layout.block_n(group_size),
            16,
        )
        assert reference.dequantize(weight).cpu().equal(expected)
        part = weight.rows(rows // 3, rows // 2)
        assert part.codes().equal(weight.codes()[rows // 3 : rows // 2])


def test_words_have_the_documented_layout() -> None:
    codes = torch.randint(16, (128, 256), dtype=torch.uint8)
    tiles = layout.pack_tiles(codes, 128)
    for t, n, j, i in torch.randint(1 << 30, (200, 4)).tolist():
        t, n, (a, c), (h, i) = t % 2, n % 128, divmod(j % 16, 2), divmod(i % 8, 4)
        assert tiles[t, n, 2 * a + c].item() >> 16 * h + 4 * i & 15 == codes[n, t * 128 + (4 * c + i) * 16 + 2 * a + h]
    assert layout.gather_e2m1(layout.spread_e2m1(tiles)).equal(tiles)
    assert len(layout.spread_e2m1(torch.arange(1 << 16, dtype=torch.int32)).unique()) == 1 << 16


# each shape symmetric or asymmetric in turn, and every one with groups of 32 in E2M1
COVERING = [(shape, KINDS[index % 2]) for index, shape in enumerate(SHAPES)]
COVERING += [(shape, "e2m1") for shape in SHAPES if shape[2] == 32]


@pytest.mark.parametrize(("shape", "kind"), COVERING, ids=str)
def test_the_kernel_agrees_with_the_reference(shape: tuple[int, int, int], kind: str) -> None:
    rows, columns, group_size = shape
    weight, expected = random_weight(rows, columns, group_size, kind)
    bias = torch.randn(rows, dtype=dtype_of(kind), device=DEVICE)
    for count in (1, 6, 17, 40):
        x = torch.randn(count, columns, dtype=dtype_of(kind), device=DEVICE)
        exact = x.double() @ expected.double().T.to(DEVICE) + bias.double()
        got = launch(x, weight, bias)
        once_rounded = {"rtol": torch.finfo(x.dtype).eps / 2, "atol": 1e-5 * exact.abs().max().item()}
        torch.testing.assert_close(got.double(), exact, **once_rounded)
        torch.testing.assert_close(launch(x, weight).double(), exact - bias.double(), **once_rounded)
        torch.testing.assert_close(reference.matmul(x, weight, bias).double(), exact, **once_rounded)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_scales_of_either_dtype(dtype: torch.dtype, kind: str, scale_dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter's bfloat16 arithmetic is wrong")
    for group_size in (32, 64, 128):
        weight, expected = random_weight(40, 256, group_size, kind, scale_dtype)
        if kernel.configuration(weight, dtype, 3) is None:
            assert kind == "asymmetric"
            assert group_size < 128
            assert dtype != scale_dtype
            continue
        x = torch.randn(3, 256, dtype=dtype, device=DEVICE)
        exact = x.double() @ expected.double().T.to(DEVICE)
        assert (launch(x, weight).double() - exact).norm() / exact.norm() < (1e-3 if dtype == torch.float16 else 5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_at_any_number_of_rows_and_index(kind: str) -> None:
    weight, _ = random_weight(140, 1024, 32 if kind == "e2m1" else 128, kind)
    assert weight.splits > 1
    x = torch.randn(64, 1024, dtype=dtype_of(kind), device=DEVICE)
    alone = torch.cat([launch(row[None], weight) for row in x[:8]])
    for count in (2, 6, 16, 17, 33, 64):
        order = torch.randperm(64, device=DEVICE)[:count]
        order[-1] = 5
        together = launch(x[order], weight)
        for place, row in enumerate(order.tolist()):
            if row < 8:
                assert together[place].equal(alone[row]), (count, place)


def test_concatenated_weights_give_the_bits_of_each_alone() -> None:
    parts = [random_weight(rows, 1024, 128)[0] for rows in (256, 100, 130)]
    concatenated = layout.concatenate(parts)
    assert concatenated is not None
    x = torch.randn(6, 1024, dtype=torch.float16, device=DEVICE)
    y, start = launch(x, concatenated), 0
    for part in parts:
        own = concatenated.rows(start, start + part.out_features)
        assert own.codes().equal(part.codes())
        assert launch(x, own).equal(y[:, start : start + part.out_features])
        start += part.tiles.shape[1]
    assert layout.concatenate([parts[0], random_weight(128, 1024, 64)[0]]) is None


def test_counters_are_reset_to_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(kernel, "counters", lambda count, device: counter)
    weight, _ = random_weight(140, 1024, 128)
    x = torch.randn(20, 1024, dtype=torch.float16, device=DEVICE)
    first = launch(x, weight)
    assert not counter.any()
    assert launch(x, weight).equal(first)


# The PTX, interpreted.


def all_half_words() -> tuple[np.ndarray, np.ndarray]:
    """Pairs of words with every half-word in each of the four positions."""
    patterns = np.arange(1 << 16, dtype=np.uint32)
    others = [np.random.permutation(patterns) for _ in range(3)]
    return patterns | others[0] << 16, others[1] | others[2] << 16


@pytest.mark.parametrize("addends", [0, 1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_ptx_converts_all_nibbles(dtype: torch.dtype, addends: int) -> None:
    words = all_half_words()
    zeros = torch.randint(16, (max(addends, 1),)).tolist() if addends else [8]
    inputs = dict(zip(("$8", "$9"), words, strict=True))
    for g in range(addends):
        bits = dequantize.bits(-zeros[g] * layout.UNIT[dtype], dtype)
        inputs[f"${10 + 2 * g}"] = np.full(1 << 16, bits << 16 | bits, np.uint32)
    out = run_ptx(dequantize.nibbles(dtype, addends), inputs)
    for i in range(8):
        zero = zeros[i * addends // 8]
        for half, got in enumerate(halves(out[f"${i}"], dtype)):
            codes = (words[i // 4] >> np.uint32(16 * half + 4 * (i % 4)) & 15).astype(float)
            assert (got == (codes - zero) * layout.UNIT[dtype]).all(), i


def test_the_ptx_converts_all_spread_e2m1_codes() -> None:
    codes = all_half_words()
    spread = [layout.spread_e2m1(torch.from_numpy(word.view(np.int32))).numpy().view(np.uint32) for word in codes]
    exponents = [127 + 126, 127, 140, 127 + 126 - layout.E2M1_SPAN]
    inputs = dict(zip(("$8", "$9"), spread, strict=True))
    inputs |= {f"${10 + 2 * g}": np.full(1 << 16, power * 0x00800080, np.uint32) for g, power in enumerate(exponents)}
    out = run_ptx(dequantize.e2m1(), inputs)
    for i in range(8):
        factor = 2.0 ** (exponents[i // 2] - 127 - layout.E2M1_UNIT)
        for half, got in enumerate(halves(out[f"${i}"], torch.bfloat16)):
            code = codes[i // 4] >> np.uint32(16 * half + 4 * (i % 4)) & 15
            assert (got == np.array(E2M1)[code] * factor).all(), i


def test_a_wrong_mask_in_the_ptx_is_detected() -> None:
    wrong = dequantize.nibbles(torch.float16, 0).replace("0x000F000F", "0x000F00F0", 1)
    words = all_half_words()
    out = run_ptx(wrong, dict(zip(("$8", "$9"), words, strict=True)))
    assert not (halves(out["$0"], torch.float16)[0] == ((words[0] & 15).astype(float) - 8) * 2.0**-9).all()


# The operator.


def test_the_operator_passes_opcheck() -> None:
    weight, _ = random_weight(40, 256, 128)
    x, bias = torch.randn(2, 3, 256).half().to(DEVICE), torch.randn(40).half().to(DEVICE)
    args = (x, weight.tiles, weight.scale, bias, torch.randperm(256, device=DEVICE), weight.kind, weight.group_size,
            weight.scale_dtype, weight.exponent, weight.splits, weight.out_features)  # fmt: skip
    library.opcheck(torch.ops.specdec.w4a16.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_columns_in_another_order_batches_and_no_rows(kind: str) -> None:
    weight, expected = random_weight(40, 256, 64, kind)
    perm = torch.randperm(256, device=DEVICE)
    x = torch.randn(2, 3, 512, dtype=torch.float16, device=DEVICE)[..., ::2]
    assert not x.is_contiguous()
    exact = x[..., perm].double() @ expected.double().T.to(DEVICE)
    got = w4a16.matmul(x, weight, perm=perm)
    assert got.shape == (2, 3, 40)
    assert (got.double() - exact).norm() / exact.norm() < 1e-3
    assert w4a16.matmul(x[:, :0], weight).shape == (2, 0, 40)


def test_the_launch_side_of_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator's CUDA code around the kernel: perm, padding, bias of another dtype, no rows, no kernel."""
    shapes: list[tuple[tuple[int, int, int], str]] = [((33, 160, 32), "symmetric"), ((20, 200, 200), "asymmetric")]
    for shape, kind in shapes:
        weight, expected = random_weight(*shape, kind)
        perm = torch.randperm(shape[1], dtype=torch.int32, device=DEVICE)
        bias = torch.randn(shape[0], device=DEVICE)
        x = torch.randn(2, 3, shape[1], dtype=torch.float16, device=DEVICE)
        rest = (weight.kind, weight.group_size, weight.scale_dtype, weight.exponent, weight.splits, weight.out_features)
        got = w4a16._by_kernel(x, weight.tiles, weight.scale, bias, perm, *rest)
        exact = x[..., perm].double() @ expected.double().T.to(DEVICE) + bias.double()
        assert (got.double() - exact).norm() / exact.norm() < 1e-3
        assert w4a16._by_kernel(x[:0], weight.tiles, weight.scale, bias, perm, *rest).shape == (0, 3, shape[0])
        with monkeypatch.context() as patch:
            patch.setattr(kernel, "launch", None)  # only the reference can compute it
            assert w4a16._by_kernel(x.float(), weight.tiles, weight.scale, bias, perm, *rest).dtype == torch.float32


def test_many_rows_are_split_over_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w4a16, "MAX_ROWS", 8)
    weight, _ = random_weight(40, 512, 128)
    x = torch.randn(19, 512, dtype=torch.float16, device=DEVICE)
    rest = (weight.kind, weight.group_size, weight.scale_dtype, weight.exponent, weight.splits, weight.out_features)
    assert w4a16._by_kernel(x, weight.tiles, weight.scale, None, None, *rest).equal(launch(x, weight))


@pytest.mark.parametrize(
    ("columns", "scales", "dtype"), [(192, 2, torch.float16), (128, 8, torch.float16), (128, 1, torch.float32)], ids=str
)
def test_weights_without_a_kernel_are_not_packed(columns: int, scales: int, dtype: torch.dtype) -> None:
    assert prepack(torch.zeros(8, columns, dtype=torch.uint8), torch.ones(8, scales, dtype=dtype)) is None


def test_codebooks_without_a_kernel_are_not_packed() -> None:
    codes = torch.zeros(8, 64, dtype=torch.uint8)
    scale = torch.full((8, 2), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert prepack(codes, scale, codebook=torch.tensor(E2M1)) is not None
    assert prepack(codes, scale, codebook=torch.tensor(E2M1).flip(0)) is None
    assert prepack(codes, scale.float().half(), codebook=torch.tensor(E2M1)) is None
    assert prepack(codes[:, :32], scale[:, :2].repeat(1, 1)[:, :1].repeat(1, 2), codebook=torch.tensor(E2M1)) is None
    for far in (0, 255):
        wide = scale.view(torch.uint8).clone()
        wide[3, 1] = far
        assert prepack(codes, wide.view(torch.float8_e8m0fnu), codebook=torch.tensor(E2M1)) is None
    assert prepack(codes[:0], scale[:0]) is None


def test_bad_input_is_refused() -> None:
    weight, _ = random_weight(40, 256, 128)
    x = torch.randn(3, 256, device=DEVICE)
    with pytest.raises(ValueError, match=r"x is torch.float32; the 4-bit matmul takes float16 or bfloat16"):
        w4a16.matmul(x, weight)
    x = x.half()
    with pytest.raises(ValueError, match=r"x has shape \[3, 128\]; the weight takes 256 columns"):
        w4a16.matmul(x[:, :128], weight)
    with pytest.raises(ValueError, match=r"bias has shape \[39\]; the weight has 40 rows"):
        w4a16.matmul(x, weight, torch.zeros(39, device=DEVICE))
    with pytest.raises(ValueError, match=r"perm is torch.float32 \[256\]; it must hold 256 integers"):
        w4a16.matmul(x, weight, perm=torch.zeros(256, device=DEVICE))
    with pytest.raises(ValueError, match=r"x is on meta and the weight on c.*; move one to the other"):
        w4a16.matmul(x.to("meta"), weight)
