"""Speculative decoding of a batch: propose, score, verify, commit, until every row has finished.

Row b has n[b] committed ids; the target's KV cache covers the first n-1 of them. One step:

    1. propose   the drafter proposes up to K ids a row; the policy chooses K  draft    [B, K]
    2. score     one target forward over the last committed id and the draft   logits   [B, K+1, V]
    3. verify    processors turn logits into distributions; rejection sampling keeps a
                 prefix of the draft and draws the id behind it             verdict  accepted [B], next_ids [B]
    4. commit    the kept ids are appended to each row, up to its first stop

The KV cache is never rolled back: the entry for position i lies in slot i, so entries of rejected ids are overwritten
before any query sees them. Plain decoding is this loop with a drafter that proposes nothing. Calls whose callbacks must
see one position at a time verify and commit by lockstep.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from specdec.core.commit import commit_verdict
from specdec.core.interfaces import Drafter, DraftLengthPolicy, Run, Target, run_eager
from specdec.core.lockstep import Lockstep
from specdec.core.plain import plain_steps
from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.steps import Draft, StepResult, Verdict, check_draft
from specdec.core.timing import Mark, no_mark
from specdec.core.verification import verify_draft


def speculate(
    target: Target,
    drafter: Drafter,
    sequences: Sequences,
    sampling: Sampling,
    policy: DraftLengthPolicy,
    *,
    lockstep: Lockstep | None = None,
    run: Run = run_eager,
    max_in_flight: int = 0,
    max_plain_steps: int = 1,
    mark: Mark = no_mark,
) -> Iterator[StepResult]:
    """Decode until all rows have finished; yields the result of each step once it is committed to `sequences`.

    run: runs a part of a step, eagerly or as a recorded graph. max_in_flight: steps that may be running when the host
    reads the result of an earlier one; a step that begins after all rows have finished commits nothing, unyielded.
    max_plain_steps: how many steps with K = 0 may run in one call of the target; more than 1 only in greedy calls that
    have neither processors nor a stop function.
    """
    target.begin(sequences.batch_size, sequences.length_limit)
    drafter.begin(sequences, sampling)
    target.prefill(sequences.ids, sequences.lengths - 1)  # the window that generate() starts with, so the same bits
    mark("prefill")
    in_flight: deque[list[StepResult]] = deque()
    while not sequences.is_done:
        k = policy.next()
        if k and not max_in_flight:
            k = min(k, sequences.remaining_tokens)
        if k == 0 and max_plain_steps > 1 and target.has_plain_steps:
            num_steps = policy.extend_plain(min(max_plain_steps, sequences.remaining_tokens + 1))
            in_flight.append(plain_steps(target, drafter, sequences, num_steps))
        else:
            in_flight.append([step(target, drafter, sequences, sampling, k, run, mark, lockstep, not max_in_flight)])
        if max_in_flight:
            in_flight[-1][0].send()
        if len(in_flight) > max_in_flight:
            results = in_flight.popleft()
            sequences.retire(*results)
            for result in results:
                policy.observe(result.steps, len(results))
                yield result


def step(
    target: Target,
    drafter: Drafter,
    sequences: Sequences,
    sampling: Sampling,
    num_draft_tokens: int,
    run: Run = run_eager,
    mark: Mark = no_mark,
    lockstep: Lockstep | None = None,
    trims_draft: bool = True,
) -> StepResult:
    """One target forward for every row; commits up to num_draft_tokens draft ids and one id of the target's own.

    trims_draft: on a CPU, leave out the columns that no row drafted; the target then verifies fewer.
    """
    mark("other")
    limit = sequences.begin_step(num_draft_tokens)
    target.reserve(sequences.longest)
    draft = sequences.no_draft
    if num_draft_tokens:
        draft = drafter.propose(sequences, limit)
        check_draft(draft, drafter, sequences.batch_size, sequences.max_draft_tokens, target.vocab_size)
        draft = draft.trimmed() if trims_draft else draft
    draft = draft if lockstep is None else lockstep.extend(draft)
    mark("draft")

    scored = run("target", partial(score_draft, target, sequences), draft.ids, draft.lengths, limit)
    mark("target")
    verify = partial(lockstep.commit, sequences) if lockstep else partial(verify_and_commit, sequences, sampling)
    if lockstep is not None or sampling.needs_prefix or sequences.stop is not None:  # runs Python on the host
        run = run_eager
    key = "verification", sampling.cache_key, sequences.stop_ids is None
    accepted, next_ids, host_summary, scores = run(key, verify, limit, draft.probs, *scored)
    result = StepResult(type(drafter).__name__, draft, Verdict(accepted, next_ids), scored[-1], scores, host_summary)
    drafter.observe(result)
    mark("verification")
    return result


def score_draft(
    target: Target, sequences: Sequences, ids: Tensor, lengths: Tensor, limit: Tensor
) -> tuple[Tensor, ...]:
    """Run the target over draft ids [B, K]: -> ids and lengths as `Draft.within` returns them, is_broken, logits."""
    *draft, window_ids, positions = sequences.stage_window(ids, lengths, limit, target.vocab_size)
    return *draft, target.forward(window_ids, positions).logits


def verify_and_commit(
    sequences: Sequences,
    sampling: Sampling,
    limit: Tensor,
    probs: Tensor | None,
    ids: Tensor,
    lengths: Tensor,
    is_broken: Tensor,
    logits: Tensor,
) -> tuple[Tensor, ...]:
    """Verify a draft, append what is kept: -> accepted, next_ids, and StepResult's host_summary and scores."""
    used = torch.where(sequences.finished, 0, lengths + 1) if sampling.needs_prefix else None
    scores = sampling.scores(logits, sequences, used=used, draft_ids=ids)
    is_greedy = probs is None and not sampling.do_sample
    if is_greedy and sequences.stop is None and sequences.has_kernels and scores.dtype == torch.float32:
        return *torch.ops.specdec.commit_greedy(
            scores, sequences.ids, sequences.lengths, sequences.end, sequences.finished, sequences.stop_ids, limit,
            ids, lengths, is_broken,
        ), scores  # fmt: skip
    draft = Draft(ids, probs, lengths)
    verdict, overlap, is_nan = verify_draft(draft, scores, sampling)
    host_summary = commit_verdict(sequences, draft, verdict, overlap, limit, is_broken, is_nan)
    return verdict.accepted, verdict.next_ids, host_summary, scores
