"""The committed ids of a batch: the length of each row, where it must end, what stops it."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable

import torch
import torch.nn.functional as F
from specdec_kernels import cpu
from torch import Tensor

from specdec.core.steps import Draft, StepResult, Verdict

BUFFER_COLUMNS = 1024  # pinned ids have a multiple of so many columns, so that calls of similar length share them


class Sequences:
    """B rows of ids, compact: column == position, no padding inside. Columns at and beyond a row's length are stale.

    On the device: ids [B, L] int64; lengths (n) [B] int64, committed ids; end [B] int64, the length at which the row
    ends; finished [B] bool. no_draft: the draft of a step that proposes nothing.
    has_kernels: whether specdec_kernels.cpu works on them.

    The host only holds bounds (num_requested, remaining_tokens, shortest, longest), so a step can begin before the
    results of earlier ones are read: `begin_step` starts a step, `retire` applies the result of the oldest in flight.
    """

    def __init__(
        self,
        prompt: Tensor,
        prompt_lengths: Tensor,
        *,
        max_length: int,
        context: int | None = None,
        num_draft_tokens: int = 0,
        stop_ids: Tensor | None = None,
        stop: Callable[[Tensor], bool] | None = None,
        in_lockstep: bool = False,
    ) -> None:
        """Admit a prompt to every row.

        prompt: [B, P] int64, left-padded. prompt_lengths: [B] int64, 1 or more each. max_length: of the padded text.
        context: no id is drafted at or beyond this position. num_draft_tokens: the most draft ids of a step.
        stop_ids: [S] int64, ids that end a row. stop: called with a left-padded text [1, L] after each committed id.
        in_lockstep: all rows advance by the same number of ids and end together; see lockstep.py.
        """
        batch_size, self.prompt_width = prompt.shape
        self.max_length, self.context, self.max_draft_tokens = max_length, context, num_draft_tokens
        self.stop_ids, self.stop, self.in_lockstep = stop_ids, stop, in_lockstep
        self.prompt, self.ids = torch.empty_like(prompt), torch.zeros_like(prompt)
        self.padding, self.lengths, self.end = (torch.zeros_like(prompt_lengths) for _ in range(3))
        self.finished = torch.zeros_like(prompt_lengths, dtype=torch.bool)
        self.no_draft = Draft.empty(batch_size, prompt.device)
        self.has_kernels = cpu.works_on(prompt.device)

        self.num_requested = 0  # draft ids that the step in progress may request for a row
        self._paddings, self._lengths = [0] * batch_size, [0] * batch_size  # as the host knows them
        self._is_live = [False] * batch_size
        self._last = [0] * batch_size  # the length from which on nothing is drafted
        self._in_flight: deque[int] = deque()  # ids that each unread step may have committed
        self._static_buffer: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
        self._place(slice(0, batch_size), prompt, prompt_lengths)
        self._reserve_columns()

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @property
    def batch_size(self) -> int:
        return self.ids.shape[0]

    @property
    def padded_lengths(self) -> Tensor:
        """[B] int64: lengths plus the prompt's left padding, as plain decoding counts them."""
        return self.lengths + self.padding

    @property
    def is_done(self) -> bool:
        """Whether all rows have finished, by the results read so far."""
        return not any(self._is_live)

    @property
    def remaining_tokens(self) -> int:
        """Upper bound of the draft ids that any row may still take."""
        rows = zip(self._last, self._lengths, self._is_live, strict=True)
        return max([0, *(last - length for last, length, live in rows if live)])

    @property
    def shortest(self) -> int:
        """Lower bound of the committed ids of a live row."""
        return min((length for length, live in zip(self._lengths, self._is_live, strict=True) if live), default=0)

    @property
    def longest(self) -> int:
        """Upper bound of the committed ids of any row, the step in progress included."""
        return min(max(self._lengths) + sum(self._in_flight), self.length_limit)

    @property
    def length_limit(self) -> int:
        """Upper bound of the committed ids of any row at the end of the call."""
        return self.max_length - min(self._paddings)

    def padded(self, width: int) -> Tensor:
        """[B, width] int64: the left-padded prompt, then the ids; columns beyond a row's staged ids are stale."""
        if not any(self._paddings):
            return self.ids[:, :width].clone()
        columns = torch.arange(width, device=self.device) - self.padding[:, None]
        ids = self.ids.gather(1, columns.clamp(min=0))
        prompt_width = min(width, self.prompt_width)
        is_padding = columns[:, :prompt_width] < 0
        ids[:, :prompt_width] = torch.where(is_padding, self.prompt[:, :prompt_width], ids[:, :prompt_width])
        return ids

    def answers(self) -> list[list[int]]:
        """The committed ids of each row behind its prompt."""
        starts, ends = (self.prompt_width - self.padding).tolist(), self.lengths.tolist()
        first = min(starts)
        ids = self.ids[:, first : max(ends)].tolist()
        return [row[start - first : end - first] for row, start, end in zip(ids, starts, ends, strict=True)]

    def pin_buffers(self, static_buffer: Callable[[str, Tensor], Tensor]) -> None:
        """Before the first step: move what steps read and write into the buffers of static_buffer(name, content)."""
        self._static_buffer = static_buffer
        self.ids = F.pad(self.ids, (0, -self.ids.shape[1] % BUFFER_COLUMNS))
        self.ids, self.lengths = static_buffer("ids", self.ids), static_buffer("lengths", self.lengths)
        self.end, self.finished = static_buffer("end", self.end), static_buffer("finished", self.finished)
        if self.stop_ids is not None:
            self.stop_ids = static_buffer("stop_ids", self.stop_ids)

    def admit(self, row: int, prompt: Tensor) -> None:
        """Start a new text in a released or finished row: prompt [P'] int64, of at most the batch's prompt width.

        The row may take as many new ids as every other row; the target and the drafter must prefill it before the next
        step. Raises ValueError for a prompt that is empty or too wide, or a row that is live; RuntimeError with steps
        in flight.
        """
        self._check_idle("admit")
        if not 1 <= len(prompt) <= self.prompt_width:
            raise ValueError(
                f"a prompt of {len(prompt)} ids does not fit rows whose prompts have 1 to {self.prompt_width}"
            )
        if self._is_live[row]:
            raise ValueError(f"row {row} is live; release it before another prompt is admitted")
        padded = F.pad(prompt[None], (self.prompt_width - len(prompt), 0))
        self._place(slice(row, row + 1), padded, self.lengths.new_tensor([len(prompt)]))
        self._reserve_columns()

    def release(self, row: int) -> Tensor:
        """End a row, whether it has finished or not: -> its committed ids [n] int64, prompt included.

        Raises RuntimeError with steps in flight.
        """
        self._check_idle("release")
        self.finished[row] = True
        self._is_live[row] = False
        return self.ids[row, : self._lengths[row]].clone()

    def begin_step(self, num_draft_tokens: int, num_steps: int = 1) -> Tensor:
        """Start a step of at most num_draft_tokens draft ids a row: -> the limit of each row, see `limit`.

        num_steps: so many steps start, which are retired together.
        """
        self.num_requested = num_draft_tokens
        self._in_flight.append(num_steps * (num_draft_tokens + 1))
        self._reserve_columns()
        return self.limit(num_draft_tokens) if num_draft_tokens else self.no_draft.lengths

    def retire(self, *results: StepResult) -> None:
        """Apply the results of the oldest steps in flight, of those that began together, to the host's bounds."""
        self._in_flight.popleft()
        for result in results:
            steps, row_ends = result.read()
            counts = [0 if step is None else step.emitted for step in steps]
            if self.in_lockstep:
                counts = [max(counts)] * len(counts)
            self._lengths = list(map(operator.add, self._lengths, counts))
            self._is_live = [live and not ends for live, ends in zip(self._is_live, row_ends, strict=True)]

    def limit(self, num_draft_tokens: int) -> Tensor:
        """The most ids to draft for each row: [B] int64, 0 where finished. The id before `end` is the target's own."""
        limits: Tensor
        if self.has_kernels:
            limits = torch.ops.specdec.draft_limits(
                self.lengths, self.end, self.finished, self.context, num_draft_tokens
            )
            return limits
        remaining = self.end - self.lengths - 1
        if self.context is not None:
            remaining = torch.minimum(remaining, self.context - self.lengths)
        return remaining.clamp(0, num_draft_tokens).masked_fill(self.finished, 0)

    def stops_at(self, ids: Tensor) -> Tensor:
        """Whether an id ends its row: [...] int64 -> [...] bool. torch.isin may sort, which waits for the device."""
        if self.stop_ids is None:
            return torch.zeros_like(ids, dtype=torch.bool)
        return (ids[..., None] == self.stop_ids).any(-1)

    def stage(self, ids: Tensor, skip: int = 0) -> None:
        """Write ids [B, W] after the committed ids and `skip` staged ones; they are stale until committed."""
        columns = self.lengths[:, None] + skip + torch.arange(ids.shape[1], device=self.device)
        self.ids.scatter_(1, columns, ids)

    def stage_window(
        self, draft_ids: Tensor, draft_lengths: Tensor, limit: Tensor, vocab_size: int
    ) -> tuple[Tensor, ...]:
        """Stage a draft as `Draft.within` returns it: -> its ids, its lengths, is_broken, and the window to score.

        The window is ids and positions [B, K+1] int64, positions n-1 … n+K-1. A column beyond a row's draft repeats
        position n-1: the same id, so the same KV entry in the same slot, within any context.
        """
        if self.has_kernels:
            staged: tuple[Tensor, ...] = torch.ops.specdec.stage_window(
                self.ids, self.lengths, draft_ids, draft_lengths, limit, vocab_size
            )
            return staged
        draft, is_broken = Draft(draft_ids, None, draft_lengths).within(limit, vocab_size)
        self.stage(draft.ids)
        columns = torch.arange(draft.ids.shape[1] + 1, device=self.device)
        positions = self.lengths[:, None] - 1 + torch.where(columns <= draft.lengths[:, None], columns, 0)
        return draft.ids, draft.lengths, is_broken, self.ids.gather(1, positions), positions

    def append(self, ids: Tensor, is_over: bool) -> None:
        """Commit ids [B, n] int64 to every row of a batch in lockstep; is_over: the whole batch ends with them."""
        self.stage(ids)
        self.lengths += ids.shape[1]
        self.finished |= is_over

    def commit(self, draft: Draft, verdict: Verdict) -> tuple[Tensor, Tensor]:
        """Append each row's accepted ids and next id, cut at its first stop: -> emitted [B] int64, stopped [B] bool.

        A row that had finished emits nothing. `stopped` rows have just finished.
        """
        num_ids = draft.ids.shape[1]
        columns = torch.arange(num_ids + 1, device=self.device)
        tokens = torch.cat([draft.ids, verdict.next_ids[:, None]], dim=1)
        tokens.scatter_(1, verdict.accepted[:, None], verdict.next_ids[:, None])
        emitted = (verdict.accepted + 1).masked_fill(self.finished, 0)
        stopped = (self.lengths + emitted >= self.end) & ~self.finished
        self.stage(tokens)

        if self.stop_ids is not None:
            is_stop = self.stops_at(tokens) & (columns < emitted[:, None])
            cut = torch.where(is_stop, columns + 1, num_ids + 2).amin(1)
            stopped |= cut <= emitted
            emitted = torch.minimum(emitted, cut)
        if self.stop is not None:
            self._apply_stop(self.stop, emitted, stopped)

        self.lengths += emitted
        self.finished |= stopped
        return emitted, stopped

    def _place(self, rows: slice, prompt: Tensor, prompt_lengths: Tensor) -> None:
        """Write left-padded prompts [b, P] into rows and set all that is kept of these rows."""
        padding = self.prompt_width - prompt_lengths
        paddings = padding.tolist()
        ids = prompt
        if any(paddings):
            columns = torch.arange(self.prompt_width, device=prompt.device) + padding[:, None]
            ids = prompt.gather(1, columns.clamp(max=self.prompt_width - 1))
        self.ids[rows, : self.prompt_width] = ids
        self.prompt[rows], self.padding[rows], self.lengths[rows] = prompt, padding, prompt_lengths
        self.end[rows] = self.max_length - padding
        self.finished[rows] = self.prompt_width >= self.max_length
        self._paddings[rows], self._lengths[rows] = paddings, prompt_lengths.tolist()
        context = self.max_length if self.context is None else self.context
        self._last[rows] = [min(self.max_length - padding - 1, context) for padding in paddings]
        self._is_live[rows] = [self.prompt_width < self.max_length] * len(prompt)

    def _reserve_columns(self) -> None:
        """Widen `ids` for the steps in flight; by doubling, since most texts end far before max_length."""
        padded = max(map(operator.add, self._lengths, self._paddings))
        needed = min(padded + sum(self._in_flight), self.max_length) + self.max_draft_tokens + 1
        width = self.ids.shape[1]
        if needed > width:
            self.ids = self._static_buffer("ids", F.pad(self.ids, (0, max(needed, 2 * width) - width)))

    def _apply_stop(self, stop: Callable[[Tensor], bool], emitted: Tensor, stopped: Tensor) -> None:
        """Call `stop` after each new id of each row, in order, as plain decoding does; cut where it is true."""
        starts = self.padded_lengths.tolist()
        counts = emitted.tolist()
        text = self.padded(max(start + count for start, count in zip(starts, counts, strict=True)))
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            for num_kept in range(1, count + 1):
                if stop(text[row : row + 1, : start + num_kept]):
                    emitted[row] = num_kept
                    stopped[row] = True
                    break

    def _check_idle(self, what: str) -> None:
        if self._in_flight:
            raise RuntimeError(f"{what}() with {len(self._in_flight)} steps in flight; retire their results first")
