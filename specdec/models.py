"""Running a transformers model on (ids, positions) with a ragged cache, and telling which models that works for."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Container
from contextlib import nullcontext, suppress
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from specdec.attention import KEYS, implementation_of, lent, takes_intervals
from specdec.cache import RaggedCache, attention_kinds, attention_masks, kept_slots
from specdec.graphs import Graphs, directly
from specdec.identity import Identity
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
    identity: Identity  # of the model that it was made of

    def renew(self, unchanged: Identity | None) -> bool:
        """A call begins: take note of weights that were replaced. False where the model is no longer what this was made of.

        unchanged: what the model was just found to be still.
        """

    def __call__(self, ids: Tensor, positions: Tensor, last_only: bool, cache: RaggedCache) -> Tensor:
        """As CachedModel.forward, with a window that the cache has moved to."""


class CachedModel:
    """A causal language model with its own KV cache: forward(ids [B, W], positions [B, W]) -> logits float32.

    vocab_size: V, the width of the logits. num_embeddings: ids it can read. context: positions the model was made for, None where
    its config names no limit. cache_argument: what its forward calls the KV cache.
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
        return directly if self.graphs is None else self.graphs.run

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

    def spare(self) -> CachedModel:
        """Another runner of the same model, with a cache of its own and nothing recorded."""
        runner = CachedModel(self.model)
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


def context_of(model: PreTrainedModel) -> int | None:
    """Positions the model was made for, None where its config names no limit."""
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return int(context) if context else None


def unsupported(model: PreTrainedModel) -> str | None:
    """Why this model cannot run on the ragged cache, None where it can. Decided by what it is and by a trial run."""
    return ruled_out(model) or _trial(model)


def ruled_out(model: PreTrainedModel) -> str | None:
    """Why this model cannot run on the ragged cache, as far as its config and attributes tell; no forward is run."""
    config = model.config
    if config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if getattr(model, "_is_stateful", False):
        return "its cache is recurrent, so a rejected draft cannot be taken back"
    text_config = config.get_text_config(decoder=True)
    if kinds := attention_kinds(text_config) - LINEAR_KINDS:
        return f"its layers of kind {', '.join(sorted(kinds))} keep more than keys and values by position"
    implementation = implementation_of(text_config)
    if implementation not in ATTENTIONS:
        return (
            f"its attention implementation {implementation!r} does not take a mask for each row;"
            " load it with attn_implementation='sdpa' or 'eager'"
        )
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "gradient checkpointing in training mode drops the KV cache; call model.eval() first"
    return None


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
    dtype = torch.bfloat16 if has_kernel else model.dtype
    return max(dtype, autocast_of(model.device) or dtype, key=lambda dtype: PROBE_TOLERANCE.get(dtype, 1e-1))


def autocast_of(device: torch.device) -> torch.dtype | None:
    """The dtype that the caller's autocast computes in on this device, None where there is none."""
    is_on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_on else None


@torch.no_grad()
def draws_random_numbers(model: PreTrainedModel) -> bool:
    """Whether a forward draws random numbers in the model's present mode, as dropout does in training.

    Leaves seeds alone. False where the forward fails: what is wrong with it, a trial says.
    """
    device = model.device
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        before = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None
        with suppress(Exception):
            model(input_ids=ids, use_cache=False)
        after = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None
    pairs = zip(before, after, strict=True)
    return any(one is not None and other is not None and not one.equal(other) for one, other in pairs)


@torch.no_grad()
def _trial(model: PreTrainedModel) -> str | None:
    """Compare a short ragged run, with rejected entries left behind, to plain decoding of each row: -> what went wrong, or None.

    Uneven on purpose: some families pass an even batch and write other text on an uneven one. The rows do not advance alike
    either, since rotary embeddings forgive positions that are off by one number throughout. The short row is decoded id by
    id on transformers' own cache, so that a forward which treats its last position in another way than those before it
    shows.
    """
    generator = torch.Generator().manual_seed(0)
    limit = context_of(model) or 64
    lengths = torch.tensor([min(length, limit - 2) for length in (3, 37)])
    if lengths.min() < 1:
        return f"its context of {limit} is too short"
    vocab_size = min(widths(model))
    ids = torch.randint(vocab_size, (2, limit if limit < 64 else 64), generator=generator)
    ids, lengths = ids.to(model.device), lengths.to(model.device)
    try:
        runner = CachedModel(model)
        runner.prefill(ids, lengths - 2)
        columns = torch.arange(3, device=ids.device)
        fed = torch.randint(vocab_size, (2, 3), generator=generator).to(ids.device)
        positions = (lengths[:, None] - 1 + columns).clamp(max=ids.shape[1] - 1)
        fed[0, :2] = ids[0, positions[0, :2]]  # the short row keeps two ids of this window, the other one none
        runner.forward(fed, positions)
        positions[0] = (positions[0] + 2).clamp(max=ids.shape[1] - 1)
        got = runner.forward(ids.gather(1, positions), positions)
        if got.shape[-1] != runner.vocab_size:
            return f"its head has {runner.vocab_size} rows and its logits are {got.shape[-1]} wide"
        for row in range(2):
            text = ids[row : row + 1, : int(positions[row, -1]) + 1]
            if row == 0:
                want = _decoded(runner, text, int(positions[0, 0])).to(got.device)[positions[0] - positions[0, 0]]
            else:
                want = model(input_ids=text, use_cache=False).logits[0, positions[row]].float()
            error = ((got[row] - want).norm() / (want - want.mean()).norm().clamp(min=1e-30)).item()
            if want.isnan().any():
                return "its logits are NaN; check its weights and dtype"
            if not error <= PROBE_TOLERANCE.get(precision_of(model), 1e-1):
                return f"on a ragged batch its logits differ from those of the row alone (relative error {error:.1e})"
    except Exception as error:  # a model may fail in any way on inputs it was not made for; the answer is the same
        first_line = str(error).partition("\n")[0]
        return f"it does not run with positions and a mask for each row (a trial ended in {type(error).__name__}: {first_line})"
    return None


def _decoded(runner: CachedModel, text: Tensor, first: int) -> Tensor:
    """Logits [n, V] float32 of text [1, L] from position `first` on, one position a forward behind those before it.

    Positions are named as generate() does: some models would else count from what an earlier call has left in them.
    """
    cache = DynamicCache(config=runner.config)
    call: dict[str, Any] = {runner.cache_argument: cache, "use_cache": True, "return_dict": True}
    logits = []
    length = text.shape[1]
    for start, end in pairwise(sorted({0, *range(first, length + 1)})):
        if "position_ids" in runner.parameters:
            call["position_ids"] = torch.arange(start, end, device=text.device)[None]
        logits.append(runner.model(input_ids=text[:, start:end], **call).logits[0, -1])
    return torch.stack(logits[first - length :]).float()
