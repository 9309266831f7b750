"""Packed codes -> operands of a tensor core, in PTX, with fewer instructions than the compiler finds.

Inputs are two adjacent words of a tile, outputs eight pairs of 16-bit numbers, the operands of eight dots; the halves
of a pair are computed from the halves of a word. Codes are shifted and masked, never converted. A nibble q in a float16
or bfloat16 is a subnormal number, q times a power of two, and one fused multiply-add, which does not flush subnormal
numbers (PTX ISA, fma), computes (q - zero) * 2^-9 or (q - zero) * 2^-6, exactly: 18 instructions for 16 weights. The
magic exponent of Kim et al., Who Says Elephants Can't Run (2022), costs bfloat16 four more shifts. The kernel
multiplies the final sum by the inverse power of two.

The two words are adjacent in Triton's layout of a dot's operand, which scripts/check_kernels.py asserts.

Operands: $0 … $7 out, $8 and $9 the words; then pairs of 16 bits, each in two registers: nibbles' addends, E2M1's
multipliers.
"""

from __future__ import annotations

import torch

from specdec_kernels.w4a16.layout import SPREAD, SYMMETRIC_ZERO, UNIT

# The PTX type, and the bits of the multipliers of a nibble in bits 0-3 and in bits 4-7: both turn a code of 1 into
# UNIT.
FLOATS = {torch.float16: ("f16x2", 0x7800, 0x6800), torch.bfloat16: ("bf16x2", 0x7F00, 0x7D00)}


def nibbles(dtype: torch.dtype, addends: int) -> str:
    """PTX for codes that are numbers: code times the power of two, plus -zero times that power.

    addends: the number of zero points of a tile, one for every 128 / addends rows; 0: all zero points are 8.
    """
    kind, low, high = FLOATS[dtype]
    lines = [".reg .b32 x, codes, low, high, eight;"]
    lines += [f"mov.b32 low, {_pair(low)};", f"mov.b32 high, {_pair(high)};"]
    if not addends:
        lines.append(f"mov.b32 eight, {_pair(bits(-SYMMETRIC_ZERO * UNIT[dtype], dtype))};")
    for i in range(8):
        word, k = f"${8 + i // 4}", i % 4
        if k == 2:
            lines.append(f"shr.u32 codes, {word}, 8;")
        mask, multiplier = (0x000F, "low") if k % 2 == 0 else (0x00F0, "high")
        addend = f"${10 + 2 * (i * addends // 8)}" if addends else "eight"
        lines += [
            f"and.b32 x, {word if k < 2 else 'codes'}, {_pair(mask)};",
            f"fma.rn.{kind} ${i}, x, {multiplier}, {addend};",
        ]
    return _block(lines)


def e2m1() -> str:
    """PTX for codes whose bits are spread: the masked bits, a bfloat16, times the multiplier."""
    lines = [".reg .b32 x, sign, nothing;", "mov.b32 nothing, 0x80008000;"]  # -0.0
    for i in range(8):
        word = f"${8 + i // 4}"
        sign, magnitude = SPREAD[i % 4]
        if 15 - sign == 6 - magnitude:
            lines += [f"shl.b32 x, {word}, {15 - sign};", f"and.b32 x, x, {_pair(0x81C0)};"]
        else:
            shift = f"shl.b32 x, {word}, {6 - magnitude};" if magnitude < 6 else f"shr.u32 x, {word}, {magnitude - 6};"
            # lop3 0xF8: a | (b & c)
            lines += [shift, f"and.b32 x, x, {_pair(0x01C0)};", f"shl.b32 sign, {word}, {15 - sign};"]
            lines += [f"lop3.b32 x, x, sign, {_pair(0x8000)}, 0xF8;"]
        lines.append(f"fma.rn.bf16x2 ${i}, x, ${10 + 2 * (i // 2)}, nothing;")  # sm_80 has no mul.bf16x2
    return _block(lines)


def bits(value: float, dtype: torch.dtype) -> int:
    """The 16 bits of a number."""
    return torch.tensor(value, dtype=dtype).view(torch.int16).item() & 0xFFFF


def _pair(bits: int) -> str:
    return f"0x{bits << 16 | bits:08X}"


def _block(lines: list[str]) -> str:
    return "\n".join(["{", *lines, "}"])
