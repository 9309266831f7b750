"""Which slots of the KV cache each query of a window sees: as intervals of slots, or as masks.

Intervals are int32 [B, 2, W, 1]: the first and the last slot that each query sees; first > last where it sees none.
Masks are bool [B, 1, W, S], True where the query sees the slot, or the additive form of that.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedConfig


def attention_kinds(config: PreTrainedConfig) -> set[str]:
    """The attention patterns of a text model's layers, by transformers' names."""
    if getattr(config, "layer_types", None):
        return set(config.layer_types)
    if getattr(config, "sliding_window", None) is not None:
        return {"sliding_attention"}
    if getattr(config, "attention_chunk_size", None) is not None:
        return {"chunked_attention"}
    return {"full_attention"}


def attention_masks(
    positions: Tensor,
    key_length: int,
    config: PreTrainedConfig,
    kinds: Iterable[str],
    dtype: torch.dtype,
    padding: Tensor | None = None,
) -> Tensor | dict[str, Tensor]:
    """Finished 4-D masks for queries at positions [B, W] over slots 0 … S-1; a dict by kind where there are several.

    dtype: torch.bool for a mask as sdpa takes it, a floating dtype for an additive one as eager attention takes it,
        torch.int32 for intervals as specdec/runtime/attention/select.py takes them.
    padding: int64 [B], the number of slots before position 0; None: none.
    """
    masks = {}
    for kind in kinds:
        if kind == "sliding_attention":
            first = (positions - config.sliding_window + 1).clamp(min=0)
        elif kind == "chunked_attention":
            first = positions // config.attention_chunk_size * config.attention_chunk_size
        else:
            first = torch.zeros_like(positions)
        intervals = torch.stack([first, positions], dim=1)[..., None]
        if padding is not None:
            intervals = intervals + padding[:, None, None, None]
        if dtype == torch.int32:
            masks[kind] = intervals.int()
            continue
        mask = seen_slots(intervals, key_length)
        if dtype != torch.bool:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
        masks[kind] = mask
    return masks if len(masks) > 1 else masks.popitem()[1]


def seen_slots(intervals: Tensor, key_length: int) -> Tensor:
    """Intervals as a bool mask over slots 0 … S-1."""
    slot = torch.arange(key_length, device=intervals.device)
    return (slot >= intervals[:, :1]) & (slot <= intervals[:, 1:])


def causal_intervals(query: Tensor, key_length: int) -> Tensor:
    """Intervals of queries [B, H, W, D] that stand at the last W of S slots; each sees its slot and those before."""
    last = torch.arange(key_length - query.shape[2], key_length, dtype=torch.int32, device=query.device)
    return torch.stack([torch.zeros_like(last), last])[None, :, :, None].expand(len(query), -1, -1, -1)


def intervals_of(mask: Tensor, batch_size: int) -> Tensor | None:
    """A bool mask [B or 1, 1, W, S] as intervals; None where some query sees slots with gaps between them."""
    if mask.dtype != torch.bool or mask.shape[1] != 1:
        return None
    seen = mask[:, 0]  # large for a prompt, so every intermediate result of its size is in bytes
    first, count = seen.view(torch.uint8).argmax(-1), seen.sum(-1)
    last = seen.shape[-1] - 1 - seen.flip(-1).view(torch.uint8).argmax(-1)
    last = torch.where(count > 0, last, first - 1)
    if (last - first + 1 != count).any():
        return None
    return torch.stack([first, last], dim=1)[..., None].int().expand(batch_size, -1, -1, -1)


def is_intervals(mask: Tensor | None, width: int) -> bool:
    """Whether an attention mask for W queries is given as intervals."""
    return mask is not None and mask.dtype == torch.int32 and mask.shape[1:] == (2, width, 1)
