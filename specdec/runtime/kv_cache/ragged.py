"""The ragged KV cache: slot == position, for each row independently.

The KV entry for position i of row b lies in slot i of row b, and a query at position q sees only slots <= q. So a
rejected draft leaves stale slots after the committed length, which are overwritten before any query sees them:
rollback, uneven acceptance and finished rows cost nothing.

window.py holds the positions of the current forward, layers.py stores the entries, features.py hidden states by
position, masks.py computes which slots each query sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from specdec.runtime.kv_cache.features import Features
from specdec.runtime.kv_cache.layers import RaggedLayer, grown_capacity
from specdec.runtime.kv_cache.window import Window


class RaggedCache(Cache):
    """A transformers KV cache of rows that advance independently. Call `window.move(positions)` before each forward.

    features: hidden states by position, of a target that a drafter reads or of a draft head; else without a buffer.
    """

    def __init__(self, key_block: int = 1, max_slots: int | None = None, right_aligned: bool = False) -> None:
        """Arguments as in `Window`."""
        window = Window(key_block, max_slots, right_aligned)
        super().__init__(layer_class_to_replicate=lambda: RaggedLayer(window))  # type: ignore[arg-type]
        self.window = window
        self.features = Features(window)
        self._buffers: list[Tensor] = []

    @classmethod
    def over(cls, buffers: list[Tensor], positions: Tensor) -> RaggedCache:
        """A cache on the buffers() of another one, for one forward at positions [B, W] that the host does not read."""
        cache = cls()
        cache.window.move_static(positions, key_length=buffers[0].shape[2])
        cache._use(buffers)
        if len(buffers) % 2:
            cache.features = Features(cache.window, buffers[-1])
        return cache

    def fill(self, shapes: Sequence[Sequence[int]], batch_size: int, dtype: torch.dtype) -> None:
        """Make layers that hold the window, for a first forward that cannot make them.

        shapes: heads and width of each of the buffers().
        """
        device = self.window.positions.device
        slots = grown_capacity(0, self.window.key_length, self.window.max_slots)
        self._use([torch.zeros(batch_size, heads, slots, width, dtype=dtype, device=device) for heads, width in shapes])
        if len(shapes) % 2:
            count, width = shapes[-1]
            self.features.allocate(torch.zeros(batch_size, 0, count, width, dtype=dtype, device=device))

    def _use(self, buffers: Sequence[Tensor]) -> None:
        """Append layers that use these buffers, keys and values of each layer in turn; an odd one is the features'."""
        for keys, values in zip(buffers[0::2], buffers[1::2], strict=False):
            self.layers.append(RaggedLayer.over(self.window, keys, values))

    def reserve(self, slots: int) -> list[Tensor]:
        """Grow the buffers to at least `slots` slots: -> buffers()."""
        self.window.reserve(slots)
        return self.buffers()

    def buffers(self) -> list[Tensor]:
        """Keys and values of each layer in turn, [B, H, S, D] each, then that of the features, if there are any.

        S is at least the window's key length. Empty before the first forward. The same list object as long as the
        buffers are the same.
        """
        layers, features = cast("list[RaggedLayer]", self.layers), self.features
        buffers = self._buffers
        is_same = buffers and buffers[0] is layers[0].keys and buffers[0].shape[2] >= self.window.key_length
        if not is_same or (features.buffer is not None and buffers[-1] is not features.buffer):
            self._buffers = [buffer for layer in layers for buffer in layer.reserve()] + features.reserve()
        return self._buffers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.window.end - self.window.positions.shape[1], 0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.window.key_length, 0
