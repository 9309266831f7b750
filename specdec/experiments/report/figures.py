"""From the records of one run to its figures: every rate is a ratio of sums over prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

from specdec.core.stats import RATIOS, Counts, acceptance_histogram
from specdec.experiments.records import PLAIN, SPECULATIVE, Record, Run, group_by_prompt
from specdec.experiments.report.estimates import (
    Array,
    Estimate,
    apply,
    count_prompts,
    ratio,
    resample_sums,
    with_bootstrap,
)
from specdec.experiments.report.what_if import Prediction, predict_other_k

MAX_STRETCHES = 12  # of the output, for acceptance along it
TIME_PARTS = {  # of a call, with the labels that the report shows
    "prefill": "prompt (prefill)",
    "draft": "draft",
    "target": "target forward",
    "verification": "verification and sampling",
    "other": "everything else",
}


@dataclass(frozen=True)
class Tally(Counts):
    """Sums over one prompt's records: counts of the speculative engine's steps, tokens and seconds of both engines.

    Fields named plain_… are the plain engine's. Seconds are a row's share of its call.
    paired: speculative records with a plain record of the same prompt, turn and repetition, in a greedy run.
    identical: those whose ids equal the plain ones.
    """

    tokens: float = 0
    seconds: float = 0
    first_token_s: float = 0
    records: float = 0
    plain_tokens: float = 0
    plain_seconds: float = 0
    plain_first_token_s: float = 0
    plain_records: float = 0
    paired: float = 0
    identical: float = 0


COLUMN = {field.name: index for index, field in enumerate(fields(Tally))}


@dataclass(frozen=True)
class Metric:
    """A figure of a run. of(column) -> value, where column(name) is a sum of Tally, or one sum for each resample."""

    label: str
    of: Callable[[Callable[[str], Array]], Array]
    unit: str = ""
    higher_is_better: bool | None = True

    def of_sums(self, sums: Array) -> Array:
        """The metric's values of sums [..., columns]."""
        return self.of(lambda name: sums[..., COLUMN[name]])


def _stats_metric(name: str, label: str, unit: str = "") -> Metric:
    """A metric that Stats defines too, over the prompts of a run."""
    numerator, denominator = RATIOS[name]
    return Metric(label, lambda c: c(numerator) / c(denominator), unit)


METRICS: dict[str, Metric] = {
    "speedup": Metric(
        "speedup over plain decoding",
        lambda c: c("tokens") / c("seconds") / (c("plain_tokens") / c("plain_seconds")),
        "×",
    ),
    "tokens_per_s": Metric("tokens per second", lambda c: c("tokens") / c("seconds")),
    "plain_tokens_per_s": Metric(
        "tokens per second, plain", lambda c: c("plain_tokens") / c("plain_seconds"), "", None
    ),
    "mean_acceptance_length": _stats_metric("mean_acceptance_length", "mean acceptance length"),
    "tokens_per_step": _stats_metric("tokens_per_step", "tokens per step"),
    "draft_acceptance_rate": _stats_metric("draft_acceptance_rate", "draft acceptance rate", "%"),
    "expected_acceptance": _stats_metric("expected_acceptance", "expected acceptance", "%"),
    "realized_acceptance": Metric(
        "realized acceptance", lambda c: c("num_accepted_draft_tokens") / c("num_tried_draft_tokens"), "%"
    ),
    "first_token_ms": Metric("time to first token", lambda c: 1000 * c("first_token_s") / c("records"), "ms", False),
    "plain_first_token_ms": Metric(
        "time to first token, plain", lambda c: 1000 * c("plain_first_token_s") / c("plain_records"), "ms", None
    ),
    "token_ms": Metric("time per token", lambda c: 1000 * c("seconds") / c("tokens"), "ms", False),
    "identical": Metric("texts identical to plain decoding", lambda c: c("identical") / c("paired"), "%"),
}


