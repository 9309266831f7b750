"""The ladder of kernels/README.md for scripts/check_kernels.py: the 4-bit matmul with other designs and constants.

    python scripts/check_kernels.py --op ladder --all --arch 90

Configurations before the shipped ones exceed the limit of instructions a weight, which is what they demonstrate.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from specdec_kernels.configuration import Configuration
from specdec_kernels.w4a16.kernel import BY_NAME


@triton.jit
def naive_kernel(
    x_ptr,  # [M, K] bf16
    codes_ptr,  # [K/8, N] int32, nibble i of row r is W^T's row 8r + i
    scale_ptr,  # [K/128, N] bf16
    y_ptr,  # [M, N] bf16
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The product from GPTQ's layout: every word is read by eight threads, every weight is converted and scaled."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        words = tl.load(codes_ptr + (start + k)[:, None] // 8 * N + n[None, :])
        codes = words >> (k % 8 * 4)[:, None] & 15
        scale = tl.load(scale_ptr + start // 128 * N + n)
        weights = (codes - 8).to(tl.bfloat16) * scale[None, :]
        x = tl.load(x_ptr + tl.minimum(m, M - 1)[:, None] * K + (start + k)[None, :])
        acc = tl.dot(x, weights, acc)
    tl.store(y_ptr + m[:, None] * N + n[None, :], acc.to(tl.bfloat16), (m < M)[:, None])


SHIPPED = BY_NAME["bf16-symmetric-128-bf16-m16"]


def variant(name: str, **constants: int | bool) -> Configuration:
    """The shipped kernel with other constants."""
    constants = SHIPPED.constants | constants
    return replace(SHIPPED, op="ladder", name=name, constants=constants, weights_per_pass=128 * constants["BN"])


_POINTERS = {"x_ptr": "*bf16", "codes_ptr": "*i32", "scale_ptr": "*bf16", "y_ptr": "*bf16"}

CONFIGURATIONS = [
    Configuration(
        op="ladder",
        name="1 naive",
        kernel=naive_kernel,
        signature=_POINTERS | dict.fromkeys(("M", "N", "K"), "i32"),
        constants={"BM": 16, "BN": 128, "BK": 64},
        divisible=(*_POINTERS, "N", "K"),
        weights_per_pass=64 * 128,
    ),
    variant("2 tiles, eight dots, plain", ASM=False),
    variant("3 inline asm, BN 64", BN=64),
    variant("4 BN 128, shipped", BN=128),
    variant("5 BM 32, shipped from 17 rows on", BM=32),
    variant("BN 256", BN=256),
    variant("BN 256, BM 32", BN=256, BM=32),
    replace(variant("8 warps, BN 256", BN=256), num_warps=8),
]
