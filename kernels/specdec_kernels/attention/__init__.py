"""Attention of the K + 1 queries of a verification window over each row's own slots of the KV cache."""

from __future__ import annotations

import torch
from torch import Tensor, library

from specdec_kernels import trial
from specdec_kernels.attention import reference

MAX_DIM = 256  # the largest head width of the kernel
DTYPES = (torch.bfloat16, torch.float16)  # of the kernel

_LIBRARY = library.Library("specdec", "FRAGMENT")
_LIBRARY.define("attention(Tensor query, Tensor key, Tensor value, Tensor first, Tensor last, float scale) -> Tensor")
_LIBRARY.impl("attention", reference.attention, "CompositeExplicitAutograd")


def attention(query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor, scale: float) -> Tensor:
    """softmax(scale * query . key) @ value over the slots first … last of each query; zeros where there are none.

    query [B, H, W, D], key [B, H', S, D], value [B, H', S, DV]; first, last [B, W] int32: -> [B, W, H, DV] in the
    query's dtype. Query head h reads key head h // (H / H'). The last dimension is contiguous, the others may have any
    stride. Slots before the first and after the last that a row's queries attend to may hold NaN; slots between those
    of its queries must be finite. On a CUDA device, bfloat16 and float16 heads of up to 256 run the kernel, and a
    query's result does not depend on W, S, the batch or the other queries, bit for bit. Anything else runs the formula
    in float32. No gradients.
    """
    if problem := _find_problem(query, key, value, first, last):
        raise ValueError(f"attention: {problem}")
    return torch.ops.specdec.attention(query, key, value, first, last, scale)


def _find_problem(query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor) -> str | None:
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if not query.ndim == key.ndim == value.ndim == 4:
        return f"{shapes} must be [B, H, W, D], [B, H', S, D], [B, H', S, DV]"
    batch, heads, width, dim = query.shape
    kv_heads, length = key.shape[1:3]
    if key.shape != (batch, kv_heads, length, dim) or value.shape[:3] != key.shape[:3]:
        return f"{shapes} do not match; they must be [B, H, W, D], [B, H', S, D], [B, H', S, DV]"
    if kv_heads == 0 or heads % kv_heads:
        return f"{heads} query heads cannot share {kv_heads} key heads; H must be a multiple of H'"
    if first.shape != (batch, width) or last.shape != (batch, width):
        return f"first {list(first.shape)} and last {list(last.shape)} must be [B, W] = {[batch, width]}"
    if first.dtype != torch.int32 or last.dtype != torch.int32:
        return f"first is {first.dtype} and last {last.dtype}; convert them with .int()"
    if not query.dtype == key.dtype == value.dtype or not query.dtype.is_floating_point:
        return f"query is {query.dtype}, key {key.dtype}, value {value.dtype}; all must have one floating dtype"
    if len(devices := {str(tensor.device) for tensor in (query, key, value, first, last)}) > 1:
        return f"its tensors are on {', '.join(sorted(devices))}; move them to one device"
    for name, tensor in (("query", query), ("key", key), ("value", value), ("first", first), ("last", last)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"{name} has a stride of {tensor.stride(-1)} in its last dimension; call .contiguous() on it"
    return None


def _on_cuda(query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor, scale: float) -> Tensor:
    dtype, dim, value_dim = query.dtype, query.shape[3], value.shape[3]
    if dtype in DTYPES and max(dim, value_dim) <= MAX_DIM:
        name = f"attention {dtype}, heads of {dim} and {value_dim}"
        if trial.passes(query.device, name, lambda: _try(dtype, dim, value_dim, query.device)):
            from specdec_kernels.attention.kernel import launch

            return launch(query, key, value, first, last, scale)
    return reference.attention(query, key, value, first, last, scale)


def _try(dtype: torch.dtype, dim: int, value_dim: int, device: torch.device) -> float:
    """The relative error on two rows of several chunks, one of them with a sliding window."""
    from specdec_kernels.attention.kernel import launch

    generator = torch.Generator().manual_seed(0)  # leaves the user's random state unchanged
    query = torch.rand(2, 4, 6, dim, generator=generator).to(device, dtype)
    key, value = (
        torch.rand(2, 2, 700, size, generator=generator).sub(0.5).to(device, dtype) for size in (dim, value_dim)
    )
    last = torch.arange(690, 696, dtype=torch.int32, device=device).repeat(2, 1)
    last[1] -= 300
    first = torch.zeros_like(last)
    first[1] = last[1] - 200
    arguments = (first, last, dim**-0.5)
    expected = reference.attention(query.float(), key.float(), value.float(), *arguments)
    return trial.relative_error(launch(query, key, value, *arguments), expected)


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor, scale: float) -> Tensor:
    batch, heads, width, _ = query.shape
    return query.new_empty(batch, width, heads, value.shape[3])


_LIBRARY.impl("attention", _on_cuda, "CUDA")
library.register_fake("specdec::attention", _fake_attention, lib=_LIBRARY)
