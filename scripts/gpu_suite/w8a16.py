"""The 8-bit matmul: heads and dtypes against float64; times against cuBLAS, dequantizing, PyTorch's own op."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from specdec_kernels.w8a16 import matmul
from torch import Tensor

from gpu_suite.checking import check_case, max_relative_error
from gpu_suite.rows import goal, matmul_rows
from gpu_suite.suite import Row, Section, Suite
from gpu_suite.w4a16 import REFERENCE_ROWS, raise_error

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def multiply(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The op as a model calls it. Without a GPU: the interpreted kernel."""
    if x.is_cuda:
        return matmul(x, weight, scale)
    from specdec_kernels.w8a16 import kernel

    return kernel.launch(x, weight, scale)


def random_weight(k: int, n: int, scale_dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """int8 [N, K], a scale a row [N]."""
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    return weight, ((torch.rand(n, device=device) + 0.5) / 1024).to(scale_dtype)


def reference(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T in float64, some rows of W at a time."""
    return torch.cat([x.double() @ part.double().T for part in weight.split(REFERENCE_ROWS)], 1) * scale.double()


def check(suite: Suite) -> list[Row]:
    """All heads and scale dtypes; a row of x has the same bits alone, among any others, and at any position."""
    sizes = suite.sizes

    def make_inputs(k: int, n: int, scale_dtype: torch.dtype) -> tuple:
        x = torch.randn(max(sizes.checked_rows), k, device=suite.device).to(suite.dtype)
        return x, *random_weight(k, n, scale_dtype, suite.device)

    def same_bits(result: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> bool:
        first = all(multiply(x[:m].contiguous(), weight, scale).equal(result[:m]) for m in sizes.checked_rows)
        return first and all(multiply(x.roll(m, 0), weight, scale).equal(result.roll(m, 0)) for m in sizes.checked_rows)

    bound = torch.finfo(suite.dtype).eps / 2 + 1e-3  # rounded once; the rest is for sums in float32
    cases = [(*shape, torch.float32) for shape in sizes.head_shapes]
    cases += [(*sizes.head_shapes[0], scale_dtype) for scale_dtype in SCALE_DTYPES[1:]]
    return [
        check_case(
            suite,
            "w8a16",
            f"{k}->{n}, scales {str(scale_dtype).removeprefix('torch.')}",
            partial(make_inputs, k, n, scale_dtype),
            multiply,
            reference,
            same_bits,
            max_relative_error,
            bound,
        )
        for k, n, scale_dtype in cases
    ]


def torch_int8(weight: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    """PyTorch's own 8-bit matmul; RuntimeError where it is absent or gives another result."""
    op, scale = torch.ops.aten._weight_int8pack_mm, scale.bfloat16()
    x = torch.randn(2, weight.shape[1], device=weight.device).bfloat16()
    error = max_relative_error(op(x, weight, scale), reference(x, weight, scale))
    if not error < 0.05:
        raise RuntimeError(f"its result is off by {error:.2g}")
    return lambda x: op(x.bfloat16(), weight, scale)


def time_head(suite: Suite, k: int, n: int) -> list[Row]:
    """Times of one head at each number of rows."""
    num_bytes = k * n + 4 * n
    copies = [random_weight(k, n, torch.float32, suite.device) for _ in range(suite.num_copies(num_bytes))]
    weight, scale = copies[0]

    def dequantize() -> Tensor:
        return weight.to(suite.dtype) * scale.to(suite.dtype)[:, None]

    candidates: dict[str, list[Callable[[Tensor], Tensor]]] = {
        "w8a16": [partial(multiply, weight=weight, scale=scale) for weight, scale in copies],
        "cublas": [partial(F.linear, weight=dequantize()) for _ in range(suite.num_copies(2 * k * n))],
        "dequantize": [lambda x: F.linear(x, dequantize())],
    }
    try:
        candidates["torch_int8"] = [torch_int8(*copy) for copy in copies]
    except (RuntimeError, NotImplementedError) as error:
        candidates["torch_int8"] = [partial(raise_error, error)]
    return matmul_rows(suite, candidates, (k, n), suite.sizes.rows, num_bytes, "int8", suite.dtype)


@torch.inference_mode()
def run(suite: Suite) -> Row:
    results = []
    for shape in suite.sizes.head_shapes:
        results += time_head(suite, *shape)
        suite.empty_cache()
    k, n = max(suite.sizes.head_shapes, key=math.prod)
    largest_few = [row for row in results if row["shape"] == f"{k}->{n}" and row["rows"] <= 16]
    goals = [
        goal(">= 85 % of a copy's speed, M = 1..16, largest head", "fraction_of_copy", min, 0.85, largest_few),
        goal("T(16) / T(1) <= 1.10", "cost_in_one_row", max, 1.10, [row for row in results if row["rows"] == 16]),
        goal(">= 1.8 x cuBLAS bf16, M <= 8", "ratio_to_cublas", min, 1.8, [row for row in results if row["rows"] <= 8]),
        goal("never slower than dequantize + matmul", "ratio_to_dequantize", min, 1.0, results),
    ]
    return {"bandwidth": suite.bandwidth, "results": results, "goals": goals}


SECTION = Section("w8a16", run, check)