@dataclass(frozen=True)
class Position:
    """Acceptance at one draft position, from 1.

    drafts: steps that drafted there with all preceding draft tokens accepted.
    unconditional: accepted at the position / steps that drafted.
    conditional: accepted at the position / drafts.
    expected: mean of sum(min(p, q)) over the same.
    """

    position: int
    drafts: int
    unconditional: Estimate
    conditional: Estimate
    expected: Estimate


@dataclass(frozen=True)
class Stretch:
    """Acceptance of draft tokens for the generated positions start … stop - 1."""

    start: int
    stop: int
    expected: Estimate


@dataclass(frozen=True)
class Figures:
    """All figures of a run.

    tasks: number of prompts and metrics, by task. histogram[i]: steps that drafted and accepted i draft tokens.
    step_lengths[i]: steps that emitted i + 1 tokens, and their share of all steps.
    time_ms: milliseconds per token of each part of TIME_PARTS, by engine. along: acceptance along the output.
    """

    metrics: dict[str, Estimate]
    tasks: dict[str, tuple[int, dict[str, Estimate]]]
    positions: list[Position]
    positions_by_task: dict[str, list[Position]]
    histogram: list[int]
    step_lengths: list[tuple[int, Estimate]]
    what_if: list[Prediction]
    time_ms: dict[str, dict[str, float]]
    along: list[Stretch]
    prompts: int
    records: int


def figures(run: Run) -> Figures:
    """All figures of a run; raises ValueError for a run without a record."""
    if not run.records:
        raise ValueError(f"{run.folder} contains no finished prompt, so there is nothing to report")
    speculative = run.of(SPECULATIVE)
    tallies = tally(run)
    return Figures(
        metrics=metrics(np.array(list(tallies.values()))),
        tasks=_by_task(run, tallies),
        positions=_positions(speculative),
        positions_by_task={
            task: _positions([record for record in speculative if record.task == task])
            for task in sorted({record.task for record in speculative})
        },
        histogram=_histogram(speculative),
        step_lengths=_step_lengths(speculative),
        what_if=predict_other_k(run),
        time_ms={engine: _time_ms(run.of(engine)) for engine in (SPECULATIVE, PLAIN) if run.of(engine)},
        along=_along(speculative),
        prompts=len(tallies),
        records=len(run.records),
    )


def tally(run: Run) -> dict[str, Array]:
    """The columns of Tally for each prompt id; where there are two engines, times only of records that both have."""
    plain, speculative = (
        {record.key._replace(engine=""): record for record in run.of(engine)} for engine in (PLAIN, SPECULATIVE)
    )
    is_greedy = run.header.config["sampling"].get("temperature", 0) == 0
    sums: dict[str, Array] = defaultdict(lambda: np.zeros(len(COLUMN)))
    for record in run.records:
        counterparts = speculative if record.engine == PLAIN else plain
        counterpart = counterparts.get(record.key._replace(engine=""))
        is_timed = counterpart is not None or not counterparts
        seconds = record.seconds.total_s / record.rows
        if record.engine == PLAIN:
            row = Tally(
                plain_tokens=is_timed * len(record.ids),
                plain_seconds=is_timed * seconds,
                plain_first_token_s=is_timed * record.seconds.first_token_s,
                plain_records=is_timed,
            )
        else:
            is_paired = is_greedy and counterpart is not None
            row = Tally(
                **asdict(Counts.of(record.steps)),
                tokens=is_timed * len(record.ids),
                seconds=is_timed * seconds,
                first_token_s=is_timed * record.seconds.first_token_s,
                records=is_timed,
                paired=is_paired,
                identical=is_paired and counterpart is not None and counterpart.ids == record.ids,
            )
        sums[record.prompt_id] += np.array([getattr(row, name) for name in COLUMN], dtype=np.float64)
    return dict(sums)


def metrics(tallies: Array) -> dict[str, Estimate]:
    """Every metric, of the tallies [n, columns] of n prompts."""
    totals, resampled = tallies.sum(0), resample_sums(tallies)
    return {
        name: with_bootstrap(
            apply(metric.of_sums, totals),
            apply(metric.of_sums, resampled),
            count_prompts(metric.of_sums, tallies),
        )
        for name, metric in METRICS.items()
    }


