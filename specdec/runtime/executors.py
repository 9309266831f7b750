"""How a runner's forwards are executed: eagerly, by a compiled forward on a CPU, or recorded as CUDA graphs."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from specdec.core.interfaces import Run, run_eager
from specdec.quant.batch_invariant import MAX_WINDOW
from specdec.runtime.cuda_graphs import Graphs
from specdec.runtime.identity.snapshot import Identity
from specdec.runtime.kv_cache.layers import static_capacity
from specdec.runtime.kv_cache.ragged import RaggedCache
from specdec.runtime.model_forward import ModelForward


class EagerExecutor:
    """Runs the model's own forward, operator by operator, with a new cache for each call.

    The other executors fall back to it. run: runs a part of a step, as `Graphs.run` does. cache: of the current call.
    """

    run: Run = staticmethod(run_eager)

    def __init__(self, model_forward: ModelForward) -> None:
        self.model_forward = model_forward
        self.cache = model_forward.new_cache()

    def begin(self, batch_size: int, max_slots: int | None, unchanged: Identity | None) -> None:
        """Start a call with an empty cache, whose buffers grow to max_slots at most; None: no limit.

        unchanged: the identity that the model was just found to have; None where it was not compared.
        """
        self.cache = self.model_forward.new_cache(max_slots)

    def reserve(self, slots: int) -> None:
        """Prepare for a step after which no row has more than `slots` positions."""

    def cache_at(self, positions: Tensor, last_only: bool = False) -> RaggedCache:
        """The cache with its window at positions [B, W]."""
        self.cache.window.move(positions, last_only)
        return self.cache

    def forward(self, ids: Tensor, positions: Tensor, last_only: bool) -> Tensor:
        """Run ids [B, W] at positions [B, W]: -> logits [B, W, V] float32, or [B, 1, V] of the last column."""
        return self.model_forward.run(ids, positions, last_only, self.cache_at(positions, last_only))


class DraftInputs(NamedTuple):
    """What a draft of K ids takes that is one call: of a row, its last ids are fed and then up to K drafted.

    text: [B, L] int64. last: [B] int64, the last position that is fed. limit: [B] int64, how many ids count. width: how
    many ids are fed, up to `last`. num_ids: K. num_embeddings: how many ids the model reads; larger ones are replaced
    by its last. vocab_size: V, to which wider logits are cut. uniforms: [K, B, 1] float64; None in greedy calls.
    """

    text: Tensor
    last: Tensor
    limit: Tensor
    width: int
    num_ids: int
    num_embeddings: int
    vocab_size: int
    uniforms: Tensor | None


class PlainInputs(NamedTuple):
    """What greedy steps without drafts take that are one call.

    ids, lengths, end, finished, stop_ids: as in `Sequences`; ids have a column for each step, and steps commit to
    them. num_steps: how many, if not all rows finish before. vocab_size: V.
    """

    ids: Tensor
    lengths: Tensor
    end: Tensor
    finished: Tensor
    stop_ids: Tensor | None
    num_steps: int
    vocab_size: int


class OptimizedForward(Protocol):
    """A compiled form of a model's decoding forward: `CompiledForward` of specdec/runtime/cpu_compile/forward.py.

    any_width: whether it serves windows of more than MAX_WINDOW positions. identity: of the model it was made from.
    """

    any_width: bool
    identity: Identity

    def renew(self, unchanged: Identity | None) -> bool:
        """Start a call: take over replaced weights. False where the model is no longer the one that this was made from.

        unchanged: the identity that the model was just found to have, None where it was not compared.
        """

    def __call__(self, ids: Tensor, positions: Tensor, last_only: bool, cache: RaggedCache) -> Tensor:
        """As `ModelForward.run`, after making the cache cover the positions."""

    def draft(self, inputs: DraftInputs, slots: int, cache: RaggedCache) -> tuple[Tensor, Tensor | None]:
        """Draft as one call, after making the cache hold `slots` positions a row.

        Returns ids [B, K] int64, and the distributions they were drawn from, [B, K, V] float32; None in greedy calls.
        """

    def run_plain_steps(
        self, inputs: PlainInputs, slots: int, cache: RaggedCache
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Run and commit greedy steps as one call, after making the cache hold `slots` positions a row.

        Returns what `Target.run_plain_steps` does.
        """


class CompiledExecutor(EagerExecutor):
    """Runs decoding windows by a compiled forward, the rest eagerly.

    is_current: whether the compiled forward serves the current call; one that does not may serve a later call.
    """

    def __init__(self, model_forward: ModelForward, compiled: OptimizedForward) -> None:
        super().__init__(model_forward)
        self.compiled = compiled
        self.is_current = True

    def begin(self, batch_size: int, max_slots: int | None, unchanged: Identity | None) -> None:
        if batch_size:
            self.is_current = self.compiled.renew(unchanged)
        super().begin(batch_size, max_slots, unchanged)

    def forward(self, ids: Tensor, positions: Tensor, last_only: bool) -> Tensor:
        if not self.is_current or not (positions.shape[1] <= MAX_WINDOW or self.compiled.any_width):
            return super().forward(ids, positions, last_only)
        return self.compiled(ids, positions, last_only, self.cache)


class RecordedExecutor(EagerExecutor):
    """Runs forwards that can be recorded as CUDA graphs.

    Buffers stay in place from call to call, and a window of up to MAX_WINDOW positions attends to all of their slots,
    so that the host reads none of its positions.
    """

    def __init__(self, model_forward: ModelForward, context: int | None, graphs: Graphs) -> None:
        """context: the most slots that the model takes; None: any number."""
        super().__init__(model_forward)
        self.context = context
        self.graphs = graphs
        self.run = graphs.run
        self.batch_size = 0
        self.recorded_buffers: list[Tensor] | None = None  # the cache's, where recordings may use them

    def begin(self, batch_size: int, max_slots: int | None, unchanged: Identity | None) -> None:
        if max_slots is not None:
            max_slots = static_capacity(max_slots, self.context)
        if batch_size and batch_size == self.batch_size:
            self.cache.window.limit(max_slots)
            return
        self.drop_recordings()
        super().begin(batch_size, max_slots, unchanged)
        self.batch_size = batch_size

    def reserve(self, slots: int) -> None:
        if not self.cache.layers:
            return
        buffers = self.cache.reserve(slots)
        if buffers is not self.recorded_buffers:
            self.drop_recordings()
            self.recorded_buffers = buffers

    def cache_at(self, positions: Tensor, last_only: bool = False) -> RaggedCache:
        if positions.shape[1] > MAX_WINDOW or not self.cache.layers:
            return super().cache_at(positions, last_only)
        return RaggedCache.over(self.cache.buffers(), positions)

    def drop_recordings(self) -> None:
        """Drop recordings that use the cache's buffers, which are about to be replaced."""
        if self.recorded_buffers is not None:
            self.graphs.drop()
        self.recorded_buffers = None
