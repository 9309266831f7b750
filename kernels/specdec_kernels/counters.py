"""Counters at which the blocks of a launch meet: the last one to come does what is left, in a fixed order, and sets it back to 0.

A block writes its part, passes a barrier, and adds 1 to its counter with acquire and release order. Whoever reads count - 1 is
the last, and reads every part. So a result is summed in the same order at every launch, whichever block ends last.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

POOL = 1 << 22  # counters a device, 16 MB: those of streams, and of launches in CUDA graphs
FOR_A_STREAM = 4096
ALIGNMENT = (
    4  # counters, 16 bytes: addresses that 16 does not divide would have Triton compile another variant, in a capture
)

_KEPT: dict[tuple[torch.device, int], Tensor] = {}
_SPARE: dict[torch.device, Tensor] = {}
_LOCK = threading.Lock()


def counters(count: int, device: torch.device) -> Tensor:
    """int32 zeros [>= count]; whoever uses them leaves zeros.

    Launches of one stream come one after the other and share theirs. A launch in a CUDA graph, which may be replayed beside
    anything, gets its own for good, and no fill that every replay would repeat. All come from one pool, made by the first launch.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    with _LOCK:
        if torch.cuda.is_current_stream_capturing():
            return _taken(count, device)
        if device not in _SPARE:
            _SPARE[device] = torch.zeros(POOL, dtype=torch.int32, device=device)
            torch.cuda.synchronize(device)  # before any other stream reads them
        key = (device, torch.cuda.current_stream(device).cuda_stream)
        kept = _KEPT.get(key)
        if kept is None or len(kept) < count:
            kept = _KEPT[key] = _taken(max(count, FOR_A_STREAM), device)
        return kept


def _taken(count: int, device: torch.device) -> Tensor:
    """Counters that nobody else has; filled anew where the pool has no more."""
    count = -(-count // ALIGNMENT) * ALIGNMENT
    spare = _SPARE.get(device)
    if spare is None or len(spare) < count:
        return torch.zeros(count, dtype=torch.int32, device=device)
    _SPARE[device] = spare[count:]
    return spare[:count]
