"""From records to figures: every rate is a ratio of sums over prompts, with a bootstrap interval over prompts.

Prompts are drawn anew, not records: repetitions and turns of one prompt are no independent evidence (Efron and Tibshirani, 1993;
percentile intervals). Two runs are compared on the same draws of the same prompts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.core.stats import RATIOS, Counts, acceptance_histogram
from specdec.core.timing import StepTimes
from specdec.draft_length.speedup import replay, speedup
from specdec.experiments.records import PLAIN, SPECULATIVE, Record, Run

DRAWS = 2000
LEVEL = 0.95
BINS = 12  # along the output
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; None where nothing was counted, no interval where only one prompt was."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Tally(Counts):
    """Sums over one prompt's records: counts of the speculative ones' steps, tokens and seconds of both engines.

    Of the plain engine where the name says so. Seconds are a row's share of its call.
    """

    tokens: float = 0
    seconds: float = 0
    first_token_s: float = 0
    records: float = 0
    plain_tokens: float = 0
    plain_seconds: float = 0
    plain_first_token_s: float = 0
    plain_records: float = 0
    paired: float = 0  # speculative records with a plain one beside them
    identical: float = 0


COLUMN = {field.name: index for index, field in enumerate(fields(Tally))}


@dataclass(frozen=True)
class Metric:
    """label: for people. of(column) -> value, where column(name) is a sum, or one sum for each draw."""

    label: str
    of: Callable[[Callable[[str], Array]], Array]
    unit: str = ""
    higher_is_better: bool | None = True


def _of_stats(name: str, label: str, unit: str = "") -> Metric:
    """A figure that Stats has too, over a run's prompts."""
    part, whole = RATIOS[name]
    return Metric(label, lambda c: c(part) / c(whole), unit)


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
    "mean_acceptance_length": _of_stats("mean_acceptance_length", "mean acceptance length"),
    "tokens_per_step": _of_stats("tokens_per_step", "tokens per step"),
    "draft_acceptance_rate": _of_stats("draft_acceptance_rate", "draft acceptance rate", "%"),
    "expected_acceptance": _of_stats("expected_acceptance", "expected acceptance", "%"),
    "realized_acceptance": Metric(
        "realized acceptance", lambda c: c("num_accepted_draft_tokens") / c("num_tried_draft_tokens"), "%"
    ),
    "first_token_ms": Metric("time to first token", lambda c: 1000 * c("first_token_s") / c("records"), "ms", False),
    "plain_first_token_ms": Metric(
        "time to first token, plain", lambda c: 1000 * c("plain_first_token_s") / c("plain_records"), "ms", None
    ),
    "token_ms": Metric("time per token", lambda c: 1000 * c("seconds") / c("tokens"), "ms", False),
    "identical": Metric("texts identical to plain decoding's", lambda c: c("identical") / c("paired"), "%"),
}


@dataclass(frozen=True)
class Position:
    """Acceptance at one draft position, from 1.

    unconditional: accepted there / steps that drafted. conditional: accepted there / drafted there with all before accepted.
    expected: mean of sum(min(p, q)) over the same.
    """

    position: int
    unconditional: Estimate
    conditional: Estimate
    expected: Estimate


@dataclass(frozen=True)
class WhatIf:
    """What another K would come to, from this run's texts and step times; no speed where costs were not measured.

    mean_acceptance_length: expected ids of a step that drafts. step_ms: what such a step takes. speedup: of whole calls, their
    prompts read as fast as here; its interval is the texts', times are taken as they are. to_best: this speedup over that of the
    K with the highest one, on the same draws of prompts.
    """

    num_draft_tokens: int
    mean_acceptance_length: Estimate
    step_ms: float | None = None
    speedup: Estimate = Estimate(None)
    to_best: Estimate = Estimate(None)


@dataclass(frozen=True)
class Stretch:
    """Acceptance of drafts for the generated positions start … stop - 1."""

    start: int
    stop: int
    expected: Estimate


@dataclass(frozen=True)
class Figures:
    """All figures of a run. time_ms: milliseconds a token of each part, by engine. tasks: number of prompts, metrics, by task."""

    metrics: dict[str, Estimate]
    tasks: dict[str, tuple[int, dict[str, Estimate]]]
    positions: list[Position]
    histogram: list[int]
    what_if: list[WhatIf]
    time_ms: dict[str, dict[str, float]]
    along: list[Stretch]
    prompts: int
    records: int


def figures(run: Run) -> Figures:
    """Raises ValueError for a run without a record."""
    speculative = run.of(SPECULATIVE)
    if not run.records:
        raise ValueError(f"{run.folder} holds no finished prompt, so there is nothing to report")
    tallies = tally(run)
    steps = [step for record in speculative for step in record.steps]
    tasks: dict[str, list[str]] = defaultdict(list)
    for task, prompt_id in dict.fromkeys((record.task, record.prompt_id) for record in run.records):
        tasks[task].append(prompt_id)
    return Figures(
        metrics=metrics(np.array(list(tallies.values()))),
        tasks={
            task: (len(ids), metrics(np.array([tallies[prompt_id] for prompt_id in ids])))
            for task, ids in sorted(tasks.items())
        },
        positions=_positions(speculative),
        histogram=acceptance_histogram(steps, max((step.requested for step in steps), default=0))
        if speculative
        else [],
        what_if=_what_if(run, speculative),
        time_ms={engine: _time_ms(run.of(engine)) for engine in (SPECULATIVE, PLAIN) if run.of(engine)},
        along=_along(speculative),
        prompts=len(tallies),
        records=len(run.records),
    )


