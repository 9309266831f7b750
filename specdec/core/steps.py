"""The data of one step. Shapes: B rows, K draft ids, W = K + 1 window columns, V vocabulary size."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Draft:
    """The ids a drafter proposes in one step.

    ids: [B, K] int64, proposed for positions n … n+K-1 of each row.
    probs: [B, K, V] float32, exactly the distributions that `ids` were drawn from, over the target's vocabulary; None
        where each is one-hot (greedy drafts, n-grams).
    lengths: [B] int64, how many of the K ids count for each row, at most its limit.
    """

    ids: Tensor
    probs: Tensor | None
    lengths: Tensor

    @classmethod
    def empty(cls, batch_size: int, device: torch.device) -> Draft:
        """No proposal for any row: plain decoding."""
        zeros = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return cls(zeros.new_zeros(batch_size, 0), None, zeros)

    def trimmed(self) -> Draft:
        """Without the columns that no row uses; on a GPU as it is, since reading the lengths would wait for it."""
        num_ids = self.ids.shape[1]
        if self.ids.device.type != "cpu" or num_ids == 0:
            return self
        longest = min(max(int(self.lengths.max()), 0), num_ids)
        if longest == num_ids:
            return self
        return Draft(self.ids[:, :longest], None if self.probs is None else self.probs[:, :longest], self.lengths)

    def within(self, limit: Tensor, vocab_size: int) -> tuple[Draft, Tensor]:
        """Clamp lengths to limit [B] and ids to the vocabulary: -> the draft, the rows [B] bool where that changed it.

        So the device never indexes out of bounds, and the error is raised when the host reads the step's result.
        """
        num_ids = self.ids.shape[1]
        lengths = torch.minimum(self.lengths.clamp(0, num_ids), limit)
        ids = self.ids.clamp(0, vocab_size - 1)
        return Draft(ids, self.probs, lengths), (lengths != self.lengths) | (ids != self.ids).any(1)

    def explain(self, limit: Tensor, vocab_size: int) -> str:
        """The error message for a draft that `within` had to change."""
        if self.ids.numel() and ((self.ids < 0) | (self.ids >= vocab_size)).any():
            return (
                f"propose returned ids from {self.ids.min().item()} to {self.ids.max().item()}; the target's vocabulary"
                f" is 0 … {vocab_size - 1}"
            )
        return (
            f"propose returned lengths {self.lengths.tolist()}; each must lie in 0 … its row's limit {limit.tolist()}"
            f" and be at most K={self.ids.shape[1]}"
        )


def check_draft(draft: object, drafter: object, batch_size: int, max_draft_tokens: int, vocab_size: int) -> None:
    """Raise ValueError where types, shapes or dtypes break the drafter's protocol; `Draft.within` checks values."""
    name = f"{type(drafter).__name__}.propose"
    if not isinstance(draft, Draft):
        raise ValueError(f"{name} returned a {type(draft).__name__}; it must return a Draft")
    ids, lengths, probs = draft.ids, draft.lengths, draft.probs
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[0] != batch_size or ids.dtype != torch.int64:
        raise ValueError(f"{name} returned ids {_describe(ids)}; it must return int64 [{batch_size}, K]")
    num_ids = ids.shape[1]
    if num_ids > max_draft_tokens:
        raise ValueError(f"{name} returned {num_ids} ids a row; this call asked for at most {max_draft_tokens}")
    if not isinstance(lengths, Tensor) or lengths.shape != (batch_size,) or lengths.dtype != torch.int64:
        raise ValueError(f"{name} returned lengths {_describe(lengths)}; it must return int64 [{batch_size}]")
    shape = (batch_size, num_ids, vocab_size)
    if probs is not None and (not isinstance(probs, Tensor) or probs.shape != shape or probs.dtype != torch.float32):
        raise ValueError(
            f"{name} returned probs {_describe(probs)}; it must return float32 {list(shape)}, the distributions the ids"
            " were drawn from, or None where they are one-hot"
        )


