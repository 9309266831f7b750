"""What passes through one step. Shapes: B rows, K draft ids, W = K + 1 window columns, V ids in the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Draft:
    """The ids a drafter proposes in one step.

    ids: [B, K] int64, proposed to stand at positions n … n+K-1 of each row.
    probs: [B, K, V] float32, exactly the distributions `ids` were drawn from, over the target's vocabulary; None where each
        is one-hot (greedy, n-gram).
    lengths: [B] int64, how many of the K a row really offers, at most its limit.
    """

    ids: Tensor
    probs: Tensor | None
    lengths: Tensor

    @classmethod
    def empty(cls, batch_size: int, device: torch.device) -> Draft:
        """No proposal for any row: plain decoding."""
        zeros = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return cls(zeros.new_zeros(batch_size, 0), None, zeros)

    def within(self, limit: Tensor, vocab_size: int) -> tuple[Draft, Tensor]:
        """The draft with its lengths within limit [B] and its ids within the vocabulary, and the rows [B] where they were not.

        So that a device, which no one asks before the step is over, never sees what it cannot do.
        """
        num_ids = self.ids.shape[1]
        lengths = torch.minimum(self.lengths.clamp(0, num_ids), limit)
        ids = self.ids.clamp(0, vocab_size - 1)
        return Draft(ids, self.probs, lengths), (lengths != self.lengths) | (ids != self.ids).any(1)

    def explain(self, limit: Tensor, vocab_size: int) -> str:
        """What was wrong with it, where `within` found something."""
        if self.ids.numel() and ((self.ids < 0) | (self.ids >= vocab_size)).any():
            return (
                f"propose returned ids from {self.ids.min().item()} to {self.ids.max().item()}; the target's vocabulary is"
                f" 0 … {vocab_size - 1}"
            )
        return (
            f"propose returned lengths {self.lengths.tolist()}; each must lie in 0 … its row's limit {limit.tolist()} and be at"
            f" most K={self.ids.shape[1]}"
        )


def check_draft(draft: object, drafter: object, batch_size: int, max_draft_tokens: int, vocab_size: int) -> None:
    """Raise ValueError where types, shapes or dtypes break the drafter's protocol; values are checked by `Draft.within`."""
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
            f"{name} returned probs {_describe(probs)}; it must return float32 {list(shape)}, the distributions the ids were"
            " drawn from, or None where they are one-hot"
        )