def tally(run: Run) -> dict[str, Array]:
    """The columns of Tally for each prompt id; times of those alone that both engines wrote, where there are two."""
    plain, speculative = ({r.key._replace(engine=""): r for r in run.of(engine)} for engine in (PLAIN, SPECULATIVE))
    greedy = run.header.config["sampling"].get("temperature", 0) == 0
    sums: dict[str, Array] = defaultdict(lambda: np.zeros(len(COLUMN)))
    for record in run.records:
        others = speculative if record.engine == PLAIN else plain
        other = others.get(record.key._replace(engine=""))
        timed = other is not None or not others
        seconds = record.seconds.total_s / record.rows
        if record.engine == PLAIN:
            row = Tally(
                plain_tokens=timed * len(record.ids),
                plain_seconds=timed * seconds,
                plain_first_token_s=timed * record.seconds.first_token_s,
                plain_records=timed,
            )
        else:
            row = Tally(
                **asdict(Counts.of(record.steps)),
                tokens=timed * len(record.ids),
                seconds=timed * seconds,
                first_token_s=timed * record.seconds.first_token_s,
                records=timed,
                paired=greedy and other is not None,
                identical=greedy and other is not None and other.ids == record.ids,
            )
        sums[record.prompt_id] += np.array([getattr(row, name) for name in COLUMN], dtype=np.float64)
    return dict(sums)


def metrics(tallies: Array) -> dict[str, Estimate]:
    """Every metric, of the tallies [n, columns] of n prompts."""
    totals, drawn = tallies.sum(0), _drawn(tallies)
    return {name: _estimate(_value(metric, totals), _value(metric, drawn)) for name, metric in METRICS.items()}


@dataclass(frozen=True)
class Difference:
    """Of a metric from run A to run B: absolute with its interval, and in per cent of A."""

    before: float | None
    after: float | None
    change: Estimate
    relative: Estimate

    @property
    def is_clear(self) -> bool:
        """The interval does not hold 0."""
        low, high = self.change.low, self.change.high
        return low is not None and high is not None and (low > 0 or high < 0)


def compare(a: Run, b: Run) -> dict[str, Difference]:
    """Every metric's difference, prompt by prompt; raises ValueError where the runs are not of the same prompts and counts."""
    check_comparable(a, b)
    first, second = tally(a), tally(b)
    left, right = np.array(list(first.values())), np.array([second[prompt_id] for prompt_id in first])
    drawn_left, drawn_right = _drawn(left), _drawn(right)
    result = {}
    for name, metric in METRICS.items():
        before, after = _value(metric, left.sum(0)), _value(metric, right.sum(0))
        draws_before, draws_after = _value(metric, drawn_left), _value(metric, drawn_right)
        with np.errstate(divide="ignore", invalid="ignore"):
            result[name] = Difference(
                _finite(before),
                _finite(after),
                _estimate(after - before, draws_after - draws_before),
                _estimate(100 * (after / before - 1), 100 * (draws_after / draws_before - 1)),
            )
    return result


def check_comparable(a: Run, b: Run) -> None:
    """Raise ValueError where two runs' figures can't be set side by side."""

    def refuse(what: str) -> ValueError:
        return ValueError(f"{a.folder} and {b.folder} cannot be compared: {what}; run both on the same workload")

    def prompts(run: Run) -> dict[tuple[str, int, int], str]:
        return {(r.prompt_id, r.turn, r.repetition): r.prompt_hash for r in run.records}

    ours, theirs = prompts(a), prompts(b)
    if ours.keys() != theirs.keys():
        extra = sorted(ours.keys() ^ theirs.keys())
        prompt_id, turn, repetition = extra[0]
        raise refuse(
            f"{len(ours)} against {len(theirs)} prompts and repetitions, {len(extra)} of them in one run alone, such as"
            f" {prompt_id!r}, turn {turn}, repetition {repetition}"
        )
    for key, prompt_hash in ours.items():
        if (
            key[1] == 0 and theirs[key] != prompt_hash
        ):  # later turns follow the answers, which are drawn anew where sampled
            raise refuse(f"the prompt {key[0]!r} has other tokens there")
    lengths = [run.header.config["sampling"].get("max_new_tokens") for run in (a, b)]
    if lengths[0] != lengths[1]:
        raise refuse(f"max_new_tokens is {lengths[0]} in one and {lengths[1]} in the other")


def _value(metric: Metric, sums: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return metric.of(lambda name: sums[..., COLUMN[name]])


def _drawn(tallies: Array) -> Array:
    """Sums over prompts drawn with replacement: [n, c] -> [DRAWS, c]; the same draws for every n prompts."""
    n = len(tallies)
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=DRAWS) @ tallies if n > 1 else tallies[:0]


