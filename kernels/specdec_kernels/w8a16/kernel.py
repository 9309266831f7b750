"""The 8-bit matmul in Triton."""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.configuration import Configuration, interpreting
from specdec_kernels.w8a16 import dequantize

INTERPRETING = tl.constexpr(interpreting())
CODES_FP16 = tl.constexpr(dequantize.codes(torch.float16))
CODES_BF16 = tl.constexpr(dequantize.codes(torch.bfloat16))
UNIT_FP16 = tl.constexpr(dequantize.UNIT[torch.float16])
UNIT_BF16 = tl.constexpr(dequantize.UNIT[torch.bfloat16])
BLOCK_N = 64
BLOCK_K = 128
# Of a block. Four warps would have 64 rows or more multiplied by wgmma or tcgen05, whose operands take twice as many
# instructions to make.
NUM_WARPS = 2


@triton.jit(do_not_specialize=["M", "N"])  # one variant runs any number of rows of either
def w8a16_kernel(
    x_ptr,  # [M, K] fp16 or bf16
    weight_ptr,  # [N, K] int8
    scale_ptr,  # [N] fp32, fp16 or bf16
    y_ptr,  # [M, N] like x
    M,
    N,
    K,  # a multiple of 16
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ASM: tl.constexpr,  # False: plain Triton, for the interpreter
):
    """y[m, n] = scale[n] * sum_k x[m, k] * weight[n, k].

    Grid: (blocks of M, blocks of N), the first one fastest, so that blocks of the same weights run together. Bound by
    reading N*K bytes of codes once, then by issuing instructions; so a block computes y^T, since x as the right operand
    needs fewer moves between registers. One block sums over all of K, in one order, so a row's bits do not depend on M.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # rows beyond M and N repeat the last one, which is cheaper than a mask in the loop
    x_ptrs = x_ptr + tl.minimum(m, M - 1)[:, None].to(tl.int64) * K + k[None, :]
    weight_ptrs = weight_ptr + tl.minimum(n, N - 1)[:, None].to(tl.int64) * K + k[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for start in tl.range(0, K, BK):
        inside = start + k < K
        x = tl.load(x_ptrs, inside[None, :], other=0.0)
        codes = tl.load(weight_ptrs, inside[None, :], other=0)
        values = _values(codes, x_ptr.dtype.element_ty, ASM)
        acc = tl.dot(values, x.to(values.dtype).T, acc)
        x_ptrs += BK
        weight_ptrs += BK

    unit: tl.constexpr = UNIT_FP16 if x_ptr.dtype.element_ty == tl.float16 else UNIT_BF16
    scale = tl.load(scale_ptr + n, n < N, other=0.0).to(tl.float32) * (1 / unit)
    y_ptrs = y_ptr + (m[None, :].to(tl.int64) * N + n[:, None])
    tl.store(y_ptrs, (acc * scale[:, None]).to(y_ptr.dtype.element_ty), (m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _values(codes, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """int8 codes -> code times the dtype's unit; float32 under the interpreter, whose bfloat16 arithmetic is wrong."""
    if ASM and DTYPE == tl.float16:
        values = tl.inline_asm_elementwise(CODES_FP16, "=&r,=&r,r", (codes,), dtype=tl.float16, is_pure=True, pack=4)
    elif ASM:
        values = tl.inline_asm_elementwise(CODES_BF16, "=&r,=&r,r", (codes,), dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        values = codes.to(tl.float32) * (UNIT_FP16 if DTYPE == tl.float16 else UNIT_BF16)
        values = values if INTERPRETING else values.to(DTYPE)
    return values


def _configuration(dtype: str, scale: str, block_m: int) -> Configuration:
    return Configuration(
        op="w8a16",
        name=f"{dtype}-{scale}-m{block_m}",
        kernel=w8a16_kernel,
        signature={
            "x_ptr": f"*{dtype}", "weight_ptr": "*i8", "scale_ptr": f"*{scale}", "y_ptr": f"*{dtype}",
            "M": "i32", "N": "i32", "K": "i32",
        },
        constants={"BM": block_m, "BN": BLOCK_N, "BK": BLOCK_K, "ASM": True},
        num_warps=NUM_WARPS,
        divisible=("x_ptr", "weight_ptr", "scale_ptr", "y_ptr", "K"),
        weights_per_pass=BLOCK_N * BLOCK_K,
        weight_bits=8,
    )  # fmt: skip


NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# From 17 rows of x on, blocks of 32 rows save work.
CONFIGURATIONS = [_configuration(*each) for each in product(("bf16", "fp16"), ("fp32", "bf16", "fp16"), (16, 32))]
BY_NAME = {configuration.name: configuration for configuration in CONFIGURATIONS}


def launch(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Launch the kernel: x [M, K], weight [N, K], scale [N], all contiguous, none empty -> y [M, N]."""
    rows, columns = x.shape
    outputs = len(weight)
    chosen = BY_NAME[f"{NAMES[x.dtype]}-{NAMES[scale.dtype]}-m{32 if rows > 16 else 16}"]
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    grid = (-(-rows // chosen.constants["BM"]), -(-outputs // BLOCK_N))
    w8a16_kernel[grid](
        x, weight, scale, y, rows, outputs, columns,
        **chosen.constants | {"ASM": not interpreting()}, **chosen.options,
    )  # fmt: skip
    return y
