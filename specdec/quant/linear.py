"""The linear layer on a 4-bit weight, and the kernels it chooses from."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from specdec_kernels import cpu
from torch import Tensor, nn

from specdec.quant.batch_invariant import MAX_WINDOW, by_phase
from specdec.quant.cpu import CpuKernel, TorchKernel
from specdec.quant.cuda import CudaKernel
from specdec.quant.int4 import Int4Tensor, pack

TILE_WEIGHTS = 1 << 21  # weights of a layer that are in full precision at any one time
WEIGHT_TENSORS = ("weight", "weight_scale", "weight_zero", "weight_perm", "weight_codebook")
CAST_ERROR = (
    "a 4-bit model cannot be cast to {}: its scales are part of its weights; its inputs may have any dtype, so load the"
    " model again with dtype=… for everything around them"
)


class Kernel(Protocol):
    """A device's 4-bit matmul for windows of up to 64 positions, on one weight in a layout of its own.

    A row of the result must not depend on the number of rows, on its index among them, or on the other rows.
    """

    weight: Tensor  # the codes
    scale: Tensor  # the scales, zero points included

    @classmethod
    def for_weight(cls, int4: Int4Tensor, int8_inputs: bool) -> Kernel | None:
        """The kernel for a weight [N, K] on its device, None where there is none.

        int8_inputs: it may round its inputs to 8 bits; only CpuKernel does.
        """

    def codes(self, start: int, stop: int) -> Tensor:
        """Codes 0 … 15, uint8 [stop - start, K], of rows start … stop; start is a multiple of 64."""

    def codes_at(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Codes 0 … 15, uint8 [n, K], of rows [n] int64; weight as in matmul."""

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether inputs of a dtype can be multiplied, unchanged or rounded to bfloat16."""

    def matmul(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, perm: Tensor | None) -> Tensor:
        """x [..., K] -> x[..., perm] W^T + bias, [..., N] of the same dtype.

        weight, scale: the kernel's own, passed in as the layer's parameter and buffer, which are what a tracer sees.
        perm: the layer's.
        """


class LinearGroup(Protocol):
    """Layers with the same input whose products are computed together; see specdec.quant.fused_linear."""

    layers: Sequence[Int4Linear]

    def fuse(self) -> None:
        """Put the codes of all layers into one tensor; every layer has chosen its kernel."""

    def matmul(self, layer: Int4Linear, x: Tensor) -> Tensor | None:
        """The layer's columns of the product x [..., K] with all weights, None where the layers are not fused."""

    def separate(self) -> None:
        """From now on each layer computes its own product."""


KERNELS: list[type[Kernel]] = [CpuKernel, TorchKernel, CudaKernel]  # the first that has one for the weight is used
_LAYOUT_LOCK = threading.Lock()