def _estimate(value: Any, draws: Array) -> Estimate:
    number = _finite(value)
    draws = draws[np.isfinite(draws)]
    if number is None or len(draws) < DRAWS / 2:
        return Estimate(number)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(number, float(low), float(high))


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def ratio(parts: Array, wholes: Array) -> Estimate:
    """Sum of parts / sum of wholes over prompts, each [n]."""
    both = np.stack([parts, wholes], axis=1)
    drawn = _drawn(both)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _estimate(np.divide(parts.sum(), wholes.sum()), drawn[:, 0] / drawn[:, 1])


def _by_prompt(records: Sequence[Record]) -> list[list[Record]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.prompt_id].append(record)
    return list(groups.values())


def _positions(records: Sequence[Record]) -> list[Position]:
    width = max((step.drafted for record in records for step in record.steps), default=0)
    groups = [[step for record in group for step in record.steps] for group in _by_prompt(records)]
    result = []
    for at in range(width):
        tried = np.array([sum(len(step.overlap) > at for step in steps) for steps in groups], dtype=np.float64)
        accepted = np.array([sum(step.accepted > at for step in steps) for steps in groups], dtype=np.float64)
        overlap = np.array([sum(step.overlap[at] for step in steps if len(step.overlap) > at) for steps in groups])
        drafting = np.array([sum(step.drafted > 0 for step in steps) for steps in groups], dtype=np.float64)
        result.append(Position(at + 1, ratio(accepted, drafting), ratio(accepted, tried), ratio(overlap, tried)))
    return result


def _what_if(run: Run, records: Sequence[Record]) -> list[WhatIf]:
    if not records:
        return []
    drafted_most = max((step.drafted for record in records for step in record.steps), default=0)
    last = [step.overlap[-1] for record in records for step in record.steps if len(step.overlap) == step.requested > 0]
    at_bonus = sum(last) / len(last) if last else 0.0
    most = run.header.config["sampling"].get("max_new_tokens")
    groups = _by_prompt(records)
    tokens = np.array([sum(len(record.ids) for record in group) for group in groups])
    step_s: list[float] = []
    if run.costs is not None:
        rest = [a + b for a, b in zip(run.costs.verification_s, run.costs.other_s, strict=True)]
        parts = (
            [seconds / run.costs.rows for seconds in part] for part in (run.costs.draft_s, run.costs.target_s, rest)
        )
        step_s = StepTimes(*parts).step_s
    prompt_s = sum(record.seconds.prefill_s / record.rows for record in records) / tokens.sum()

    def speedups(sums: Array) -> Any:
        """At k, of sums [..., 3] of tokens, steps that draft and steps that do not."""
        written, spec_steps, plain_steps = np.moveaxis(sums, -1, 0)
        return speedup(k, written, spec_steps, plain_steps, step_s, prompt_s)

    result, draws = [], []
    for k in range(1, drafted_most + 1):
        texts = [
            [replay(record.steps, k, at_bonus, stopped=len(record.ids) != most) for record in group] for group in groups
        ]
        sums = np.column_stack([tokens, [np.sum(text, axis=0) for text in texts]])
        guess, draw = (
            WhatIf(k, ratio(sums[:, 0] - sums[:, 2], sums[:, 1])),
            np.array([]),
        )  # without a draft a step emits one id
        if k < len(step_s):
            draw = speedups(_drawn(sums))
            guess = replace(guess, step_ms=1000 * step_s[k], speedup=_estimate(speedups(sums.sum(0)), draw))
        result.append(guess)
        draws.append(draw)
    timed = [index for index, guess in enumerate(result) if guess.speedup.value]
    if timed:
        best = max(timed, key=lambda index: result[index].speedup.value or 0)
        for index in timed:
            to_best = (result[index].speedup.value or 0) / (result[best].speedup.value or 1)
            result[index] = replace(result[index], to_best=_estimate(to_best, draws[index] / draws[best]))
    return result


def _time_ms(records: Sequence[Record]) -> dict[str, float]:
    tokens = sum(len(record.ids) for record in records)
    return {
        part: 1000 * sum(getattr(record.seconds, f"{part}_s") / record.rows for record in records) / tokens
        for part in ("prefill", "draft", "target", "verification", "other")
    }


def _along(records: Sequence[Record]) -> list[Stretch]:
    longest = max((len(record.ids) for record in records), default=0)
    if longest == 0:
        return []
    width = -(-longest // BINS)
    stretches = -(-longest // width)
    groups = _by_prompt(records)
    overlap, tried = np.zeros((stretches, len(groups))), np.zeros((stretches, len(groups)))
    for index, group in enumerate(groups):
        for record in group:
            position = 0
            for step in record.steps:
                for at, value in enumerate(step.overlap):
                    overlap[(position + at) // width, index] += value
                    tried[(position + at) // width, index] += 1
                position += step.emitted
    return [
        Stretch(at * width, min((at + 1) * width, longest), ratio(overlap[at], tried[at])) for at in range(stretches)
    ]
