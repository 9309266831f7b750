"""4-bit matmuls of a CPU: specdec's own kernel where it has been built (specdec_kernels.cpu), else PyTorch's int4 op.

Ours sums in float32 (of inputs rounded to bfloat16 where the CPU multiplies such), and one read of the weights serves eight rows.
PyTorch's (torch._weight_int4pack_mm_for_cpu) takes and gives bfloat16; one row takes about a quarter of a bfloat16 linear's time,
more rows take more, and from some eight on it loses (the cost table of scripts/bench_int4.py has the figures of a machine).
Neither's result for a row depends on the other rows.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from specdec_kernels import cpu
from torch import Tensor

if TYPE_CHECKING:
    from specdec.quant.int4 import Int4Tensor

ROWS = 64  # rows are padded to a multiple: then the layout is even
OP_GROUP_SIZES = (256, 128, 64, 32)


class CpuKernel:
    """specdec::int4_linear on one weight [N, K].

    weight: int32 [N'/64, K/8, 64], the codes; scale: [1 or 2, K/G, N']; see specdec_kernels.cpu.pack.
    """

    def __init__(self, int4: Int4Tensor) -> None:
        self.out_features = int4.weight.shape[0]
        self.weight, self.scale = cpu.pack(int4.codes(), int4.scale, int4.zero)

    @classmethod
    def of(cls, int4: Int4Tensor) -> CpuKernel | None:
        """The kernel for a weight, None where it is not on a CPU or has a codebook, or the kernel has not been built."""
        if (
            int4.weight.device.type != "cpu"
            or int4.codebook is not None
            or int4.group_size % cpu.WORD
            or not cpu.load()
        ):
            return None
        return cls(int4)

    def codes(self, start: int, stop: int) -> Tensor:
        """Codes 0 … 15, uint8 [stop - start, K], of rows start … stop; start is a multiple of 64."""
        return cpu.unpack(self.weight[start // cpu.BLOCK : -(-stop // cpu.BLOCK)])[: stop - start]

    def takes(self, dtype: torch.dtype) -> bool:
        """All of them, through float32."""
        return True

    def matmul(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, perm: Tensor | None) -> Tensor:
        """x [..., K] -> x[..., perm] W^T + bias, [..., N] of the same dtype."""
        if perm is not None:
            x = x[..., perm]
        inner = x if x.dtype in cpu.DTYPES else x.float()
        y: Tensor
        [y] = torch.ops.specdec.int4_linear(inner, [weight], [scale], [self.out_features])
        return y.to(x.dtype) if bias is None else y.to(x.dtype) + bias.to(x.dtype)


class TorchKernel:
    """PyTorch's op on one weight [N, K].

    weight: uint8 [N', K/2], codes in the op's layout, N' a multiple of 64.
    scale: bfloat16 [K/G, N', 2], scale and (8 - zero) * scale; G is the weight's group size or a divisor of it that the op has.
    """

    def __init__(self, int4: Int4Tensor, group_size: int) -> None:
        self.out_features, self.in_features = int4.weight.shape[0], 2 * int4.weight.shape[1]
        self.group_size = group_size
        padding = -self.out_features % ROWS
        self.is_padded = padding > 0
        codes = F.pad(int4.codes(), (0, 0, 0, padding)).int()
        self.weight = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        scale = int4.scale.float()
        offset = torch.zeros_like(scale) if int4.zero is None else (8 - int4.zero.float()) * scale
        both = torch.stack((scale, offset), dim=-1).repeat_interleave(int4.group_size // group_size, dim=1)
        self.scale = F.pad(both, (0, 0, 0, 0, 0, padding)).transpose(0, 1).contiguous().bfloat16()

    @classmethod
    def of(cls, int4: Int4Tensor) -> TorchKernel | None:
        """The kernel for a weight, None where it is not on a CPU, has a codebook, or its groups don't suit the op."""
        if int4.weight.device.type != "cpu" or int4.codebook is not None or row_order() is None:
            return None
        group_size = next((size for size in OP_GROUP_SIZES if int4.group_size % size == 0), None)
        return None if group_size is None else cls(int4, group_size)

    def codes(self, start: int, stop: int) -> Tensor:
        """Codes 0 … 15, uint8 [stop - start, K], of rows start … stop; start is a multiple of 64."""
        order = row_order()
        assert order is not None
        packed = self.weight[start : -(-stop // ROWS) * ROWS]
        nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).view(-1, self.in_features, len(order))
        return nibbles[:, :, order].transpose(1, 2).reshape(-1, self.in_features)[: stop - start]

    def takes(self, dtype: torch.dtype) -> bool:
        """All of them, rounded to bfloat16."""
        return True

    def matmul(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, perm: Tensor | None) -> Tensor:
        """x [..., K] -> x[..., perm] W^T + bias, [..., N] of the same dtype."""
        rows = x.reshape(-1, self.in_features)
        if perm is not None:
            rows = rows[:, perm]
        y = torch._weight_int4pack_mm_for_cpu(rows.bfloat16().contiguous(), weight, self.group_size, scale)
        if self.is_padded:
            y = y[:, : self.out_features]
        y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if bias is None else y + bias.to(y.dtype)


@functools.cache
def row_order() -> Tensor | None:
    """Where the op's layout keeps each row: nibble order[r] of a block, column by column; None where it does otherwise.

    The layout goes by the CPU's vector width and is not documented, so it is read off: each element's own number is packed, digit
    by digit.
    """
    columns = 32
    number = torch.arange(ROWS * columns, dtype=torch.int32).view(ROWS, columns)
    try:
        digits = [torch._convert_weight_to_int4pack_for_cpu((number >> shift) & 15, 1) for shift in (0, 4, 8)]
    except (AttributeError, RuntimeError, NotImplementedError):  # a build without the op
        return None
    place = sum(torch.stack((d & 15, d >> 4), dim=-1).flatten().int() << 4 * i for i, d in enumerate(digits))
    assert isinstance(place, Tensor)
    for block in (64, 32, 16):
        row, column = (place // columns).view(-1, columns, block), (place % columns).view(-1, columns, block)
        rows = row[0, 0]
        even = rows + block * torch.arange(ROWS // block)[:, None, None]
        if row.equal(even.expand_as(row).int()) and column.equal(
            torch.arange(columns).int()[None, :, None].expand_as(column)
        ):
            return rows.argsort()
    return None
