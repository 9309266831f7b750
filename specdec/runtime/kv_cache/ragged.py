"""The ragged KV cache: slot == position, for every row on its own.

A KV entry for position i of row b lives in slot i of row b. A query at position q sees slots <= q and nothing else. So a
rejected draft leaves stale slots behind the committed length, which no query sees before they are overwritten: rollback, uneven
acceptance and finished rows cost nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

GROWTH = 256  # slots; a buffer grows by doubling, at least by this, up to what its call can fill


class Window:
    """Where the ids of the forward in progress stand; one object shared by all layers of a cache.

    key_block: keys are handed to attention in whole blocks of so many slots; masks hide what lies behind the last position.
    max_slots: how far the call's texts can come; buffers don't grow beyond its block.
    right_aligned: keys are handed to attention as left-padded rows have them: the window's last column stands at the last key in
    every row. For models that tell by the number of keys where a query stands.
    padding: with that, how many keys stand before position 0 of each row, int64 [B]; may be negative; else None.
    """

    def __init__(self, key_block: int = 1, max_slots: int | None = None, right_aligned: bool = False) -> None:
        self.key_block = key_block
        self.right_aligned = right_aligned
        self.padding: Tensor | None = None
        self.limit(max_slots)
        self.rows = torch.empty(0, 1, dtype=torch.int64)
        self.positions = torch.empty(0, 0, dtype=torch.int64)
        self.end = 0  # one behind the last position
        self.key_length = 0
        self.first: int | None = None

    def limit(self, max_slots: int | None) -> None:
        """A call begins, whose texts come so far; None: as far as they like."""
        self.max_slots = sys.maxsize if max_slots is None else _blocks(max_slots, self.key_block)

    def move(self, positions: Tensor, last_only: bool = False) -> None:
        """positions: [B, W] int64 of the ids that come next; last_only: of which the last column counts, else the first ones."""
        batch, width = positions.shape
        if self.right_aligned:  # columns without a use stand at consecutive positions too, or before the text
            first = positions[:, -1:] - (width - 1) if last_only else positions[:, :1]
            positions = first + torch.arange(width, device=positions.device)
        if self.rows.shape[0] != batch or self.rows.device != positions.device:
            self.rows = torch.arange(batch, device=positions.device)[:, None]
        self.positions = positions
        self.first = None
        if (
            batch == 1
        ):  # consecutive positions, the usual case of one row, are written as a slice: cheaper than an index
            row = positions[0].tolist()
            self.end = max(row) + 1
            if row[0] >= 0 and row[0] + width == self.end and row[-1] + 1 == self.end:
                self.first = row[0]
        else:
            self.end = int(positions.max()) + 1
        self.key_length = _blocks(self.end, self.key_block)
        if self.right_aligned:
            self.padding = self.key_length - width - positions[:, 0]

    def shown(self, buffer: Tensor) -> Tensor:
        """The slots of a buffer [B, H, S, D] that the window may see, [B, H, key_length, D]."""
        if self.padding is None:
            return buffer[:, :, : self.key_length]
        slots = torch.arange(self.key_length, device=buffer.device) - self.padding[:, None]
        return buffer.take_along_dim(slots.clamp(min=0)[:, None, :, None], dim=2)


class RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer: [B, H, S, D] buffers, written at the window's positions, read up to its key length."""

    is_sliding = False

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = key_states.new_zeros(*key_states.shape[:2], 0, key_states.shape[-1])
        self.values = value_states.new_zeros(*value_states.shape[:2], 0, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, H, W, D] states at the window's positions; return the slots that it may see, [B, H, key_length, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys = _write(_grown(self.keys, self.window), key_states, self.window)
        self.values = _write(_grown(self.values, self.window), value_states, self.window)
        return self.window.shown(self.keys), self.window.shown(self.values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.key_length, 0

    def get_seq_length(self) -> int:
        """Slots before the window, were it even: models without position_ids derive the key length from it."""
        return max(self.window.end - self.window.positions.shape[1], 0)

    def get_max_length(self) -> int:
        return -1


class RaggedCache(Cache):
    """What a transformers model takes as its KV cache. Call `window.move(positions)` before each forward."""

    def __init__(self, key_block: int = 1, max_slots: int | None = None, right_aligned: bool = False) -> None:
        window = Window(key_block, max_slots, right_aligned)
        super().__init__(layer_class_to_replicate=lambda: RaggedLayer(window))  # type: ignore[arg-type]
        self.window = window
        self._buffers: list[Tensor] = []

    @classmethod
    def over(cls, buffers: list[Tensor], positions: Tensor) -> RaggedCache:
        """A cache on buffers() of another, for one forward of ids at positions [B, W]; nothing is read of them on the host."""
        cache = cls()
        window = cache.window
        window.rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        window.positions, window.key_length = positions, buffers[0].shape[2]
        for keys, values in zip(buffers[::2], buffers[1::2], strict=True):
            layer = RaggedLayer(window)
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            cache.layers.append(layer)
        return cache

    def fill(self, shapes: Sequence[Sequence[int]], batch_size: int, dtype: torch.dtype) -> None:
        """Make the layers, empty, before a first forward that cannot: heads and width of each of buffers()."""
        device = self.window.positions.device
        empty = [torch.zeros(batch_size, heads, 0, width, dtype=dtype, device=device) for heads, width in shapes]
        for layer in RaggedCache.over(empty, self.window.positions).layers:
            assert isinstance(layer, RaggedLayer)
            layer.window = self.window
            self.layers.append(layer)

    def reserve(self, slots: int) -> list[Tensor]:
        """buffers(), with room for texts of so many positions."""
        self.window.key_length = _blocks(slots, self.window.key_block)
        return self.buffers()

    def buffers(self) -> list[Tensor]:
        """Keys and values of each layer in turn, [B, H, S, D] each, with room for the window; empty before the first forward."""
        first: Any = self.layers[0] if self.layers else None
        known = self._buffers
        if not known or known[0] is not first.keys or known[0].shape[2] < self.window.key_length:
            self._buffers = []
            for layer in self.layers:
                assert isinstance(layer, RaggedLayer)
                assert layer.keys is not None
                assert layer.values is not None
                layer.keys, layer.values = _grown(layer.keys, self.window), _grown(layer.values, self.window)
                self._buffers += [layer.keys, layer.values]
        return self._buffers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.window.end - self.window.positions.shape[1], 0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.window.key_length, 0


def attention_kinds(config: PreTrainedConfig) -> set[str]:
    """The attention patterns of a text model's layers, in transformers' words."""
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

    padding: int64 [B], how many slots stand before position 0; None: none.

    bool [B, 1, W, S] (True = see), as sdpa takes them; additive in a floating `dtype`, as eager attention does; or int32
    [B, 2, W, 1], the first and the last slot that each query sees, as specdec/runtime/attention/select.py does.
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
    """bool [B, 1, W, S] of intervals [B, 2, W, 1]."""
    slot = torch.arange(key_length, device=intervals.device)
    return (slot >= intervals[:, :1]) & (slot <= intervals[:, 1:])


def grown_capacity(capacity: int, needed: int, max_slots: int) -> int:
    """Slots of a buffer of `capacity` slots once `needed` are to be filled."""
    return capacity if needed <= capacity else max(needed, min(max(2 * capacity, GROWTH), max_slots))


def kept_slots(max_slots: int, context: int | None) -> int:
    """Where buffers end that stay from call to call: further than this one's texts, for calls of about the same length."""
    even = _blocks(max_slots, GROWTH)
    return (
        even if context is None else max(max_slots, min(even, context))
    )  # some models take no more slots than their context


def _blocks(slots: int, key_block: int) -> int:
    return -(-slots // key_block) * key_block


def _grown(buffer: Tensor, window: Window) -> Tensor:
    """The buffer, or a longer one with its content. Zeros, because 0 times a masked NaN would still be NaN."""
    capacity = buffer.shape[2]
    slots = grown_capacity(capacity, window.key_length, window.max_slots)
    if slots == capacity:
        return buffer
    larger = buffer.new_zeros(*buffer.shape[:2], slots, buffer.shape[3])
    larger[:, :, :capacity] = buffer
    return larger


def _write(buffer: Tensor, states: Tensor, window: Window) -> Tensor:
    if window.first is not None:
        buffer[:, :, window.first : window.end] = states
    else:
        buffer[window.rows, :, window.positions] = states.transpose(1, 2)
    return buffer
