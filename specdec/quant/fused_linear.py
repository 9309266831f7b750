"""One kernel launch for the 4-bit layers of a module that have the same input (q, k, v; gate, up).

The attention and MLP code of transformers calls these layers one by one, and the models' classes stay as they are. So
the result is handed over between calls, under this contract:

- The codes of all layers are in one tensor, of which each layer's `weight` is a slice.
- The first layer that is called with an input multiplies all weights by it, keeps the product for the others, and
  returns its own columns. Another layer returns its columns of that product if it is called with the same tensor object
  at the same version, in the same thread, and has not had its columns yet. Otherwise it multiplies all weights again:
  results are right in any order of calls, and only the number of launches differs.
- The product and the reference to its input are dropped when every layer has had its columns.
- Layers that turn out to have inputs of their own are separated and multiply by their slices. A row's bits are the
  same: how a column is summed is a property of the packed weight.

Compiled graphs and inputs that require gradients never come here; see Int4Linear.forward.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from specdec_kernels import w4a16
from torch import Tensor

from specdec.quant.cuda import CudaKernel
from specdec.quant.linear import Int4Linear

FUSED_LAYERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # names of layers with the same input
MAX_MISSES = 8  # calls in a row whose input was not that of the pending product


class FusedLinearGroup:
    """Layers whose products with one input are computed by one launch; see above.

    kernel: on the rows of all layers; None before `fuse`, where the packed weights differ in more than their rows, and
    after `separate`.
    """

    def __init__(self, layers: Sequence[Int4Linear]) -> None:
        self.layers = layers
        self.kernel: CudaKernel | None = None
        self.starts: dict[Int4Linear, int] = {}  # first row of each layer in the fused weight
        self.pending = threading.local()
        self.num_misses = 0

    def fuse(self) -> None:
        """Put the codes of all layers into one tensor and give each layer its slice."""
        kernels = [layer.kernel for layer in self.layers if isinstance(layer.kernel, CudaKernel)]
        perm = self.layers[0].weight_perm
        if len(kernels) < len(self.layers) or not all(_same(layer.weight_perm, perm) for layer in self.layers):
            return
        packed = w4a16.concatenate([kernel.packed for kernel in kernels])
        if packed is None:
            return
        start = 0
        for layer, kernel in zip(self.layers, kernels, strict=True):
            self.starts[layer] = start
            layer.set_kernel(CudaKernel(packed.rows(start, start + layer.out_features)))
            start += kernel.weight.shape[1]
        self.kernel = CudaKernel(packed)

    def matmul(self, layer: Int4Linear, x: Tensor) -> Tensor | None:
        """The layer's columns of the product x [..., K] with all weights, None where the layers are not fused."""
        kernel = self.kernel  # read once: another thread may separate the layers
        if kernel is None:
            return None
        # Inference tensors have no version; nothing writes to them between the calls.
        version = None if x.is_inference() else x._version
        pending: _PendingProduct | None = getattr(self.pending, "product", None)
        if pending is None or pending.x is not x or pending.version != version or layer not in pending.waiting:
            self.num_misses = self.num_misses + 1 if pending is not None else 0
            if self.num_misses > MAX_MISSES:  # each layer would compute the others' columns for nothing
                self.separate()
                return None
            y = kernel.matmul(x, kernel.weight, kernel.scale, self._bias(), layer.weight_perm)
            pending = _PendingProduct(x, version, y, set(self.layers))
        pending.waiting.discard(layer)
        self.pending.product = pending if pending.waiting else None
        return pending.y[..., self.starts[layer] : self.starts[layer] + layer.out_features]

    def separate(self) -> None:
        """From now on each layer multiplies by its slice: the same bits, one launch per layer."""
        self.kernel = None
        self.pending = threading.local()

    def _bias(self) -> Tensor | None:
        """The biases of all layers at their rows of the fused weight; read for each product, since they may change."""
        if all(layer.bias is None for layer in self.layers):
            return None
        parts = []
        for layer in self.layers:
            num_rows = layer.weight.shape[1]  # padded to whole blocks
            bias = layer.weight_scale.new_zeros(num_rows) if layer.bias is None else layer.bias
            parts.append(bias if len(bias) == num_rows else F.pad(bias, (0, num_rows - len(bias))))
        return torch.cat(parts)


@dataclass
class _PendingProduct:
    """The product y = x W^T of all layers. waiting: the layers that have not had their columns."""

    x: Tensor
    version: int | None
    y: Tensor
    waiting: set[Int4Linear]


def link_fused_layers(model: Any) -> None:
    """Group the 4-bit layers of each module that have the same input, which their names say."""
    for module in model.modules():
        for names in FUSED_LAYERS:
            layers = [layer for name in names if isinstance(layer := getattr(module, name, None), Int4Linear)]
            if len(layers) == len(names):
                group = FusedLinearGroup(layers)
                for layer in layers:
                    layer.group = group


def _same(perm: Tensor | None, other: Tensor | None) -> bool:
    return perm is other or (perm is not None and other is not None and torch.equal(perm, other))
