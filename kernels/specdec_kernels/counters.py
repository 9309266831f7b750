"""Counters at which the blocks of a launch meet: the last one to come does what is left, in a fixed order, and sets it back to 0.

A block writes its part, passes a barrier, and adds 1 to its counter with acquire and release order. Whoever reads count - 1 is
the last, and reads every part. So a result is summed in the same order at every launch, whichever block ends last.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

POOL = 1 << 20  # counters for launches in CUDA graphs, 4 MB a device

_KEPT: dict[tuple[torch.device, int], Tensor] = {}
_SPARE: dict[torch.device, Tensor] = {}
_LOCK = threading.Lock()


def counters(count: int, device: torch.device) -> Tensor:
    """int32 zeros [>= count]; whoever uses them leaves zeros.

    Launches of one stream come one after the other and share theirs. A launch in a CUDA graph, which may be replayed beside
    anything, gets its own for good, and no fill that every replay would repeat.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    with _LOCK:
        if torch.cuda.is_current_stream_capturing():
            spare = _SPARE.get(device)
            if spare is None or len(spare) < count:
                return torch.zeros(count, dtype=torch.int32, device=device)
            _SPARE[device] = spare[count:]
            return spare[:count]
        if device not in _SPARE:
            _SPARE[device] = torch.zeros(POOL, dtype=torch.int32, device=device)
        key = (device, torch.cuda.current_stream(device).cuda_stream)
        kept = _KEPT.get(key)
        if kept is None or len(kept) < count:
            kept = _KEPT[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
        return kept
