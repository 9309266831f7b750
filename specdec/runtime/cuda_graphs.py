"""Parts of a step as CUDA graphs: recorded once, then replayed with one launch for all their kernels.

A part is a function of tensors that never waits for the device and changes only tensors that stay in place: the
committed ids and the caches. Its first run is eager, which builds and tunes its kernels. Its second run, with the same
key and shapes, is recorded; later ones are replays. If a recording fails, parts run eagerly from then on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from specdec.runtime.identity.hooks import find_hook
from specdec.runtime.identity.snapshot import Identity
from specdec.utils.warn import warn

MAX_RECORDINGS = 64  # at a time; calls of one kind need a few


class Recording(Protocol):
    """A recorded part of a step, in the form that a type of device replays."""

    def record(self, function: Callable[[], Any]) -> Any:
        """Record the operations of function() without executing them: -> its outputs, which each replay overwrites."""

    def replay(self) -> None:
        """Execute the recorded operations."""

    def close(self) -> None:
        """Free the recording, once its last replay is done."""


class CudaRecording:
    """A CUDA graph. All graphs of one `Graphs` share a memory pool, since only one of them runs at a time."""

    def __init__(self, pool: list[Any]) -> None:
        """pool: the shared pool's handle; empty before the first recording, which adds it."""
        if not pool:
            pool.append(torch.cuda.graph_pool_handle())
        self.pool = pool[0]
        self.graph = torch.cuda.CUDAGraph()

    def record(self, function: Callable[[], Any]) -> Any:
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"):
                return function()
        finally:
            torch.cuda.set_stream(stream)  # after a failed recording, torch stays on the recording's stream

    def replay(self) -> None:
        self.graph.replay()

    def close(self) -> None:
        torch.cuda.synchronize()
        self.graph.reset()


# The recorder of each type of device that has one: called with the pool, it makes a Recording.
RECORDINGS: dict[str, Callable[[list[Any]], Recording]] = {"cuda": CudaRecording}


@dataclass(frozen=True, eq=False)
class _RecordedPart:
    """A recorded part of a step with the static tensors that it reads and writes."""

    recording: Recording
    inputs: list[Tensor | None]
    outputs: Any


class Graphs:
    """The recorded parts of one pair of models on one device, and the static buffers that they use.

    is_on: whether the current call uses them. failure: why nothing is recorded any more, None if no recording failed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_on = True
        self.failure: str | None = None
        self._models: weakref.WeakKeyDictionary[nn.Module, tuple[Identity, list[int]]] = weakref.WeakKeyDictionary()
        self._static_buffers: dict[str, Tensor] = {}
        self._is_running = False
        self._parts: dict[Any, _RecordedPart] = {}
        self.drop()

    def static_buffer(self, name: str, tensor: Tensor) -> Tensor:
        """The buffer of this name with the tensor's content, at the same address in each call. A matrix may be wider.

        Where the tensor does not fit into the buffer, a new one is made and all recordings are dropped.
        """
        buffer = self._static_buffers.get(name)
        with outside_inference_mode():
            if buffer is None or not _fits(tensor, buffer):
                self.drop()
                self._static_buffers[name] = buffer = tensor.clone()
            else:
                buffer[..., : tensor.shape[-1]] = tensor
        return buffer

    def run(self, key: Any, function: Callable[..., Any], *inputs: Tensor | None) -> Any:
        """Run a part: -> function(*inputs), a tensor or a tuple of tensors and None, valid until the part runs again.

        key: equal where functions do the same with other inputs. A part that runs within another part belongs to it.
        """
        if self._is_running or not self.is_on or self.failure is not None:
            return function(*inputs)
        cache_key = key, *(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in inputs)
        part = self._parts.get(cache_key)
        if part is None and cache_key in self._run_before:
            part = self._record(cache_key, function, inputs)
        if part is None:
            self._run_before.add(cache_key)
            return self._run_whole(lambda: function(*inputs))
        with outside_inference_mode():
            for static, tensor in zip(part.inputs, inputs, strict=True):
                if static is not None and tensor is not None and static is not tensor:
                    static.copy_(tensor)
        part.recording.replay()
        return part.outputs

    def refresh(self, models: Sequence[nn.Module]) -> bool:
        """Start a call of these models: -> whether they are as recorded. If not, all recordings are dropped."""
        is_same = True
        for model in models:
            identity, addresses = self._models.get(model, (None, None))
            if identity is not None and identity.change() is None and addresses == _addresses(model):
                continue
            is_same = is_same and identity is None  # nothing is recorded of a new model
            identity = Identity(model)  # which may move weights
            self._models[model] = identity, _addresses(model)
        if not is_same:
            self.drop()
        return is_same

    def drop(self) -> None:
        """Free all recordings, because memory that they use is about to be freed or the models have changed."""
        for part in self._parts.values():
            part.recording.close()
        self._parts.clear()
        self._run_before: set[Any] = set()  # keys of parts that ran eagerly once
        self._output_ids: set[int] = set()  # id() of recorded outputs, which are static inputs of the next part
        self._pool: list[Any] = []

    def close(self) -> None:
        """Free everything, static buffers too."""
        self.drop()
        self._static_buffers = {}
        self._models.clear()

    def _record(
        self, cache_key: Any, function: Callable[..., Any], inputs: tuple[Tensor | None, ...]
    ) -> _RecordedPart | None:
        if len(self._parts) >= MAX_RECORDINGS:
            self.drop()
        try:
            with outside_inference_mode():
                static = [
                    tensor if tensor is None or id(tensor) in self._output_ids else tensor.clone() for tensor in inputs
                ]
                recording = RECORDINGS[self.device.type](self._pool)
                outputs = self._run_whole(lambda: recording.record(lambda: function(*static)))
        except Exception as error:  # raised by the model, the driver or the allocator
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            self.failure = f"{type(error).__name__}: {reason}"
            self.drop()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            warn(f"specdec runs without CUDA graphs, and slower: recording one failed ({self.failure})")
            return None
        self._output_ids |= {id(output) for output in (outputs if isinstance(outputs, tuple) else (outputs,))}
        self._parts[cache_key] = part = _RecordedPart(recording, static, outputs)
        return part

    def _run_whole(self, function: Callable[[], Any]) -> Any:
        """Run one part; parts within it belong to it."""
        self._is_running = True
        try:
            return function()
        finally:
            self._is_running = False


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Tensors made within the block can be written by any call, under inference_mode or not."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def why_not_recorded(model: nn.Module) -> str | None:
    """Why a model's forward cannot be recorded, None where it can."""
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "its layers lie on several devices"
    if (hook := find_hook(model)) is not None:
        return f"{hook}, which a recording would not call"
    return None


def _fits(tensor: Tensor, buffer: Tensor) -> bool:
    """Whether a tensor can be written into a buffer: of the same shape, or a matrix that is as high and no wider."""
    if buffer.dtype != tensor.dtype or buffer.ndim != tensor.ndim or buffer.device != tensor.device:
        return False
    if tensor.ndim == 2:
        return buffer.shape[0] == tensor.shape[0] and buffer.shape[1] >= tensor.shape[1]
    return buffer.shape == tensor.shape


def _addresses(model: nn.Module) -> list[int]:
    """Where the model's weights lie in memory; a recording uses these addresses."""
    return [weight.data_ptr() for weight in chain(model.parameters(), model.buffers())]