@dataclass(frozen=True, slots=True)
class TargetOutput:
    """What a target's forward returns for a window of W positions: logits [B, W, V] float32."""

    logits: Tensor


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of verification.

    accepted: [B] int64, how many leading draft ids are accepted.
    next_ids: [B] int64, the target's own id after them: recovered after a rejection, bonus after full acceptance.
    """

    accepted: Tensor
    next_ids: Tensor


@dataclass(frozen=True, slots=True)
class RowStep:
    """What one step did to one row.

    requested: draft ids that the drafter was asked for: K, or fewer near the end of the row.
    drafted, accepted, emitted: draft ids proposed and accepted, ids committed; on the row's last step up to its stop.
    overlap: the chance of acceptance, sum(min(p, q)) or verify_block()'s, at each draft position whose preceding draft
        ids were all accepted.
    """

    requested: int
    drafted: int
    accepted: int
    emitted: int
    overlap: list[float]

    def origins(self) -> list[str]:
        """The origin of each emitted id: "accepted", then "recovered" or "bonus"; "plain" where nothing was drafted."""
        own = "plain" if self.drafted == 0 else "bonus" if self.accepted == self.drafted else "recovered"
        return (["accepted"] * self.accepted + [own])[: self.emitted]

    def chances(self) -> list[float | None]:
        """The probability that a draft id is accepted at the position of each emitted id.

        `overlap` where an id was drafted; 0 where the drafter proposed fewer ids than requested; None at a bonus
        id, where nothing was requested.
        """
        own = None if self.drafted == self.requested else 0.0
        return [*self.overlap, own][: self.emitted]


BROKEN_DRAFT, NAN_DRAFT, NAN_TARGET = 1, 2, 4  # flags of what went wrong in a row's step
NUM_COUNTS = 6  # columns of StepResult.host_summary before the overlap


@dataclass(eq=False)
class StepResult:
    """One committed step. Rows that had finished before it have live = False and zeros everywhere.

    drafter: the name of the drafter's class. draft, verdict: as proposed and verified, before any stop.
    logits, scores: [B, K+1, V] float32, the target's, before and after the call's processors.
    host_summary: [B, 6 + K] float32, what is counted, packed for one copy to the host: requested, drafted, accepted,
        emitted, whether the row ends, faults, overlap.

    The tensors lie on the device; where steps are recorded as CUDA graphs, the next step overwrites them. `send` starts
    a copy of host_summary to the host. `steps` and `ends` wait for it; without it, they wait for the step.
    """

    drafter: str
    draft: Draft
    verdict: Verdict
    logits: Tensor
    scores: Tensor
    host_summary: Tensor
    _sent: tuple[Tensor, torch.cuda.Event | None] | None = field(default=None, init=False, repr=False)
    _read: tuple[list[RowStep | None], list[bool]] | None = field(default=None, init=False, repr=False)

    @property
    def requested(self) -> Tensor:
        """[B] int64, the limit that the drafter was given."""
        return self.host_summary[:, 0].long()

    @property
    def drafted(self) -> Tensor:
        """[B] int64, the draft ids that count: on a row's last step up to its stop."""
        return self.host_summary[:, 1].long()

    @property
    def accepted(self) -> Tensor:
        """[B] int64, the accepted ones of those."""
        return self.host_summary[:, 2].long()

    @property
    def emitted(self) -> Tensor:
        """[B] int64, ids committed for the row: accepted + 1, or fewer where a stop fell."""
        return self.host_summary[:, 3].long()

    @property
    def live(self) -> Tensor:
        """[B] bool, whether the row took part; it then emitted at least one id."""
        return self.host_summary[:, 3] > 0

    @property
    def overlap(self) -> Tensor:
        """[B, K] float32, the chance of acceptance at each draft position after those before it."""
        return self.host_summary[:, NUM_COUNTS:]

    def send(self) -> None:
        """Start the copy of host_summary to the host without waiting for it, before a next step may overwrite it."""
        if not self.host_summary.is_cuda:
            self._sent = self.host_summary.clone(), None
            return
        host_copy = torch.empty(self.host_summary.shape, dtype=self.host_summary.dtype, pin_memory=True)
        host_copy.copy_(self.host_summary, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.host_summary.device))
        self._sent = host_copy, copied

    @property
    def steps(self) -> list[RowStep | None]:
        """What the step did to each row; None for a row that had finished. Raises ValueError where `faults` says so."""
        return self.read()[0]

    @property
    def ends(self) -> list[bool]:
        """Whether it was each row's last step."""
        return self.read()[1]

    def read(self) -> tuple[list[RowStep | None], list[bool]]:
        """`steps` and `ends`."""
        if self._read is not None:
            return self._read
        host_copy, copied = self._sent or (self.host_summary, None)
        if copied is not None:
            copied.synchronize()
        steps: list[RowStep | None] = []
        ends = []
        for row in host_copy.tolist():
            requested, drafted, accepted, emitted, last, faults = map(int, row[:NUM_COUNTS])
            if faults:
                raise ValueError(self._error_message(faults))
            overlap = row[NUM_COUNTS : NUM_COUNTS + min(drafted, accepted + 1)]
            steps.append(RowStep(requested, drafted, accepted, emitted, overlap) if emitted else None)
            ends.append(bool(last))
        self._read = steps, ends
        return self._read

    def _error_message(self, faults: int) -> str:
        if faults & BROKEN_DRAFT:
            return f"{self.drafter}.{self.draft.explain(self.requested, self.logits.shape[-1])}"
        who = "target" if faults & NAN_TARGET else "draft model"
        return (
            f"the {who} returned NaN logits (or its processors excluded every token), so nothing can be sampled;"
            " check its weights and dtype (float16 overflows where bfloat16 and float32 do not)"
        )


def find_faults(is_broken: Tensor, is_nan: Tensor, draft_probs: Tensor | None) -> Tensor:
    """What went wrong in each row's step: [B] int64, a sum of BROKEN_DRAFT, NAN_DRAFT and NAN_TARGET.

    is_broken: [B] bool, see Draft.within. is_nan: [B] bool, the target's distribution. draft_probs: [B, K, V] or None.
    """
    faults = BROKEN_DRAFT * is_broken + NAN_TARGET * is_nan
    return faults if draft_probs is None else faults + NAN_DRAFT * draft_probs[..., 0].isnan().any(1)


def pack_host_summary(
    requested: Tensor, drafted: Tensor, accepted: Tensor, emitted: Tensor, ends: Tensor, faults: Tensor, overlap: Tensor
) -> Tensor:
    """StepResult.host_summary: columns [B] and overlap [B, K] -> [B, 6 + K] float32, exact for integers below 2^24."""
    counts = torch.stack([requested, drafted, accepted, emitted, ends, faults], dim=1).float()
    return torch.cat([counts, overlap], dim=1)


def _describe(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return f"as a {type(tensor).__name__}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
