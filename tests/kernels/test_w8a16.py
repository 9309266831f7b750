"""The 8-bit matmul: PTX, the kernel under Triton's interpreter (or on a GPU), the operator."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, library

pytest.importorskip("triton")

from specdec_kernels import trial, w8a16
from specdec_kernels.configuration import interpreting
from specdec_kernels.w8a16 import dequantize, kernel, reference

from tests.helpers.poison import poison_empty
from tests.helpers.ptx import halves, run_ptx

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16)
SCALE_DTYPES = (torch.float32, *DTYPES)
SHAPES = [(64, 256), (1, 256), (65, 16), (130, 400), (257, 576)]  # N, K: whole and partial blocks of both


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty(monkeypatch)


def random_weight(rows: int, columns: int, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    weight = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, device=DEVICE)
    return weight, ((0.5 + torch.rand(rows, device=DEVICE)) / 1000).to(scale_dtype)


def random_input(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, device=DEVICE).to(dtype)


def rounding(dtype: torch.dtype) -> float:
    """The relative error of one rounding to a dtype. The interpreter truncates to bfloat16."""
    eps = torch.finfo(dtype).eps
    return eps if dtype == torch.bfloat16 and interpreting() else eps / 2


def exact(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.double() @ weight.double().T * scale.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_agrees_with_the_formula(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, scale = random_weight(*shape)
    for count in (1, 6, 17, 64):
        x = random_input(count, shape[1], dtype)
        expected = exact(x, weight, scale)
        got, atol = kernel.launch(x, weight, scale), 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(got.double(), expected, rtol=rounding(dtype), atol=atol)
        got = reference.matmul(x, weight, scale)
        torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps / 2, atol=atol)


@pytest.mark.parametrize(("dtype", "scale_dtype"), list(product(DTYPES, SCALE_DTYPES)), ids=str)
def test_scales_of_any_dtype(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    weight, scale = random_weight(70, 144, scale_dtype)
    for count in (3, 18):
        x = random_input(count, 144, dtype)
        expected = exact(x, weight, scale)
        got = kernel.launch(x, weight, scale)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=rounding(dtype), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_at_any_number_of_rows_and_index(dtype: torch.dtype) -> None:
    weight, scale = random_weight(75, 528)
    x = random_input(64, 528, dtype)
    alone = torch.cat([kernel.launch(row[None], weight, scale) for row in x])
    for count in range(1, 65):
        order = torch.randperm(64, device=DEVICE)[:count]
        assert kernel.launch(x[order], weight, scale).equal(alone[order]), count


def test_columns_beyond_k_and_rows_beyond_m_are_not_read() -> None:
    """K ends in the middle of a block, and what follows x in memory is NaN."""
    weight, scale = random_weight(64, 144)
    memory = torch.full((5, 144), torch.nan, dtype=torch.float16, device=DEVICE)
    memory[:3] = random_input(3, 144, torch.float16)
    assert not kernel.launch(memory[:3], weight, scale).isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ptx_converts_all_codes_of_all_positions(dtype: torch.dtype) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint32)
    words = patterns | np.random.permutation(patterns) << 16
    out = run_ptx(dequantize.codes(dtype), {"$2": words})
    codes = words.view(np.int8).reshape(-1, 4)
    for pair in range(2):
        for half, got in enumerate(halves(out[f"${pair}"], dtype)):
            assert (got == codes[:, 2 * pair + half] * dequantize.UNIT[dtype]).all(), (pair, half)


def test_a_wrong_selector_in_the_ptx_is_detected() -> None:
    words = np.arange(1 << 16, dtype=np.uint32)
    out = run_ptx(dequantize.codes(torch.float16).replace("0x4140", "0x4240"), {"$2": words})
    assert not (halves(out["$0"], torch.float16)[1] == words.view(np.int8).reshape(-1, 4)[:, 1] * 2.0**-9).all()


# The operator.


def test_the_operator_passes_opcheck() -> None:
    arguments = (random_input(6, 256, torch.float16).view(2, 3, 256), *random_weight(40, 256))
    library.opcheck(torch.ops.specdec.w8a16.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("shape", [(2, 3, 256), (256,), (2, 0, 256)], ids=str)
def test_batches_a_single_row_and_no_rows(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w8a16, "runs_on", lambda device: True)
    weight, scale = random_weight(40, 256)
    x = torch.randn(*shape[:-1], 512, device=DEVICE).half()[..., ::2]
    for compute in (w8a16.matmul, w8a16._on_cuda):
        got = compute(x, weight, scale)
        assert got.shape == (*shape[:-1], 40)
        torch.testing.assert_close(got.double(), exact(x, weight, scale), rtol=1e-3, atol=1e-4)


def test_the_kernel_runs_where_it_is_supported_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[Tensor] = []
    launch = kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda x, *rest: launches.append(x) or launch(x, *rest))
    x, (weight, scale) = random_input(3, 256, torch.float16), random_weight(40, 256)
    unsupported = {
        "columns": (x[:, :24], weight[:, :24].contiguous(), scale),
        "strided weight": (x, weight.T.contiguous().T, scale),
        "strided scale": (x, weight, scale.repeat_interleave(2)[::2]),
    }
    monkeypatch.setattr(w8a16, "runs_on", lambda device: True)
    for name, arguments in unsupported.items():
        assert not w8a16.is_supported(*arguments), name
        torch.testing.assert_close(w8a16._on_cuda(*arguments).double(), exact(*arguments), rtol=1e-3, atol=1e-4)
    assert not launches
    assert w8a16.is_supported(x, weight, scale)
    w8a16._on_cuda(x, weight, scale)
    assert launches
    monkeypatch.setattr(trial, "passes", lambda *_: False)
    assert not w8a16.is_supported(x, weight, scale)
    monkeypatch.undo()
    assert w8a16.is_supported(x, weight, scale) == (DEVICE == "cuda")


def test_bad_input_is_refused() -> None:
    x, (weight, scale) = random_input(3, 256, torch.float16), random_weight(40, 256)
    for arguments, message in (
        ((x.float(), weight, scale), r"x is torch.float32; it must be float16 or bfloat16"),
        ((x, weight.short(), scale), r"the weight is torch.int16 \[40, 256\]; it must be int8 \[N, K\]"),
        ((x, weight[0], scale), r"the weight is torch.int8 \[256\]; it must be int8 \[N, K\]"),
        ((x, weight, scale.double()), r"scale is torch.float64 \[40\]; it must be float32, float16 or bfloat16 \[40\]"),
        ((x, weight, scale[1:]), r"scale is torch.float32 \[39\]; it must be float32, float16 or bfloat16 \[40\]"),
        ((x[:, 1:], weight, scale), r"x has shape \[3, 255\]; the weight takes 256 columns"),
        ((x, weight.to("meta"), scale), r"the weight on meta, scale on c.*; move them to one device"),
    ):
        with pytest.raises(ValueError, match=message):
            w8a16.matmul(*arguments)
        assert not w8a16.is_supported(*arguments)
