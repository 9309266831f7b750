"""A CUDA graph for CPUs: what a part of a step does is taken down operator by operator, and done again over the same memory."""

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

from specdec.runtime import cuda_graphs as graphs

aten = torch.ops.aten
# Operators whose answer goes to the host, or whose result's shape does: a CUDA device would be waited for.
ASKS = {
    aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default, aten.allclose.default,
    aten.nonzero.default, aten.nonzero_numpy.default, aten.argwhere.default, aten.masked_select.default,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Log(TorchDispatchMode):
    """Every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, output))
        return output

    @property
    def asked(self) -> list[str]:
        """What would have waited for the device, indexing by a mask included."""
        return [str(func) for func, args, *_ in self.calls if func in ASKS or (func in INDEXES and _has_mask(args[1]))]


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


class OnCpu:
    """Recording does the thing once, for its operators; replaying does them again over the same tensors, and runs no Python."""

    def __init__(self, pool: list[Any]) -> None:
        self.log = Log()
        self.is_done = False
        self.num_replays = 0
        MADE.append(self)

    def record(self, function: Callable[[], Any]) -> Any:
        with self.log:
            RECORDING.add(threading.get_ident())
            try:
                outputs = function()
            finally:
                RECORDING.discard(threading.get_ident())
        assert not self.log.asked, f"a recorded part asks the device: {self.log.asked}"
        self.is_done = True
        return outputs

    def replay(self) -> None:
        if self.is_done:  # by its recording, where a CUDA device would do nothing
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


MADE: list[OnCpu] = []
RECORDING: set[int] = set()  # threads that record
STOCK_TOLIST = Tensor.tolist


def _tolist(tensor: Tensor) -> Any:
    assert threading.get_ident() not in RECORDING, "a recorded part reads a tensor on the host"
    return STOCK_TOLIST(tensor)


@contextmanager
def recorded() -> Iterator[list[OnCpu]]:
    """Within, what is enabled records its steps, on a CPU too: -> what was recorded."""
    MADE.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(graphs.RECORDINGS, "cpu", OnCpu)
        patch.setattr(Tensor, "tolist", _tolist)
        yield MADE