def count_identical(run: Run) -> tuple[int, int]:
    """Texts that are identical to plain decoding's, and texts that are compared: greedy ones with a plain record."""
    sums = sum(tally(run).values(), np.zeros(len(COLUMN)))
    return int(sums[COLUMN["identical"]]), int(sums[COLUMN["paired"]])


def _by_task(run: Run, tallies: dict[str, Array]) -> dict[str, tuple[int, dict[str, Estimate]]]:
    prompt_ids: dict[str, list[str]] = defaultdict(list)
    for task, prompt_id in dict.fromkeys((record.task, record.prompt_id) for record in run.records):
        prompt_ids[task].append(prompt_id)
    return {
        task: (len(ids), metrics(np.array([tallies[prompt_id] for prompt_id in ids])))
        for task, ids in sorted(prompt_ids.items())
    }


def _histogram(records: Sequence[Record]) -> list[int]:
    """Steps that drafted, by the number of draft tokens accepted, 0 … the largest K; [] without a record."""
    steps = [step for record in records for step in record.steps]
    return acceptance_histogram(steps, max((step.requested for step in steps), default=0)) if records else []


def _step_lengths(records: Sequence[Record]) -> list[tuple[int, Estimate]]:
    """The number of steps that emitted 1, 2, … tokens, and their shares; [] without a record."""
    if not records:
        return []
    groups = [[step.emitted for record in group for step in record.steps] for group in group_by_prompt(records)]
    counts = np.stack([np.bincount(emitted, minlength=max(map(max, groups)) + 1) for emitted in groups])[:, 1:]
    steps = counts.sum(axis=1).astype(np.float64)
    return [(int(column.sum()), ratio(column.astype(np.float64), steps)) for column in counts.T]


def _positions(records: Sequence[Record]) -> list[Position]:
    max_drafted = max((step.drafted for record in records for step in record.steps), default=0)
    groups = [[step for record in group for step in record.steps] for group in group_by_prompt(records)]
    drafting = np.array([sum(step.drafted > 0 for step in steps) for steps in groups], dtype=np.float64)
    positions = []
    for at in range(max_drafted):
        tried = np.array([sum(len(step.overlap) > at for step in steps) for steps in groups], dtype=np.float64)
        accepted = np.array([sum(step.accepted > at for step in steps) for steps in groups], dtype=np.float64)
        overlap = np.array([sum(step.overlap[at] for step in steps if len(step.overlap) > at) for steps in groups])
        positions.append(
            Position(at + 1, int(tried.sum()), ratio(accepted, drafting), ratio(accepted, tried), ratio(overlap, tried))
        )
    return positions


def _time_ms(records: Sequence[Record]) -> dict[str, float]:
    """Milliseconds per token of each part."""
    tokens = sum(len(record.ids) for record in records)
    return {
        part: 1000 * sum(getattr(record.seconds, f"{part}_s") / record.rows for record in records) / tokens
        for part in TIME_PARTS
    }


def _along(records: Sequence[Record]) -> list[Stretch]:
    """Acceptance along the output, in at most MAX_STRETCHES stretches of equal length."""
    longest = max((len(record.ids) for record in records), default=0)
    if longest == 0:
        return []
    length = -(-longest // MAX_STRETCHES)
    num_stretches = -(-longest // length)
    groups = group_by_prompt(records)
    overlap, tried = np.zeros((num_stretches, len(groups))), np.zeros((num_stretches, len(groups)))
    for column, group in enumerate(groups):
        for record in group:
            position = 0
            for step in record.steps:
                for at, value in enumerate(step.overlap):
                    overlap[(position + at) // length, column] += value
                    tried[(position + at) // length, column] += 1
                position += step.emitted
    return [
        Stretch(index * length, min((index + 1) * length, longest), ratio(overlap[index], tried[index]))
        for index in range(num_stretches)
    ]
