"""Verification position by position, for callbacks that must be called exactly as plain decoding calls them.

A callback of unknown kind (a grammar's matcher, a budget that counts calls, a criterion of the whole batch or of the
scores) is called once for each committed position, in order, with the full batch [B, L] and the processed scores [B,
V]. All rows
advance together: positions of the window are verified one by one until the first row rejects its draft id. Rejection
sampling at one position is complete in itself, so cutting all rows at the first rejection leaves each row's
distribution as it is; a step commits no more ids than its shortest acceptance. Drafts go through the known processors
alone.

Rows that have ended go on as in plain decoding: with padding where the call has an EOS id, else with ids of their own.
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
    """The callbacks of one call and the state that plain decoding's loop keeps for them.

    input_ids: [B, L] int64, the padded text so far, on the device of the caller's ids.
    process: all processors, (input_ids [B, L], scores [B, V] float32) -> scores [B, V].
    has_ended: all criteria, (input_ids [B, L], scores or None) -> bool [B].
    emit: called with the ids [B] of each position after the criteria, as a streamer is; None without a streamer.
    pad_token_id: the id that rows which have ended go on with; None: they go on with their own.
    scores, logits: one [B, V] for each position, processed and raw; None where the call does not return them.
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
        """Set the draft of rows that have ended to padding."""
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
        """speculative.verify_and_commit, position by position: process, verify, append, call the criteria."""
        num_drafted, draft_ids = lengths.tolist(), ids.tolist()
        unfinished = live = self.unfinished.tolist()
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

            is_accepted = [
                column < count and row[column] == token
                for count, row, token in zip(num_drafted, draft_ids, next_ids.tolist(), strict=True)
            ]
            emitted = [count + is_unfinished for count, is_unfinished in zip(emitted, unfinished, strict=True)]
            accepted = [
                count + (is_same and is_unfinished)
                for count, is_same, is_unfinished in zip(accepted, is_accepted, unfinished, strict=True)
            ]
            unfinished = self.unfinished.tolist()
            if not all(is_accepted) or not any(unfinished):
                break

        is_over = not any(unfinished)
        sequences.append(torch.stack(chosen, dim=1), is_over)
        counts = torch.tensor([emitted, accepted, live], device=ids.device)
        drafted = torch.minimum(lengths, counts[0])  # the positions that were verified
        faults = counts[2] * find_faults(is_broken, has_nan, probs)
        ends = torch.full_like(drafted, is_over)
        summary = pack_host_summary(limit, drafted, counts[1], counts[0], ends, faults, overlap)
        return counts[1], chosen[-1], summary, processed

    def _processed(self, logits: Tensor) -> Tensor:
        """Apply all processors at the position after the text: [B, V] -> [B, V]."""
        raw = logits.to(self.input_ids.device, copy=True)
        scores = self.process(self.input_ids, raw)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (raw,)
        return scores

    def _verified(self, draft: Draft, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Verify one position against scores [B, 1, V]; the draft has one id a row, none in the window's last column.

        -> the ids [B] of this position, sum(min(p, q)) [B, 1 or 0], the rows [B] whose scores are NaN.
        """
        if self.sampling.do_sample:
            width = draft.ids.shape[1]
            both = scores.expand(-1, width + 1, -1)  # the bonus id is not used
            verdict, overlap, is_nan = verify_draft(draft, both, self.sampling)
            next_ids = (
                torch.where(verdict.accepted > 0, draft.ids[:, 0], verdict.next_ids) if width else verdict.next_ids
            )
        else:  # the target's argmax, whatever the draft is
            best, target_ids = scores.max(-1)
            next_ids, overlap, is_nan = target_ids[:, 0], overlap_greedy(draft, target_ids), best[:, 0].isnan()
        if self.pad_token_id is not None:
            next_ids = next_ids.masked_fill(~self.unfinished.to(next_ids.device), self.pad_token_id)
        return next_ids, overlap, is_nan

    def _append(self, ids: Tensor) -> None:
        """Append ids [B], call the criteria, then the streamer, in the order of plain decoding."""
        ids = ids.to(self.input_ids.device)
        self.input_ids = torch.cat([self.input_ids, ids[:, None]], dim=1)
        self.unfinished = self.unfinished & ~self.has_ended(self.input_ids, self.scores)
        if self.emit is not None:
            self.emit(ids)
