"""The canonical 4-bit form of a weight, and the linear layer that runs on it.

A weight W [N, K] (out, in) is N * K codes of four bits and a scale for every group of G columns of a row:

    W[n, k] = (code[n, k] - zero[n, k // G]) * scale[n, k // G]        zero is 8 where none is stored
    W[n, k] = codebook[code[n, k]] * scale[n, k // G]                  where there is a codebook (MXFP4)

Whatever wrote a checkpoint, this is what it becomes. Products are taken in float32 and rounded once, so in the scales' own dtype
the weights are bit for bit what the checkpoint's own library makes of them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from specdec_kernels import cpu
from torch import Tensor, nn

from specdec.quant.batch_invariant import MAX_WINDOW, by_phase
from specdec.quant.cpu import CpuKernel, TorchKernel
from specdec.quant.cuda import CudaKernel, FusedLinearGroup

GROUP_SIZES = (16, 32, 64, 128, 256, -1)  # columns that share a scale; -1: the whole row (per channel)
SYMMETRIC_ZERO = 8
TILE_WEIGHTS = 1 << 21  # in full precision at any one time
WEIGHT_TENSORS = ("weight", "weight_scale", "weight_zero", "weight_perm", "weight_codebook")


def pack(codes: Tensor) -> Tensor:
    """Codes 0 … 15, [..., K] of any integer dtype -> uint8 [..., K/2]; the even column in the low nibble."""
    if codes.shape[-1] % 2:
        raise ValueError(f"two codes share a byte, so the number of columns must be even, got {codes.shape[-1]}")
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """uint8 [..., K/2] -> codes 0 … 15, uint8 [..., K]: the inverse of pack."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


