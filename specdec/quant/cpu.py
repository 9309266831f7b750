"""4-bit matmuls of a CPU: specdec's own kernel where it has been built (specdec_kernels.cpu), else PyTorch's int4 op.

specdec's kernel rounds its inputs to 8 bits by group, or with int8_inputs=False to bfloat16 where the CPU has bfloat16
products, and sums in float32; one read of the weights serves several rows. PyTorch's op
(torch._weight_int4pack_mm_for_cpu) reads and returns bfloat16; one row takes about a quarter of a bfloat16 linear
layer's time, from about eight rows on the op is the slower one (scripts/bench_int4.py measures both). In both, a row's
result does not depend on the other rows.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from specdec_kernels import cpu
from torch import Tensor

from specdec.quant.int4 import SYMMETRIC_ZERO, Int4Tensor

ROW_BLOCK = 64  # the op's rows are padded to a multiple of it, so that every block has the same layout
OP_GROUP_SIZES = (256, 128, 64, 32)


class CpuKernel:
    """specdec::int4_linear on one weight [N, K].

    weight: int32 [N'/64, K/8, 64], the codes; scale: [1 or 2, N'/64, K/G, 64]; see specdec_kernels.cpu.pack.
    int8_inputs: round the inputs to 8 bits by group.
    """

    def __init__(self, int4: Int4Tensor, int8_inputs: bool) -> None:
        self.out_features = int4.weight.shape[0]
        self.int8_inputs = int8_inputs
        self.weight, self.scale = cpu.pack(int4.codes(), int4.scale, int4.zero)

    @classmethod
    def for_weight(cls, int4: Int4Tensor, int8_inputs: bool) -> CpuKernel | None:
        """The kernel for a weight, None off the CPU, with a codebook, or where the kernel has not been built."""
        is_supported = int4.weight.device.type == "cpu" and int4.codebook is None and int4.group_size % cpu.WORD == 0
        return cls(int4, int8_inputs) if is_supported and cpu.load() else None

    def codes(self, start: int, stop: int) -> Tensor:
        """Codes 0 … 15, uint8 [stop - start, K], of rows start … stop; start is a multiple of 64."""
        return cpu.unpack(self.weight[start // cpu.BLOCK : -(-stop // cpu.BLOCK)])[: stop - start]

    def codes_at(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Codes 0 … 15, uint8 [n, K], of rows [n]; weight: the kernel's own."""
        words = weight[rows // cpu.BLOCK, :, rows % cpu.BLOCK]
        return (words[..., None] >> 4 * torch.arange(cpu.WORD) & 15).to(torch.uint8).flatten(-2)

    def supports(self, dtype: torch.dtype) -> bool:
        """Every dtype: others are computed in float32."""
        return True

    def matmul(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, perm: Tensor | None) -> Tensor:
        """x [..., K] -> x[..., perm] W^T + bias, [..., N] of the same dtype."""
        if perm is not None:
            x = x[..., perm]
        inputs = x if x.dtype in cpu.DTYPES else x.float()
        y: Tensor
        [y] = torch.ops.specdec.int4_linear(inputs, [weight], [scale], [self.out_features], self.int8_inputs)
        return y.to(x.dtype) if bias is None else y.to(x.dtype) + bias.to(x.dtype)


class TorchKernel:
    """PyTorch's op on one weight [N, K].

    weight: uint8 [N', K/2], codes in the op's layout, N' a multiple of 64.
    scale: bfloat16 [K/G, N', 2], scale and (8 - zero) * scale. G: the weight's group size or a divisor of it that the
    op has.
    """

    def __init__(self, int4: Int4Tensor, group_size: int) -> None:
        self.out_features, self.in_features = int4.weight.shape[0], 2 * int4.weight.shape[1]
        self.group_size = group_size
        padding = -self.out_features % ROW_BLOCK
        self.is_padded = padding > 0
        codes = F.pad(int4.codes(), (0, 0, 0, padding)).int()
        self.weight = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        scale = int4.scale.float()
        offset = torch.zeros_like(scale) if int4.zero is None else (SYMMETRIC_ZERO - int4.zero.float()) * scale
        scale_and_offset = torch.stack((scale, offset), dim=-1).repeat_interleave(int4.group_size // group_size, dim=1)
        self.scale = F.pad(scale_and_offset, (0, 0, 0, 0, 0, padding)).transpose(0, 1).contiguous().bfloat16()

    @classmethod
    def for_weight(cls, int4: Int4Tensor, int8_inputs: bool) -> TorchKernel | None:
        """The kernel for a weight, None off the CPU, with a codebook, or where the op does not have its group size."""
        if int4.weight.device.type != "cpu" or int4.codebook is not None or row_order() is None:
            return None
        group_size = next((size for size in OP_GROUP_SIZES if int4.group_size % size == 0), None)
        return None if group_size is None else cls(int4, group_size)

    def codes(self, start: int, stop: int) -> Tensor:
        """Codes 0 … 15, uint8 [stop - start, K], of rows start … stop; start is a multiple of 64."""
        order = row_order()
        assert order is not None
        packed = self.weight[start : -(-stop // ROW_BLOCK) * ROW_BLOCK]
        nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).view(-1, self.in_features, len(order))
        return nibbles[:, :, order].transpose(1, 2).reshape(-1, self.in_features)[: stop - start]

    def codes_at(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Codes 0 … 15, uint8 [n, K], of rows [n]; weight: the kernel's own."""
        order = row_order()
        assert order is not None
        packed = weight.view(-1, self.in_features * len(order) // 2)[rows // len(order)]
        nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).view(len(rows), self.in_features, len(order))
        return nibbles.take_along_dim(order[rows % len(order), None, None], dim=2)[..., 0]

    def supports(self, dtype: torch.dtype) -> bool:
        """Every dtype: inputs are rounded to bfloat16."""
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
    """The order of rows in the op's layout, column by column: row r of a block is nibble order[r].

    None where the op is missing or has another layout.

    The layout depends on the CPU's vector width and is not documented, so it is measured: the index of each element is
    packed, one hexadecimal digit at a time.
    """
    columns = 32
    index = torch.arange(ROW_BLOCK * columns, dtype=torch.int32).view(ROW_BLOCK, columns)
    try:
        digits = [torch._convert_weight_to_int4pack_for_cpu((index >> shift) & 15, 1) for shift in (0, 4, 8)]
    except (AttributeError, RuntimeError, NotImplementedError):  # a build without the op
        return None
    packed = sum(torch.stack((d & 15, d >> 4), dim=-1).flatten().int() << 4 * i for i, d in enumerate(digits))
    assert isinstance(packed, Tensor)
    expected_column = torch.arange(columns).int()[None, :, None]
    for block in (64, 32, 16):
        row, column = (packed // columns).view(-1, columns, block), (packed % columns).view(-1, columns, block)
        rows = row[0, 0]
        expected_row = rows + block * torch.arange(ROW_BLOCK // block)[:, None, None]
        if row.equal(expected_row.expand_as(row).int()) and column.equal(expected_column.expand_as(column)):
            return rows.argsort()
    return None
