"""Counters of a call and the acceptance metrics made of them, by vLLM's names; docs/figures.md defines each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from specdec.core.steps import RowStep, StepResult
from specdec.core.timing import StepTimes, Timing


@dataclass(frozen=True, slots=True)
class Choice:
    """How a call with num_draft_tokens="auto" chose K.

    steps_by_k[k]: steps of the batch that requested k draft ids.
    times: seconds of a step's parts by its number of draft ids, as profiled before the first call.
    acceptance: mean estimate of the acceptance rate over the rows that finished last.
    predicted_speedup, measured_speedup: tokens per row and second, over those of plain steps.
    profile_s: seconds that profiling took; None where an earlier call did it.
    """

    steps_by_k: list[int]
    times: StepTimes
    acceptance: float
    predicted_speedup: float | None
    measured_speedup: float | None
    profile_s: float | None

    def __str__(self) -> str:
        """In one line: "K=3 in 84 % of steps, 0 in 2 %; predicted 1.84×, measured 1.79×"."""
        total = sum(self.steps_by_k)
        if self.predicted_speedup is None or self.measured_speedup is None:
            return "no step"
        shares = sorted(((count / total, k) for k, count in enumerate(self.steps_by_k) if count), reverse=True)
        first, *rest = (f"{k} in {100 * share:.0f} %" for share, k in shares)
        summary = ", ".join([f"K={first} of steps", *rest])
        return f"{summary}; predicted {self.predicted_speedup:.2f}×, measured {self.measured_speedup:.2f}×"


@dataclass(frozen=True, slots=True)
class Counts:
    """Sums over row-steps. A step that drafts has at least one draft id that counts; any other emits one id.

    num_steps, num_emitted_tokens: over all steps. num_spec_steps, num_spec_emitted_tokens: over steps that draft.
    num_tried_draft_tokens: draft ids whose preceding draft ids were all accepted. overlap: sum of their chances of
    acceptance.
    """

    num_steps: int = 0
    num_emitted_tokens: int = 0
    num_spec_steps: int = 0
    num_spec_emitted_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    num_tried_draft_tokens: int = 0
    overlap: float = 0

    @classmethod
    def of(cls, steps: Sequence[RowStep]) -> Counts:
        drafting = [step for step in steps if step.drafted]
        return cls(
            num_steps=len(steps),
            num_emitted_tokens=sum(step.emitted for step in steps),
            num_spec_steps=len(drafting),
            num_spec_emitted_tokens=sum(step.emitted for step in drafting),
            num_draft_tokens=sum(step.drafted for step in drafting),
            num_accepted_draft_tokens=sum(step.accepted for step in drafting),
            num_tried_draft_tokens=sum(len(step.overlap) for step in drafting),
            overlap=sum(sum(step.overlap) for step in drafting),
        )

    def ratio(self, name: str) -> float | None:
        """One of RATIOS; None where nothing was counted."""
        part, whole = RATIOS[name]
        return _ratio(getattr(self, part), getattr(self, whole))


RATIOS = {  # figures that are one sum over another: of Stats and of the records of an experiment
    "mean_acceptance_length": ("num_spec_emitted_tokens", "num_spec_steps"),
    "tokens_per_step": ("num_emitted_tokens", "num_steps"),
    "draft_acceptance_rate": ("num_accepted_draft_tokens", "num_draft_tokens"),
    "expected_acceptance": ("overlap", "num_tried_draft_tokens"),
}


@dataclass(slots=True)
class Stats:
    """Counts of one call and the metrics made of them, as docs/figures.md defines them.

    A row-step is one target forward for one unfinished row. A row's last step counts up to its stop. A step drafts
    where at least one draft id counts. Ratios are None where nothing was drafted, tokens_per_step where no step was
    made.

    num_steps: row-steps. num_spec_steps: row-steps that draft.
    num_draft_tokens, num_accepted_draft_tokens: draft ids proposed and accepted.
    num_emitted_tokens: ids committed by all steps.
    num_target_forwards: forwards of the target for the whole batch, prefill excluded.
    acceptance_histogram[i]: steps that draft and accept exactly i draft ids, i = 0 … K.
    mean_acceptance_length (tau): ids emitted by steps that draft / num_spec_steps.
    tokens_per_step: num_emitted_tokens / num_steps.
    draft_acceptance_rate: num_accepted_draft_tokens / num_draft_tokens.
    acceptance_per_position[i]: steps that accept a draft id at position i / num_spec_steps.
    conditional_acceptance_per_position[i]: the same / steps that draft position i and accept all positions before it.
    expected_acceptance (alpha): mean chance of acceptance over those positions, free of sampling noise.
    chance_acceptance: what draft ids drawn from the frequencies of the answers' own ids would reach; None for fewer
        than two ids, in the figures of one row, and where nothing was drafted.
    timing: seconds of the call by part; None without enable(..., timing=True).
    choice: how K was chosen; None where num_draft_tokens is a number.
    steps: in the figures of one row, what each step did; empty in those of the batch.
    per_row: the figures of each row; empty in those of one row.
    """

    num_steps: int = 0
    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    num_emitted_tokens: int = 0
    num_target_forwards: int = 0
    acceptance_histogram: list[int] = field(default_factory=list)
    mean_acceptance_length: float | None = None
    tokens_per_step: float | None = None
    draft_acceptance_rate: float | None = None
    acceptance_per_position: list[float | None] = field(default_factory=list)
    conditional_acceptance_per_position: list[float | None] = field(default_factory=list)
    expected_acceptance: float | None = None
    chance_acceptance: float | None = None
    timing: Timing | None = None
    choice: Choice | None = None
    steps: list[RowStep] = field(default_factory=list)
    per_row: list[Stats] = field(default_factory=list)

    @classmethod
    def of(cls, steps: Sequence[RowStep], num_draft_tokens: int, num_target_forwards: int) -> Stats:
        """Stats of row-steps of at most num_draft_tokens draft ids, without timing, choice, steps and per_row."""
        counts = Counts.of(steps)
        histogram = acceptance_histogram(steps, num_draft_tokens)
        num_accepted_at = [sum(histogram[position + 1 :]) for position in range(num_draft_tokens)]
        num_tested_at = [sum(len(step.overlap) > position for step in steps) for position in range(num_draft_tokens)]
        return cls(
            num_steps=counts.num_steps,
            num_spec_steps=counts.num_spec_steps,
            num_draft_tokens=counts.num_draft_tokens,
            num_accepted_draft_tokens=counts.num_accepted_draft_tokens,
            num_emitted_tokens=counts.num_emitted_tokens,
            num_target_forwards=num_target_forwards,
            acceptance_histogram=histogram,
            acceptance_per_position=[_ratio(count, counts.num_spec_steps) for count in num_accepted_at],
            conditional_acceptance_per_position=[
                _ratio(*at) for at in zip(num_accepted_at, num_tested_at, strict=True)
            ],
            mean_acceptance_length=counts.ratio("mean_acceptance_length"),
            tokens_per_step=counts.ratio("tokens_per_step"),
            draft_acceptance_rate=counts.ratio("draft_acceptance_rate"),
            expected_acceptance=counts.ratio("expected_acceptance"),
        )


class StatsCounter:
    """Collects step results; `stats()` makes Stats of them at any time."""

    def __init__(self, batch_size: int, num_draft_tokens: int) -> None:
        self.num_draft_tokens = num_draft_tokens
        self.num_forwards = 0
        self.rows: list[list[RowStep]] = [[] for _ in range(batch_size)]

    def add(self, result: StepResult) -> None:
        """Count one step."""
        self.num_forwards += 1
        for row, step in zip(self.rows, result.steps, strict=True):
            if step is not None:
                row.append(step)

    def stats(self) -> Stats:
        """The whole batch, with each row's own figures in `per_row`."""
        stats = Stats.of([step for row in self.rows for step in row], self.num_draft_tokens, self.num_forwards)
        stats.per_row = [Stats.of(row, self.num_draft_tokens, len(row)) for row in self.rows]
        for row_stats, row in zip(stats.per_row, self.rows, strict=True):
            row_stats.steps = list(row)
        return stats


def acceptance_histogram(steps: Sequence[RowStep], num_draft_tokens: int) -> list[int]:
    """The number of steps that draft and accept exactly i draft ids, for i = 0 … num_draft_tokens."""
    counted = Counter(step.accepted for step in steps if step.drafted)
    return [counted[length] for length in range(num_draft_tokens + 1)]


def chance_acceptance(answers: Sequence[Sequence[int]]) -> float | None:
    """The probability that the ids at two different positions of the answers are equal; None for fewer than two ids."""
    counts = Counter(token for answer in answers for token in answer)
    total = counts.total()
    return _ratio(sum(count * (count - 1) for count in counts.values()), total * (total - 1))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
