"""Verification position by position, for callbacks that must be called exactly as plain decoding calls them.

A grammar's matcher, a budget that counts its calls, a criterion of the whole batch or one that reads scores: what such a callback
does with its arguments is its own business. So it is called once for each committed position, in order, with the full batch
[B, L] and the processed scores [B, V]. All rows advance together: the window is walked position by position, and the walk ends
where the first row leaves its draft. Rejection sampling at one position is complete in itself, so cutting all rows at the first
divergence leaves each row's distribution as it is; the price is that a step commits no more ids than its shortest row accepts.

Rows that have ended go on as plain decoding lets them: with padding where the call has an EOS id, fed to the target like any
other id, else with ids of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.steps import Draft, find_faults, pack_host_summary
from specdec.core.verification import overlap_greedy, verify_draft


class Lockstep:
    """The callbacks of one call, and what plain decoding's loop keeps for them.

    input_ids: [B, L] int64, the padded text so far, on the device that the caller's ids came from; the prompt at first.
    process: all processors, (input_ids [B, L], scores [B, V] float32) -> scores [B, V].
    has_ended: all criteria, (input_ids [B, L], scores or None) -> bool [B].
    emit: called with each position's ids [B] behind the criteria, as a streamer is; None where nobody reads them.
    pad_token_id: what rows that have ended go on with; None: with what they choose.
    scores, logits: for each position [B, V], processed and raw; None where they are not kept.
    """

    def __init__(
        self,
        input_ids: Tensor,
        sampling: Sampling,
        process: Callable[..., Tensor],
        has_ended: Callable[..., Tensor],
        *,
        emit: Callable[[Tensor], None] | None = None,
        pad_token_id: int | None = None,
        keeps_scores: bool = False,
        keeps_logits: bool = False,
    ) -> None:
        self.input_ids = input_ids
        self.sampling = sampling
        self.process, self.has_ended, self.emit = process, has_ended, emit
        self.pad_token_id = pad_token_id
        self.scores: tuple[Tensor, ...] | None = () if keeps_scores else None
        self.logits: tuple[Tensor, ...] | None = () if keeps_logits else None
        self.unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def extend(self, draft: Draft) -> Draft:
        """The draft, with padding as the draft of rows that go on with it."""
        if self.pad_token_id is None:
            return draft
        padded = ~self.unfinished.to(draft.ids.device)
        ids = draft.ids.masked_fill(padded[:, None], self.pad_token_id)
        return Draft(ids, draft.probs, draft.lengths.masked_fill(padded, draft.ids.shape[1]))

    def commit(
        self,
        sequences: Sequences,
        limit: Tensor,
        probs: Tensor | None,
        ids: Tensor,
        lengths: Tensor,
        is_broken: Tensor,
        logits: Tensor,
    ) -> tuple[Tensor, ...]:
        """As speculative.verify_and_commit, position by position: process, verify, append, ask the criteria."""
        offered, drafts = lengths.tolist(), ids.tolist()
        going = live = self.unfinished.tolist()
        emitted, accepted = [0] * len(live), [0] * len(live)
        overlap = torch.zeros(ids.shape, device=ids.device)
        has_nan = torch.zeros(len(live), dtype=torch.bool, device=ids.device)
        processed, chosen = logits.clone(), []
        for column in range(logits.shape[1]):
            at = slice(column, column + 1)
            processed[:, at] = self._processed(logits[:, column])[:, None]
            draft = Draft(ids[:, at], None if probs is None else probs[:, at], (lengths > column).long())
            next_ids, overlap[:, at], is_nan = self._verified(draft, processed[:, at])
            chosen.append(next_ids)
            has_nan |= is_nan
            self._append(next_ids)

            is_kept = [
                column < count and row[column] == token
                for count, row, token in zip(offered, drafts, next_ids.tolist(), strict=True)
            ]
            emitted = [count + is_going for count, is_going in zip(emitted, going, strict=True)]
            accepted = [
                count + (kept and is_going) for count, kept, is_going in zip(accepted, is_kept, going, strict=True)
            ]
            going = self.unfinished.tolist()
            if not all(is_kept) or not any(going):
                break

        is_over = not any(going)
        sequences.append(torch.stack(chosen, dim=1), is_over)
        counts = torch.tensor([emitted, accepted, live], device=ids.device)
        drafted = torch.minimum(lengths, counts[0])  # the positions that were verified
        faults = counts[2] * find_faults(is_broken, has_nan, probs)
        ends = torch.full_like(drafted, is_over)
        summary = pack_host_summary(limit, drafted, counts[1], counts[0], ends, faults, overlap)
        return counts[1], chosen[-1], counts[2].bool(), counts[0], drafted, counts[1], overlap, summary, processed

    def _processed(self, logits: Tensor) -> Tensor:
        """All processors, at the position behind the text: [B, V] -> [B, V]."""
        raw = logits.to(self.input_ids.device, copy=True)
        scores = self.process(self.input_ids, raw)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (raw,)
        return scores

    def _verified(self, draft: Draft, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Verify one position: a draft of one id a row, of none in the window's last column, against scores [B, 1, V].

        -> the ids [B] that stand there, sum(min(p, q)) [B, 1 or 0], where scores are NaN [B].
        """
        if self.sampling.do_sample:
            width = draft.ids.shape[1]
            verdict, overlap, is_nan = verify_draft(
                draft, scores.expand(-1, width + 1, -1), self.sampling
            )  # a bonus id is not used
            next_ids = (
                torch.where(verdict.accepted > 0, draft.ids[:, 0], verdict.next_ids) if width else verdict.next_ids
            )
        else:  # the largest score, whatever the draft is
            best, target_ids = scores.max(-1)
            next_ids, overlap, is_nan = target_ids[:, 0], overlap_greedy(draft, target_ids), best[:, 0].isnan()
        if self.pad_token_id is not None:
            next_ids = next_ids.masked_fill(~self.unfinished.to(next_ids.device), self.pad_token_id)
        return next_ids, overlap, is_nan

    def _append(self, ids: Tensor) -> None:
        """As plain decoding's loop does with ids [B]: append them, ask the criteria, hand them to the streamer."""
        ids = ids.to(self.input_ids.device)
        self.input_ids = torch.cat([self.input_ids, ids[:, None]], dim=1)
        self.unfinished = self.unfinished & ~self.has_ended(self.input_ids, self.scores)
        if self.emit is not None:
            self.emit(ids)
