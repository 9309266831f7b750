"""Rejection sampling of a batch of drafts in one launch."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec_kernels.configuration import Configuration
from specdec_kernels.counters import counters

CHUNK = 2048  # ids that one block reads; fixed, so that a row is summed in the same order in any batch
MAX_CHUNKS = 512  # of a row
ID_BLOCK = 32  # draft ids that are verified at a time


@triton.jit
def _weights(p_row, q_row, drafted, chunk, vocab, q_vocab, DENSE: tl.constexpr, CHUNK: tl.constexpr):
    """p and max(p - q, 0) of one chunk, float64 [CHUNK]; 0 where they are NaN."""
    x = chunk * CHUNK + tl.arange(0, CHUNK)
    p = tl.load(p_row + x, mask=x < vocab, other=0.0)
    q = tl.load(q_row + x, mask=x < q_vocab, other=0.0) if DENSE else tl.where(x == drafted, 1.0, 0.0)
    excess = p - q
    return tl.where(p > 0, p, 0.0).to(tl.float64), tl.where(excess > 0, excess, 0.0).to(tl.float64)


@triton.jit
def _pick(weights, before, t, SIZE: tl.constexpr):
    """The first i with weights[i] > 0 and before + weights[0] + … + weights[i] > t.

    If rounding leaves no such i, the last one with weights[i] > 0, or 0 if there is none.
    """
    i = tl.arange(0, SIZE)
    passed = (before + tl.cumsum(weights, 0) > t) & (weights > 0)
    first = tl.min(tl.where(passed, i, SIZE))
    last = tl.max(tl.where(weights > 0, i, 0))
    return tl.minimum(first, last)


@triton.jit(do_not_specialize=["num_ids"])
def _rejection_kernel(
    p_ptr,         # [B, K+1, V] float32, the target's distributions
    ids_ptr,       # [B, K] int64, the draft ids
    q_ptr,         # [B, K, V] float32, the distributions they were drawn from; read if DENSE
    lengths_ptr,   # [B] int64, number of draft ids of a row
    uniforms_ptr,  # [B, K+1] float64
    accepted_ptr,  # [B] int64, output
    next_ptr,      # [B] int64, output
    sums_ptr,      # [B, 2, CHUNKS] float64 scratch: sums of p, then of max(p - q, 0)
    counter_ptr,   # [B] int32 zeros, reset to zeros
    num_ids,       # K
    vocab,         # V
    DENSE: tl.constexpr, CHUNK: tl.constexpr, MAX_CHUNKS: tl.constexpr, ID_BLOCK: tl.constexpr,
):  # fmt: skip
    """accepted[b] = number of draft ids x before the first one without u * q(x) < p(x); q is one-hot unless DENSE.
    next[b]: after a rejection drawn from max(p - q, 0), or from p if that is 0 everywhere; else drawn from p.

    Grid: (B, CHUNKS = cdiv(V, CHUNK)). Every block counts the accepted ids and sums its chunk; the last block of a row
    draws the row's next id. Bound by reading one of the row's p and one of its q once.
    """
    b = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    uniforms_ptr += b * (num_ids + 1)
    p_first = b * (num_ids + 1)  # index of the row's first distribution
    q_first = b * num_ids

    offered = tl.maximum(tl.minimum(tl.load(lengths_ptr + b), num_ids), 0)
    accepted = offered
    for start in range(0, num_ids, ID_BLOCK):
        i = start + tl.arange(0, ID_BLOCK)
        is_offered = i < accepted
        drafted = tl.load(ids_ptr + q_first + i, mask=is_offered, other=0)
        in_vocab = is_offered & (drafted >= 0) & (drafted < vocab)  # other ids have no p and are rejected
        p = tl.load(p_ptr + (p_first + i) * vocab + drafted, mask=in_vocab, other=0.0)
        q = (
            tl.load(q_ptr + (q_first + i) * vocab + drafted, mask=in_vocab, other=0.0)
            if DENSE
            else tl.full([ID_BLOCK], 1.0, tl.float32)
        )
        u = tl.load(uniforms_ptr + i, mask=is_offered, other=0.0)
        passed = u * q.to(tl.float64) < p.to(tl.float64)
        accepted = tl.minimum(accepted, tl.min(tl.where(is_offered & ~passed, i, num_ids)))

    rejected = accepted < offered
    drafted = tl.load(ids_ptr + q_first + accepted, mask=rejected, other=-1)
    q_vocab = tl.where(rejected, vocab, 0)  # without a rejection q is 0, so max(p - q, 0) is p
    p_row = p_ptr + (p_first + accepted) * vocab
    q_row = q_ptr + (q_first + accepted) * vocab
    p, excess = _weights(p_row, q_row, drafted, chunk, vocab, q_vocab, DENSE, CHUNK)
    p_sums = sums_ptr + b * 2 * chunks
    excess_sums = p_sums + chunks
    tl.store(p_sums + chunk, tl.sum(p))
    tl.store(excess_sums + chunk, tl.sum(excess))
    tl.debug_barrier()  # all stores of the block precede the counter
    if tl.atomic_add(counter_ptr + b, 1, sem="acq_rel") != chunks - 1:
        return

    tl.store(counter_ptr + b, 0)
    c = tl.arange(0, MAX_CHUNKS)
    sums = tl.load(excess_sums + c, mask=c < chunks, other=0.0, cache_modifier=".cg")
    has_residual = tl.max(sums) > 0
    if not has_residual:  # p == q in floating point
        sums = tl.load(p_sums + c, mask=c < chunks, other=0.0, cache_modifier=".cg")
    t = tl.load(uniforms_ptr + num_ids) * tl.sum(sums)  # u < 1, so t is less than the sum
    chunk = _pick(sums, 0.0, t, MAX_CHUNKS)
    before = tl.sum(tl.where(c < chunk, sums, 0.0))
    p, excess = _weights(p_row, q_row, drafted, chunk, vocab, q_vocab, DENSE, CHUNK)
    weights = tl.where(has_residual, excess, p)
    tl.store(next_ptr + b, chunk * CHUNK + _pick(weights, before, t, CHUNK))
    tl.store(accepted_ptr + b, accepted)


POINTERS = {
    "p_ptr": "*fp32", "ids_ptr": "*i64", "q_ptr": "*fp32", "lengths_ptr": "*i64", "uniforms_ptr": "*fp64",
    "accepted_ptr": "*i64", "next_ptr": "*i64", "sums_ptr": "*fp64", "counter_ptr": "*i32",
}  # fmt: skip


@functools.cache
def configuration(dense: bool, wide: bool) -> Configuration:
    """wide: V is a multiple of 16, so rows begin at multiples of 128 bits, which Triton detects at launch."""
    return Configuration(
        op="rejection",
        name=("dense" if dense else "one-hot") + ("" if wide else "-narrow"),
        kernel=_rejection_kernel,
        signature=POINTERS | {"num_ids": "i32", "vocab": "i32"},
        constants={"DENSE": dense, "CHUNK": CHUNK, "MAX_CHUNKS": MAX_CHUNKS, "ID_BLOCK": ID_BLOCK},
        divisible=(*POINTERS, "vocab") if wide else tuple(POINTERS),
        num_stages=1,
        tensor_cores=False,
        wide_loads=wide,
        ordered=True,
    )


CONFIGURATIONS = [configuration(dense, wide) for wide in (True, False) for dense in (True, False)]


def launch(
    target_probs: Tensor, draft_ids: Tensor, draft_probs: Tensor | None, lengths: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the kernel on the arguments of verify(), which has checked them: -> accepted [B], next_ids [B]."""
    batch, num_ids = draft_ids.shape
    vocab = target_probs.shape[2]
    accepted = torch.empty(batch, dtype=torch.int64, device=lengths.device)
    next_ids = torch.empty(batch, dtype=torch.int64, device=lengths.device)
    if not batch:
        return accepted, next_ids
    chunks = triton.cdiv(vocab, CHUNK)
    sums = torch.empty(batch, 2, chunks, dtype=torch.float64, device=lengths.device)
    chosen = configuration(draft_probs is not None, vocab % 16 == 0)
    chosen.kernel[batch, chunks](
        target_probs, draft_ids, target_probs if draft_probs is None else draft_probs, lengths, uniforms,
        accepted, next_ids, sums, counters(batch, lengths.device), num_ids, vocab,
        **chosen.constants, **chosen.options,
    )  # fmt: skip
    return accepted, next_ids
