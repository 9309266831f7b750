"""The peak memory of a block of code: the allocator's count on CUDA, live tensors elsewhere."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live storages on any device, `meta` included: each once, however many views it has.

    bytes: live now; peak_bytes: the most so far. Counted are results of operators that run within the mode, and tensors
    that are added. What an operator allocates and frees inside (a matmul library's workspace) is not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak_bytes = 0
        self.alive: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self.alive:
            return
        self.alive[address] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(storage, self._remove, address).atexit = False

    def _remove(self, address: int) -> None:
        self.bytes -= self.alive.pop(address)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # under inference_mode composite operators arrive undivided: decomposed, their intermediate tensors are counted
        with self:
            result = func.decompose(*args, **(kwargs or {}))
        if result is NotImplemented:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


class PeakMemory:
    """`with PeakMemory(device, *models) as peak: …`, then peak.bytes: the peak within the block, with the models'
    weights.

    On a CUDA device it is what the allocator had allocated for all threads, without the CUDA context and its reserve.
    Elsewhere it is the live tensors of this thread, see LiveStorages: those made within the block and the models' own.
    """

    bytes: int

    def __init__(self, device: torch.device | str, *models: nn.Module) -> None:
        self.device = torch.device(device)
        self.models = models

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        self.live = LiveStorages()
        for model in self.models:
            for tensor in (*model.parameters(), *model.buffers()):
                self.live.add(tensor)
        self.live.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device)
            return
        self.live.__exit__(*raised)  # type: ignore[no-untyped-call]
        self.bytes = self.live.peak_bytes
