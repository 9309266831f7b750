"""Positive controls: loops that are broken on purpose, which an audit must find before its verdict counts.

Each is a context manager; within, all calls of this process run the broken loop. Enable the model before, with
compile=False: recorded steps and compiled forwards do not call what is replaced here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.core import speculative, verification
from specdec.core.commit import commit_verdict
from specdec.core.sampling import draw
from specdec.core.sequences import Sequences
from specdec.core.steps import Draft, Verdict
from specdec.runtime.kv_cache.window import Window

Verify = Callable[[Draft, Tensor, Tensor], Verdict]
_verify: Verify = verification.verify


@dataclass(frozen=True)
class Control:
    """what: the mistake, in words. call: the kind of sampled call that shows it, of sampling.CALLS.

    needs_probs: whether only a drafter that samples its drafts can show it.
    """

    what: str
    apply: Callable[[], AbstractContextManager[None]]
    call: str = "plain"
    needs_probs: bool = False


@contextmanager
def _replaced(owner: Any, **functions: Any) -> Iterator[None]:
    originals = {name: getattr(owner, name) for name in functions}
    for name, function in functions.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(owner, name, original)


def replace_verifier(verify: Verify) -> Callable[[], AbstractContextManager[None]]:
    """A context manager in which sampled drafts are verified by this function, whichever way was chosen."""

    def verify_block(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> tuple[Verdict, Tensor]:
        return verify(draft, target_probs, uniforms), verification.overlap(draft, target_probs)

    return lambda: _replaced(verification, verify=verify, verify_block=verify_block)


def _probs_of_draft(draft: Draft, vocab_size: int) -> Tensor:
    return verification.one_hot(draft.ids, vocab_size) if draft.probs is None else draft.probs


def accept_zero_probability(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Verdict:
    """Accepts where u <= p / q, with uniforms of 8 bits as half precision gives them: u = 0 accepts p = 0."""
    num_ids = draft.ids.shape[1]
    if num_ids == 0:
        return _verify(draft, target_probs, uniforms)
    q = _probs_of_draft(draft, target_probs.shape[-1]).gather(-1, draft.ids[..., None])[..., 0]
    p = target_probs[:, :num_ids].gather(-1, draft.ids[..., None])[..., 0]
    coarse = (uniforms[:, :num_ids] * 256).trunc() / 256
    accepted = verification.count_leading(coarse * q <= p, draft.lengths)
    return _with_next_ids(draft, target_probs, uniforms, accepted)


def _with_next_ids(draft: Draft, target_probs: Tensor, uniforms: Tensor, accepted: Tensor) -> Verdict:
    """The recovered or bonus id behind `accepted` draft ids, drawn as it should be."""
    rows = torch.arange(len(accepted), device=accepted.device)
    p = target_probs[rows, accepted]
    column = accepted.clamp(max=draft.ids.shape[1] - 1)
    q = _probs_of_draft(draft, p.shape[-1])[rows, column]
    is_rejected = (accepted < draft.lengths)[:, None]
    return Verdict(accepted, draw(torch.where(is_rejected, verification.residual(p, q), p), uniforms[:, -1]))


def residual_not_normalized(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Verdict:
    """Draws the recovered id from max(p - q, 0) as if it summed to 1: the missing mass falls on the last id."""
    verdict = _verify(draft, target_probs, uniforms)
    if draft.ids.shape[1] == 0:
        return verdict
    accepted = verdict.accepted
    rows = torch.arange(len(accepted), device=accepted.device)
    column = accepted.clamp(max=draft.ids.shape[1] - 1)
    p = target_probs[rows, accepted]
    excess = (p - _probs_of_draft(draft, p.shape[-1])[rows, column]).clamp(min=0)
    missing = (uniforms[:, -1] >= excess.double().sum(-1)) & (accepted < draft.lengths)
    return Verdict(accepted, torch.where(missing, p.shape[-1] - 1, verdict.next_ids))


def draft_probs_of_another_temperature(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Verdict:
    """Verifies with q of temperature 1.5 in place of the q that the draft was drawn from."""
    if draft.probs is None:
        return _verify(draft, target_probs, uniforms)
    flatter = draft.probs ** (1 / 1.5)
    return _verify(Draft(draft.ids, flatter / flatter.sum(-1, keepdim=True), draft.lengths), target_probs, uniforms)


def bonus_from_draft(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Verdict:
    """Draws the bonus id from the draft's last distribution."""
    verdict = _verify(draft, target_probs, uniforms)
    if draft.ids.shape[1] == 0:
        return verdict
    rows = torch.arange(len(draft.lengths), device=draft.lengths.device)
    last = (draft.lengths - 1).clamp(min=0)
    bonus = draw(_probs_of_draft(draft, target_probs.shape[-1])[rows, last], uniforms[:, -1])
    is_bonus = (verdict.accepted == draft.lengths) & (draft.lengths > 0)
    return Verdict(verdict.accepted, torch.where(is_bonus, bonus, verdict.next_ids))


