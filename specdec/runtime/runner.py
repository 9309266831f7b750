"""Running a transformers model on (ids, positions) with a ragged cache."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Container
from contextlib import nullcontext, suppress
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.core.interfaces import run_eager
from specdec.core.steps import TargetOutput
from specdec.quant.batch_invariant import ATTENTION, MAX_WINDOW, is_decoding
from specdec.runtime.attention.select import KEYS, attention_override, implementation_of, takes_intervals
from specdec.runtime.cuda_graphs import Graphs
from specdec.runtime.identity.snapshot import Identity
from specdec.runtime.kv_cache.ragged import RaggedCache, attention_kinds, attention_masks, kept_slots

PREFILL_CHUNK = 1024  # positions a forward, where a mask of rows * positions * keys would be too large
PREFILL_MASK = 1 << 26  # elements of a mask: a prompt of 8192 in one forward, as stock decoding runs it


class Forward(Protocol):
    """A model's decoding forward in another form: see specdec/runtime/cpu_compile/forward.py."""

    any_width: bool  # whether it serves windows of more than MAX_WINDOW
    identity: Identity  # of the model that it was made of

    def renew(self, unchanged: Identity | None) -> bool:
        """A call begins: take note of weights that were replaced. False where the model is no longer what this was made of.

        unchanged: what the model was just found to be still.
        """

    def __call__(self, ids: Tensor, positions: Tensor, last_only: bool, cache: RaggedCache) -> Tensor:
        """As ModelRunner.forward, with a window that the cache has moved to."""


class ModelRunner:
    """A causal language model with its own KV cache: forward(ids [B, W], positions [B, W]) -> logits float32.

    vocab_size: V, the width of the logits. num_embeddings: ids it can read. context: positions the model was made for, None where
    its config names no limit. cache_argument: what its forward calls the KV cache. masks_by_slot: see there.
    compiled: what runs decoding windows, None: the model itself. One that does not serve a call may serve a later one.
    unchanged: what the model was found to be still when the call in progress began.
    graphs: what parts of a step are recorded in, None: nothing is. With them buffers stay where they are from call to call, and a
    window of up to MAX_WINDOW sees all of them, so that nothing of its positions is read on the host.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self.kinds = attention_kinds(self.config)
        self.context = context_of(model)
        self.masks_by_slot = masks_by_slot(model)
        self._compiled: Forward | None = None
        self._is_current = True  # whether that serves the call in progress
        self.unchanged: Identity | None = None
        self.graphs: Graphs | None = None
        self.batch_size = 0
        self.recorded_over: list[Tensor] | None = None  # the buffers
        self.begin(0)

    @property
    def run(self) -> Any:
        """How a part of a step is run on this model: see Graphs.run."""
        return run_eager if self.graphs is None else self.graphs.run

    @property
    def compiled(self) -> Forward | None:
        return self._compiled if self._is_current else None

    @compiled.setter
    def compiled(self, forward: Forward | None) -> None:
        self._compiled, self._is_current = forward, True

    def refresh(self) -> None:
        """Take note of what the model's forward takes, and how wide its head and embeddings are now."""
        self.parameters = forward_parameters(self.model)
        self.cache_argument = cache_argument(self.parameters)
        self.vocab_size, self.num_embeddings = widths(self.model)

    def spare(self) -> ModelRunner:
        """Another runner of the same model, with a cache of its own and nothing recorded."""
        runner = ModelRunner(self.model)
        runner.compiled, runner.unchanged = self._compiled, self.unchanged
        return runner

    def begin(self, batch_size: int, max_slots: int | None = None) -> None:
        """Forget everything: an empty cache, whose buffers grow to max_slots at most; None: as far as texts go."""
        self.refresh()
        if self._compiled is not None and batch_size:
            self._is_current = self._compiled.renew(self.unchanged)
        implementation = implementation_of(self.config)
        self.mask_dtype = self.model.dtype if implementation == "eager" else torch.bool
        self.takes_intervals = takes_intervals(self.model)
        if self.graphs is not None and max_slots is not None:
            max_slots = kept_slots(max_slots, self.context)
        is_kept = self.graphs is not None and batch_size == self.batch_size > 0
        if not is_kept:
            self._forget_recordings(None)
            self.cache = RaggedCache(KEYS if implementation == ATTENTION else 1, max_slots, self.masks_by_slot)
        self.cache.window.limit(max_slots)
        self.batch_size = batch_size

    def reserve(self, slots: int) -> None:
        """Room for texts of so many positions, before a step that must not ask how long they are."""
        if self.graphs is not None and self.cache.layers:
            buffers = self.cache.reserve(slots)
            if buffers is not self.recorded_over:
                self._forget_recordings(buffers)

    def _forget_recordings(self, buffers: list[Tensor] | None) -> None:
        if self.graphs is not None and self.recorded_over is not None:
            self.graphs.drop()
        self.recorded_over = buffers

    def prefill(self, ids: Tensor, last: Tensor) -> TargetOutput | None:
        """Feed positions up to last [B] of ids [B, L]: -> logits [B, 1, V] at `last`; None where there is nothing to feed."""
        width = int(last.max()) + 1
        self.reserve(width)
        return self.feed(ids, last, width)

    def feed(self, ids: Tensor, last: Tensor, width: int) -> TargetOutput | None:
        """Feed the `width` positions of each row that end at last [B]: -> logits [B, 1, V] float32 at `last`.

        A row with fewer positions starts at 0 several times over: the same entry in the same slot.
        """
        output = None
        positions = (last[:, None] - torch.arange(width - 1, -1, -1, device=last.device)).clamp(min=0)
        chunk_size = width if len(ids) * width**2 <= PREFILL_MASK else PREFILL_CHUNK
        for chunk in positions.split(chunk_size, dim=1) if width else ():
            output = self.forward(ids.gather(1, chunk), chunk, last_only=True)
        return output

    def forward(self, ids: Tensor, positions: Tensor, last_only: bool = False) -> TargetOutput:
        """Run ids [B, W] at positions [B, W]: -> logits [B, W, V] float32, or [B, 1, V] of the last column."""
        width, cache = positions.shape[1], self.cache
        if self.graphs is not None and width <= MAX_WINDOW and cache.layers:
            cache = RaggedCache.over(cache.buffers(), positions)
        else:
            cache.window.move(positions, last_only)
        if self.compiled is not None and (width <= MAX_WINDOW or self.compiled.any_width):
            return TargetOutput(self.compiled(ids, positions, last_only, cache))
        decodes = self.takes_intervals and is_decoding(width, positions.device)
        mask_dtype = torch.int32 if decodes else self.mask_dtype
        # inference_mode takes 10 % less time per operator than no_grad
        with attention_override(self.config) if decodes else nullcontext(), torch.inference_mode():
            logits = self.call(ids, positions, cache, mask_dtype, int(last_only))
        return TargetOutput(
            logits.to(device=ids.device, dtype=torch.float32, copy=True)
        )  # the copy is no inference tensor

    def call(
        self, ids: Tensor, positions: Tensor, cache: RaggedCache, mask_dtype: torch.dtype, columns: int | Tensor
    ) -> Tensor:
        """The model's own forward: -> logits of the last `columns` of them (0: all), or of those numbered."""
        window = cache.window
        seen_from = positions if window.padding is None else window.positions
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": attention_masks(
                seen_from, window.key_length, self.config, self.kinds, mask_dtype, window.padding
            ),
            self.cache_argument: cache,
            "use_cache": True,
            "return_dict": True,
        }
        if "position_ids" in self.parameters:
            inputs["position_ids"] = positions
        keeps = "logits_to_keep" in self.parameters
        if keeps:
            inputs["logits_to_keep"] = columns
        logits: Tensor = self.model(**inputs).logits
        return logits if keeps else logits[:, columns] if isinstance(columns, Tensor) else logits[:, -columns:]