class Int4Linear(nn.Module):
    """y = x W^T + b on a 4-bit weight: x [..., W, K] of any floating dtype -> [..., W, N] of the same.

    The width W of the window selects the path, never the number of rows. A window of up to 64 positions is decoding and
    runs the device's kernel. A wider one is prefill: the weight is dequantized and multiplied one tile of rows at a
    time, so the model never exists in full precision; the last position, from which the next id is sampled, is computed
    as in decoding. Where no kernel supports the weight or the inputs, or the input requires a gradient, weight tiles
    serve both.

    On a CPU the kernel is specdec's own where it has been built, for windows of any width, else PyTorch's int4 op
    (bfloat16 inputs, outputs and scales, whatever the dtype around it). On a CUDA device it is the Triton kernel, which
    multiplies float16 and bfloat16, and layers with the same input share a launch.
    The codes are stored in the kernel's layout instead of the canonical one, never in both; state_dict() gives the
    canonical form.
    use_kernel: False computes with weight tiles alone, in the dtype of the inputs.
    int8_inputs: specdec's CPU kernel rounds the inputs to 8 bits by group; set before the first forward.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero: Tensor | None
    weight_perm: Tensor | None
    weight_codebook: Tensor | None
    bias: Tensor | None
    kernel_scale: Tensor | None

    def __init__(self, int4: Int4Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features = int4.weight.shape[0]
        self.in_features = 2 * int4.weight.shape[1]
        self.group_size = int4.group_size
        self.use_kernel = self.int8_inputs = True
        self.kernel: Kernel | None = None  # whose layout `weight` is in; None: the canonical layout
        self.has_chosen_kernel = False  # on this device
        self.group: LinearGroup | None = None  # layers with the same input; a copy of a layer has none
        for name, value in zip(
            WEIGHT_TENSORS, (int4.weight, int4.scale, int4.zero, int4.perm, int4.codebook), strict=True
        ):
            self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.register_buffer("kernel_scale", None, persistent=False)

    def extra_repr(self) -> str:
        codes = "symmetric" if self.weight_zero is None else "asymmetric"
        if self.weight_codebook is not None:
            codes = "codebook"
        order = ", activation order" if self.weight_perm is not None else ""
        bias = f"bias={self.bias is not None}{'' if self.use_kernel else ', no kernel'}"
        return f"{self.in_features}, {self.out_features}, group_size={self.group_size}, {codes}{order}, {bias}"

    @property
    def int4(self) -> Int4Tensor:
        """The weight in the canonical form; computed on each access while the codes are in a kernel's layout."""
        return self._rows(0, self.out_features)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [N, K]; see Int4Tensor.dequantize."""
        return self.int4.dequantize(dtype)

    def embed(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of W, as an embedding reads them: ids [...] -> [..., K]."""
        if not self.has_chosen_kernel:
            self.choose_kernel()
        rows = ids.flatten()
        weight = self.weight[rows] if self.kernel is None else pack(self.kernel.codes_at(rows, self.weight))
        zero = None if self.weight_zero is None else self.weight_zero[rows]
        int4 = Int4Tensor(weight, self.weight_scale[rows], zero, self.weight_perm, self.weight_codebook)
        return int4.dequantize(dtype).unflatten(0, ids.shape)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError("a 4-bit layer cannot be trained and has no training mode; call model.eval()")
        if not self.has_chosen_kernel:
            self.choose_kernel()
        # A compiled graph cannot depend on which layer of a group comes first; a layer's own slice gives the same bits.
        if (
            self.group is not None
            and x.shape[-2] <= MAX_WINDOW
            and not torch.compiler.is_compiling()
            and self._has_kernel(x)
        ):
            y = self.group.matmul(self, x)
            if y is not None:
                return y
        if isinstance(self.kernel, CpuKernel) and self._has_kernel(x):
            return self._decode(x)
        return by_phase(x, self._decode, self._prefill)

    def _has_kernel(self, x: Tensor) -> bool:
        has_gradients = x.requires_grad and torch.is_grad_enabled()  # weight tiles alone compute them
        return self.kernel is not None and self.use_kernel and self.kernel.supports(x.dtype) and not has_gradients

    def _decode(self, x: Tensor) -> Tensor:
        if not self._has_kernel(x):
            return self._prefill(x)
        assert self.kernel is not None
        assert self.kernel_scale is not None
        return self.kernel.matmul(x, self.weight, self.kernel_scale, self.bias, self.weight_perm)

    def _prefill(self, x: Tensor) -> Tensor:
        if self.weight_perm is not None:
            x = x[..., self.weight_perm]
        y = x.new_empty(*x.shape[:-1], self.out_features)
        step = max(64, TILE_WEIGHTS // self.in_features // 64 * 64)
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            y[..., start:stop] = F.linear(x, self._rows(start, stop).stored(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _rows(self, start: int, stop: int) -> Int4Tensor:
        """Rows start … stop in the canonical form; start is a multiple of 64."""
        weight = self.weight[start:stop] if self.kernel is None else pack(self.kernel.codes(start, stop))
        zero = None if self.weight_zero is None else self.weight_zero[start:stop]
        return Int4Tensor(weight, self.weight_scale[start:stop], zero, self.weight_perm, self.weight_codebook)

    def choose_kernel(self) -> None:
        """Choose this device's kernel and bring the codes into its layout; all layers of a group choose together.

        Done once for a device; again where specdec's CPU kernels have been built since.
        """
        if self.has_chosen_kernel and isinstance(self.kernel, TorchKernel) and cpu.load():
            self._drop_kernel()
        if self.has_chosen_kernel:
            return
        with _LAYOUT_LOCK:
            if self.has_chosen_kernel:  # another thread was first
                return
            layers = (
                [self] if self.group is None else [layer for layer in self.group.layers if not layer.has_chosen_kernel]
            )
            for layer in layers:
                int4 = layer.int4
                kernel = next(
                    (kernel for cls in KERNELS if (kernel := cls.for_weight(int4, layer.int8_inputs)) is not None), None
                )
                if kernel is not None:
                    layer.set_kernel(kernel)
            if self.group is not None:
                self.group.fuse()
            for layer in layers:
                layer.has_chosen_kernel = True

    def set_kernel(self, kernel: Kernel) -> None:
        """Store the codes in the kernel's layout."""
        self.kernel, self.kernel_scale = kernel, kernel.scale
        self.weight = nn.Parameter(kernel.weight, requires_grad=False)

    def _drop_kernel(self) -> None:
        """Store the codes in the canonical layout; the next forward chooses again."""
        if self.group is not None:
            self.group.separate()
        if self.kernel is not None:
            self.weight = nn.Parameter(self.int4.weight, requires_grad=False)
            self.kernel = self.kernel_scale = None
        self.has_chosen_kernel = False

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies hold the canonical form: the machine that reads them may need another layout."""
        state = self.__dict__ | {"group": None}
        if self.kernel is not None:
            state["_parameters"] = self._parameters | {"weight": nn.Parameter(self.int4.weight, requires_grad=False)}
            state["_buffers"] = self._buffers | {"kernel_scale": None}
            state |= {"kernel": None, "has_chosen_kernel": False}
        return state

    def _apply(self, fn: Any, recurse: bool = True) -> Int4Linear:
        probe = fn(torch.empty(0, dtype=self.weight_scale.dtype, device=self.weight_scale.device))
        if probe.dtype != self.weight_scale.dtype:
            raise ValueError(CAST_ERROR.format(probe.dtype))
        self._drop_kernel()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel is not None:
            destination[prefix + "weight"] = self.int4.weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._drop_kernel()
        error_msgs = args[-1]
        scale = state_dict.get(prefix + "weight_scale")
        if scale is not None and scale.shape != self.weight_scale.shape and scale.shape[-1]:
            error_msgs.append(
                f"{prefix}weight_scale has shape {list(scale.shape)}, this layer's is {list(self.weight_scale.shape)}:"
                f" the state dict was quantized with group_size={self.in_features // scale.shape[-1]}, this model with"
                f" {self.group_size}; quantize the model with the group size of the state dict"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
