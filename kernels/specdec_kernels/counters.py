"""Counters by which the last block of a launch recognizes that it is the last, to combine the partial results.

A block writes its part, passes a barrier, and adds 1 to its counter with acquire and release order. The block that
reads count - 1 is the last; it reads all parts in a fixed order. So a result is the same at every launch, whichever
block ends last. The last block resets the counter to 0.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

POOL_SIZE = 1 << 22  # counters of a device, 16 MB, for streams and for launches in CUDA graphs
STREAM_SIZE = 4096
ALIGNMENT = 4  # counters, 16 bytes: for an unaligned address Triton would compile another variant, during a capture

_OF_STREAM: dict[tuple[torch.device, int], Tensor] = {}
_FREE: dict[torch.device, Tensor] = {}  # the rest of each device's pool
_LOCK = threading.Lock()


def counters(count: int, device: torch.device) -> Tensor:
    """int32 zeros [>= count]; a kernel that uses them leaves zeros.

    Launches of one stream run one after the other and share counters. A launch in a CUDA graph, whose replay may run at
    the same time as anything else, gets counters of its own, without a fill that every replay would repeat. All are
    part of one pool that the first launch allocates.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    with _LOCK:
        if torch.cuda.is_current_stream_capturing():
            return _allocate(count, device)
        if device not in _FREE:
            _FREE[device] = torch.zeros(POOL_SIZE, dtype=torch.int32, device=device)
            torch.cuda.synchronize(device)  # before any other stream reads them
        key = (device, torch.cuda.current_stream(device).cuda_stream)
        shared = _OF_STREAM.get(key)
        if shared is None or len(shared) < count:
            shared = _OF_STREAM[key] = _allocate(max(count, STREAM_SIZE), device)
        return shared


def _allocate(count: int, device: torch.device) -> Tensor:
    """Counters from the device's pool; a tensor of its own where the pool is empty."""
    count = -(-count // ALIGNMENT) * ALIGNMENT
    free = _FREE.get(device)
    if free is None or len(free) < count:
        return torch.zeros(count, dtype=torch.int32, device=device)
    _FREE[device] = free[count:]
    return free[:count]
