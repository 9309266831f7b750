"""The Triton kernel on a CUDA device: float16 and bfloat16 inputs, accumulated in float32; see specdec_kernels.w4a16.

Inputs it has no form for are rounded to bfloat16. A row's result is the same at any number of rows. Layers that take the same
input (q, k, v; gate, up) are fused: their codes lie in one tensor, and the first of them multiplies for all.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from specdec_kernels import w4a16
from specdec_kernels.configuration import runs_on
from torch import Tensor

if TYPE_CHECKING:
    from specdec.quant.int4 import Int4Linear, Int4Tensor

MISSES = 8  # in a row, of layers that were called with inputs of their own


class CudaKernel:
    """The kernel on one weight [N, K].

    weight: int32 [K/128, N', 16], codes in tiles; scale: int32 [words, N'], with the zero points.
    """

    def __init__(self, packed: w4a16.PackedWeight) -> None:
        self.packed = packed
        self.weight, self.scale = packed.tiles, packed.scale
        self.dtypes = [dtype for dtype in (torch.float16, torch.bfloat16) if w4a16.has_kernel(packed, dtype)]

    @classmethod
    def of(cls, int4: Int4Tensor) -> CudaKernel | None:
        """The kernel for a weight, None where it is not on a CUDA device, or there is none for its groups, scales or codebook."""
        if not runs_on(int4.weight.device):
            return None
        packed = w4a16.prepack(int4.codes(), int4.scale, int4.zero, int4.codebook)
        kernel = None if packed is None else cls(packed)
        return kernel if kernel is not None and kernel.dtypes else None

    def codes(self, start: int, stop: int) -> Tensor:
        """Codes 0 … 15, uint8 [stop - start, K], of rows start … stop."""
        return self.packed.rows(start, stop).codes()

    def takes(self, dtype: torch.dtype) -> bool:
        """Its own dtypes, and all others where bfloat16 is one of them."""
        return dtype in self.dtypes or torch.bfloat16 in self.dtypes

    def matmul(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, perm: Tensor | None) -> Tensor:
        """x [..., K] -> x[..., perm] W^T + bias, [..., N] of the same dtype; weight and scale are `packed`'s."""
        inner = x.dtype if x.dtype in self.dtypes else torch.bfloat16
        return w4a16.matmul(x.to(inner), self.packed, bias, perm).to(x.dtype)


class FusedLinearGroup:
    """Layers that one launch serves: the first to be called with an input multiplies for all, the others find it done.

    fused: the kernel on all their rows; None until they have entered its layout, and where they differ in form.
    """

    def __init__(self, layers: Sequence[Int4Linear]) -> None:
        self.layers = layers
        self.fused: CudaKernel | None = None
        self.starts: dict[Int4Linear, int] = {}
        self.pending = threading.local()
        self.misses = 0

    def fuse(self) -> None:
        """Lay the codes of all layers into one tensor, of which each keeps its slice."""
        kernels = [layer.kernel for layer in self.layers if isinstance(layer.kernel, CudaKernel)]
        perm = self.layers[0].weight_perm
        if len(kernels) < len(self.layers) or not all(_same(layer.weight_perm, perm) for layer in self.layers):
            return
        packed = w4a16.joined([kernel.packed for kernel in kernels])
        if packed is None:
            return
        start = 0
        for layer, kernel in zip(self.layers, kernels, strict=True):
            self.starts[layer] = start
            layer.adopt(CudaKernel(packed.rows(start, start + layer.out_features)))
            start += kernel.weight.shape[1]
        self.fused = CudaKernel(packed)

    def matmul(self, layer: Int4Linear, x: Tensor) -> Tensor | None:
        """The layer's own columns of the product x [..., K] with all weights, None where they are not fused."""
        fused = self.fused  # another thread may part them at any time
        if fused is None:
            return None
        version = None if x.is_inference() else x._version  # inference tensors are not written to between q and k
        pending: _Pending | None = getattr(self.pending, "product", None)
        if pending is None or pending.x is not x or pending.version != version or layer not in pending.waiting:
            self.misses = self.misses + 1 if pending is not None else 0
            if self.misses > MISSES:  # they turn out not to share inputs, and would multiply for each other in vain
                self.separate()
                return None
            y = fused.matmul(x, fused.weight, fused.scale, self._bias(), layer.weight_perm)
            pending = _Pending(x, version, y, set(self.layers))
        pending.waiting.discard(layer)
        self.pending.product = pending if pending.waiting else None
        return pending.y[..., self.starts[layer] : self.starts[layer] + layer.out_features]

    def separate(self) -> None:
        """From now on each layer multiplies by its slice alone: the same bits, a launch each."""
        self.fused = None
        self.pending = threading.local()

    def _bias(self) -> Tensor | None:
        """The layers' biases, one behind the other as the rows lie; made anew each time, since they may be written to."""
        if all(layer.bias is None for layer in self.layers):
            return None
        parts = []
        for layer in self.layers:
            filled = layer.weight.shape[1]  # up to a whole block
            bias = layer.weight_scale.new_zeros(filled) if layer.bias is None else layer.bias
            parts.append(bias if len(bias) == filled else F.pad(bias, (0, filled - len(bias))))
        return torch.cat(parts)


@dataclass
class _Pending:
    """A product x W^T of all layers, and who has not taken its columns yet."""

    x: Tensor
    version: int | None
    y: Tensor
    waiting: set[Int4Linear]


def _same(perm: Tensor | None, other: Tensor | None) -> bool:
    return perm is other or (perm is not None and other is not None and torch.equal(perm, other))