def forward_parameters(model: PreTrainedModel) -> frozenset[str]:
    """Names that the model's forward takes; those of the forwards that it overrides too, while it passes on any keyword."""
    overridden = [cls.__dict__["forward"] for cls in type(model).__mro__ if "forward" in cls.__dict__]
    names: frozenset[str] = frozenset()
    for function in (model.forward, *overridden):
        named, takes_any = _signature_of(getattr(function, "__func__", function))
        names |= named
        if not takes_any:
            break
    return names


def cache_argument(parameters: Container[str]) -> str:
    """What a forward that takes these calls the KV cache: `cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in parameters else "past_key_values"


_SIGNATURES: weakref.WeakKeyDictionary[Any, tuple[frozenset[str], bool]] = weakref.WeakKeyDictionary()


def _signature_of(function: Any) -> tuple[frozenset[str], bool]:
    """Names of its parameters, and whether it takes any keyword; looked up once, which takes 50 us."""
    with suppress(TypeError):  # a callable object may be no key
        if (known := _SIGNATURES.get(function)) is not None:
            return known
    parameters = inspect.signature(function).parameters
    known = frozenset(parameters), any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    with suppress(TypeError):
        _SIGNATURES[function] = known
    return known


def widths(model: PreTrainedModel) -> tuple[int, int]:
    """Of the logits, and how many ids the model can read, as its head and its embeddings are now."""
    vocab_size = int(model.config.get_text_config(decoder=True).vocab_size)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return _rows(head, "out_features", vocab_size), _rows(embeddings, "num_embeddings", vocab_size)


def _rows(module: Any, name: str, default: int) -> int:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point():
        return weight.shape[0]
    return int(getattr(module, name, default))


def masks_by_slot(model: PreTrainedModel) -> bool:
    """Whether the model has a causal mask of its own, bool [1, 1, P, P], of which it takes the rows behind its cache's length."""
    masks = (buffer for buffer in model.buffers() if buffer.dtype == torch.bool and buffer.ndim == 4)
    return any(mask.shape[:2] == (1, 1) and mask.shape[2] == mask.shape[3] > 1 for mask in masks)


def context_of(model: PreTrainedModel) -> int | None:
    """Positions the model was made for, None where its config names no limit."""
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return int(context) if context and context > 0 else None  # XLNet says -1
