"""What a call did: counters and the acceptance metrics made of them. Names follow vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field

from specdec.clock import Timing
from specdec.cost import StepTimes
from specdec.interfaces import Outcome, Step


@dataclass(frozen=True, slots=True)
class Choice:
    """How a call with num_draft_tokens="auto" chose K.

    steps_by_k[k]: steps of the batch that asked for k ids.
    times: the profile's seconds of a step's parts, by K.
    acceptance: the estimate for the rows that were last at work, on average.
    predicted_speedup, measured_speedup: tokens a row over the seconds of the steps, against one token a plain step.
    profile_s: seconds that the profile took; None where an earlier call had made it.
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
        told = ", ".join([f"K={first} of steps", *rest])
        return f"{told}; predicted {self.predicted_speedup:.2f}×, measured {self.measured_speedup:.2f}×"


@dataclass(slots=True)
class Stats:
    """Counts of one call and the metrics made of them; None where nothing was drafted or no step was made.

    num_spec_steps: row-steps, one verifying forward for one unfinished row each, those without a draft included.
    num_draft_tokens, num_accepted_draft_tokens, num_emitted_tokens: a row's last step counts only up to its stop.
    acceptance_histogram[i]: row-steps that accepted exactly i draft ids, 0 … K.
    mean_acceptance_length (tau): 1 + accepted / steps, the recovered or bonus id included.
    draft_acceptance_rate: accepted / drafted.
    acceptance_per_position[i]: accepted at i / steps.
    conditional_acceptance_per_position[i]: the same among steps that drafted i with all before it accepted.
    expected_acceptance (alpha): mean of sum(min(p, q)) over those positions; from the distributions, not from coin flips.
    num_target_forwards: forwards of the target for the whole batch, the prompt's apart.
    timing: seconds of the call by part, where enable(..., timing=True) asked for it.
    choice: how K was chosen, where num_draft_tokens is "auto".
    steps: in a row's own figures, what each of its steps did.
    per_row: the same for each row; empty in a row's own.
    """

    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    num_emitted_tokens: int = 0
    num_target_forwards: int = 0
    acceptance_histogram: list[int] = field(default_factory=list)
    mean_acceptance_length: float | None = None
    draft_acceptance_rate: float | None = None
    acceptance_per_position: list[float | None] = field(default_factory=list)
    conditional_acceptance_per_position: list[float | None] = field(default_factory=list)
    expected_acceptance: float | None = None
    timing: Timing | None = None
    choice: Choice | None = None
    steps: list[Step] = field(default_factory=list)
    per_row: list[Stats] = field(default_factory=list)


class StatsCounter:
    """Collects outcomes; `stats()` turns them into Stats at any time."""

    def __init__(self, batch_size: int, num_draft_tokens: int) -> None:
        self.num_forwards = 0
        self.rows = [_RowCounter(num_draft_tokens) for _ in range(batch_size)]

    def add(self, outcome: Outcome) -> None:
        """Count one step."""
        self.num_forwards += 1
        for row, step in zip(self.rows, outcome.steps, strict=True):
            if step is not None:
                row.add(step)

    def stats(self) -> Stats:
        """The whole batch, with each row's own figures in `per_row`."""
        total = _RowCounter(len(self.rows[0].histogram) - 1)
        for row in self.rows:
            total.merge(row)
        stats = total.stats()
        stats.num_target_forwards = self.num_forwards
        stats.per_row = [row.stats() for row in self.rows]
        for of_row, row in zip(stats.per_row, self.rows, strict=True):
            of_row.steps = row.steps
        return stats


class _RowCounter:
    def __init__(self, num_draft_tokens: int) -> None:
        self.drafted = self.emitted = 0
        self.histogram = [0] * (num_draft_tokens + 1)
        self.tried = [0] * num_draft_tokens  # steps that drafted i with all before it accepted
        self.overlap = 0.0  # sum(min(p, q)) over the tried positions
        self.steps: list[Step] = []

    def add(self, step: Step) -> None:
        self.drafted += step.drafted
        self.emitted += step.emitted
        self.histogram[step.accepted] += 1
        self.steps.append(step)
        for position, value in enumerate(step.overlap):
            self.tried[position] += 1
            self.overlap += value

    def merge(self, other: _RowCounter) -> None:
        self.drafted += other.drafted
        self.emitted += other.emitted
        self.overlap += other.overlap
        self.histogram = [a + b for a, b in zip(self.histogram, other.histogram, strict=True)]
        self.tried = [a + b for a, b in zip(self.tried, other.tried, strict=True)]

    def stats(self) -> Stats:
        steps = sum(self.histogram)
        accepted_at = [sum(self.histogram[position + 1 :]) for position in range(len(self.tried))]
        accepted = sum(accepted_at)
        return Stats(
            num_spec_steps=steps,
            num_draft_tokens=self.drafted,
            num_accepted_draft_tokens=accepted,
            num_emitted_tokens=self.emitted,
            num_target_forwards=steps,
            acceptance_histogram=list(self.histogram),
            mean_acceptance_length=_ratio(steps + accepted, steps),
            draft_acceptance_rate=_ratio(accepted, self.drafted),
            acceptance_per_position=[_ratio(count, steps if self.drafted else 0) for count in accepted_at],
            conditional_acceptance_per_position=[
                _ratio(count, tried) for count, tried in zip(accepted_at, self.tried, strict=True)
            ],
            expected_acceptance=_ratio(self.overlap, sum(self.tried)),
        )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
