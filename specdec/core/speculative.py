"""The algorithm: propose, verify, commit, for a whole batch, until every row has finished.

Row b has n[b] committed ids; the target's cache covers the first n-1. One step:

    1. the drafter proposes up to K ids for each row; the pace says K      draft      [B, K]
    2. one target forward over the last committed id and the draft         logits     [B, K+1, V]
    3. the call's processors turn them into the target's distributions     p          [B, K+1, V]
    4. rejection sampling keeps a prefix and draws one id behind it        verdict    accepted [B], next_ids [B]
    5. the kept ids are committed, up to each row's own stop
    6. nothing is rolled back: a KV entry lives in the slot of its position, and stale slots are overwritten before they are seen

Where a call brings callbacks that must be called once for each committed position, lockstep.py does 3 to 5 position by position.
Plain decoding is this loop with a drafter that proposes nothing. The host hears of a step when it asks, or while `ahead` further
ones are under way; what they do is decided on the device, so it need not be asked between them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from specdec.core.interfaces import Drafter, DraftLengthPolicy, Run, Target, run_eager
from specdec.core.lockstep import Lockstep
from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.steps import BROKEN_DRAFT, NAN_DRAFT, NAN_TARGET, Draft, StepResult, Verdict, pack_host_summary
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
    mark: Mark = no_mark,
) -> Iterator[StepResult]:
    """Generate until all rows have finished; yields what each step did, after it is committed to `sequences`.

    sequences: with columns for as many ids a step as the pace may ask for. ahead: steps under way when the host hears of one;
    those behind the last are thrown away, they find no row to work on.
    """
    target.begin(sequences.batch_size, sequences.length_limit)
    drafter.begin(sequences, sampling)
    target.prefill(sequences.ids, sequences.lengths - 1)  # as generate() begins; the first step feeds the last id again
    mark("prefill")
    in_flight: deque[StepResult] = deque()
    while not sequences.is_done:
        most = policy.next() if max_in_flight else min(policy.next(), sequences.room)
        in_flight.append(step(target, drafter, sequences, sampling, most, run, mark, lockstep))
        if len(in_flight) <= max_in_flight:
            continue
        outcome = in_flight.popleft()
        sequences.retire(outcome)
        policy.observe(outcome.steps)
        yield outcome


def step(
    target: Target,
    drafter: Drafter,
    sequences: Sequences,
    sampling: Sampling,
    num_draft_tokens: int,
    run: Run = run_eager,
    mark: Mark = no_mark,
    lockstep: Lockstep | None = None,
) -> StepResult:
    """One forward of the target for every row: up to num_draft_tokens accepted ids and one of its own."""
    mark("other")
    limit = sequences.ask(num_draft_tokens)
    target.reserve(sequences.longest)
    draft = (
        drafter.propose(sequences, limit) if num_draft_tokens else Draft.empty(sequences.batch_size, sequences.device)
    )
    if not isinstance(draft, Draft):
        raise ValueError(f"{type(drafter).__name__}.propose returned a {type(draft).__name__}; it must return a Draft")
    draft.check(sequences.batch_size, sequences.spare - 1, target.vocab_size, drafter)
    draft = draft if lockstep is None else lockstep.extend(draft)
    mark("draft")

    looked = run("target", partial(score_draft, target, sequences), draft.ids, draft.lengths, limit)
    mark("target")

    if lockstep is not None or sampling.needs_prefix or sequences.stop is not None:  # the host's
        run = run_eager
    function = partial(commit, sequences, sampling) if lockstep is None else partial(lockstep.commit, sequences)
    key = "verification", sampling.form, sequences.stop_ids is None
    accepted, next_ids, *committed = run(key, function, limit, draft.probs, *looked)
    outcome = StepResult(type(drafter).__name__, draft, Verdict(accepted, next_ids), limit, looked[-1], *committed)
    outcome.send()
    drafter.observe(outcome)
    mark("verification")
    return outcome


def score_draft(
    target: Target, sequences: Sequences, ids: Tensor, lengths: Tensor, limit: Tensor
) -> tuple[Tensor, ...]:
    """Take a draft, ids [B, K], to the target: -> its ids and lengths and where they were wrong, see Draft.within; logits."""
    draft, is_broken = Draft(ids, None, lengths).within(limit, target.vocab_size)
    sequences.stage(draft.ids)
    positions = window_positions(sequences.lengths, draft)
    return draft.ids, draft.lengths, is_broken, target.forward(sequences.ids.gather(1, positions), positions)


def window_positions(lengths: Tensor, draft: Draft) -> Tensor:
    """Positions of the verification window, n-1 … n+K-1: [B, K+1].

    A column that its row has no use for repeats n-1: the same id at the same position, so the same KV entry once more. It
    needs no slot of its own, whatever the context's end is.
    """
    columns = torch.arange(draft.ids.shape[1] + 1, device=lengths.device)
    return lengths[:, None] - 1 + torch.where(columns <= draft.lengths[:, None], columns, 0)


def commit(
    sequences: Sequences,
    sampling: Sampling,
    limit: Tensor,
    probs: Tensor | None,
    ids: Tensor,
    lengths: Tensor,
    is_broken: Tensor,
    logits: Tensor,
) -> tuple[Tensor, ...]:
    """Verify a draft and append what is kept of it: -> the verdict's two, then Outcome's from `live` to `scores`."""
    draft = Draft(ids, probs, lengths)
    used = torch.where(sequences.finished, 0, lengths + 1)
    scores = sampling.scores(logits, sequences, used=used, draft_ids=ids)
    verdict, overlap, is_nan = verify_draft(draft, scores, sampling)

    live = ~sequences.finished
    emitted, stopped = sequences.commit(draft, verdict)
    drafted = torch.where(stopped, torch.minimum(lengths, emitted), lengths)
    accepted = torch.minimum(verdict.accepted, emitted)
    faults = BROKEN_DRAFT * is_broken + NAN_TARGET * is_nan
    if probs is not None:
        faults = faults + NAN_DRAFT * probs[..., 0].isnan().any(1)
    host_summary = pack_host_summary(limit, drafted, accepted, emitted, stopped, faults, overlap)
    return verdict.accepted, verdict.next_ids, live, emitted, drafted, accepted, overlap, host_summary, scores
