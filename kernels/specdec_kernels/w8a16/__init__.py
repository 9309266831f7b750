"""The matmul of an 8-bit head, y = x W^T for up to some 64 rows of x, as the torch operator specdec::w8a16.

The weight is int8 [N, K] with a scale a row, as it is stored: an embedding may read rows of the same tensor. `matmul`
multiplies by it: with the Triton kernel where `is_supported`, else with the float32 reference. A row of the kernel's
result depends on that row of x alone: it has the same bits at any M and any index.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from specdec_kernels import trial
from specdec_kernels.configuration import runs_on
from specdec_kernels.w8a16 import reference

__all__ = ["is_supported", "matmul"]

DTYPES = (torch.bfloat16, torch.float16)
SCALE_DTYPES = (torch.float32, *DTYPES)
COLUMN_MULTIPLE = 16  # the codes of a 128-bit load

_LIBRARY = library.Library("specdec", "FRAGMENT")
_LIBRARY.define("w8a16(Tensor x, Tensor weight, Tensor scale) -> Tensor")


def matmul(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [..., K] float16 or bfloat16 -> x W^T, [..., N] of the same dtype, summed in float32, rounded once.

    weight: [N, K] int8. scale: [N] float32, float16 or bfloat16; W[n, k] = weight[n, k] * scale[n]. No gradients.
    """
    if problem := _find_problem(x, weight, scale):
        raise ValueError(f"w8a16: {problem}")
    return torch.ops.specdec.w8a16(x, weight, scale)


def is_supported(x: Tensor, weight: Tensor, scale: Tensor) -> bool:
    """Whether the Triton kernel computes matmul(x, weight, scale): on CUDA, weight and scale contiguous, K % 16 == 0.

    The first call for a device and its dtypes runs a trial there.
    """
    if not runs_on(weight.device) or _find_problem(x, weight, scale):
        return False
    if weight.shape[1] % COLUMN_MULTIPLE or not weight.is_contiguous() or not scale.is_contiguous():
        return False
    name, device = f"w8a16 {x.dtype}, scales {scale.dtype}", weight.device
    return trial.passes(device, name, lambda: _try(x.dtype, scale.dtype, device))


def _find_problem(x: Tensor, weight: Tensor, scale: Tensor) -> str | None:
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; it must be float16 or bfloat16, so cast it first"
    if weight.dtype != torch.int8 or weight.ndim != 2:
        return f"the weight is {weight.dtype} {list(weight.shape)}; it must be int8 [N, K]"
    if scale.dtype not in SCALE_DTYPES or scale.shape != weight.shape[:1]:
        return f"scale is {scale.dtype} {list(scale.shape)}; it must be float32, float16 or bfloat16 {[len(weight)]}"
    if x.shape[-1:] != weight.shape[1:]:
        return f"x has shape {list(x.shape)}; the weight takes {weight.shape[1]} columns"
    if not x.device == weight.device == scale.device:
        return f"x is on {x.device}, the weight on {weight.device}, scale on {scale.device}; move them to one device"
    return None


def _try(dtype: torch.dtype, scale_dtype: torch.dtype, device: torch.device) -> float:
    """The larger relative error of two products, with 3 and with 20 rows; the last blocks of N and K are partial."""
    from specdec_kernels.w8a16 import kernel

    generator = torch.Generator().manual_seed(0)  # leaves the user's random state unchanged
    weight = torch.randint(-128, 128, (200, 400), generator=generator).to(device, torch.int8)
    scale = (0.5 + torch.rand(200, generator=generator)).to(device, scale_dtype)
    inputs = [torch.rand(rows, 400, generator=generator).sub(0.5).to(device, dtype) for rows in (3, 20)]
    return max(
        trial.relative_error(kernel.launch(x, weight, scale), reference.matmul(x.float(), weight, scale))
        for x in inputs
    )


def _on_cuda(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    if x.numel() == 0 or len(weight) == 0 or not is_supported(x, weight, scale):
        return reference.matmul(x, weight, scale)
    from specdec_kernels.w8a16 import kernel

    with torch.cuda.device_of(x):
        y = kernel.launch(x.reshape(-1, x.shape[-1]).contiguous(), weight, scale)
    return y.view(*x.shape[:-1], len(weight))


def _fake_w8a16(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_LIBRARY.impl("w8a16", _on_cuda, "CUDA")
_LIBRARY.impl("w8a16", reference.matmul, "CPU")
library.register_fake("specdec::w8a16", _fake_w8a16, lib=_LIBRARY)
