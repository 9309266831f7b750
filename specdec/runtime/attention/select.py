"""Attention over the ragged cache: each query by itself, whatever its window, its batch and its neighbours are.

`row_attention` stands in transformers' AttentionInterface as "specdec_rows". A decoding window goes to a fused kernel, which
reads from each row's stretch of the cache and nothing else: on a CUDA device in float16 or bfloat16, on a CPU where the kernels
have been built; `ModelRunner` hands over where that stretch begins and ends instead of a mask. A CPU without them works in blocks
of 8 queries and 128 keys. What neither does is sdpa's, so any model may carry the name, and a stock call gets what it would from
sdpa.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from specdec_kernels import cpu
from specdec_kernels.attention import DTYPES, MAX_DIM, attention
from specdec_kernels.configuration import runs_on
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from specdec.quant.batch_invariant import ATTENTION, BLOCK, MAX_WINDOW, is_decoding
from specdec.runtime.kv_cache.ragged import seen_slots

KEYS = 128  # keys of one matmul on a CPU
SDPA_STAYS = ("cpu",)  # there the kernel adds up in another order than sdpa, which some text would show in bfloat16
OTHER_FORMULAS = (
    "softcap",
    "s_aux",
    "position_bias",
    "cache",
)  # keywords of transformers' that change what is computed


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a fused kernel runs there."""
    return (dtype in cpu.DTYPES and cpu.load()) if device.type == "cpu" else (dtype in DTYPES and runs_on(device))


def takes_intervals(model: PreTrainedModel) -> bool:
    """Whether the model's decoding windows come with intervals: it reaches `row_attention` through transformers' interface."""
    implementation = implementation_of(model.config.get_text_config(decoder=True))
    can_override_attention = (
        implementation == "sdpa" and model.device.type not in SDPA_STAYS and model._supports_attention_backend
    )
    return implementation == ATTENTION or (can_override_attention and serves(model.device, model.dtype))


@contextmanager
def attention_override(config: PreTrainedConfig) -> Iterator[None]:
    """Within, the layers of `config` run `row_attention`; behind the last of several forwards, what they ran before.

    A stock call of another thread may meet the one or the other, and gets the same from both. Counted, since one that ends early
    must not take the name from a forward of ours whose layers still expect intervals.
    """
    key = id(config)
    with _OVERRIDE_LOCK:
        _OVERRIDDEN.setdefault(key, [config._attn_implementation, 0])[1] += 1
        config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        with _OVERRIDE_LOCK:
            _OVERRIDDEN[key][1] -= 1
            if not _OVERRIDDEN[key][1]:
                config._attn_implementation = _OVERRIDDEN.pop(key)[0]


def implementation_of(config: PreTrainedConfig) -> str:
    """The attention implementation that a model was given, also while a forward of ours runs."""
    with _OVERRIDE_LOCK:
        name: str = _OVERRIDDEN.get(id(config), [config._attn_implementation])[0]
    return name


_OVERRIDE_LOCK = threading.Lock()
# By id of a config, while forwards of ours run: what it ran before, and their number. Not in the config itself, which
# another thread may copy or save meanwhile.
_OVERRIDDEN: dict[int, list[Any]] = {}


