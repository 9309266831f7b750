"""Attention by a fused kernel: in C++ on a CPU, where it has been built; in Triton on a CUDA device.

The kernel reads only the interval of slots that each query sees. A query's result does not depend on the window, the
batch and the other rows.
"""

from __future__ import annotations

import torch
from specdec_kernels import cpu
from specdec_kernels.attention import DTYPES, MAX_DIM, attention
from specdec_kernels.configuration import runs_on
from torch import Tensor


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a fused kernel for this device and dtype."""
    return (dtype in cpu.DTYPES and cpu.load()) if device.type == "cpu" else (dtype in DTYPES and runs_on(device))


def is_supported(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel of their device computes attention of these states, [B, H, W, D] and [B, H', S, D]."""
    states = (query, key, value)
    is_narrow = max(query.shape[3], value.shape[3]) <= MAX_DIM
    has_gradients = torch.is_grad_enabled() and any(state.requires_grad for state in states)
    return (
        has_kernel(query.device, query.dtype)
        and is_narrow
        and not has_gradients
        and all(state.stride(3) == 1 for state in states)
    )


def attend(query: Tensor, key: Tensor, value: Tensor, intervals: Tensor, scale: float) -> Tensor:
    """Queries [B, H, W, D] over the slots of intervals [B, 2, W, 1]: -> [B, W, H, DV]."""
    first, last = intervals[..., 0].unbind(1)
    return attention(query, key, value, first, last, scale)
