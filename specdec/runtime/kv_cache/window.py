"""The positions of one forward in a ragged KV cache, shared by all layers of the cache."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


class Window:
    """Where the ids of the current forward stand, and how many slots attention reads.

    key_block: attention gets whole blocks of this many slots; masks hide the slots after the last position.
    max_slots: the most positions that a row of the call can have; buffers do not grow beyond its block. None: no limit.
    right_aligned: attention gets keys as left-padded rows have them, so that the last column of the window stands at
        the last key in every row. For models that derive a query's position from the number of keys.
    padding: the number of keys before position 0 of each row, int64 [B], may be negative; None unless right_aligned.
    rows, positions: int64 [B, 1] and [B, W], the index of the slots that the forward writes.
    first: the first slot, where one row's positions are consecutive and can be written as a slice; else None.
    end: the largest position + 1. key_length: S, the number of slots that attention reads.
    """

    def __init__(self, key_block: int = 1, max_slots: int | None = None, right_aligned: bool = False) -> None:
        self.key_block = key_block
        self.right_aligned = right_aligned
        self.padding: Tensor | None = None
        self.limit(max_slots)
        self.rows = torch.empty(0, 1, dtype=torch.int64)
        self.positions = torch.empty(0, 0, dtype=torch.int64)
        self.end = 0
        self.key_length = 0
        self.first: int | None = None

    def limit(self, max_slots: int | None) -> None:
        """Start a call whose rows have at most max_slots positions; None: no limit."""
        self.max_slots = sys.maxsize if max_slots is None else round_up(max_slots, self.key_block)

    def reserve(self, slots: int) -> None:
        """Make layers hold at least this many slots from now on."""
        self.key_length = round_up(slots, self.key_block)

    def move(self, positions: Tensor, last_only: bool = False) -> None:
        """Start a forward at positions [B, W] int64.

        last_only: only the last column is used; otherwise the first ones are, as many as a row's draft has.
        """
        batch, width = positions.shape
        if self.right_aligned:  # unused columns get consecutive positions too, or positions before the text
            first = positions[:, -1:] - (width - 1) if last_only else positions[:, :1]
            positions = first + torch.arange(width, device=positions.device)
        if self.rows.shape[0] != batch or self.rows.device != positions.device:
            self.rows = torch.arange(batch, device=positions.device)[:, None]
        self.positions = positions
        self.first = None
        if batch == 1:  # consecutive positions, the usual case, are written as a slice: cheaper than an index
            row = positions[0].tolist()
            self.end = max(row) + 1
            if row[0] >= 0 and row[0] + width == self.end and row[-1] + 1 == self.end:
                self.first = row[0]
        else:
            self.end = int(positions.max()) + 1
        self.reserve(self.end)
        if self.right_aligned:
            self.padding = self.key_length - width - positions[:, 0]

    def cover(self, positions: Tensor) -> None:
        """Make layers hold positions [B, W] on a CPU, for a forward that reads the positions itself."""
        self.reserve(max(map(max, positions.tolist())) + 1)

    def move_static(self, positions: Tensor, key_length: int) -> None:
        """As `move`, for a recorded or traced forward: attention reads key_length slots, the host no positions."""
        self.rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        self.positions, self.key_length = positions, key_length

    def write(self, buffer: Tensor, states: Tensor) -> None:
        """Write states [B, H, W, D] into a buffer [B, H, S, D] at the window's positions."""
        if self.first is not None:
            buffer[:, :, self.first : self.end] = states
        else:
            buffer[self.rows, :, self.positions] = states.transpose(1, 2)

    def read(self, buffer: Tensor) -> Tensor:
        """The slots of a buffer [B, H, S, D] that attention reads: [B, H, key_length, D]."""
        if self.padding is None:
            return buffer[:, :, : self.key_length]
        slots = torch.arange(self.key_length, device=buffer.device) - self.padding[:, None]
        return buffer.take_along_dim(slots.clamp(min=0)[:, None, :, None], dim=2)


def round_up(slots: int, block: int) -> int:
    """The smallest multiple of `block` that is at least `slots`."""
    return -(-slots // block) * block
