"""The 4-bit matmul: every shape and format against float64; times against cuBLAS, dequantizing, PyTorch's own op."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from specdec_kernels.w4a16 import PackedWeight, matmul, prepack
from specdec_kernels.w4a16.layout import E2M1
from torch import Tensor

from gpu_suite.checking import check_case, max_relative_error
from gpu_suite.rows import goal, matmul_rows
from gpu_suite.suite import MAIN_FORMAT, Row, Section, Suite, WeightFormat
from specdec.quant.int4 import Int4Tensor, pack, unpack
from specdec.quant.linear import Int4Linear

OTHER_FORMATS = (
    WeightFormat("asymmetric, 128", asymmetric=True),
    WeightFormat("symmetric, 64", 64),
    WeightFormat("symmetric, 32", 32),
    WeightFormat("e2m1, 32", 32, e2m1=True),
    WeightFormat("symmetric, 128, fp16", dtype=torch.float16),
)
REFERENCE_ROWS = 4096  # of W at a time, in float64


def multiply(x: Tensor, weight: PackedWeight) -> Tensor:
    """The op as a model calls it. Without a GPU: the interpreted kernel, in float16, the dtype that it supports."""
    if x.is_cuda or x.dtype != torch.float16:
        return matmul(x, weight)
    from specdec_kernels.w4a16 import kernel

    return kernel.launch(x, weight, None)


def random_weight(weight_format: WeightFormat, k: int, n: int, device: torch.device) -> tuple[Int4Tensor, PackedWeight]:
    """A weight [N, K] in the canonical layout and in the kernel's."""
    codes = torch.randint(16, (n, k), dtype=torch.uint8, device=device)
    groups = (n, k // weight_format.group_size)
    if weight_format.e2m1:
        scale = torch.randint(118, 123, groups, dtype=torch.uint8, device=device).view(torch.float8_e8m0fnu)
        int4 = Int4Tensor(pack(codes), scale, codebook=torch.tensor(E2M1, device=device))
    else:
        scale = ((torch.rand(groups, device=device) + 0.5) / 64).to(weight_format.dtype)
        zero = torch.randint(16, groups, dtype=torch.uint8, device=device) if weight_format.asymmetric else None
        int4 = Int4Tensor(pack(codes), scale, zero)
    packed = prepack(codes, int4.scale, int4.zero, int4.codebook)
    assert packed is not None
    return int4, packed


def reference(x: Tensor, int4: Int4Tensor) -> Tensor:
    """x W^T in float64, from the canonical layout, some rows of W at a time."""
    parts = []
    for start in range(0, len(int4.weight), REFERENCE_ROWS):
        part = int4[start : start + REFERENCE_ROWS]
        codes = unpack(part.weight)
        values = codes.double() if part.codebook is None else part.codebook.double()[codes.int()]
        groups = values.unflatten(1, (part.scale.shape[1], -1))
        if part.codebook is None:
            groups = groups - (8.0 if part.zero is None else part.zero.double()[..., None])
        parts.append(x.double() @ (groups * part.scale.float().double()[..., None]).flatten(1).T)
    return torch.cat(parts, 1)


def check(suite: Suite) -> list[Row]:
    """All shapes and formats; a row of x has the same bits alone, among any number of others, and at any position."""
    sizes = suite.sizes

    def make_inputs(weight_format: WeightFormat, k: int, n: int) -> tuple:
        x = torch.randn(max(sizes.checked_rows), k, device=suite.device).to(weight_format.dtype)
        return x, *random_weight(weight_format, k, n, suite.device)

    def same_bits(result: Tensor, x: Tensor, _: Int4Tensor, packed: PackedWeight) -> bool:
        first = all(multiply(x[:m].contiguous(), packed).equal(result[:m]) for m in sizes.checked_rows)
        return first and all(multiply(x.roll(m, 0), packed).equal(result.roll(m, 0)) for m in sizes.checked_rows)

    def check_format(weight_format: WeightFormat, k: int, n: int) -> Row:
        bound = torch.finfo(weight_format.dtype).eps / 2 + 1e-3  # rounded once; the rest is for sums in float32
        return check_case(
            suite,
            "w4a16",
            f"{k}->{n}, {weight_format.name}",
            partial(make_inputs, weight_format, k, n),
            lambda x, int4, packed: multiply(x, packed),
            lambda x, int4, packed: reference(x, int4),
            same_bits,
            max_relative_error,
            bound,
        )

    cases = [(MAIN_FORMAT, shape) for shape in sizes.shapes] + [(one, sizes.other_shape) for one in OTHER_FORMATS]
    return [check_format(suite.supported(weight_format), *shape) for weight_format, shape in cases]


def torch_int4(int4: Int4Tensor) -> Callable[[Tensor], Tensor]:
    """PyTorch's own 4-bit matmul on a symmetric weight; RuntimeError where it is absent or gives another result."""
    ops, codes, scale = torch.ops.aten, int4.codes(), int4.scale.bfloat16().T
    scales_and_zeros = torch.stack((scale, torch.zeros_like(scale)), -1).contiguous()
    if codes.is_cuda:
        packed = ops._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
        op = ops._weight_int4pack_mm
    else:
        packed = ops._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        op = ops._weight_int4pack_mm_for_cpu
    x = torch.randn(2, codes.shape[1], device=codes.device).bfloat16()
    error = max_relative_error(op(x, packed, int4.group_size, scales_and_zeros), reference(x, int4))
    if not error < 0.05:
        raise RuntimeError(f"its result is off by {error:.2g}")
    return lambda x: op(x.bfloat16(), packed, int4.group_size, scales_and_zeros)


def raise_error(error: Exception, x: Tensor) -> Tensor:
    raise error


def dequantizing(int4: Int4Tensor) -> Int4Linear:
    """The layer as prefill runs it: tiles in full precision, one after the other, from the canonical codes."""
    layer = Int4Linear(int4).eval()
    layer.use_kernel, layer.has_chosen_kernel = False, True
    return layer


def time_format(
    suite: Suite, weight_format: WeightFormat, shape: tuple[int, int], rows: Sequence[int], all_baselines: bool
) -> list[Row]:
    """Times of one weight at each number of rows, against all baselines or cuBLAS alone."""
    k, n = shape
    int4, packed = random_weight(weight_format, k, n, suite.device)
    num_bytes = packed.tiles.nbytes + packed.scale.nbytes
    copies = [
        replace(packed, tiles=packed.tiles.clone(), scale=packed.scale.clone())
        for _ in range(suite.num_copies(num_bytes))
    ]
    dense = [int4.dequantize(weight_format.dtype) for _ in range(suite.num_copies(2 * k * n))]
    candidates: dict[str, list[Callable[[Tensor], Tensor]]] = {
        "w4a16": [partial(multiply, weight=weight) for weight in copies],
        "cublas": [partial(F.linear, weight=weight) for weight in dense],
    }
    if all_baselines:
        candidates["dequantize"] = [dequantizing(replace(int4, weight=int4.weight.clone())) for _ in range(2)]
        try:
            candidates["torch_int4"] = [torch_int4(int4) for _ in copies]
        except (RuntimeError, NotImplementedError) as error:
            candidates["torch_int4"] = [partial(raise_error, error)]
    return matmul_rows(suite, candidates, shape, rows, num_bytes, weight_format.name, weight_format.dtype)


@torch.inference_mode()
def run(suite: Suite) -> Row:
    sizes, main, others = suite.sizes, [], []
    for shape in sizes.shapes:
        main += time_format(suite, suite.supported(MAIN_FORMAT), shape, sizes.rows, all_baselines=True)
        suite.empty_cache()
    for weight_format in OTHER_FORMATS:
        others += time_format(suite, suite.supported(weight_format), sizes.other_shape, (6,), all_baselines=False)
        suite.empty_cache()
    large = {f"{k}->{n}" for k, n in sorted(sizes.shapes, key=math.prod)[-3:]}
    large_few = [row for row in main if row["shape"] in large and row["rows"] <= 16]
    goals = [
        goal(">= 85 % of a copy's speed, M = 1..16, three largest shapes", "fraction_of_copy", min, 0.85, large_few),
        goal("T(16) / T(1) <= 1.10", "cost_in_one_row", max, 1.10, [row for row in main if row["rows"] == 16]),
        goal(">= 3.4 x cuBLAS bf16, M <= 8", "ratio_to_cublas", min, 3.4, [row for row in main if row["rows"] <= 8]),
        goal("never slower than dequantize + matmul", "ratio_to_dequantize", min, 1.0, main),
    ]
    return {"bandwidth": suite.bandwidth, "results": main, "other_forms": others, "goals": goals}


SECTION = Section("w4a16", run, check)