def row_attention(
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
    """transformers' attention call: query [B, H, W, D], key, value [B, H', S, D] -> [B, W, H, D].

    attention_mask: bool [B, 1, W, S]; or int32 [B, 2, W, 1], the first and the last slot that each query sees; or None, causal.
    """
    width = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    ours = causal and not dropout and all(kwargs.get(name) is None for name in OTHER_FORMULAS)
    if (
        ours and attention_mask is None and width > 1
    ):  # as sdpa: the first query stands at the first key (an empty static cache)
        key, value = key[:, :, :width], value[:, :, :width]
    length = key.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    def stock(key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        named = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal} | kwargs
        y: Tensor = sdpa_attention_forward(module, query, key, value, mask, **named)[0]
        return y

    mask, intervals = attention_mask, None
    if attention_mask is not None and attention_mask.dtype == torch.int32 and attention_mask.shape[1:] == (2, width, 1):
        mask, intervals = None, attention_mask
    on_cpu = query.device.type == "cpu"
    if ours and (mask is None or (on_cpu and cpu.load())) and _has_kernel(query, key, value):
        seen = intervals
        if seen is None:
            seen = _causal(query, length) if mask is None else _intervals(mask, len(query))  # a mask: a stock call
        if seen is not None:
            decodes = is_decoding(width, query.device)
            at = slice(None) if decodes else slice(-1, None)
            first, last = seen[:, :, at, 0].unbind(1)
            decoded = attention(query[:, :, at], key, value, first, last, scale)
            if decodes:
                return decoded, None
            is_plain = mask is None and intervals is None and not on_cpu
            y = _whole(stock, key, value, None if is_plain else seen_slots(seen, length))
            y[:, -1:] = decoded
            return y, None

    if intervals is not None:
        mask = seen_slots(intervals, length)
    if not ours or not on_cpu or (mask is not None and mask.dtype != torch.bool):
        return stock(key, value, mask), None
    if mask is None:
        mask = seen_slots(_causal(query, length), length)
    # Blocks of keys begin at multiples of 128 of their positions, also where a sliding cache hands over the last ones alone.
    start = 0
    if (
        intervals is None and position_ids is not None and position_ids.ndim == 2
    ):  # ours, with intervals, begin at slot 0
        start = max(int(position_ids[0, -1]) + 1 - length, 0)
    if width > MAX_WINDOW:
        y = _whole(stock, key, value, mask)
        y[:, -1:] = _in_blocks(query[:, :, -1:], key, value, mask[:, :, -1:], scale, start % KEYS)
        return y, None
    return _in_blocks(query, key, value, mask, scale, start % KEYS), None


def _whole(stock: Callable[..., Tensor], key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """sdpa over whole blocks of keys on a CPU, where it sums otherwise over another number of them; our caches hand over such."""
    missing = -key.shape[2] % KEYS
    if key.device.type != "cpu" or not missing or mask is None:
        return stock(key, value, mask)
    return stock(F.pad(key, (0, 0, 0, missing)), F.pad(value, (0, 0, 0, missing)), F.pad(mask, (0, missing)))


def _has_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    states = (query, key, value)
    narrow = max(query.shape[3], value.shape[3]) <= MAX_DIM
    has_gradients = torch.is_grad_enabled() and any(state.requires_grad for state in states)
    return (
        serves(query.device, query.dtype)
        and narrow
        and not has_gradients
        and all(state.stride(3) == 1 for state in states)
    )


def _causal(query: Tensor, length: int) -> Tensor:
    """Intervals of the last W queries of a text of so many slots."""
    last = torch.arange(length - query.shape[2], length, dtype=torch.int32, device=query.device)
    return torch.stack([torch.zeros_like(last), last])[None, :, :, None].expand(len(query), -1, -1, -1)


def _intervals(mask: Tensor, batch_size: int) -> Tensor | None:
    """A bool mask [B or 1, 1, W, S] as intervals [B, 2, W, 1]; None where some query sees slots with gaps between them."""
    if mask.dtype != torch.bool or mask.shape[1] != 1:
        return None
    seen = mask[:, 0]  # a prompt's is large: nothing of it is held in more than a byte
    first, count = seen.view(torch.uint8).argmax(-1), seen.sum(-1)
    last = seen.shape[-1] - 1 - seen.flip(-1).view(torch.uint8).argmax(-1)
    last = torch.where(count > 0, last, first - 1)
    if (last - first + 1 != count).any():
        return None
    return torch.stack([first, last], dim=1)[..., None].int().expand(batch_size, -1, -1, -1)


def _in_blocks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, missing: int) -> Tensor:
    """[B, H, W, D] queries with a bool mask [B, 1, W, S] -> [B, W, H, D], in blocks of 8 queries and 128 keys.

    missing: how many slots the first block of keys lacks before the first key.
    """
    blocks = _blocks(key, value, missing)
    mask = F.pad(mask, (missing, -(missing + key.shape[2]) % KEYS))
    starts = range(0, query.shape[2], BLOCK)
    parts = [_attend(query[:, :, at : at + BLOCK], blocks, mask[:, :, at : at + BLOCK], scale) for at in starts]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).transpose(1, 2).contiguous()


def _blocks(key: Tensor, value: Tensor, missing: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [B, H', S, D] in pieces of whole blocks of 128; only those at the ends are filled up, with a copy.

    missing: how many slots the first block lacks before the first key.
    """
    head = min(KEYS - missing, key.shape[2]) if missing else 0
    tail = (key.shape[2] - head) % KEYS
    pieces = []
    if head:
        behind = KEYS - missing - head
        pieces.append(
            (F.pad(key[:, :, :head], (0, 0, missing, behind)), F.pad(value[:, :, :head], (0, 0, missing, behind)))
        )
    if key.shape[2] - head - tail:
        middle = slice(head, key.shape[2] - tail)
        pieces.append((key[:, :, middle], value[:, :, middle]))
    if tail:
        last = slice(key.shape[2] - tail, None)
        pieces.append(
            (F.pad(key[:, :, last], (0, 0, 0, KEYS - tail)), F.pad(value[:, :, last], (0, 0, 0, KEYS - tail)))
        )
    return pieces


def _attend(query: Tensor, blocks: list[tuple[Tensor, Tensor]], mask: Tensor, scale: float) -> Tensor:
    """Up to 8 queries against whole blocks of 128 keys: a matmul's shape depends on neither their number nor the length."""
    batch, heads, width, dim = query.shape
    kv_heads = blocks[0][0].shape[1]
    group = heads // kv_heads  # query heads that share a key head stand as rows of one matmul
    rows = F.pad(query * scale, (0, 0, 0, BLOCK - width)).reshape(batch, kv_heads, group * BLOCK, dim)
    scores = torch.cat([torch.matmul(rows, key.transpose(2, 3)) for key, _ in blocks], dim=-1)
    scores = scores.view(batch, kv_heads, group, BLOCK, -1)[:, :, :, :width]
    probs = (
        scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
        .softmax(-1, dtype=torch.float32)
        .to(query.dtype)
    )
    probs = F.pad(probs, (0, 0, 0, BLOCK - width)).reshape(batch, kv_heads, group * BLOCK, -1)
    values = [value for _, piece in blocks for value in piece.split(KEYS, dim=2)]  # type: ignore[no-untyped-call]
    y = torch.matmul(probs[..., :KEYS], values[0])
    for index, value in enumerate(
        values[1:], start=1
    ):  # summed in the keys' order: blocks not seen yet add exact zeros
        y = y + torch.matmul(probs[..., index * KEYS : (index + 1) * KEYS], value)
    return y.view(batch, heads, BLOCK, -1)[:, :, :width]


AttentionInterface.register(ATTENTION, row_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
