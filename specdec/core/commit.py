"""Committing a verdict: append what was verified, and count it for the host."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.core.sequences import Sequences
from specdec.core.steps import Draft, Verdict, find_faults, pack_host_summary


def commit_verdict(
    sequences: Sequences,
    draft: Draft,
    verdict: Verdict,
    overlap: Tensor,
    limit: Tensor,
    is_broken: Tensor,
    is_nan: Tensor,
) -> Tensor:
    """Append each row's accepted ids and next id, up to its first stop.

    overlap: [B, K] float32. limit: [B] int64. is_broken, is_nan: [B] bool, see `Draft.within` and `verify_draft`.
    -> StepResult.host_summary. On a CPU with specdec's kernels one operator, except where a stop function runs Python.
    """
    host_summary: Tensor
    if sequences.stop is None and sequences.has_kernels:
        host_summary = torch.ops.specdec.commit(
            sequences.ids, sequences.lengths, sequences.end, sequences.finished, sequences.stop_ids, limit,
            draft.ids, draft.probs, draft.lengths, verdict.accepted, verdict.next_ids, overlap, is_broken, is_nan,
        )  # fmt: skip
        return host_summary
    emitted, stopped = sequences.commit(draft, verdict)
    drafted = torch.where(stopped, torch.minimum(draft.lengths, emitted), draft.lengths)  # a last step: up to its stop
    accepted = torch.minimum(verdict.accepted, emitted)
    faults = find_faults(is_broken, is_nan, draft.probs)
    return pack_host_summary(limit, drafted, accepted, emitted, stopped, faults, overlap)
