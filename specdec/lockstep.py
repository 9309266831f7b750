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

from specdec.interfaces import BROKEN_DRAFT, NAN_DRAFT, NAN_TARGET, Draft, host_summary
from specdec.sampling import Sampling
from specdec.sequences import Sequences
from specdec.verification import judge


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
        """As speculative.commit, position by position: process, verify, append, ask the criteria."""
        live = self.unfinished.to(ids.device)
        emitted, accepted = torch.zeros_like(lengths), torch.zeros_like(lengths)
        overlap = torch.zeros(ids.shape, device=ids.device)
        has_nan = torch.zeros_like(live)
        processed, chosen = logits.clone(), []
        is_over = False
        for column in range(logits.shape[1]):
            raw = logits[:, column].to(self.input_ids.device, copy=True)
            scores = self.process(self.input_ids, raw)
            if self.scores is not None:
                self.scores += (scores,)
            if self.logits is not None:
                self.logits += (raw,)
            processed[:, column] = scores

            going = self.unfinished.to(ids.device)
            draft = Draft(
                ids[:, column : column + 1],
                None if probs is None else probs[:, column : column + 1],
                (lengths > column).long(),
            )
            repeated = processed[:, column : column + 1].expand(-1, draft.ids.shape[1] + 1, -1)
            verdict, shared, is_nan = judge(draft, repeated, self.sampling)
            has_nan |= is_nan & going
            next_ids = verdict.next_ids
            if draft.ids.shape[1]:
                next_ids = torch.where(verdict.accepted > 0, draft.ids[:, 0], next_ids)
                overlap[:, column] = shared[:, 0]
            if self.pad_token_id is not None:
                next_ids = next_ids.masked_fill(~going, self.pad_token_id)
            is_kept = torch.zeros_like(going)
            if draft.ids.shape[1]:
                is_kept = (lengths > column) & (next_ids == draft.ids[:, 0])
            chosen.append(next_ids)
            emitted += going
            accepted += going & is_kept

            tokens = next_ids.to(self.input_ids.device)
            self.input_ids = torch.cat([self.input_ids, tokens[:, None]], dim=1)
            self.unfinished = self.unfinished & ~self.has_ended(self.input_ids, self.scores)
            if self.emit is not None:
                self.emit(tokens)
            is_over = not self.unfinished.any()
            if is_over or not is_kept.all():
                break

        sequences.append(torch.stack(chosen, dim=1), is_over)
        drafted = torch.minimum(lengths, emitted).masked_fill(~live, 0)  # positions that were verified
        faults = live * (BROKEN_DRAFT * is_broken + NAN_TARGET * has_nan)
        if probs is not None:
            faults = faults + live * NAN_DRAFT * probs[..., 0].isnan().any(1)
        ends = torch.full_like(live, is_over)
        told = host_summary(limit, drafted, accepted, emitted, ends, faults, overlap)
        return accepted, chosen[-1], live, emitted, drafted, accepted, overlap, told, processed
