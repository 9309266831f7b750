"""The reference of the w8a16 kernel, in float32 and plain torch."""

from __future__ import annotations

from torch import Tensor


def matmul(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [..., K], weight [N, K] int8, scale [N] -> [..., N] of x's dtype, rounded once."""
    return (x.float() @ weight.float().T * scale.float()).to(x.dtype)
