"""The memory of a call with two models and two caches, before anything is loaded.

    peak = weights + both caches + the most that a phase adds to them: target prefill, draft prefill, drafting,
    verification

Tests require it to be within 5 % of the peak measured on a CPU. Not in it: the CUDA context, the allocator's
fragmentation and workspaces inside of operators, for which `devices.usable_bytes` leaves a margin; what a logits
processor stores; temporary tensors of quantizing while loading; what recorded steps keep for each K on a CUDA device,
mostly logits and probabilities. The CPU kernels hold little inside: a layer's inputs once more in float32, and in
attention 16 bytes a slot for each thread.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from specdec.planning.devices import usable_bytes
from specdec.planning.formulas import ModelFootprint
from specdec.runtime.attention.blocks import KEY_BLOCK
from specdec.runtime.kv_cache.layers import grown_capacity, static_capacity
from specdec.runtime.runner import PREFILL_MASK

UNLIMITED_CONTEXT = 1 << 20  # tried at most where a config names no limit


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the peak of a call.

    target_kv_bytes, draft_kv_bytes: the caches at the call's end.
    logits_bytes: logits, processed scores and distributions, of one verification and of the step result before it.
    workspace_bytes: what the most demanding phase adds: activations, masks, repeated keys, a tile of weights.
    """

    target_weights_bytes: int
    draft_weights_bytes: int
    target_kv_bytes: int
    draft_kv_bytes: int
    logits_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class _CacheSize:
    """Bytes of a cache after prefill and at the end, and of the buffer that its last growth copies from."""

    after_prefill: int
    end: int
    growth: int


def plan_memory(
    target: ModelFootprint,
    draft: ModelFootprint | None = None,
    *,
    context: int,
    batch: int = 1,
    num_draft_tokens: int = 5,
    prompt: int | None = None,
    sampled: bool = True,
    target_int4: bool = True,
    draft_int4: bool = False,
) -> MemoryPlan:
    """Memory of a call whose longest row ends at `context` positions.

    prompt: tokens of the longest row; None for the most demanding, one that fills the context. sampled: with top-p,
    whose sorting holds the most of all usual processors; False for greedy, without any. Raises ValueError for values
    out of range.
    """
    _check(target, context, batch, num_draft_tokens, prompt)
    prompt = context if prompt is None else prompt
    width = min(num_draft_tokens, context - 1) + 1
    target_cache = _cache_size(target, batch, prompt, context, target_int4)
    draft_cache = _cache_size(draft, batch, prompt, context, draft_int4) if draft else _CacheSize(0, 0, 0)
    later = target_cache.end - target_cache.after_prefill + draft_cache.end  # not there yet while the target prefills

    head_bytes = target.logits_bytes(batch, width, target_int4)
    held, verifying = _verification_bytes(batch * target.vocab_size * 4, width, head_bytes, draft is not None, sampled)
    logits_bytes = int(held + verifying)
    phases = [
        target.prefill_bytes(batch, prompt, target_int4) - later,
        held + target.forward_bytes(batch, width, context, target_int4, target_cache.growth),
        logits_bytes,
    ]
    if draft:
        phases.append(draft.prefill_bytes(batch, prompt, draft_int4) - later + draft_cache.after_prefill)
        phases.append(held + draft.forward_bytes(batch, 2, context, draft_int4, draft_cache.growth))
    return MemoryPlan(
        target_weights_bytes=target.weights_bytes(target_int4),
        draft_weights_bytes=draft.weights_bytes(draft_int4) if draft else 0,
        target_kv_bytes=target_cache.end,
        draft_kv_bytes=draft_cache.end,
        logits_bytes=logits_bytes,
        workspace_bytes=max(phases) - logits_bytes,
    )