@dataclass(frozen=True, slots=True)
class TargetOutput:
    """What a target's forward returns for a window of W positions.

    logits: [B, W, V] float32.
    features: hidden states that the drafter asked for, each [B, W, H]; None where it asked for none.
    """

    logits: Tensor
    features: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the target made of a draft.

    accepted: [B] int64, how many leading draft ids are kept.
    next_ids: [B] int64, the target's own id after them: recovered after a rejection, bonus after full acceptance.
    """

    accepted: Tensor
    next_ids: Tensor


@dataclass(frozen=True, slots=True)
class RowStep:
    """What one step did to one row.

    requested: how many ids the drafter was requested for: K, or fewer where the row had no room for so many.
    drafted, accepted, emitted: as they count; on the row's last step only up to its stop.
    overlap: sum(min(p, q)) at each position that was drafted with all before it accepted.
    """

    requested: int
    drafted: int
    accepted: int
    emitted: int
    overlap: list[float]

    def origins(self) -> list[str]:
        """Where each emitted id came from: "accepted", then "recovered" or "bonus"; "plain" where nothing was drafted."""
        own = "plain" if self.drafted == 0 else "bonus" if self.accepted == self.drafted else "recovered"
        return (["accepted"] * self.accepted + [own])[: self.emitted]

    def chances(self) -> list[float | None]:
        """The chance that a draft id would be accepted at each emitted one's position.

        Where ids were drafted it is their sum(min(p, q)). None at an id behind as many accepted ones as were requested for: there was
        no draft to compare with. 0 where the drafter offered less than it was requested for.
        """
        own = None if self.drafted == self.requested else 0.0
        return [*self.overlap, own][: self.emitted]


BROKEN_DRAFT, NAN_DRAFT, NAN_TARGET = 1, 2, 4  # what may be wrong with a row's step; they add up


@dataclass(frozen=True)
class StepResult:
    """One committed step. Rows that had finished before it have live = False and zeros everywhere.

    drafter: the class of what proposed. draft, verdict: as proposed and as judged, before any stop.
    requested: [B] int64, the limit that the drafter was given.
    logits, scores: [B, K+1, V] float32, the target's, before and after the call's processors.
    live: [B] bool, the row took part.
    emitted: [B] int64, ids committed for the row: accepted + 1, or fewer where a stop fell.
    drafted, accepted: [B] int64, the counts for the statistics; on a row's last step only up to its stop.
    overlap: [B, K] float32, sum(min(p, q)) at each draft position.
    told: [B, 6 + K] float32, what the host is told: requested, drafted, accepted, emitted, whether the row ends, faults, overlap.

    All are the device's, and where steps are recorded they hold until the next one begins. `send` begins the one copy to the
    host, which `steps` and `ends` wait for.
    """

    drafter: str
    draft: Draft
    verdict: Verdict
    requested: Tensor
    logits: Tensor
    live: Tensor
    emitted: Tensor
    drafted: Tensor
    accepted: Tensor
    overlap: Tensor
    host_summary: Tensor
    scores: Tensor

    def send(self) -> None:
        """Begin to tell the host, without waiting."""
        _ = self._sent

    @property
    def steps(self) -> list[RowStep | None]:
        """What the step did to each row; None for one that had finished. ValueError where it went wrong."""
        return self._read[0]

    @property
    def ends(self) -> list[bool]:
        """Whether it was the row's last step."""
        return self._read[1]

    @cached_property
    def _sent(self) -> tuple[Tensor, torch.cuda.Event | None]:
        on_gpu = self.host_summary.is_cuda
        host = torch.empty(self.host_summary.shape, dtype=self.host_summary.dtype, pin_memory=on_gpu)
        host.copy_(self.host_summary, non_blocking=True)
        arrived = torch.cuda.Event() if on_gpu else None
        if arrived is not None:
            arrived.record(torch.cuda.current_stream(self.host_summary.device))
        return host, arrived

    @cached_property
    def _read(self) -> tuple[list[RowStep | None], list[bool]]:
        host, arrived = self._sent
        if arrived is not None:
            arrived.synchronize()
        steps: list[RowStep | None] = []
        ends = []
        for requested, drafted, accepted, emitted, last, faults, *overlap in host.tolist():
            if faults:
                raise ValueError(self._complaint(int(faults)))
            tried = int(min(drafted, accepted + 1))
            steps.append(
                RowStep(int(requested), int(drafted), int(accepted), int(emitted), overlap[:tried]) if emitted else None
            )
            ends.append(bool(last))
        return steps, ends

    def _complaint(self, faults: int) -> str:
        if faults & BROKEN_DRAFT:
            return f"{self.drafter}.{self.draft.explain(self.requested, self.logits.shape[-1])}"
        who = "target" if faults & NAN_TARGET else "draft model"
        return (
            f"the {who} returned NaN logits (or its processors excluded every token), so nothing can be sampled;"
            " check its weights and dtype (float16 overflows where bfloat16 and float32 do not)"
        )


def find_faults(is_broken: Tensor, is_nan: Tensor, draft_probs: Tensor | None) -> Tensor:
    """What went wrong in each row's step, as a sum of BROKEN_DRAFT, NAN_DRAFT and NAN_TARGET: [B] int64.

    is_broken: [B] bool, see Draft.within. is_nan: [B] bool, the target's distribution. draft_probs: [B, K, V] or None.
    """
    faults = BROKEN_DRAFT * is_broken + NAN_TARGET * is_nan
    return faults if draft_probs is None else faults + NAN_DRAFT * draft_probs[..., 0].isnan().any(1)


def pack_host_summary(
    requested: Tensor, drafted: Tensor, accepted: Tensor, emitted: Tensor, ends: Tensor, faults: Tensor, overlap: Tensor
) -> Tensor:
    """StepResult.told: columns [B] and the overlap [B, K] -> [B, 6 + K] float32, exact for integers below 2^24."""
    counts = torch.stack([requested, drafted, accepted, emitted, ends, faults], dim=1).float()
    return torch.cat([counts, overlap], dim=1)


def _describe(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return f"as a {type(tensor).__name__}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
