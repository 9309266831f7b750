"""Parts of a step as CUDA graphs: recorded once, replayed with one launch for all their kernels.

A part is a function of tensors that asks the device nothing and changes only what stays where it is: the committed ids, the
caches. It is run as it is the first time, which builds and tunes its kernels; recorded the second time, when the same key and
shapes come back; replayed from then on. Where recording fails it goes on being run as it is.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from specdec.runtime.identity.hooks import find_hook
from specdec.runtime.identity.snapshot import Identity

MOST = 64  # recordings at a time; what they are made for changes little from call to call


class Recording(Protocol):
    """What a device replays."""

    def record(self, function: Callable[[], Any]) -> Any:
        """Take down what function() does, without doing it: -> its outputs, which a replay fills."""

    def replay(self) -> None:
        """Do it."""

    def close(self) -> None:
        """Free it, once it is done."""


class CudaRecording:
    """A CUDA graph, in a pool of memory that all of one pair share: only one of them runs at a time."""

    def __init__(self, pool: list[Any]) -> None:
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
            torch.cuda.set_stream(stream)  # where a recording fails, torch stays on its own

    def replay(self) -> None:
        self.graph.replay()

    def close(self) -> None:
        torch.cuda.synchronize()
        self.graph.reset()


RECORDINGS: dict[str, Callable[[list[Any]], Recording]] = {"cuda": CudaRecording}  # by type of device


class Graphs:
    """The recorded parts of one pair on its device, and the tensors that stay where they are.

    is_on: whether the call in progress goes by them. failure: why nothing is recorded any more, None while all is well.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_on = True
        self.failure: str | None = None
        self._models: weakref.WeakKeyDictionary[nn.Module, tuple[Identity, list[int]]] = weakref.WeakKeyDictionary()
        self._held: dict[str, Tensor] = {}
        self._is_running = False
        self._parts: dict[Any, _Part] = {}
        self.drop()

    def static_buffer(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of this content that stays where it is from call to call. A matrix may come back wider."""
        kept = self._held.get(name)
        fits = (
            kept is not None
            and kept.dtype == tensor.dtype
            and kept.ndim == tensor.ndim
            and kept.device == tensor.device
        )
        if fits and kept is not None and tensor.ndim == 2:
            fits = kept.shape[0] == tensor.shape[0] and kept.shape[1] >= tensor.shape[1]
        elif fits and kept is not None:
            fits = kept.shape == tensor.shape
        with outside_inference_mode():
            if kept is None or not fits:
                self.drop()
                self._held[name] = kept = tensor.clone()
            else:
                kept[..., : tensor.shape[-1]] = tensor
        return kept

    def run(self, key: Any, function: Callable[..., Any], *inputs: Tensor | None) -> Any:
        """function(*inputs) -> a tensor, or a tuple of tensors and None. What it returns holds until the same part runs again.

        key: equal where function does the same with other inputs. A part that runs within another one is part of that.
        """
        if self._is_running or not self.is_on or self.failure is not None:
            return function(*inputs)
        form = key, *(None if given is None else (given.shape, given.dtype) for given in inputs)
        part = self._parts.get(form)
        if part is None and form in self._seen:
            part = self._record(form, function, inputs)
        if part is None:
            self._seen.add(form)
            return self._guarded(lambda: function(*inputs))
        with outside_inference_mode():
            for kept, given in zip(part.inputs, inputs, strict=True):
                if kept is not None and given is not None and kept is not given:
                    kept.copy_(given)
        part.recording.replay()
        return part.outputs

    def renew(self, models: Sequence[nn.Module]) -> bool:
        """A call of these models begins: whether they are what was recorded of them; if not, that is forgotten."""
        is_same = True
        for model in models:
            identity, places = self._models.get(model, (None, None))
            if identity is not None and identity.change() is None and places == _places(model):
                continue
            is_same = is_same and identity is None  # of a new one nothing is recorded
            identity = Identity(model)  # which may move weights
            self._models[model] = identity, _places(model)
        if not is_same:
            self.drop()
        return is_same

    def drop(self) -> None:
        """Forget all that is recorded, and free its memory: what it was recorded over is no longer there."""
        for part in self._parts.values():
            part.recording.close()
        self._parts.clear()
        self._seen: set[Any] = set()
        self._ours: set[int] = set()  # outputs, by id: as inputs of another part they are in their place
        self._pool: list[Any] = []

    def close(self) -> None:
        """Let go of everything, kept tensors too."""
        self.drop()
        self._held = {}
        self._models.clear()

    def _record(self, form: Any, function: Callable[..., Any], inputs: tuple[Tensor | None, ...]) -> _Part | None:
        if len(self._parts) >= MOST:
            self.drop()
        try:
            with outside_inference_mode():
                kept = [given if given is None or id(given) in self._ours else given.clone() for given in inputs]
                recording = RECORDINGS[self.device.type](self._pool)
                outputs = self._guarded(lambda: recording.record(lambda: function(*kept)))
        except Exception as error:  # a model, a driver or the memory may have its own reasons
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            self.failure = f"{type(error).__name__}: {reason}"
            self.drop()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            warnings.warn(
                f"specdec runs without CUDA graphs, and slower: recording one failed ({self.failure})", stacklevel=2
            )
            return None
        self._ours |= {id(output) for output in (outputs if isinstance(outputs, tuple) else (outputs,))}
        self._parts[form] = part = _Part(recording, kept, outputs)
        return part

    def _guarded(self, function: Callable[[], Any]) -> Any:
        self._is_running = True
        try:
            return function()
        finally:
            self._is_running = False


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """What is made within can be written to by any call, whether it runs under inference_mode or not."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def why_not_recorded(model: nn.Module) -> str | None:
    """Why a model's forward cannot be recorded, None where it can."""
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "its layers lie on several devices"
    if (hook := find_hook(model)) is not None:
        return f"{hook}, which a recording would not call"
    return None


def _places(model: nn.Module) -> list[int]:
    """Where weights lie, which a recording goes by."""
    return [weight.data_ptr() for weight in chain(model.parameters(), model.buffers())]


class _Part:
    """One recorded part, over inputs that stay where they are."""

    def __init__(self, recording: Recording, inputs: list[Tensor | None], outputs: Any) -> None:
        self.recording, self.inputs, self.outputs = recording, inputs, outputs
