"""Recordings for a CPU, in place of CUDA graphs: operators are logged and executed again on the same tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specdec.runtime import cuda_graphs

aten = torch.ops.aten
# Operators whose result, or its shape, the host reads: on a CUDA device it would wait.
SYNCHRONIZING = {
    aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default,
    aten.allclose.default, aten.nonzero.default, aten.nonzero_numpy.default, aten.argwhere.default,
    aten.masked_select.default, aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Log(TorchDispatchMode):
    """Logs every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, output))
        return output

    @property
    def synchronizing(self) -> list[str]:
        """Operators that would make the host wait for the device, indexing by a mask included."""
        return [
            str(func)
            for func, args, *_ in self.calls
            if func in SYNCHRONIZING or (func in INDEXING and _has_mask(args[1]))
        ]


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


class CpuRecording:
    """Recording runs the function and logs its operators; a replay runs these on the same tensors, without Python."""

    def __init__(self, pool: list[Any]) -> None:
        self.log = Log()
        self.is_done = False
        self.num_replays = 0
        CPU_RECORDINGS.append(self)

    def record(self, function: Callable[[], Any]) -> Any:
        with self.log:
            RECORDING_THREADS.add(threading.get_ident())
            try:
                outputs = function()
            finally:
                RECORDING_THREADS.discard(threading.get_ident())
        operators = self.log.synchronizing
        assert not operators, f"a recorded part makes the host wait for the device: {operators}"
        self.is_done = True
        return outputs

    def replay(self) -> None:
        if self.is_done:  # recording ran the function, which recording a CUDA graph does not
            self.is_done = False
            return
        self.num_replays += 1
        with torch.inference_mode():
            for func, args, kwargs, output in self.log.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)

    def close(self) -> None:
        self.log.calls = []


CPU_RECORDINGS: list[CpuRecording] = []  # made since the last `recorded` began
RECORDING_THREADS: set[int] = set()
STOCK_TOLIST = Tensor.tolist


def _tolist(tensor: Tensor) -> Any:
    assert threading.get_ident() not in RECORDING_THREADS, "a recorded part reads a tensor on the host"
    return STOCK_TOLIST(tensor)


@contextmanager
def recorded() -> Iterator[list[CpuRecording]]:
    """Within the block, enabled models record their steps on a CPU too: -> the recordings."""
    CPU_RECORDINGS.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cuda_graphs.RECORDINGS, "cpu", CpuRecording)
        patch.setattr(Tensor, "tolist", _tolist)
        yield CPU_RECORDINGS
