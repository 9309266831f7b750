"""Rejection sampling: keep the longest prefix of a draft that leaves the target's distribution unchanged.

Pure functions of tensors; random numbers come in as uniforms. On a CUDA device specdec_kernels.rejection runs verify()
in one launch, on a CPU specdec_kernels.cpu each kind of verification in one operator; this module defines what they
compute.

Token verification: Leviathan et al., Fast Inference from Transformers via Speculative Decoding (2023), and Chen et al.,
Accelerating Large Language Model Decoding with Speculative Sampling (2023).

    p  target probability        q  draft probability        u  uniform in [0, 1)
    draft id x at position i is accepted      when u < p(x) / q(x), so never where p(x) = 0
    recovered id, after the first rejection   drawn from normalize(max(p - q, 0))
    bonus id, after full acceptance           drawn from p at the position after the draft

Block verification: Sun et al., Block Verification Accelerates Speculative Decoding (2024, arXiv 2403.10444). The same
distribution; at least as many ids are accepted on average, more where some id has p > q. At K = 1 the two are one.

    w[0] = 1, w[i] = min(w[i-1] * p(x) / q(x), 1) for the i-th draft id: the chance that at least i ids are kept
    r[i] = max(w[i] * p - q, 0), with p and q at the position after i draft ids
    h[i] = sum(r[i]) / (sum(r[i]) + 1 - w[i]), and w[K] for the whole draft
    accepted ids                              the last i with u < h[i], 0 where there is none
    recovered id, after i < K accepted ids    drawn from normalize(r[i])
    bonus id                                  as above

A deterministic draft (probs=None) keeps as many ids either way, so it is verified token by token.
"""

from __future__ import annotations

import torch
from specdec_kernels import cpu, rejection
from torch import Tensor

from specdec.core.sampling import Sampling, draw, uniforms
from specdec.core.steps import Draft, Verdict


def verify_draft(draft: Draft, scores: Tensor, sampling: Sampling) -> tuple[Verdict, Tensor, Tensor]:
    """Verify a draft against the target's processed scores [B, K+1, V] float32.

    -> the verdict, the chance of each draft id to be accepted after those before it [B, K] float32, and the rows [B]
    bool whose scores contain NaN: NaN propagates to the largest score and, through softmax, to every probability.
    """
    if sampling.do_sample:
        probs = sampling.probs(scores)
        draws, is_nan = uniforms(*scores.shape[:2], device=scores.device), probs[..., 0].isnan()
        if draft.probs is not None and sampling.verification == "block":
            verdict, shared = verify_block(draft, probs, draws)
        else:
            verdict, shared = verify(draft, probs, draws), overlap(draft, probs)
    elif draft.probs is None and scores.dtype == torch.float32 and cpu.works_on(scores.device):
        accepted, next_ids, shared, is_nan = torch.ops.specdec.verify_greedy(scores, draft.ids, draft.lengths)
        return Verdict(accepted, next_ids), shared, is_nan
    else:
        best, target_ids = scores.max(-1)  # one-hot distributions, held as ids
        verdict = verify_greedy(draft, target_ids)
        shared, is_nan = overlap_greedy(draft, target_ids), best.isnan()
    return Verdict(verdict.accepted, verdict.next_ids.clamp(0, scores.shape[-1] - 1)), shared, is_nan.any(1)