def block_without_rejected_mass(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Verdict:
    """Block verification that keeps i ids with chance w[i], though later ids may keep them as well."""
    num_ids = draft.ids.shape[1]
    if draft.probs is None or num_ids == 0:
        return _verify(draft, target_probs, uniforms)
    ids = draft.ids[..., None]
    p, q = (probs[:, :num_ids].gather(-1, ids)[..., 0] for probs in (target_probs, draft.probs))
    weights = [torch.ones_like(p[:, 0])]
    for ratio in torch.where(q > 0, p / q, 0).unbind(1):
        weights.append((weights[-1] * ratio).clamp(max=1))
    num_kept = torch.arange(1, num_ids + 1, device=ids.device)
    is_kept = (uniforms[:, :num_ids] < torch.stack(weights[1:], 1)) & (num_kept <= draft.lengths[:, None])
    return _with_next_ids(draft, target_probs, uniforms, (is_kept * num_kept).amax(1))


def last_id_never_checked(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Verdict:
    """Accepts the last draft id of each row once those before it are accepted."""
    verdict = _verify(draft, target_probs, uniforms)
    if draft.ids.shape[1] == 0:
        return verdict
    is_missed = (verdict.accepted == draft.lengths - 1) & (draft.lengths > 0)
    accepted = torch.where(is_missed, draft.lengths, verdict.accepted)
    rows = torch.arange(len(accepted), device=accepted.device)
    bonus = draw(target_probs[rows, accepted], uniforms[:, -1])
    return Verdict(accepted, torch.where(is_missed, bonus, verdict.next_ids))


@contextmanager
def stale_slot_visible() -> Iterator[None]:
    """The entry of the last committed id is not written where the KV cache holds one of a rejected draft id."""
    move, write = Window.move, Window.write

    def move_and_remember(self: Window, positions: Tensor, last_only: bool = False) -> None:
        move(self, positions, last_only)
        self.__dict__["is_prefill"] = last_only

    def write_all_but_first(self: Window, buffer: Tensor, states: Tensor) -> None:
        if self.__dict__.get("is_prefill", True) or states.shape[2] == 1:
            write(self, buffer, states)
            return
        first, positions = self.first, self.positions
        self.first, self.positions = None, positions[:, 1:]
        write(self, buffer, states[:, :, 1:])
        slots = positions[:, :1]
        is_empty = (buffer[self.rows, :, slots] == 0).flatten(1).all(1)[:, None, None, None]
        stale = buffer[self.rows, :, slots].transpose(1, 2)
        buffer[self.rows, :, slots] = torch.where(is_empty, states[:, :, :1], stale).transpose(1, 2)
        self.first, self.positions = first, positions

    with _replaced(Window, move=move_and_remember, write=write_all_but_first):
        yield


def stops_once_a_step(
    sequences: Sequences, draft: Draft, verdict: Verdict, overlap: Tensor, limit: Tensor, *flags: Tensor
) -> Tensor:
    """Commits a step and looks for a stop id in its last id alone."""
    stop_ids, sequences.stop_ids = sequences.stop_ids, None
    try:
        summary = commit_verdict(sequences, draft, verdict, overlap, limit, *flags)
    finally:
        sequences.stop_ids = stop_ids
    if stop_ids is not None:
        is_over = torch.isin(verdict.next_ids, stop_ids) & (summary[:, 3] > 0)
        sequences.finished |= is_over
        summary[:, 4] = torch.maximum(summary[:, 4], is_over.float())
    return summary


CONTROLS = {
    "zero_probability": Control(
        "accepts where u <= p/q, and so ids with p = 0", replace_verifier(accept_zero_probability), call="grammar"
    ),
    "residual": Control("draws from a residual that is not normalized", replace_verifier(residual_not_normalized)),
    "draft_temperature": Control(
        "verifies with draft probabilities of another temperature",
        replace_verifier(draft_probs_of_another_temperature),
        needs_probs=True,
    ),
    "bonus": Control("draws the bonus id from the draft", replace_verifier(bonus_from_draft)),
    "block_mass": Control(
        "verifies by block and keeps too many draft ids",
        replace_verifier(block_without_rejected_mass),
        needs_probs=True,
    ),
    "last_id": Control("never checks the last draft id", replace_verifier(last_id_never_checked)),
    "stale_slot": Control("leaves the KV entry of a rejected draft id visible", stale_slot_visible),
    "stops": Control(
        "looks for a stop id once a step",
        lambda: _replaced(speculative, commit_verdict=stops_once_a_step),
        call="stops",
    ),
}  # fmt: skip