@dataclass(frozen=True)
class Int4Tensor:
    """A weight [..., N, K] in its canonical form.

    weight: uint8 [..., N, K/2], two codes a byte (see pack).
    scale: [..., N, K/G], any floating dtype, float8_e8m0fnu included; kept as it came.
    zero: uint8 [..., N, K/G], or None where every zero point is 8 or there is a codebook.
    perm: int32 [K], or None: stored column j is the layer's input column perm[j] (GPTQ's activation order).
    codebook: [16] floating, or None: the value of each code.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None = None
    perm: Tensor | None = None
    codebook: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., N, K] of the weight."""
        return (*self.weight.shape[:-1], 2 * self.weight.shape[-1])

    @property
    def group_size(self) -> int:
        return 2 * self.weight.shape[-1] // self.scale.shape[-1]

    def __getitem__(self, index: Any) -> Int4Tensor:
        """The same of some rows, or of one expert of [E, N, K]."""
        zero = None if self.zero is None else self.zero[index]
        return Int4Tensor(self.weight[index], self.scale[index], zero, self.perm, self.codebook)

    def codes(self) -> Tensor:
        """Codes 0 … 15, uint8 [..., N, K]."""
        return unpack(self.weight)

    def stored(self, dtype: torch.dtype) -> Tensor:
        """W [..., N, K] with its columns in stored order."""
        codes = self.codes()
        values = codes.float() if self.codebook is None else self.codebook.float()[codes.int()]
        groups = values.unflatten(-1, (self.scale.shape[-1], -1))
        if self.codebook is None:
            groups -= SYMMETRIC_ZERO if self.zero is None else self.zero.float()[..., None]
        groups *= self.scale.float()[..., None]
        return values.to(dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [..., N, K], columns as the inputs have them; in the scales' dtype (bfloat16 for 8-bit scales) unless told."""
        dtype = dtype or (torch.bfloat16 if self.scale.dtype.itemsize == 1 else self.scale.dtype)
        stored = self.stored(dtype)
        if self.perm is None:
            return stored
        weight = torch.empty_like(stored)
        weight[..., self.perm.long()] = stored
        return weight


class Kernel(Protocol):
    """A device's own 4-bit matmul for windows of up to 64 positions, with one weight's codes in a layout of its own.

    A row of its result must not depend on the number of rows, on its place among them, or on the others.
    """

    weight: Tensor  # the codes
    scale: Tensor  # the scales, zero points included

    @classmethod
    def of(cls, int4: Int4Tensor) -> Kernel | None:
        """The kernel for such a weight on its device, None where it has none."""

    def codes(self, start: int, stop: int) -> Tensor:
        """Codes 0 … 15, uint8 [stop - start, K], of rows start … stop; start is a multiple of 64."""

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether inputs of a dtype can be multiplied, as they are or rounded to bfloat16."""

    def matmul(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, perm: Tensor | None) -> Tensor:
        """x [..., K] -> x[..., perm] W^T + bias, [..., N] of the same dtype.

        weight, scale: the kernel's own, as its layer holds them, since a tracer knows no others; perm: the layer's.
        """


KERNELS: list[type[Kernel]] = [CpuKernel, TorchKernel, CudaKernel]
_LAYOUT_LOCK = threading.Lock()


class Int4Linear(nn.Module):
    """y = x W^T + b on a 4-bit weight, where an nn.Linear stood: x [..., W, K] of any floating dtype -> [..., W, N] of the same.

    The path goes by phase, never by the number of rows. A window of up to 64 positions is decoding: the device's own kernel. A
    wider one is prefill: slabs of the weight in full precision, one after the other, so that no full-precision copy of the model
    ever exists; its last position, the one that is sampled from, goes the decoding way. Where no kernel takes the weight, or the
    input wants a gradient, slabs serve both.

    On a CPU the kernel is specdec's own where it has been built, for windows of any width, else PyTorch's int4 op (bfloat16
    inputs, outputs and scales, whatever the dtype around it). On a CUDA device it is the Triton kernel, which takes float16 and
    bfloat16, and layers that take the same input share its launch.
    The codes are held in the kernel's layout instead of the canonical one, never in both; state_dict() gives the canonical form.
    use_kernel: False keeps to slabs, in the inputs' own precision.
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
        self.use_kernel = True
        self.kernel: Kernel | None = None  # the layout that `weight` is in: this kernel's, or the canonical one
        self.has_looked = False  # for a kernel, on this device
        self.siblings: FusedLinearGroup | None = None  # layers that take the same input; a copy of a layer has none
        for name, value in zip(
            WEIGHT_TENSORS, (int4.weight, int4.scale, int4.zero, int4.perm, int4.codebook), strict=True
        ):
            self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.register_buffer("kernel_scale", None, persistent=False)

    def extra_repr(self) -> str:
        kind = (
            "codebook"
            if self.weight_codebook is not None
            else "asymmetric"
            if self.weight_zero is not None
            else "symmetric"
        )
        order = ", activation order" if self.weight_perm is not None else ""
        bias = f"bias={self.bias is not None}{'' if self.use_kernel else ', no kernel'}"
        return f"{self.in_features}, {self.out_features}, group_size={self.group_size}, {kind}{order}, {bias}"

    @property
    def int4(self) -> Int4Tensor:
        """The canonical form; made anew where the codes lie in a kernel's layout."""
        return self._rows(0, self.out_features)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [N, K]; see Int4Tensor.dequantize."""
        return self.int4.dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError("a 4-bit layer cannot be trained and has no training mode; call model.eval()")
        if not self.has_looked:
            self.enter_layout()
        # a compiled graph has no room for who was first; a layer's own slice gives it the same bits
        if (
            self.siblings is not None
            and x.shape[-2] <= MAX_WINDOW
            and not torch.compiler.is_compiling()
            and self._has_kernel(x)
        ):
            y = self.siblings.matmul(self, x)
            if y is not None:
                return y
        if isinstance(self.kernel, CpuKernel) and self._has_kernel(x):
            return self._decode(x)
        return by_phase(x, self._decode, self._prefill)

    def _has_kernel(self, x: Tensor) -> bool:
        has_gradients = x.requires_grad and torch.is_grad_enabled()  # which slabs alone have
        return self.kernel is not None and self.use_kernel and self.kernel.takes(x.dtype) and not has_gradients

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

    def enter_layout(self) -> None:
        """Bring the codes into the layout of this device's best kernel, if it has one for them; siblings go together."""
        if (
            self.has_looked and isinstance(self.kernel, TorchKernel) and cpu.load()
        ):  # which was not there when it looked
            self._leave_layout()
        if self.has_looked:
            return
        with _LAYOUT_LOCK:
            if self.has_looked:  # another thread was first
                return
            layers = (
                [self] if self.siblings is None else [layer for layer in self.siblings.layers if not layer.has_looked]
            )
            for layer in layers:
                int4 = layer.int4
                kernel = next((kernel for kind in KERNELS if (kernel := kind.of(int4)) is not None), None)
                if kernel is not None:
                    layer.adopt(kernel)
            if self.siblings is not None:
                self.siblings.fuse()
            for layer in layers:
                layer.has_looked = True

    def adopt(self, kernel: Kernel) -> None:
        """Hold the codes in the kernel's layout."""
        self.kernel, self.kernel_scale = kernel, kernel.scale
        self.weight = nn.Parameter(kernel.weight, requires_grad=False)

    def _leave_layout(self) -> None:
        """Bring the codes back into the canonical layout."""
        if self.siblings is not None:
            self.siblings.separate()
        if self.kernel is not None:
            self.weight = nn.Parameter(self.int4.weight, requires_grad=False)
            self.kernel = self.kernel_scale = None
        self.has_looked = False

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies hold the canonical form: a kernel's layout may be another one where they are read."""
        state = self.__dict__ | {"siblings": None}
        if self.kernel is not None:
            state["_parameters"] = self._parameters | {"weight": nn.Parameter(self.int4.weight, requires_grad=False)}
            state["_buffers"] = self._buffers | {"kernel_scale": None}
            state |= {"kernel": None, "has_looked": False}
        return state

    def _apply(self, fn: Any, recurse: bool = True) -> Int4Linear:
        probe = fn(torch.empty(0, dtype=self.weight_scale.dtype, device=self.weight_scale.device))
        if probe.dtype != self.weight_scale.dtype:
            raise ValueError(CAST.format(probe.dtype))
        self._leave_layout()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel is not None:
            destination[prefix + "weight"] = self.int4.weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._leave_layout()
        error_msgs = args[-1]
        scale = state_dict.get(prefix + "weight_scale")
        if scale is not None and scale.shape != self.weight_scale.shape and scale.shape[-1]:
            error_msgs.append(
                f"{prefix}weight_scale has shape {list(scale.shape)}, this layer's is {list(self.weight_scale.shape)}: the state"
                f" dict was quantized with group_size={self.in_features // scale.shape[-1]}, this model with {self.group_size};"
                " quantize the model with the group size of the state dict"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


CAST = (
    "a 4-bit model cannot be cast to {}: its scales are part of its weights; its inputs may have any dtype, so load it anew with"
    " dtype=… for everything around them"
)