def verify(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Verdict:
    """Accept or reject a batch of drafts.

    target_probs: [B, K+1, V] float32, the target's distribution at each draft position and after the last.
    uniforms: [B, K+1] float64 in [0, 1), one for each draft id and one for the recovered or bonus id.
    """
    if _has_kernel(target_probs):
        return _verify_in_kernel(draft, target_probs, uniforms)
    if cpu.works_on(target_probs.device):
        return Verdict(*torch.ops.specdec.verify(target_probs, draft.ids, draft.probs, draft.lengths, uniforms))
    num_ids = draft.ids.shape[1]
    ids = draft.ids[..., None]
    p = target_probs[:, :num_ids].gather(-1, ids)[..., 0]
    q = torch.ones_like(p) if draft.probs is None else draft.probs.gather(-1, ids)[..., 0]
    accepted = count_leading(uniforms[:, :num_ids] * q < p, draft.lengths)

    rows = torch.arange(len(accepted), device=accepted.device)
    next_probs = target_probs[rows, accepted]
    if num_ids:
        column = accepted.clamp(max=num_ids - 1)  # of the rejected id
        vocab_size = target_probs.shape[-1]
        q_next = one_hot(draft.ids[rows, column], vocab_size) if draft.probs is None else draft.probs[rows, column]
        rejected = (accepted < draft.lengths)[:, None]
        next_probs = torch.where(rejected, residual(next_probs, q_next), next_probs)
    return Verdict(accepted, draw(next_probs, uniforms[:, num_ids]))


def verify_block(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> tuple[Verdict, Tensor]:
    """Block verification of a batch of drafts with probabilities; arguments as in verify().

    -> the verdict, and for each draft id its chance to be accepted after those before it: sum(min(p, q / w)) [B, K]
    float32, which is overlap() where w = 1; 0 beyond a row's draft. A row's `lengths` may depend on the ids before, not
    on those left out.
    """
    assert draft.probs is not None
    num_ids = draft.ids.shape[1]
    if num_ids == 0:
        return verify(draft, target_probs, uniforms), overlap(draft, target_probs)
    if cpu.works_on(target_probs.device):
        accepted, next_ids, shared = torch.ops.specdec.verify_block(
            target_probs, draft.ids, draft.probs, draft.lengths, uniforms
        )
        return Verdict(accepted, next_ids), shared
    ids = draft.ids[..., None]
    p, q = (probs[:, :num_ids].gather(-1, ids)[..., 0].double() for probs in (target_probs, draft.probs))
    weights = [torch.ones_like(p[:, 0])]
    for ratio in torch.where(q > 0, p / q, 0).unbind(1):  # q may be 0 beyond a row's draft
        weights.append((weights[-1] * ratio).clamp(max=1))
    w = torch.stack(weights, dim=1)

    following = w[:, :num_ids, None].float() * target_probs[:, :num_ids]
    excess = (following - draft.probs).clamp(min=0).sum(-1, dtype=torch.float64)  # sum(r) after 0 … K - 1 ids
    shared = torch.minimum(following, draft.probs).sum(-1) / w[:, :num_ids].clamp(min=torch.finfo(torch.float32).tiny)
    num_kept = torch.arange(1, num_ids + 1, device=ids.device)
    is_whole = num_kept == draft.lengths[:, None]
    rest = torch.cat([excess[:, 1:], torch.zeros_like(excess[:, :1])], dim=1)  # after 1 … K ids
    chance = torch.where((rest == 0) & (w[:, 1:] == 1), 1, rest / (rest + 1 - w[:, 1:]))  # p == q there, so w stays 1
    chance = torch.where(is_whole, w[:, 1:], chance)
    is_drafted = num_kept <= draft.lengths[:, None]
    is_kept = (uniforms[:, :num_ids] < chance) & is_drafted
    accepted = (is_kept * num_kept).amax(1)

    rows = torch.arange(len(accepted), device=accepted.device)
    next_probs = target_probs[rows, accepted]
    q_next = draft.probs[rows, accepted.clamp(max=num_ids - 1)]
    recovered_probs = residual(w[rows, accepted, None].float() * next_probs, q_next)
    next_probs = torch.where((accepted < draft.lengths)[:, None], recovered_probs, next_probs)
    return Verdict(accepted, draw(next_probs, uniforms[:, num_ids])), torch.where(is_drafted, shared, 0).float()


def verify_greedy(draft: Draft, target_ids: Tensor) -> Verdict:
    """verify() where the target is one-hot at target_ids [B, K+1] int64: p is 0 or 1, so q does not matter."""
    num_ids = draft.ids.shape[1]
    accepted = count_leading(draft.ids == target_ids[:, :num_ids], draft.lengths)
    return Verdict(accepted, target_ids.gather(1, accepted[:, None])[:, 0])


def residual(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """Weights of the recovered id, max(0, p - q), not normalized: [..., V], [..., V] -> [..., V].

    Falls back to p where p == q in floating point and no mass is left.
    """
    excess = (target_probs - draft_probs).clamp(min=0)
    return torch.where((excess > 0).any(-1, keepdim=True), excess, target_probs)


def overlap(draft: Draft, target_probs: Tensor) -> Tensor:
    """sum(min(p, q)) at each draft position, the chance that its id is accepted: [B, K]. Equals 1 - TV(p, q)."""
    p = target_probs[:, : draft.ids.shape[1]]
    if draft.probs is None:
        return p.gather(-1, draft.ids[..., None])[..., 0]
    return torch.minimum(p, draft.probs).sum(-1)


def overlap_greedy(draft: Draft, target_ids: Tensor) -> Tensor:
    """overlap() where the target is one-hot at target_ids [B, K+1] int64."""
    target_ids = target_ids[:, : draft.ids.shape[1]]
    if draft.probs is None:
        return (draft.ids == target_ids).float()
    return draft.probs.gather(-1, target_ids[..., None])[..., 0]


def one_hot(ids: Tensor, vocab_size: int) -> Tensor:
    """[...] int64 -> [..., V] float32, all mass on the id."""
    return torch.zeros(*ids.shape, vocab_size, device=ids.device).scatter_(-1, ids[..., None], 1.0)


def count_leading(accept: Tensor, lengths: Tensor) -> Tensor:
    """Accepted ids before the first rejection, among the first `lengths`: [B, K] bool, [B] int64 -> [B] int64."""
    is_drafted = torch.arange(accept.shape[1], device=accept.device) < lengths[:, None]
    return (accept & is_drafted).long().cumprod(1).sum(1)


def _has_kernel(target_probs: Tensor) -> bool:
    return target_probs.shape[-1] <= rejection.MAX_VOCAB_SIZE and rejection.works_on(target_probs.device)


def _verify_in_kernel(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Verdict:
    probs = None if draft.probs is None else draft.probs.contiguous()
    ids, lengths = draft.ids.contiguous(), draft.lengths.contiguous()
    return Verdict(*rejection.verify(target_probs.contiguous(), ids, probs, lengths, uniforms.contiguous()))
