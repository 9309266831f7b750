"""Running a transformers model on (ids, positions) with a ragged cache, and telling which models that works for."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.attention import KEYS, lent, takes_intervals
from specdec.cache import RaggedCache, attention_kinds, attention_masks, kept_slots
from specdec.graphs import Graphs, directly
from specdec.quant.int4 import Int4Linear
from specdec.quant.rows import ATTENTION, MAX_WINDOW, is_decoding

PREFILL_CHUNK = 1024  # positions a forward, where a mask of rows * positions * keys would be too large
PREFILL_MASK = 1 << 26  # elements of a mask: a prompt of 8192 in one forward, as stock decoding runs it
ATTENTIONS = ("sdpa", "eager", ATTENTION)  # implementations that take a mask for each row
LINEAR_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}

# Relative error that a dtype's rounding explains; a wrong mask or cache is off by much more.
PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Forward(Protocol):
    """A model's decoding forward in another form: see specdec/compiled.py."""

    any_width: bool  # whether it serves windows of more than MAX_WINDOW

    def renew(self) -> bool:
        """A call begins: take note of weights that were replaced. False where the model is no longer what this was made of."""

    def __call__(self, ids: Tensor, positions: Tensor, last_only: bool, cache: RaggedCache) -> Tensor:
        """As CachedModel.forward, with a window that the cache has moved to."""


class CachedModel:
    """A causal language model with its own KV cache: forward(ids [B, W], positions [B, W]) -> logits float32.

    vocab_size: V, the width of the logits. context: positions the model was made for, None where its config names no limit.
    compiled: what runs decoding windows, None: the model itself. One that does not serve a call may serve a later one.
    graphs: what parts of a step are recorded in, None: nothing is. With them buffers stay where they are from call to call, and a
    window of up to MAX_WINDOW sees all of them, so that nothing of its positions is read on the host.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self.kinds = attention_kinds(self.config)
        self.parameters = set(inspect.signature(model.forward).parameters)
        self.vocab_size = int(self.config.vocab_size)
        self.context = context_of(model)
        self._compiled: Forward | None = None
        self._is_current = True  # whether that serves the call in progress
        self.graphs: Graphs | None = None
        self.batch_size = 0
        self.recorded_over: list[Tensor] | None = None  # the buffers
        self.begin(0)

    @property
    def run(self) -> Any:
        """How a part of a step is run on this model: see Graphs.run."""
        return directly if self.graphs is None else self.graphs.run

    @property
    def compiled(self) -> Forward | None:
        return self._compiled if self._is_current else None

    @compiled.setter
    def compiled(self, forward: Forward | None) -> None:
        self._compiled, self._is_current = forward, True

    def begin(self, batch_size: int, max_slots: int | None = None) -> None:
        """Forget everything: an empty cache, whose buffers grow to max_slots at most; None: as far as texts go."""
        if self._compiled is not None and batch_size:
            self._is_current = self._compiled.renew()
        implementation = self.config._attn_implementation
        self.mask_dtype = self.model.dtype if implementation == "eager" else torch.bool
        self.takes_intervals = takes_intervals(self.model)
        if self.graphs is not None and max_slots is not None:
            max_slots = kept_slots(max_slots, self.context)
        is_kept = self.graphs is not None and batch_size == self.batch_size > 0
        if not is_kept:
            self._forget_recordings(None)
            self.cache = RaggedCache(KEYS if implementation == ATTENTION else 1, max_slots)
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

    def prefill(self, ids: Tensor, last: Tensor) -> Tensor | None:
        """Feed positions up to last [B] of ids [B, L]: -> logits [B, 1, V] behind `last`, None where there is nothing to feed."""
        width = int(last.max()) + 1
        self.reserve(width)
        return self.feed(ids, last, width)

    def feed(self, ids: Tensor, last: Tensor, width: int) -> Tensor | None:
        """Feed the `width` positions of each row that end at last [B]: -> logits [B, 1, V] float32 behind `last`.

        A row with fewer positions starts at 0 several times over: the same entry in the same slot.
        """
        logits = None
        positions = (last[:, None] - torch.arange(width - 1, -1, -1, device=last.device)).clamp(min=0)
        chunk_size = width if len(ids) * width**2 <= PREFILL_MASK else PREFILL_CHUNK
        for chunk in positions.split(chunk_size, dim=1) if width else ():
            logits = self.forward(ids.gather(1, chunk), chunk, last_only=True)
        return logits

    def forward(self, ids: Tensor, positions: Tensor, last_only: bool = False) -> Tensor:
        """Run ids [B, W] at positions [B, W]: -> logits [B, W, V] float32, or [B, 1, V] of the last column."""
        width, cache = positions.shape[1], self.cache
        if self.graphs is not None and width <= MAX_WINDOW and cache.layers:
            cache = RaggedCache.over(cache.buffers(), positions)
        else:
            cache.window.move(positions)
        if self.compiled is not None and (width <= MAX_WINDOW or self.compiled.any_width):
            return self.compiled(ids, positions, last_only, cache)
        decodes = self.takes_intervals and is_decoding(width, positions.device)
        mask_dtype = torch.int32 if decodes else self.mask_dtype
        with lent(self.config) if decodes else nullcontext(), torch.inference_mode():  # a tenth less per operator than no_grad
            logits = self.call(ids, positions, cache, mask_dtype, int(last_only))
        return logits.to(device=ids.device, dtype=torch.float32, copy=True)  # a copy is an ordinary tensor again

    def call(self, ids: Tensor, positions: Tensor, cache: RaggedCache, mask_dtype: torch.dtype, columns: int | Tensor) -> Tensor:
        """The model's own forward: -> logits of the last `columns` of them (0: all), or of those numbered."""
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": attention_masks(positions, cache.window.key_length, self.config, self.kinds, mask_dtype),
            "past_key_values": cache,
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


