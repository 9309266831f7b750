"""The most memory that a stretch of code holds at any one time: the allocator's count on CUDA, live tensors elsewhere."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages while they live, on any device, `meta` included: each once, however many views it has.

    bytes: alive now, peak_bytes: the most so far; of tensors that operators within the mode gave, and of those that were added.
    What an operator holds inside and frees again (a matmul library's workspace) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak_bytes = 0
        self.alive: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, if it is not yet."""
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
        with (
            self
        ):  # under inference_mode an operator made of others comes whole: taken apart, what it holds in between is seen
            result = func.decompose(*args, **(kwargs or {}))
        if result is NotImplemented:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


class PeakMemory:
    """`with PeakMemory(device, *models) as peak: …`, then peak.bytes: the most memory within, the models' weights included.

    On a CUDA device it is what its allocator had handed out, whoever asked for it, without the CUDA context and what it keeps in
    reserve. Elsewhere it is the live tensors, see LiveStorages: of this thread, made within or the models' own.
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
