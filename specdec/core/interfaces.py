"""The protocols of the decoding loop. Shapes: B rows, K draft ids, W = K + 1 window columns, V vocabulary size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.stats import Choice
from specdec.core.steps import Draft, RowStep, StepResult, TargetOutput

Run = Callable[..., Any]  # run(key, function, *inputs) -> function(*inputs), eagerly or as a recorded graph


def run_eager(key: Any, function: Callable[..., Any], *inputs: Tensor | None) -> Any:
    """Call function(*inputs): the `Run` of calls that record nothing."""
    return function(*inputs)


class Target(Protocol):
    """The model whose distribution is sampled from, with its own KV cache.

    The cache is ragged: the entry for position i of a row lies in slot i of that row, and a later forward overwrites
    it.
    """

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits."""

    def begin(self, batch_size: int, max_slots: int) -> None:
        """Start a call with an empty KV cache for batch_size rows of at most max_slots positions."""

    def prefill(self, ids: Tensor, last: Tensor) -> TargetOutput | None:
        """Compute the KV entries of positions 0 … last [B] int64 of ids [B, L] int64: -> logits [B, 1, V] at `last`."""

    def reserve(self, slots: int) -> None:
        """Allocate `slots` positions a row, the longest that a row can be after the step that begins."""

    def forward(self, ids: Tensor, positions: Tensor) -> TargetOutput:
        """Run ids [B, W] int64 at positions [B, W] int64 over the KV cache: -> logits [B, W, V] float32."""

    @property
    def has_plain_steps(self) -> bool:
        """Whether run_plain_steps can be called in the current call."""

    def run_plain_steps(self, sequences: Sequences, num_steps: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Run and commit greedy steps without drafts or processors: num_steps, or until all rows have finished.

        -> of each step the rows' next ids [B] int64, its host_summary (see `StepResult`), its logits [B, 1, V].
        """


@runtime_checkable
class Drafter(Protocol):
    """Proposes draft ids. A drafter changes the speed of generation and nothing else."""

    def begin(self, sequences: Sequences, sampling: Sampling) -> None:
        """Start a call: drop the state of the last one. `sampling` holds the call's processors."""

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        """Propose at most limit [B] int64 ids for each row; 0 for rows that have finished or need one more id only.

        `sequences.num_requested` is an upper bound of all limits that is known without waiting for the device. A step
        with K = 0 does not call propose; `observe` is called all the same.
        """

    def observe(self, result: StepResult) -> None:
        """Receive the result of the step; `sequences` already holds its committed ids."""


class DraftLengthPolicy(Protocol):
    """Chooses K, how many ids the next step drafts. `next` may be called before the previous step is observed."""

    @property
    def max_draft_tokens(self) -> int:
        """The largest K that next() returns."""

    def next(self) -> int:
        """K of the step that begins."""

    def extend_plain(self, limit: int) -> int:
        """After next() returned 0: how many steps with K = 0 run together, 1 … limit, the one that begins included."""

    def observe(self, steps: Sequence[RowStep | None], num_together: int = 1) -> None:
        """Receive what the oldest unobserved step did to each row; None for a row that had finished before it.

        num_together: of steps that ran together, how many they were; each is observed.
        """

    def end(self) -> Choice | None:
        """End the call: -> how K was chosen, for the statistics; None where it was constant."""