def context_of(model: PreTrainedModel) -> int | None:
    """Positions the model was made for, None where its config names no limit."""
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return int(context) if context else None


def unsupported(model: PreTrainedModel) -> str | None:
    """Why this model cannot run on the ragged cache, None where it can. Decided by what it is and by a trial run."""
    config = model.config
    if config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if getattr(model, "_is_stateful", False):
        return "its cache is recurrent, so a rejected draft cannot be taken back"
    text_config = config.get_text_config(decoder=True)
    if kinds := attention_kinds(text_config) - LINEAR_KINDS:
        return f"its layers of kind {', '.join(sorted(kinds))} keep more than keys and values by position"
    implementation = text_config._attn_implementation
    if implementation not in ATTENTIONS:
        return (
            f"its attention implementation {implementation!r} does not take a mask for each row;"
            " load it with attn_implementation='sdpa' or 'eager'"
        )
    return _trial(model)


def dynamic_rope_limit(model: PreTrainedModel) -> int | None:
    """Length beyond which rotary frequencies depend on the batch's longest row (dynamic, longrope); None: they never do."""
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    by_kind = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    limits = [
        int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        for rope in by_kind
        if rope.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)


def precision_of(model: PreTrainedModel) -> torch.dtype:
    """The coarsest dtype that a model computes in: kernels of 4-bit layers take and give 16 bits, whatever is around them."""
    has_kernel = any(isinstance(module, Int4Linear) and module.use_kernel for module in model.modules())
    return torch.bfloat16 if has_kernel else model.dtype


@torch.no_grad()
def _trial(model: PreTrainedModel) -> str | None:
    """Compare a short ragged run, with rejected entries left behind, to each row on its own: -> what went wrong, or None.

    Uneven on purpose: some families pass an even batch and write other text on an uneven one.
    """
    generator = torch.Generator().manual_seed(0)
    text_config = model.config.get_text_config(decoder=True)
    limit = context_of(model) or 64
    lengths = torch.tensor([min(length, limit - 2) for length in (3, 37)])
    if lengths.min() < 1:
        return f"its context of {limit} is too short"
    vocab_size = int(text_config.vocab_size)
    ids = torch.randint(vocab_size, (2, limit if limit < 64 else 64), generator=generator)
    ids, lengths = ids.to(model.device), lengths.to(model.device)
    was_training = model.training
    try:
        model.eval()
        runner = CachedModel(model)
        runner.prefill(ids, lengths - 2)
        columns = torch.arange(3, device=ids.device)
        rejected = torch.randint(vocab_size, (2, 3), generator=generator).to(ids.device)
        positions = (lengths[:, None] - 1 + columns).clamp(max=ids.shape[1] - 1)
        runner.forward(rejected, positions)
        got = runner.forward(ids.gather(1, positions), positions)
        for row in range(2):
            stop = int(positions[row, -1]) + 1
            want = model(input_ids=ids[row : row + 1, :stop], use_cache=False).logits[0, positions[row]].float()
            error = ((got[row] - want).norm() / (want - want.mean()).norm().clamp(min=1e-30)).item()
            if want.isnan().any():
                return "its logits are NaN; check its weights and dtype"
            if not error <= PROBE_TOLERANCE.get(precision_of(model), 1e-1):
                return f"on a ragged batch its logits differ from those of the row alone (relative error {error:.1e})"
    except Exception as error:  # a model may fail in any way on inputs it was not made for; the answer is the same
        first_line = str(error).partition("\n")[0]
        return f"it does not run with positions and a mask for each row (a trial ended in {type(error).__name__}: {first_line})"
    finally:
        model.train(was_training)
    return None
