"""The algorithm: propose, verify, commit, for a whole batch, until every row has finished.

Row b has n[b] committed ids; the target's cache covers the first n-1. One step:

    1. the drafter proposes up to K ids for each row; the pace says K      draft      [B, K]
    2. one target forward over the last committed id and the draft         logits     [B, K+1, V]
    3. the call's processors turn them into the target's distributions     p          [B, K+1, V]
    4. rejection sampling keeps a prefix and draws one id behind it        verdict    accepted [B], next_ids [B]
    5. the kept ids are committed, up to each row's own stop
    6. nothing is rolled back: a KV entry lives in the slot of its position, and stale slots are overwritten before they are seen

Plain decoding is this loop with a drafter that proposes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from specdec import verification
from specdec.clock import no_lap
from specdec.interfaces import Draft, Drafter, Outcome, Verdict
from specdec.pace import Pace
from specdec.sampling import Sampling, check_finite, uniforms
from specdec.sequences import Sequences


class Target(Protocol):
    """The model whose distribution counts, with its own KV cache."""

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits."""

    def begin(self, batch_size: int, max_slots: int) -> None:
        """A call starts: an empty cache for so many rows, whose texts come to at most max_slots positions."""

    def prefill(self, ids: Tensor, last: Tensor) -> Tensor | None:
        """Fill the cache for positions 0 … last [B] of ids [B, L]."""

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Run ids [B, W] at positions [B, W] against the cache: -> logits [B, W, V] float32."""


Lap = Callable[[str], None]  # told the name of each part of a step when it ends: where time goes


def speculate(
    target: Target, drafter: Drafter, sequences: Sequences, sampling: Sampling, pace: Pace, lap: Lap = no_lap
) -> Iterator[Outcome]:
    """Generate until all rows have finished; yields what each step did, after it is committed to `sequences`.

    sequences: with columns for as many ids a step as the pace may ask for.
    """
    target.begin(sequences.batch_size, int(sequences.end.max()))
    drafter.begin(sequences, sampling)
    target.prefill(sequences.ids, sequences.lengths - 1)  # stock decoding's first window; the first step feeds its end again
    lap("prefill")
    while not sequences.finished.all():
        outcome = step(target, drafter, sequences, sampling, pace.next(), lap)
        pace.observe(outcome.steps)
        yield outcome


def step(
    target: Target, drafter: Drafter, sequences: Sequences, sampling: Sampling, num_draft_tokens: int, lap: Lap = no_lap
) -> Outcome:
    """One forward of the target for every row: up to num_draft_tokens accepted ids and one of its own."""
    lap("other")
    limit = sequences.limit(num_draft_tokens)
    draft = drafter.propose(sequences, limit)
    if not isinstance(draft, Draft):
        raise ValueError(f"{type(drafter).__name__}.propose returned a {type(draft).__name__}; it must return a Draft")
    draft.check(limit, sequences.spare - 1, target.vocab_size, drafter)
    lap("draft")

    sequences.stage(draft.ids)
    positions = window_positions(sequences.lengths, draft)
    logits = target.forward(sequences.ids.gather(1, positions), positions)
    lap("target")
    used = torch.where(sequences.finished, 0, draft.lengths + 1)
    scores = sampling.scores(logits, sequences, used=used, draft_ids=draft.ids)
    verdict, overlap = judge(draft, scores, sampling)
    lap("verification")

    live = ~sequences.finished
    emitted, stopped = sequences.commit(draft, verdict)
    outcome = Outcome(
        draft=draft,
        verdict=verdict,
        live=live,
        asked=limit,
        emitted=emitted,
        drafted=torch.where(stopped, torch.minimum(draft.lengths, emitted), draft.lengths),
        accepted=torch.minimum(verdict.accepted, emitted),
        overlap=overlap,
        logits=logits,
        scores=scores,
    )
    drafter.observe(outcome)
    return outcome


def window_positions(lengths: Tensor, draft: Draft) -> Tensor:
    """Positions of the verification window, n-1 … n+K-1: [B, K+1].

    A column that its row has no use for repeats n-1: the same id at the same position, so the same KV entry once more. It
    needs no slot of its own, whatever the context's end is.
    """
    columns = torch.arange(draft.ids.shape[1] + 1, device=lengths.device)
    return lengths[:, None] - 1 + torch.where(columns <= draft.lengths[:, None], columns, 0)


def judge(draft: Draft, scores: Tensor, sampling: Sampling) -> tuple[Verdict, Tensor]:
    """Verify a draft against the target's processed scores [B, K+1, V]: -> the verdict, sum(min(p, q)) [B, K]."""
    if sampling.do_sample:
        probs = sampling.probs(scores)
        check_finite(probs[..., 0], "target")
        verdict = verification.verify(draft, probs, uniforms(*scores.shape[:2], device=scores.device))
        return verdict, verification.overlap(draft, probs)
    best, target_ids = scores.max(-1)  # one-hot distributions, held as ids
    check_finite(best, "target")
    return verification.verify_greedy(draft, target_ids), verification.overlap_greedy(draft, target_ids)
