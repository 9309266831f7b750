"""No drafter: plain decoding in the same loop, the baseline of measurements."""

from __future__ import annotations

from torch import Tensor

from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.steps import Draft, StepResult


class NoDrafter:
    """Proposes no draft tokens."""

    def begin(self, sequences: Sequences, sampling: Sampling) -> None:
        pass

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        return sequences.no_draft

    def observe(self, result: StepResult) -> None:
        pass
