"""The protocols of the loop: a target, a drafter, a policy of the draft length. Shapes as in steps.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.stats import Choice
from specdec.core.steps import Draft, RowStep, StepResult, TargetOutput

Run = Callable[..., Any]  # run(key, function, *inputs): function(*inputs), tensors or None


def run_eager(key: Any, function: Callable[..., Any], *inputs: Tensor | None) -> Any:
    """The plain way to run a part of a step; a recorder's is the other."""
    return function(*inputs)


class Target(Protocol):
    """The model whose distribution counts, with its own KV cache."""

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits."""

    def begin(self, batch_size: int, max_slots: int) -> None:
        """A call starts: an empty cache for so many rows, whose texts come to at most max_slots positions."""

    def prefill(self, ids: Tensor, last: Tensor) -> TargetOutput | None:
        """Fill the cache for positions 0 … last [B] of ids [B, L]."""

    def reserve(self, slots: int) -> None:
        """A step begins, behind which no row is longer."""

    def forward(self, ids: Tensor, positions: Tensor) -> TargetOutput:
        """Run ids [B, W] at positions [B, W] against the cache: -> logits [B, W, V] float32, features."""


@runtime_checkable
class Drafter(Protocol):
    """Anything that proposes. It may change the speed of generation and nothing else."""

    def begin(self, sequences: Sequences, sampling: Sampling) -> None:
        """A call starts: forget the last one; `sampling` holds the processors this call asked for."""

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        """Propose at most limit [B] ids for each row; 0 for a row that has finished or is one id from its end.

        sequences.num_requested is what no limit exceeds; the host knows it without waiting for the device. Not called for a step that
        drafts nothing; what comes of that, `observe` sees.
        """

    def observe(self, outcome: StepResult) -> None:
        """See what became of the last proposal; `sequences` now holds the committed ids."""


class DraftLengthPolicy(Protocol):
    """Says how many ids the next step drafts. It may be asked again before it has heard of the step before."""

    @property
    def max_draft_tokens(self) -> int:
        """The largest number that next() may give."""

    def next(self) -> int:
        """K of the step that begins now."""

    def observe(self, steps: Sequence[RowStep | None]) -> None:
        """See what the oldest step not heard of did to each row; None for one that had finished."""

    def end(self) -> Choice | None:
        """The call has ended: what was chosen, for the statistics; None where nothing was."""
