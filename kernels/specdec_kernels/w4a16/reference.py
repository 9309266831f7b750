"""The reference of the w4a16 kernel, in float32 and plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels.w4a16.layout import E2M1, E2M1_UNIT, SYMMETRIC_ZERO, TILE, UNIT, PackedWeight


def dequantize(weight: PackedWeight) -> Tensor:
    """W [N, K] float32, computed from the packed weight."""
    codes = weight.codes()
    groups = weight.tiles.shape[0] * TILE // weight.group_size
    words = weight.scale[:, : weight.out_features].T
    if weight.kind == "e2m1":
        values = codes.new_tensor(E2M1, dtype=torch.float32)[codes.int()]
        scale = torch.exp2(_parts(words, 8)[:, :groups].float() - 127 - E2M1_UNIT + weight.exponent)
    elif weight.kind == "symmetric":
        values = codes.float() - SYMMETRIC_ZERO
        scale = _floats(_parts(words, 16)[:, :groups], weight.scale_dtype)
    else:
        parts = _parts(words, 16).unflatten(1, (groups, 2))
        zero = _floats(parts[..., 1], weight.scale_dtype) / -UNIT[weight.scale_dtype]
        values = codes.float() - zero.repeat_interleave(weight.group_size, dim=1)[:, : weight.in_features]
        scale = _floats(parts[..., 0], weight.scale_dtype)
    return values * scale.repeat_interleave(weight.group_size, dim=1)[:, : weight.in_features]


def matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, perm: Tensor | None = None) -> Tensor:
    """x [..., K] -> x[..., perm] W^T + bias, [..., N] of x's dtype, rounded once."""
    x32 = x.float() if perm is None else x.float()[..., perm]
    y = x32 @ dequantize(weight).T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _parts(words: Tensor, bits: int) -> Tensor:
    """int32 [N, words] -> int32 [N, parts], the low one of each word first."""
    parts = [words >> shift & (1 << bits) - 1 for shift in range(0, 32, bits)]
    return torch.stack(parts, dim=-1).flatten(1)


def _floats(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.to(torch.int16).view(dtype).float()
