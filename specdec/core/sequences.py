"""The committed ids of a batch: where each row stands, where it must end, what stops it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.core.steps import Draft, StepResult, Verdict

COLUMNS = 1024  # of ids that are kept from call to call, or a multiple


class Sequences:
    """B rows of ids, compact: column == position, no padding inside. Beyond a row's length its columns are stale.

    ids: [B, L] int64. lengths (n): [B] int64, committed ids. end: [B] int64, the row's own length limit. finished: [B] bool.
    Those are the device's. The host goes by bounds (asked, room, shortest, longest), so that a step can begin before it has
    heard of the one before: `ask` begins a step, `learn` tells the host what became of the oldest one it has not heard of.
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
        """prompt: [B, P] int64, left-padded; prompt_lengths: [B] int64, at least 1 each; max_length: of the padded text, > P.

        context: no id is drafted at or behind this position. num_draft_tokens: the most that a step may stage.
        stop_ids: [S] int64, ids that end a row. stop: decides on a left-padded text [1, L] after each committed id.
        in_lockstep: all rows advance by the same number of ids and end with the batch; see specdec/core/lockstep.py.
        """
        width = prompt.shape[1]
        self.prompt, self.max_length, self.context = prompt, max_length, context
        self.stop_ids, self.stop, self.in_lockstep = stop_ids, stop, in_lockstep
        self.padding = width - prompt_lengths
        self.lengths = prompt_lengths.clone()
        self.end = max_length - self.padding
        self.finished = self.lengths >= self.end
        self.max_draft_tokens = num_draft_tokens
        columns = torch.arange(width, device=prompt.device) + self.padding[:, None]
        self.ids = prompt.gather(1, columns.clamp(max=width - 1))

        self.num_requested = 0  # ids that the step in progress may draft for a row
        self._paddings: list[int] = self.padding.tolist()
        self._known: list[int] = prompt_lengths.tolist()  # lengths, as far as the host has heard
        self._live = [width < max_length] * len(self._known)
        self._in_flight: deque[int] = deque()  # ids that each step it has not heard of may have committed
        self._hold: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
        self._reserve()

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @property
    def batch_size(self) -> int:
        return self.ids.shape[0]

    @property
    def padded_lengths(self) -> Tensor:
        """[B] int64: lengths, with the prompt's left padding counted as plain decoding counts it."""
        return self.lengths + self.padding

    def padded(self, width: int) -> Tensor:
        """[B, width] int64: left-padded prompt, then ids; columns behind a row's staged ids are stale."""
        columns = torch.arange(width, device=self.device) - self.padding[:, None]
        ids = self.ids.gather(1, columns.clamp(min=0))
        prompt_width = min(width, self.prompt.shape[1])
        ids[:, :prompt_width] = torch.where(
            columns[:, :prompt_width] < 0, self.prompt[:, :prompt_width], ids[:, :prompt_width]
        )
        return ids

    @property
    def is_done(self) -> bool:
        """Whether all rows have finished, as far as the host has heard."""
        return not any(self._live)

    @property
    def remaining_tokens(self) -> int:
        """No row may draft more ids than this."""
        rows = [length for length, live in zip(self._remaining(), self._live, strict=True) if live]
        return max(rows, default=0)

    @property
    def shortest(self) -> int:
        """No row that goes on has fewer committed ids."""
        return min((length for length, live in zip(self._known, self._live, strict=True) if live), default=0)

    @property
    def longest(self) -> int:
        """No row has more committed ids, the step in progress included."""
        return min(max(self._known) + sum(self._in_flight), self.length_limit)

    @property
    def length_limit(self) -> int:
        """No row will ever have more committed ids."""
        return self.max_length - min(self._paddings)

    def pin_buffers(self, static_buffer: Callable[[str, Tensor], Tensor]) -> None:
        """Before the first step: keep what steps read and write in the tensors that hold(name, content) gives."""
        self._hold = static_buffer
        self.ids = F.pad(self.ids, (0, -self.ids.shape[1] % COLUMNS))
        self.ids, self.lengths = static_buffer("ids", self.ids), static_buffer("lengths", self.lengths)
        self.end, self.finished = static_buffer("end", self.end), static_buffer("finished", self.finished)
        if self.stop_ids is not None:
            self.stop_ids = static_buffer("stop_ids", self.stop_ids)

    def begin_step(self, num_draft_tokens: int) -> Tensor:
        """A step begins, which may draft so many ids for a row: -> its limit [B]."""
        self._reserve()
        self.num_requested = num_draft_tokens
        self._in_flight.append(num_draft_tokens + 1)
        return self.limit(num_draft_tokens)

    def retire(self, outcome: StepResult) -> None:
        """What the oldest step that the host had not heard of did to each row."""
        self._in_flight.popleft()
        counts = [0 if step is None else step.emitted for step in outcome.steps]
        if self.in_lockstep:
            counts = [max(counts)] * len(counts)
        for row, (count, ends) in enumerate(zip(counts, outcome.ends, strict=True)):
            self._known[row] += count
            self._live[row] &= not ends

    def limit(self, num_draft_tokens: int) -> Tensor:
        """How many ids may be drafted for each row: [B] int64, 0 where finished. One slot before `end` is the target's own."""
        room = self.end - self.lengths - 1
        if self.context is not None:
            room = torch.minimum(room, self.context - self.lengths)
        return room.clamp(0, num_draft_tokens).masked_fill(self.finished, 0)

    def _remaining(self) -> list[int]:
        """Of each row, as the host knows its length."""
        context = self.max_length if self.context is None else self.context
        rows = zip(self._known, self._paddings, strict=True)
        return [max(min(self.max_length - padding - length - 1, context - length), 0) for length, padding in rows]

    def stops_at(self, ids: Tensor) -> Tensor:
        """Whether an id ends its row: [...] int64 -> [...] bool. Not by isin, which may sort, and wait for the device."""
        return (
            torch.zeros_like(ids, dtype=torch.bool)
            if self.stop_ids is None
            else (ids[..., None] == self.stop_ids).any(-1)
        )

    def stage(self, ids: Tensor, skip: int = 0) -> None:
        """Write ids [B, W] behind the committed ones and `skip` staged ones, where they are stale until committed."""
        columns = self.lengths[:, None] + skip + torch.arange(ids.shape[1], device=self.device)
        self.ids.scatter_(1, columns, ids)

    def append(self, ids: Tensor, is_over: bool) -> None:
        """Append ids [B, n] int64 to every row, of a batch in lockstep; is_over: the whole batch ends with them."""
        self.stage(ids)
        self.lengths += ids.shape[1]
        self.finished |= is_over

    def commit(self, draft: Draft, verdict: Verdict) -> tuple[Tensor, Tensor]:
        """Append each row's accepted ids and its next id, cut at its first stop: -> emitted [B] int64, stopped [B] bool.

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

    def _reserve(self) -> None:
        """Make room for one more step; by doubling, since max_length may be far beyond what a text comes to."""
        padded = max(length + padding for length, padding in zip(self._known, self._paddings, strict=True))
        needed = min(padded + sum(self._in_flight), self.max_length) + self.max_draft_tokens + 1
        width = self.ids.shape[1]
        if needed > width:
            self.ids = self._hold("ids", F.pad(self.ids, (0, max(needed, 2 * width) - width)))

    def _apply_stop(self, stop: Callable[[Tensor], bool], emitted: Tensor, stopped: Tensor) -> None:
        """Judge the row alone after each of its new ids, in order, as plain decoding would; cut where it says so."""
        starts = self.padded_lengths.tolist()
        counts = emitted.tolist()
        text = self.padded(max(start + count for start, count in zip(starts, counts, strict=True)))
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            for taken in range(1, count + 1):
                if stop(text[row : row + 1, : start + taken]):
                    emitted[row] = taken
                    stopped[row] = True
                    break