def largest_context(
    memory_bytes: int, target: ModelFootprint, draft: ModelFootprint | None = None, *, batch: int = 1, **call: Any
) -> int:
    """The longest context that fits a card of so much memory, up to the target's own; 0 where none does.

    call: plan_memory's other arguments.
    """
    usable = usable_bytes(memory_bytes)

    def fits(context: int) -> bool:
        return plan_memory(target, draft, context=context, batch=batch, **call).total_bytes <= usable

    limit = target.context or UNLIMITED_CONTEXT
    return _largest(fits, 2, limit, math.isqrt(PREFILL_MASK // max(batch, 1)))


def largest_batch(
    memory_bytes: int, target: ModelFootprint, draft: ModelFootprint | None = None, *, context: int, **call: Any
) -> int:
    """The most rows that fit a card of so much memory at a context; 0 where not even one does.

    call: plan_memory's other arguments.
    """
    usable = usable_bytes(memory_bytes)

    def fits(batch: int) -> bool:
        return plan_memory(target, draft, context=context, batch=batch, **call).total_bytes <= usable

    limit = usable // (context * target.token_bytes)  # rows of the cache alone
    return _largest(fits, 1, max(limit, 1), PREFILL_MASK // context**2)


def _check(target: ModelFootprint, context: int, batch: int, num_draft_tokens: int, prompt: int | None) -> None:
    minima = (("batch", batch, 1), ("context", context, 2), ("num_draft_tokens", num_draft_tokens, 1))
    for name, value, minimum in minima:
        if value < minimum:
            raise ValueError(f"{name}={value} must be {minimum} or more")
    if target.context is not None and context > target.context:
        raise ValueError(f"context={context} is beyond the {target.context} positions that {target.name} supports")
    if prompt is not None and not 1 <= prompt <= context:
        raise ValueError(f"prompt={prompt} must lie in 1 … context={context}")


def _cache_size(model: ModelFootprint, batch: int, prompt: int, context: int, int4: bool) -> _CacheSize:
    block = KEY_BLOCK if int4 and model.device == "cpu" else 1
    end = static_capacity(context, model.context) if model.device == "cuda" else context
    first, before_growth, last = _slots(prompt, end, block)
    slot_bytes = batch * model.token_bytes
    return _CacheSize(first * slot_bytes, last * slot_bytes, model.growth_bytes(batch, before_growth))


def _verification_bytes(row_bytes: int, width: int, head_bytes: int, drafts: bool, sampled: bool) -> tuple[int, float]:
    """Logits and distributions that are held through a step, and what making and verifying the logits adds.

    row_bytes: one float32 distribution for each row. head_bytes: of the forward of the output head.
    """
    logits, probs = width * row_bytes, (width - 1) * row_bytes if drafts and sampled else 0
    if not sampled:
        return logits, max(head_bytes, logits)
    held = 2 * logits + 2 * probs  # the last result's logits, scores and draft probabilities; and this draft's
    sorting = 7.5 * logits  # logits, scores, these sorted, their order (int64), its sums, two masks, the result
    # logits, scores, probabilities; their overlap, or a float64 draw
    verifying = 3 * logits + max(probs, 6 * row_bytes)
    return held, max(head_bytes, sorting, verifying)


def _slots(prompt: int, context: int, block: int) -> tuple[int, int, int]:
    """Slots of a buffer after prefill, before it last grew (0: it has not since) and at the end of a call."""
    lengths = (prompt, context - 1, context)  # the last id is never fed
    prompt, end, limit = (-(-slots // block) * block for slots in lengths)
    first = last = grown_capacity(0, prompt, limit)
    before = 0
    while last < end:
        before, last = last, grown_capacity(last, last + 1, limit)
    return first, before, last


def _largest(fits: Callable[[int], bool], low: int, high: int, whole_prefill: int) -> int:
    """The largest of low … high that fits, 0 where none does.

    Beyond whole_prefill, prefill runs in chunks and takes less memory, so a larger value may fit where a smaller one
    does not.
    """
    for start, stop in ((max(whole_prefill + 1, low), high), (low, min(whole_prefill, high))):
        if start <= stop and fits(start):
            return start + bisect.bisect_left(range(start + 1, stop + 1), True, key=lambda value: not fits(value))
    return 0
