"""The reference of the attention kernel: the formula in float32, all scores at once."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor, scale: float) -> Tensor:
    """softmax(scale * query . key) @ value over the slots first … last of each query; zeros where there are none.

    query [B, H, W, D], key [B, H', S, D], value [B, H', S, DV], first, last [B, W]: -> [B, W, H, DV] in the query's
    dtype.
    """
    slot = torch.arange(key.shape[2], device=key.device)
    visible = (slot >= first[:, :, None]) & (slot <= last[:, :, None])  # [B, W, S]
    # Slots that no query attends to may be NaN
    value = value.float().masked_fill(~visible.any(1)[:, None, :, None], 0.0)
    queries = query.float().unflatten(1, (key.shape[1], -1))  # [B, H', G, W, D]
    scores = queries @ key.float().transpose(2, 3)[:, :, None] * scale
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    weights = scores.softmax(-1).masked_fill(~visible[:, None, None], 0.0)
    return (weights @ value[:, :, None]).flatten(1, 2).transpose(1, 2).to(query.dtype).contiguous()
