"""Batch-invariant attention: a query's result does not depend on the window, the batch and the rows that it runs with.

`batch_invariant_attention` is registered with transformers' AttentionInterface as "specdec_rows" and dispatches each
call to a backend:

    fused    decoding windows on a CUDA device in float16 or bfloat16, and on a CPU whose C++ kernels have been built
    blocks   decoding windows on a CPU without them
    stock    everything else: transformers' sdpa, so any model may use the name

A wider window is prefill: sdpa computes it, except for the last position, which the backend of decoding windows
computes. The first id is sampled from that position, and the first verification computes it again.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

import torch
from specdec_kernels import cpu
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from specdec.quant.batch_invariant import ATTENTION, MAX_WINDOW, is_decoding
from specdec.runtime.attention import blocks, fused, stock
from specdec.runtime.attention.override import implementation_of
from specdec.runtime.kv_cache.masks import causal_intervals, intervals_of, is_intervals, seen_slots

# Device types on which sdpa models keep sdpa: a CPU's kernel sums in another order, which changes texts in bfloat16.
KEEP_SDPA = ("cpu",)
# transformers' keywords that change the formula; only sdpa computes calls with one of them.
OTHER_FORMULAS = ("softcap", "s_aux", "position_bias", "cache")


class Backend(Enum):
    FUSED = "fused"
    BLOCKS = "blocks"
    STOCK = "stock"


def select_backend(device: torch.device, is_standard: bool, can_fuse: bool, has_bool_mask: bool) -> Backend:
    """The backend of a call: of a decoding window, or of the last position of a prefill.

    is_standard: the formula is plain causal attention.
    can_fuse: a fused kernel supports the states, and the slots that each query sees are an interval.
    has_bool_mask: those slots are known as intervals or as a bool mask, not as an additive one.
    """
    if is_standard and can_fuse:
        return Backend.FUSED
    if is_standard and device.type == "cpu" and has_bool_mask:
        return Backend.BLOCKS
    return Backend.STOCK


def takes_intervals(model: PreTrainedModel) -> bool:
    """Whether decoding windows of the model get intervals, not masks: its layers call `batch_invariant_attention`."""
    implementation = implementation_of(model.config.get_text_config(decoder=True))
    can_override = implementation == "sdpa" and model.device.type not in KEEP_SDPA and model._supports_attention_backend
    return implementation == ATTENTION or (can_override and fused.has_kernel(model.device, model.dtype))


def batch_invariant_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention call: query [B, H, W, D], key [B, H', S, D], value [B, H', S, DV] -> [B, W, H, DV].

    attention_mask: bool [B, 1, W, S]; int32 [B, 2, W, 1], the first and the last slot that each query sees; None for
        causal attention.
    """
    width = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_standard = causal and not dropout and all(kwargs.get(name) is None for name in OTHER_FORMULAS)
    if is_standard and attention_mask is None and width > 1:
        # As in sdpa, the first query stands at the first key: the static cache was empty.
        key, value = key[:, :, :width], value[:, :, :width]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sdpa = stock.sdpa_of(module, query, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)

    intervals = None
    if is_standard and fused.is_supported(query, key, value):
        intervals = _visible_intervals(query, key, attention_mask)
    has_bool_mask = attention_mask is None or attention_mask.dtype in (torch.bool, torch.int32)
    backend = select_backend(query.device, is_standard, intervals is not None, has_bool_mask)

    attend: Callable[..., Tensor]
    if backend is Backend.FUSED:
        attend, visible, decodes = fused.attend, intervals, is_decoding(width, query.device)
    elif backend is Backend.BLOCKS:
        attend = partial(blocks.attend, missing=_missing_slots(attention_mask, position_ids, width, key.shape[2]))
        visible, decodes = _as_mask(attention_mask, query, key), width <= MAX_WINDOW
    else:
        mask = None if attention_mask is None else _as_mask(attention_mask, query, key)
        return sdpa(key, value, mask), None

    assert visible is not None
    if decodes:
        return attend(query, key, value, visible, scale), None
    is_causal_on_gpu = attention_mask is None and query.device.type != "cpu"
    output = stock.over_whole_blocks(sdpa, key, value, None if is_causal_on_gpu else _as_mask(visible, query, key))
    output[:, -1:] = attend(query[:, :, -1:], key, value, visible[:, :, -1:], scale)
    return output, None


def _visible_intervals(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
    """The slots that each query sees as intervals; None where they are only known as a mask.

    A bool mask, as stock calls have it, is converted only on a CPU: on a GPU, reading it would make the host wait.
    """
    if mask is None:
        return causal_intervals(query, key.shape[2])
    if is_intervals(mask, query.shape[2]):
        return mask
    return intervals_of(mask, len(query)) if query.device.type == "cpu" and cpu.load() else None


def _as_mask(visible: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """Intervals, a mask or None (causal) as a mask."""
    if visible is None:
        visible = causal_intervals(query, key.shape[2])
    return seen_slots(visible, key.shape[2]) if is_intervals(visible, query.shape[2]) else visible


def _missing_slots(mask: Tensor | None, position_ids: Tensor | None, width: int, num_slots: int) -> int:
    """How many slots of the first block of keys precede the first key.

    Blocks begin at multiples of 128 of the keys' positions, also where a sliding cache passes only the last keys. The
    ragged cache, whose windows come with intervals, passes all of them.
    """
    if is_intervals(mask, width) or position_ids is None or position_ids.ndim != 2:
        return 0
    return max(int(position_ids[0, -1]) + 1 - num_slots, 0) % blocks.KEY_BLOCK


AttentionInterface.register(ATTENTION, batch_invariant_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
