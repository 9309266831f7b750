"""Hidden states by position, of a target that a drafter reads, or a draft head's own.

As in the layers, slot == position: states of rejected ids are overwritten before they are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.runtime.kv_cache.layers import grown
from specdec.runtime.kv_cache.window import Window


class Features:
    """n hidden states of width H for each position, in a buffer [B, n, S + 1, H] of a cache with S slots.

    The last slot is for the state behind the last position, which a draft head writes for its next step.
    buffer: that of another cache, which grows it; else None before the first `allocate`.
    """

    def __init__(self, window: Window, buffer: Tensor | None = None) -> None:
        self.window = window
        self.buffer = buffer
        self.grows = buffer is None

    def allocate(self, like: Tensor) -> None:
        """Make the buffer for states [B, W, n, H] of this shape, dtype and device, where there is none yet."""
        if self.buffer is None:
            self.buffer = like.new_zeros(like.shape[0], like.shape[2], 0, like.shape[3])

    def reserve(self) -> list[Tensor]:
        """Grow the buffer to the window's key length: -> the buffer, or nothing where there is none."""
        if self.buffer is None:
            return []
        if self.grows:
            self.buffer = grown(self.buffer, self.window.key_length + 1, self.window.max_slots + 1)
        return [self.buffer]

    def write(self, positions: Tensor, states: Tensor) -> None:
        """Write states [B, W, n, H] at positions [B, W]."""
        self.allocate(states)
        [buffer] = self.reserve()
        buffer[self._rows(positions), :, positions] = states.to(buffer.device)

    def read(self, positions: Tensor) -> Tensor:
        """The states at positions [B, W]: [B, W, n, H]."""
        [buffer] = self.reserve()
        return buffer[self._rows(positions), :, positions]

    @staticmethod
    def _rows(positions: Tensor) -> Tensor:
        return torch.arange(positions.shape[0], device=positions.device)[:, None]
