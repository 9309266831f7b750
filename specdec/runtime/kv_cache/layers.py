"""How one layer of the ragged KV cache stores keys and values: in the model's dtype.

A layer of another storage format is a class with the members of `RaggedLayer` that `RaggedCache` and transformers call:
`update`, `reserve`, `over` and `get_*`. Rejected entries need no rollback in any format, since slot == position.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from specdec.runtime.kv_cache.window import Window, round_up

GROWTH = 256  # slots; a buffer at least doubles and gains this many when it grows, up to what its call can fill


class RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer: buffers [B, H, S, D], written at the window's positions, read up to key_length."""

    is_sliding = False

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    @classmethod
    def over(cls, window: Window, keys: Tensor, values: Tensor) -> RaggedLayer:
        """A layer that uses existing buffers, [B, H, S, D] each."""
        layer = cls(window)
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        return layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = key_states.new_zeros(*key_states.shape[:2], 0, key_states.shape[-1])
        self.values = value_states.new_zeros(*value_states.shape[:2], 0, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write states [B, H, W, D] at the window's positions: -> keys and values to read, [B, H, key_length, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.reserve()
        self.window.write(keys, key_states)
        self.window.write(values, value_states)
        return self.window.read(keys), self.window.read(values)

    def reserve(self) -> list[Tensor]:
        """Grow the buffers to the window's key length: -> the buffers, keys and values."""
        assert self.keys is not None
        assert self.values is not None
        needed, max_slots = self.window.key_length, self.window.max_slots
        self.keys = grown(self.keys, needed, max_slots)  # before the values: only one old buffer is alive at a time
        self.values = grown(self.values, needed, max_slots)
        return [self.keys, self.values]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.key_length, 0

    def get_seq_length(self) -> int:
        """Slots before the window, as if all rows had one length: models without position_ids count on it."""
        return max(self.window.end - self.window.positions.shape[1], 0)

    def get_max_length(self) -> int:
        return -1


def grown_capacity(capacity: int, needed: int, max_slots: int) -> int:
    """Slots of a buffer of `capacity` slots once `needed` are to be filled."""
    return capacity if needed <= capacity else max(needed, min(max(2 * capacity, GROWTH), max_slots))


def static_capacity(max_slots: int, context: int | None) -> int:
    """Slots of buffers that are reused from call to call: max_slots, rounded up so that similar calls share them.

    Not beyond the model's context, unless max_slots is: some models take no more keys than that.
    """
    rounded = round_up(max_slots, GROWTH)
    return rounded if context is None else max(max_slots, min(rounded, context))


def grown(buffer: Tensor, needed: int, max_slots: int) -> Tensor:
    """A buffer [B, H, S, D], or a longer one with its content where `needed` slots are to be filled.

    New slots are zeros: 0 times a masked NaN would still be NaN.
    """
    capacity = buffer.shape[2]
    slots = grown_capacity(capacity, needed, max_slots)
    if slots == capacity:
        return buffer
    larger = buffer.new_zeros(*buffer.shape[:2], slots, buffer.shape[3])
    if capacity:
        larger[:, :, :capacity] = buffer
    return larger
