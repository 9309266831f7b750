"""4-bit matmuls of a CUDA device: the Triton kernel (specdec_kernels.w4a16), with float32 sums.

Inputs are float16 or bfloat16; those of other dtypes are rounded to bfloat16. A row's result is the same at any number
of rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from specdec_kernels import w4a16
from specdec_kernels.configuration import runs_on
from torch import Tensor

from specdec.quant.int4 import Int4Tensor


class CudaKernel:
    """The Triton kernel on one weight [N, K].

    weight: int32 [K/128, N', 16], codes in the kernel's packed tiles. scale: int32 [words, N'], zero points included.
    """

    def __init__(self, packed: w4a16.PackedWeight) -> None:
        self.packed = packed
        self.weight, self.scale = packed.tiles, packed.scale
        self.dtypes = [dtype for dtype in (torch.float16, torch.bfloat16) if w4a16.has_kernel(packed, dtype)]

    @classmethod
    def for_weight(cls, int4: Int4Tensor, int8_inputs: bool) -> CudaKernel | None:
        """The kernel for a weight, None off CUDA devices and for groups, scales or codebooks without a kernel."""
        if not runs_on(int4.weight.device):
            return None
        packed = w4a16.prepack(int4.codes(), int4.scale, int4.zero, int4.codebook)
        kernel = None if packed is None else cls(packed)
        return kernel if kernel is not None and kernel.dtypes else None

    def codes(self, start: int, stop: int) -> Tensor:
        """Codes 0 … 15, uint8 [stop - start, K], of rows start … stop."""
        return self.packed.rows(start, stop).codes()

    def codes_at(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Codes 0 … 15, uint8 [n, K], of rows [n]; weight: the kernel's own."""
        return replace(self.packed, tiles=weight[:, rows], out_features=len(rows)).codes()

    def supports(self, dtype: torch.dtype) -> bool:
        """The kernel's own dtypes; every dtype if bfloat16 is one of them."""
        return dtype in self.dtypes or torch.bfloat16 in self.dtypes

    def matmul(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, perm: Tensor | None) -> Tensor:
        """x [..., K] -> x[..., perm] W^T + bias, [..., N] of the same dtype; weight and scale are those of `packed`."""
        dtype = x.dtype if x.dtype in self.dtypes else torch.bfloat16
        return w4a16.matmul(x.to(dtype), self.packed, bias, perm).to(x.dtype)
