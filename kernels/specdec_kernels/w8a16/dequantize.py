"""Four int8 codes of a word -> operands of a tensor core, in PTX, with fewer instructions than the compiler finds.

An exclusive or makes a code q the byte q + 128. Such a byte in the low bits of a float16 or a bfloat16 is the number
(q + 128) * 2^-24 or 2^-133: bfloat16 has seven bits of mantissa, and the lowest exponent bit, the byte's eighth,
continues the subnormal numbers in equal steps. One fused multiply-add, which does not flush subnormal numbers (PTX ISA,
fma), then computes q * 2^-9 or q * 2^-6, exactly: 5 instructions for 4 weights. The kernel multiplies the sum by the
inverse power of two. A conversion by cvt has a quarter of the rate or less.

Operands: $0 and $1 out, the pairs of codes 0, 1 and 2, 3; $2 the word.
"""

from __future__ import annotations

import torch

# The PTX type, and the bits of the multiplier and of the addend, -128 times the unit.
FLOATS = {torch.float16: ("f16x2", 0x7800, 0xB400), torch.bfloat16: ("bf16x2", 0x7F00, 0xC000)}
UNIT = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}  # the operand of a code of 1


def codes(dtype: torch.dtype) -> str:
    """PTX for the four codes of a word, each times the dtype's unit."""
    kind, multiplier, addend = FLOATS[dtype]
    return f"""{{
.reg .b32 bytes, low, high, multiplier, addend;
mov.b32 multiplier, 0x{multiplier:04X}{multiplier:04X};
mov.b32 addend, 0x{addend:04X}{addend:04X};
xor.b32 bytes, $2, 0x80808080;
prmt.b32 low, bytes, 0, 0x4140;
prmt.b32 high, bytes, 0, 0x4342;
fma.rn.{kind} $0, low, multiplier, addend;
fma.rn.{kind} $1, high, multiplier, addend;
}}"""
