"""The 4-bit verification matmul in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.configuration import Configuration, interpreting
from specdec_kernels.counters import counters
from specdec_kernels.w4a16 import dequantize
from specdec_kernels.w4a16.layout import DOTS, SPREAD, SYMMETRIC_ZERO, TILE, UNIT, Kind, PackedWeight, block_n

INTERPRETING = tl.constexpr(interpreting())
NIBBLES_FP16 = tl.constexpr({addends: dequantize.nibbles(torch.float16, addends) for addends in (0, 1, 2, 4)})
NIBBLES_BF16 = tl.constexpr({addends: dequantize.nibbles(torch.bfloat16, addends) for addends in (0, 1, 2, 4)})
E2M1_BF16 = tl.constexpr(dequantize.e2m1())
REGISTERS = tl.constexpr({pairs: ",".join(["=&r"] * 8 + ["r"] * (2 + 2 * pairs)) for pairs in (1, 2, 4)})
UNIT_FP16 = tl.constexpr(UNIT[torch.float16])
UNIT_BF16 = tl.constexpr(UNIT[torch.bfloat16])
SIGNS = tl.constexpr(tuple(sign for sign, _ in SPREAD))
MAGNITUDES = tl.constexpr(tuple(magnitude for _, magnitude in SPREAD))
ZERO = tl.constexpr(SYMMETRIC_ZERO)
ROWS = tl.constexpr(TILE)
STEPS = tl.constexpr(DOTS)
STEP = tl.constexpr(TILE // DOTS)


@triton.jit(do_not_specialize=["M", "num_tiles", "has_bias"])  # one variant runs any number of rows
def w4a16_kernel(
    x_ptr,  # [M, K] fp16 or bf16, K = 128 T
    tiles_ptr,  # [T, N', 16] int32, see layout.py; tile_stride words from tile to tile
    scale_ptr,  # [words, N'] int32, see layout.py; scale_stride words from row to row
    bias_ptr,  # [N] like x; any address where has_bias is 0
    y_ptr,  # [M, N] like x
    partial_ptr,  # [splits, M, N'] float32; any address for one split
    counter_ptr,  # [blocks of N * blocks of M] int32 zeros, reset to zeros
    factor,  # float32, a power of two; multiplies the sum
    M,
    N,
    K,
    num_tiles,
    tile_stride,
    scale_stride,
    has_bias,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,  # rows that share a scale
    SCALE_BF16: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ASM: tl.constexpr,  # False: plain Triton, for the interpreter
):
    """y[m, n] = factor * sum_k x[m, k] * (code[k, n] - zero[k // G, n]) * scale[k // G, n] + bias[n].

    Grid: (blocks of M, blocks of N, splits of K), the first one fastest, so that blocks of the same weights run
    together. Bound by reading K*N/2 bytes of codes once, then by issuing instructions; so scales multiply the
    accumulator, once a group. The last block of an output tile sums its splits in order, so a row's bits depend neither
    on M nor on which block is last.
    """
    split, splits = tl.program_id(2), tl.num_programs(2)
    first = num_tiles * split // splits
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    j = tl.arange(0, STEP)
    # rows beyond M repeat the last one, which is cheaper than a mask in the loop
    x_ptrs = x_ptr + tl.minimum(m, M - 1)[:, None].to(tl.int64) * K + (first * ROWS + j[None, :])
    tile_ptrs = tiles_ptr + first.to(tl.int64) * tile_stride + (n[None, :] * STEP + j[:, None])
    acc = tl.zeros((BM, BN), tl.float32)
    for tile in range(first, num_tiles * (split + 1) // splits):
        codes = tl.load(tile_ptrs)
        words = _scale_words(scale_ptr + n, tile, scale_stride, KIND, GROUP)
        if KIND == "e2m1":
            values = _e2m1(codes, words, x_ptr.dtype.element_ty, ASM)
            for i in tl.static_range(STEPS):
                acc = _dot(tl.load(x_ptrs + i * STEP), values[i], acc)
        else:
            values = _nibbles(codes, words, x_ptr.dtype.element_ty, KIND, GROUP, SCALE_BF16, ASM)
            for g in tl.static_range(ROWS // GROUP):
                part = tl.zeros((BM, BN), tl.float32)
                for i in tl.static_range(g * GROUP // STEP, (g + 1) * GROUP // STEP):
                    part = _dot(tl.load(x_ptrs + i * STEP), values[i], part)
                acc += part * _scale(words, tile, g, KIND, GROUP, SCALE_BF16)[None, :]
        x_ptrs += ROWS
        tile_ptrs += tile_stride

    if splits == 1:
        _store(acc, bias_ptr, y_ptr, factor, m, n, M, N, has_bias)
    else:
        columns = tl.num_programs(1) * BN
        mask = (m < M)[:, None]
        part_ptrs = partial_ptr + (m[:, None].to(tl.int64) * columns + n[None, :])
        size = M.to(tl.int64) * columns
        tl.store(part_ptrs + split * size, acc, mask)
        tl.debug_barrier()  # all stores of the block precede the counter
        counter = counter_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
            total = tl.zeros((BM, BN), tl.float32)
            for s in tl.range(splits, num_stages=1, loop_unroll_factor=4):
                total += tl.load(part_ptrs + s * size, mask, other=0.0, cache_modifier=".cg")
            _store(total, bias_ptr, y_ptr, factor, m, n, M, N, has_bias)
            tl.store(counter, 0)


@triton.jit
def _scale_words(ptrs, tile, stride, KIND: tl.constexpr, GROUP: tl.constexpr):
    """The scale words of a tile, int32 [BN] each."""
    words = ()
    if KIND == "asymmetric":
        for g in tl.static_range(ROWS // GROUP):
            words = words + (tl.load(ptrs + (tile * (ROWS // GROUP) + g) * stride),)
    elif KIND == "e2m1":
        words = (tl.load(ptrs + tile * stride),)
    elif GROUP == ROWS:
        words = (tl.load(ptrs + tile // 2 * stride),)
    else:
        for g in tl.static_range(ROWS // GROUP // 2):
            words = words + (tl.load(ptrs + (tile * (ROWS // GROUP // 2) + g) * stride),)
    return words


@triton.jit
def _scale(words, tile, g: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SCALE_BF16: tl.constexpr):
    """The scale of a tile's group g, float32 [BN]."""
    if KIND == "asymmetric":
        bits = words[g]
    elif GROUP == ROWS:
        bits = words[0] >> (tile % 2 * 16)
    else:
        bits = words[g // 2] >> (g % 2 * 16)
    if SCALE_BF16:
        scale = (bits << 16).to(tl.float32, bitcast=True)
    else:
        scale = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale


@triton.jit
def _nibbles(
    codes,
    words,
    DTYPE: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_BF16: tl.constexpr,
    ASM: tl.constexpr,
):
    """Codes int32 [16, BN] and a tile's scale words -> for each dot [16, BN], (code - zero) times the dtype's unit."""
    if ASM:
        pairs = ()
        for g in tl.static_range(len(words)):
            pair = words[g]
            if KIND == "asymmetric":
                bits = (pair >> 16) & 0xFFFF
                if SCALE_BF16 != (DTYPE == tl.bfloat16):
                    bits = _addend(pair, DTYPE, SCALE_BF16).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
                pair = bits * 0x00010001
            # The asm ignores it if zero points are 8, but Triton prefetches only loads that a dot depends on.
            pairs = pairs + (tl.broadcast_to(pair[None, :], codes.shape),)
        ADDENDS: tl.constexpr = ROWS // GROUP if KIND == "asymmetric" else 0
        if DTYPE == tl.float16:
            values = tl.inline_asm_elementwise(
                NIBBLES_FP16[ADDENDS], REGISTERS[len(words)], (codes,) + pairs,
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True, pack=2,
            )  # fmt: skip
        else:
            values = tl.inline_asm_elementwise(
                NIBBLES_BF16[ADDENDS], REGISTERS[len(words)], (codes,) + pairs,
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
                       tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True, pack=2,
            )  # fmt: skip
    else:
        UNIT: tl.constexpr = UNIT_FP16 if DTYPE == tl.float16 else UNIT_BF16
        values = ()
        for i in tl.static_range(STEPS):
            value = (_half_words(codes, i // 4) >> 4 * (i % 4) & 15).to(tl.float32) * UNIT
            if KIND == "asymmetric":
                value += _addend(words[i * STEP // GROUP], DTYPE, SCALE_BF16)[None, :]
            else:
                value -= ZERO * UNIT
            values = values + (_as_operand(value, DTYPE),)
    return values


@triton.jit
def _addend(word, DTYPE: tl.constexpr, SCALE_BF16: tl.constexpr):
    """-zero times the dtype's unit, float32 [BN]; in the high half of a scale word it is in the scale dtype's unit."""
    if SCALE_BF16:
        addend = (word >> 16 << 16).to(tl.float32, bitcast=True) * (1 / UNIT_BF16)
    else:
        addend = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * (1 / UNIT_FP16)
    return addend * (UNIT_FP16 if DTYPE == tl.float16 else UNIT_BF16)


@triton.jit
def _e2m1(codes, words, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Spread codes int32 [16, BN], the exponents of a tile's four groups -> for each dot the scaled values [16, BN]."""
    word = words[0]
    if ASM:
        pairs = ()
        for g in tl.static_range(4):
            pair = (word >> 8 * g & 0xFF) * 0x00800080
            pairs = pairs + (tl.broadcast_to(pair[None, :], codes.shape),)
        values = tl.inline_asm_elementwise(
            E2M1_BF16, REGISTERS[4], (codes,) + pairs,
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
                   tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        values = ()
        for i in tl.static_range(STEPS):
            half = _half_words(codes, i // 4)
            bits = (half >> SIGNS[i % 4] & 1) << 31 | (half >> MAGNITUDES[i % 4] & 7) << 22
            scale = ((word >> 8 * (i // 2) & 0xFF) << 23).to(tl.float32, bitcast=True)
            values = values + (_as_operand(bits.to(tl.float32, bitcast=True) * scale[None, :], DTYPE),)
    return values


@triton.jit
def _half_words(words, c: tl.constexpr):
    """Words [16, BN] -> row 2a + h is half h of word 2a + c, in the low bits, as in the registers of the asm."""
    by_c = tl.split(tl.permute(tl.reshape(words, (8, 2, words.shape[1])), (0, 2, 1)))
    halves = tl.permute(tl.join(by_c[c], by_c[c] >> 16), (0, 2, 1))
    return tl.reshape(halves, words.shape)


@triton.jit
def _as_operand(value, DTYPE: tl.constexpr):
    """float32 under the interpreter, whose bfloat16 arithmetic is wrong; the values are exact in both."""
    return value if INTERPRETING else value.to(DTYPE)


@triton.jit
def _dot(x, values, acc):
    return tl.dot(x.to(values.dtype), values, acc)


@triton.jit
def _store(acc, bias_ptr, y_ptr, factor, m, n, M, N, has_bias):
    acc *= factor
    acc += tl.load(bias_ptr + n, n < N * has_bias, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + (m[:, None].to(tl.int64) * N + n[None, :])
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])


def _configuration(dtype: str, kind: Kind, group_size: int, scale: str, block_m: int) -> Configuration:
    pointers = ("x_ptr", "tiles_ptr", "scale_ptr", "bias_ptr", "y_ptr", "partial_ptr", "counter_ptr")
    sizes = ("M", "N", "K", "num_tiles", "tile_stride", "scale_stride", "has_bias")
    words = ("tiles_ptr", "scale_ptr", "counter_ptr")
    signature = dict.fromkeys(pointers, f"*{dtype}") | dict.fromkeys(words, "*i32") | dict.fromkeys(sizes, "i32")
    block = block_n(group_size)
    return Configuration(
        op="w4a16",
        name=f"{dtype}-{kind}-{group_size}-{scale}-m{block_m}",
        kernel=w4a16_kernel,
        signature=signature | {"partial_ptr": "*fp32", "factor": "fp32"},
        constants={
            "KIND": kind,
            "GROUP": group_size,
            "SCALE_BF16": scale == "bf16",
            "BM": block_m,
            "BN": block,
            "ASM": True,
        },
        divisible=(*pointers, "N", "K", "tile_stride", "scale_stride"),
        weights_per_pass=TILE * block,
        adjacent_pairs=True,
        ordered=True,
    )


# From 17 rows of x on, blocks of 32 rows save work. Small groups need too many registers for them, and for converting
# zero points if scales and inputs differ in dtype.
CONFIGURATIONS = [
    _configuration(dtype, kind, group_size, scale, block_m)
    for dtype in ("bf16", "fp16")
    for kind in ("symmetric", "asymmetric")
    for group_size in (128, 64, 32)
    for scale in ("bf16", "fp16")
    for block_m in ((16, 32) if group_size == 128 else (16,))
    if kind == "symmetric" or group_size == 128 or dtype == scale
] + [_configuration("bf16", "e2m1", 32, "bf16", 16)]
BY_NAME = {configuration.name: configuration for configuration in CONFIGURATIONS}
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def configuration(weight: PackedWeight, dtype: torch.dtype, rows: int) -> Configuration | None:
    """The configuration for inputs [rows, K] of a dtype, None where none is shipped."""
    block_m = 32 if rows > 16 and weight.group_size == TILE else 16
    name = f"{NAMES.get(dtype)}-{weight.kind}-{weight.group_size}-{NAMES[weight.scale_dtype]}-m{block_m}"
    return BY_NAME.get(name)


def launch(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Launch the kernel: x [M, K] contiguous, K whole tiles, M > 0, bias [N] like x -> y [M, N]."""
    rows, columns = x.shape
    chosen = configuration(weight, x.dtype, rows)
    assert chosen is not None
    num_tiles, padded = weight.tiles.shape[:2]
    blocks = padded // chosen.constants["BN"]
    grid = (-(-rows // chosen.constants["BM"]), blocks, weight.splits)
    y = torch.empty(rows, weight.out_features, dtype=x.dtype, device=x.device)
    if grid[2] > 1:
        partial = torch.empty(grid[2], rows, padded, dtype=torch.float32, device=x.device)
        counter = counters(grid[0] * grid[1], x.device)
    else:  # neither is read or written
        partial, counter = weight.tiles.view(torch.float32), weight.tiles
    factor = 2.0**weight.exponent / (1.0 if weight.kind == "e2m1" else UNIT[x.dtype])
    w4a16_kernel[grid](
        x, weight.tiles, weight.scale, y if bias is None else bias, y, partial, counter, factor,
        rows, weight.out_features, columns, num_tiles, weight.tiles.stride(0), weight.scale.stride(0),
        int(bias is not None),
        **chosen.constants | {"ASM": not interpreting()}, **chosen.options,
    )  # fmt: skip
    return y
