"""The 4-bit verification matmul, y = x W^T + b for up to some 64 rows of x, as the torch operator specdec::w4a16.

`prepack` converts a weight to the kernel's layout, `matmul` multiplies by it: with the Triton kernel on CUDA; with the
float32 reference elsewhere, and where no configuration is shipped or the kernel failed its trial. A row of the kernel's
result depends on that row of x alone: it has the same bits at any M and any index.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, library

from specdec_kernels import trial
from specdec_kernels.w4a16 import reference
from specdec_kernels.w4a16.layout import E2M1, TILE, Kind, PackedWeight, concatenate, prepack

__all__ = ["PackedWeight", "concatenate", "has_kernel", "matmul", "prepack"]

MAX_ROWS = 256  # of a launch: the scratch of split sums grows with them, and a row's bits don't depend on them

_LIBRARY = library.Library("specdec", "FRAGMENT")
_LIBRARY.define(
    "w4a16(Tensor x, Tensor tiles, Tensor scale, Tensor? bias, Tensor? perm, str kind, int group_size,"
    " ScalarType scale_dtype, int exponent, int splits, int out_features) -> Tensor"
)


def matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, perm: Tensor | None = None) -> Tensor:
    """x [..., K] float16 or bfloat16 -> x W^T + bias, [..., N] of the same dtype, summed in float32, rounded once.

    bias: [N] floating. perm: int [K], column perm[j] of x is multiplied by column j of W (GPTQ's activation order).
    """
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"x is {x.dtype}; the 4-bit matmul takes float16 or bfloat16, so cast it first")
    if x.shape[-1:] != (weight.in_features,):
        raise ValueError(f"x has shape {list(x.shape)}; the weight takes {weight.in_features} columns")
    if bias is not None and bias.shape != (weight.out_features,):
        raise ValueError(f"bias has shape {list(bias.shape)}; the weight has {weight.out_features} rows")
    if perm is not None and (perm.shape != (weight.in_features,) or perm.is_floating_point()):
        raise ValueError(
            f"perm is {perm.dtype} {list(perm.shape)}; it must hold {weight.in_features} integers, the order of the"
            " columns"
        )
    for name, tensor in (("weight", weight.tiles), ("bias", bias), ("perm", perm)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x is on {x.device} and the {name} on {tensor.device}; move one to the other")
    return torch.ops.specdec.w4a16(
        x, weight.tiles, weight.scale, bias, perm, weight.kind, weight.group_size, weight.scale_dtype, weight.exponent,
        weight.splits, weight.out_features,
    )  # fmt: skip


def has_kernel(weight: PackedWeight, dtype: torch.dtype) -> bool:
    """Whether the Triton kernel multiplies inputs of a dtype by the weight; needs triton."""
    from specdec_kernels.w4a16 import kernel

    configuration = kernel.configuration(weight, dtype, rows=1)
    if configuration is None:
        return False
    device, quantization = weight.tiles.device, (weight.kind, weight.group_size, weight.scale_dtype)
    return trial.passes(device, f"w4a16 {configuration.name}", lambda: _try(*quantization, dtype, device))


def _try(kind: Kind, group_size: int, scale_dtype: torch.dtype, dtype: torch.dtype, device: torch.device) -> float:
    """The larger relative error of two products, with 3 and with 20 rows."""
    from specdec_kernels.w4a16 import kernel

    generator = torch.Generator().manual_seed(0)  # leaves the user's random state unchanged
    weight = _random_weight(kind, group_size, scale_dtype, device, generator)
    inputs = [torch.rand(rows, weight.in_features, generator=generator).sub(0.5).to(device, dtype) for rows in (3, 20)]
    return max(
        trial.relative_error(kernel.launch(x, weight, None), reference.matmul(x.float(), weight)) for x in inputs
    )


def _random_weight(
    kind: Kind, group_size: int, scale_dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> PackedWeight:
    """A weight [256, 1024] of a kind, whose columns are summed in several splits."""
    codes = torch.randint(16, (256, 1024), generator=generator, dtype=torch.uint8)
    shape = (256, 1024 // group_size)
    scale = (0.5 + torch.rand(shape, generator=generator)).to(scale_dtype)
    zero = torch.randint(16, shape, generator=generator, dtype=torch.uint8) if kind == "asymmetric" else None
    codebook = torch.tensor(E2M1) if kind == "e2m1" else None
    if kind == "e2m1":
        scale = torch.randint(120, 134, shape, generator=generator, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    weight = prepack(codes, scale, zero, codebook)
    assert weight is not None
    return replace(weight, tiles=weight.tiles.to(device), scale=weight.scale.to(device))


def _by_kernel(
    x: Tensor, tiles: Tensor, scale: Tensor, bias: Tensor | None, perm: Tensor | None, kind: Kind, group_size: int,
    scale_dtype: torch.dtype, exponent: int, splits: int, out_features: int,
) -> Tensor:  # fmt: skip
    from specdec_kernels.w4a16 import kernel

    weight = PackedWeight(tiles, scale, kind, group_size, scale_dtype, exponent, splits, out_features, x.shape[-1])
    if x.numel() == 0 or not has_kernel(weight, x.dtype):
        return reference.matmul(x, weight, bias, perm)
    rows = x.reshape(-1, x.shape[-1])
    rows = rows.contiguous() if perm is None else rows.index_select(1, perm)
    if padding := tiles.shape[0] * TILE - rows.shape[1]:
        rows = F.pad(rows, (0, padding))
    bias = None if bias is None else bias.to(x.dtype)
    with torch.cuda.device_of(x):
        outputs = [kernel.launch(chunk, weight, bias) for chunk in rows.split(MAX_ROWS)]
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return y.view(*x.shape[:-1], out_features)


def _by_reference(
    x: Tensor, tiles: Tensor, scale: Tensor, bias: Tensor | None, perm: Tensor | None, kind: Kind, group_size: int,
    scale_dtype: torch.dtype, exponent: int, splits: int, out_features: int,
) -> Tensor:  # fmt: skip
    weight = PackedWeight(tiles, scale, kind, group_size, scale_dtype, exponent, splits, out_features, x.shape[-1])
    return reference.matmul(x, weight, bias, perm)


def _fake_w4a16(x: Tensor, *args: object) -> Tensor:
    out_features = args[-1]
    assert isinstance(out_features, int)
    return x.new_empty(*x.shape[:-1], out_features)


_LIBRARY.impl("w4a16", _by_kernel, "CUDA")
_LIBRARY.impl("w4a16", _by_reference, "CPU")
library.register_fake("specdec::w4a16", _fake_w4a16, lib=_LIBRARY)
