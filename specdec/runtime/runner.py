"""Running a transformers model on (ids, positions) with a ragged KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from specdec.core.interfaces import Run
from specdec.core.sequences import Sequences
from specdec.core.steps import TargetOutput
from specdec.runtime.cuda_graphs import Graphs
from specdec.runtime.executors import CompiledExecutor, EagerExecutor, OptimizedForward, PlainInputs, RecordedExecutor
from specdec.runtime.identity.snapshot import Identity
from specdec.runtime.kv_cache.ragged import RaggedCache
from specdec.runtime.model_forward import ModelForward

PREFILL_CHUNK = 1024  # positions of one forward, where a mask of rows * positions * keys would be too large
PREFILL_MASK = 1 << 26  # elements of a mask: a prompt of 8192 in one forward, as stock decoding runs it
PREFILL_SCORES = 2 << 30  # bytes of the scores of one layer's attention, where it holds them
SCORE_BYTES = 8  # of a query and a key: in float32 twice; or in 16 bits, their softmax in float32 and in 16 bits
MIN_PREFILL_CHUNK = 64


class ModelRunner:
    """A causal language model with its own KV cache: forward(ids [B, W], positions [B, W]) -> logits float32.

    vocab_size: V, the width of the logits. num_embeddings: how many ids it can read.
    context: positions the model was made for, None where its config names no limit. masks_by_slot: see the function.
    model_forward: the model's own forward.
    unchanged: the identity that the model was found to have before the current call; None where it was not compared.
    prefill_chunk: positions of a prompt that are fed at a time; None: as `prefill_chunk` says.
    feature_layers: which hidden states `read_features` returns, see `ModelForward`.
    """

    def __init__(self, model: PreTrainedModel, feature_layers: Sequence[int] = ()) -> None:
        self.model = model
        self.context = context_of(model)
        self.masks_by_slot = masks_by_slot(model)
        self.unchanged: Identity | None = None
        self.prefill_chunk: int | None = None
        self.model_forward = ModelForward(model, self.masks_by_slot, feature_layers)
        self._executor = EagerExecutor(self.model_forward)
        self.refresh()

    @property
    def config(self) -> PreTrainedConfig:
        """The model's text config."""
        return self.model_forward.config

    @property
    def parameters(self) -> frozenset[str]:
        """Names of the arguments that the model's forward takes."""
        return self.model_forward.parameters

    @property
    def cache_argument(self) -> str:
        """The name of the KV cache among them."""
        return self.model_forward.cache_argument

    @property
    def cache(self) -> RaggedCache:
        """The KV cache of the current call."""
        return self._executor.cache

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The hidden states that forwards keep for a drafter."""
        return self.model_forward.feature_layers

    def read_features(self, positions: Tensor) -> Tensor:
        """The hidden states of feature_layers at positions [B, W] that were fed: [B, W, n, H] in the model's dtype."""
        return self.cache.features.read(positions)

    def cache_at(self, positions: Tensor) -> RaggedCache:
        """The KV cache of the current call with its window at positions [B, W], to be written without a forward."""
        return self._executor.cache_at(positions)

    @property
    def run(self) -> Run:
        """Runs a part of a step on this model, as `Graphs.run` does."""
        return self._executor.run

    @property
    def compiled(self) -> OptimizedForward | None:
        """The compiled forward that serves decoding windows of the current call; None where there is none.

        Assigning it replaces a recorded executor; None: forwards run eagerly.
        """
        executor = self._executor
        return executor.compiled if isinstance(executor, CompiledExecutor) and executor.is_current else None

    @compiled.setter
    def compiled(self, compiled: OptimizedForward | None) -> None:
        self._set_executor(
            EagerExecutor(self.model_forward) if compiled is None else CompiledExecutor(self.model_forward, compiled)
        )

    @property
    def graphs(self) -> Graphs | None:
        """The CUDA graphs that parts of a step are recorded in; None where nothing is recorded.

        Assigning them replaces a compiled forward; None: forwards run eagerly.
        """
        return self._executor.graphs if isinstance(self._executor, RecordedExecutor) else None

    @graphs.setter
    def graphs(self, graphs: Graphs | None) -> None:
        self._set_executor(
            EagerExecutor(self.model_forward)
            if graphs is None
            else RecordedExecutor(self.model_forward, self.context, graphs)
        )

    def _set_executor(self, executor: EagerExecutor) -> None:
        """Run the rest of the current call by another executor, with the same cache."""
        if isinstance(self._executor, RecordedExecutor):
            self._executor.drop_recordings()
        executor.cache = self._executor.cache
        self._executor = executor

    def refresh(self) -> None:
        """Read from the model what its forward takes, and how wide its head and embeddings are now."""
        self.model_forward.refresh()
        self.vocab_size, self.num_embeddings = widths(self.model)

    def spare(self) -> ModelRunner:
        """Another runner of the same model, with its own cache and without recordings."""
        runner = ModelRunner(self.model, self.feature_layers)
        if isinstance(self._executor, CompiledExecutor):
            runner.compiled = self._executor.compiled
        runner.unchanged = self.unchanged
        return runner

    def begin(self, batch_size: int, max_slots: int | None = None) -> None:
        """Start a call with an empty cache, whose buffers grow to max_slots at most; None: no limit.

        batch_size 0 frees the cache.
        """
        if batch_size:
            self.refresh()
        self._executor.begin(batch_size, max_slots, self.unchanged)

    def reserve(self, slots: int) -> None:
        """Start a step after which no row has more than `slots` positions, so that the step need not read them."""
        self._executor.reserve(slots)

    def prefill(self, ids: Tensor, last: Tensor) -> TargetOutput | None:
        """Feed positions up to last [B] of ids [B, L]: -> logits [B, 1, V] at `last`; None where there are none."""
        width = int(last.max()) + 1
        self.reserve(width)
        return self.feed(ids, last, width)

    def feed(self, ids: Tensor, last: Tensor, width: int) -> TargetOutput | None:
        """Feed the `width` positions of each row that end at last [B]: -> logits [B, 1, V] float32 at `last`.

        A row with fewer positions feeds position 0 several times: the same entry in the same slot.
        """
        output = None
        positions = (last[:, None] - torch.arange(width - 1, -1, -1, device=last.device)).clamp(min=0)
        score_heads = getattr(self.config, "num_attention_heads", 0) if self.model_forward.holds_scores else 0
        chunk_size = self.prefill_chunk or prefill_chunk(len(ids), width, score_heads)
        for chunk in positions.split(chunk_size, dim=1) if width else ():
            output = self.forward(ids.gather(1, chunk), chunk, last_only=True)
        return output

    def forward(self, ids: Tensor, positions: Tensor, last_only: bool = False) -> TargetOutput:
        """Run ids [B, W] at positions [B, W]: -> logits [B, W, V] float32, or [B, 1, V] of the last column."""
        return TargetOutput(self._executor.forward(ids, positions, last_only))

    @property
    def has_plain_steps(self) -> bool:
        """Whether a compiled forward can run several steps in one call."""
        return self.compiled is not None

    def run_plain_steps(self, sequences: Sequences, num_steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Run and commit greedy steps without drafts or processors, see `Target.run_plain_steps`."""
        compiled = self.compiled
        assert compiled is not None
        inputs = PlainInputs(
            sequences.ids, sequences.lengths, sequences.end, sequences.finished, sequences.stop_ids, num_steps,
            self.vocab_size,
        )  # fmt: skip
        return compiled.run_plain_steps(inputs, sequences.longest, self.cache)


def prefill_chunk(rows: int, width: int, score_heads: int) -> int:
    """Positions that one forward reads of prompts of `width` positions, so that its masks and scores are bounded.

    score_heads: query heads of an attention that holds its scores [B, H, W, S], as eager attention does; 0 for others.
    """
    chunk = width if rows * width**2 <= PREFILL_MASK else min(width, PREFILL_CHUNK)
    if score_heads:
        largest = PREFILL_SCORES // (SCORE_BYTES * rows * score_heads * max(width, 1))
        chunk = min(chunk, max(MIN_PREFILL_CHUNK, largest // MIN_PREFILL_CHUNK * MIN_PREFILL_CHUNK))
    return chunk


def widths(model: PreTrainedModel) -> tuple[int, int]:
    """The width of the logits and the number of ids the model can read, as its head and its embeddings are now."""
    vocab_size = int(model.config.get_text_config(decoder=True).vocab_size)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return _num_rows(head, "out_features", vocab_size), _num_rows(embeddings, "num_embeddings", vocab_size)


def _num_rows(module: Any, name: str, default: int) -> int:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point():
        return weight.shape[0]
    return int(getattr(module, name, default))


def masks_by_slot(model: PreTrainedModel) -> bool:
    """Whether the model derives a query's position from the number of keys.

    Such a model has its own causal mask, a bool buffer [1, 1, P, P], and takes its rows from the cache's length on.
    """
    masks = (buffer for buffer in model.buffers() if buffer.dtype == torch.bool and buffer.ndim == 4)
    return any(mask.shape[:2] == (1, 1) and mask.shape[2] == mask.shape[3] > 1 for mask in masks)


def context_of(model: PreTrainedModel) -> int | None:
    """The number of positions the model was made for, None where its config names no limit."""
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return int(context) if context and context > 0 else None  # XLNet says -1
