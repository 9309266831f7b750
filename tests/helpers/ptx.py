"""The PTX of the kernels' inline asm, interpreted in NumPy: one instruction a line, 32-bit registers."""

from __future__ import annotations

import re

import numpy as np
import torch


def run_ptx(ptx: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every register after the program, uint32; inputs: those before it, by name, arrays of one shape."""
    registers = dict(inputs)
    shape = next(iter(inputs.values())).shape

    def value(operand: str) -> np.ndarray | np.uint32:
        return registers[operand] if operand in registers else np.uint32(int(operand, 0))

    for line in ptx.replace("{", "").replace("}", "").splitlines():
        if not line or line.startswith(".reg"):
            continue
        instruction, operands = re.fullmatch(r"(\S+) (.*);", line).groups()  # type: ignore[union-attr]
        target, *sources = [operand.strip() for operand in operands.split(",")]
        a, *rest = [value(source) for source in sources]
        if instruction == "mov.b32":
            result = a
        elif instruction == "and.b32":
            result = a & rest[0]
        elif instruction == "xor.b32":
            result = a ^ rest[0]
        elif instruction == "shl.b32":
            result = a << rest[0]
        elif instruction == "shr.u32":
            result = a >> rest[0]
        elif instruction == "prmt.b32":
            eight, selector = (
                [a >> s & 0xFF for s in (0, 8, 16, 24)] + [rest[0] >> s & 0xFF for s in (0, 8, 16, 24)],
                int(rest[1]),
            )
            assert not selector & 0x8888
            result = sum(eight[selector >> 4 * i & 7] << np.uint32(8 * i) for i in range(4))
        elif instruction == "lop3.b32":
            b, c, table = rest
            result = np.zeros_like(a)
            for row in range(8):
                if int(table) >> row & 1:
                    result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        else:
            dtype = {"fma.rn.f16x2": torch.float16, "fma.rn.bf16x2": torch.bfloat16}[instruction]
            products = [halves(a, dtype)[i] * halves(rest[0], dtype)[i] + halves(rest[1], dtype)[i] for i in (0, 1)]
            low, high = (torch.from_numpy(product).to(dtype) for product in products)
            for product, rounded in zip(products, (low, high), strict=True):
                assert (rounded.double().numpy() == product).all(), "a product was not exact"
            low, high = (half.view(torch.int16).numpy().astype(np.uint32) & 0xFFFF for half in (low, high))
            result = low | high << 16
        registers[target] = np.broadcast_to(np.asarray(result, np.uint32), shape)
    return registers


def halves(x: np.ndarray | np.uint32, dtype: torch.dtype) -> list[np.ndarray]:
    """float64 values of the low and of the high 16 bits, subnormal numbers as they are."""
    array = np.asarray(x, np.uint32)
    parts = [(array >> np.uint32(s) & np.uint32(0xFFFF)).astype(np.uint16).view(np.int16) for s in (0, 16)]
    return [torch.from_numpy(np.atleast_1d(part).copy()).view(dtype).double().numpy() for part in parts]
