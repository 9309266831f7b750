"""Compares engines on the same tasks, in interleaved rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from common.interleaved import interleave

from peers.engines import Engine, Ids, Task, count_same_rows

OnProgress = Callable[[str], None]
TUNING_ROUNDS = 3
MIN_TIMED_CALLS = 3  # whose steps are timed part by part


@dataclass(frozen=True)
class TaskSet:
    """What engines are compared on: all prompts, `batch` at a time."""

    batch: int
    sampled: bool
    prompts: Ids
    new_tokens: int

    def tasks(self, seed: int = 0) -> list[Task]:
        starts = range(0, len(self.prompts), self.batch)
        return [Task(self.prompts[at : at + self.batch], self.new_tokens, self.sampled, seed + at) for at in starts]

    def short(self) -> TaskSet:
        """A quarter of the prompts, at least a batch, and half the new tokens: for choosing settings."""
        count = max(1, len(self.prompts) // self.batch // 4) * self.batch
        return replace(self, prompts=self.prompts[:count], new_tokens=max(8, self.new_tokens // 2))

    @property
    def sampling(self) -> str:
        return "sampled" if self.sampled else "greedy"

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.sampling}"


@dataclass(frozen=True)
class Tuning:
    """A setting that was chosen by measuring: the best round of each candidate, in tokens per second."""

    what: str
    best: Any
    tokens_per_second: dict[Any, float]


@dataclass(frozen=True)
class Pass:
    """One pass of an engine over tasks: the ids of all rows, and the sums of its calls' times."""

    ids: Ids
    seconds: float
    cpu_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.ids)) / self.seconds


@dataclass(frozen=True)
class Round:
    """Whole calls, and calls of one new token on the same prompts: what is left of the time is decoding."""

    whole: Pass
    first: Pass

    @property
    def num_decoded(self) -> int:
        return sum(map(len, self.whole.ids)) - len(self.whole.ids)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """None where a call of one token took no less time than a whole one."""
        seconds = self.whole.seconds - self.first.seconds
        return self.num_decoded / seconds if seconds > 0 else None

    @property
    def cpu_ms_per_token(self) -> float | None:
        """Of decoding, CPU time of all threads; None where a call of one token took no less than a whole one."""
        seconds = self.whole.cpu_seconds - self.first.cpu_seconds
        return 1000 * seconds / self.num_decoded if seconds > 0 else None


def run_tasks(engine: Engine, tasks: Sequence[Task]) -> Pass:
    """One call for each task; RuntimeError where an engine wrote too few or too many ids."""
    ids: Ids = []
    seconds = cpu_seconds = 0.0
    with engine.ready():
        engine.warm_up(tasks[0])
        for task in tasks:
            result = engine.generate(task)
            lengths = [len(row) for row in result.ids]
            if lengths != [task.new_tokens] * len(task.prompts):
                raise RuntimeError(
                    f"{label(engine)} wrote {lengths} ids instead of {task.new_tokens} for {len(task.prompts)} rows"
                )
            ids += result.ids
            seconds += result.seconds
            cpu_seconds += result.cpu_seconds
    return Pass(ids, seconds, cpu_seconds)


def run_round(engine: Engine, tasks: Sequence[Task]) -> Round:
    return Round(run_tasks(engine, tasks), run_tasks(engine, [replace(task, new_tokens=1) for task in tasks]))


def tune(
    what: str, candidates: Mapping[Any, Engine], task_set: TaskSet, on_progress: OnProgress
) -> tuple[Engine, Tuning]:
    """The fastest of the candidates, by their setting, on a short version of the tasks; the first round warms up."""
    tasks = task_set.short().tasks()

    def tokens_per_second(engine: Engine, _: int) -> float:
        return run_tasks(engine, tasks).tokens_per_second

    rounds = interleave(
        {setting: partial(tokens_per_second, engine) for setting, engine in candidates.items()},
        TUNING_ROUNDS,
        warm_up=1,
        on_call=lambda setting, _: on_progress(f"{what}: {setting}"),
    )
    rates = {setting: max(values) for setting, values in rounds.items()}
    best = max(rates, key=rates.__getitem__)
    return candidates[best], Tuning(what, best, {setting: round(rate, 1) for setting, rate in rates.items()})


def compare(engines: Sequence[Engine], task_set: TaskSet, rounds: int, on_progress: OnProgress) -> list[dict[str, Any]]:
    """One result for each engine. Ratios are taken within a round; the first engine is the baseline.

    Ratios are between engines with the same number of threads. Greedy texts are compared with those of the first engine
    of the same runtime and threads, where it holds the target in the same format.
    """
    texts, step_means = [], []
    for engine in engines:  # also warms up
        texts.append(run_tasks(engine, task_set.tasks()).ids)
        step_means.append(mean_steps(engine, task_set))
        on_progress(f"{task_set}: {label(engine)}, warm-up")

    def measure(engine: Engine, index: int) -> Round:
        return run_round(engine, task_set.tasks(seed=1000 * (index + 1)))

    measured = interleave(
        {position: partial(measure, engine) for position, engine in enumerate(engines)},
        rounds,
        on_call=lambda position, index: on_progress(f"{task_set}: {label(engines[position])}, round {index + 1}"),
    )
    rates = {position: [one.whole.tokens_per_second for one in measured[position]] for position in measured}
    results = []
    for position, engine in enumerate(engines):
        same_threads = [i for i, other in enumerate(engines) if other.threads == engine.threads]
        same_runtime = [i for i in same_threads if engines[i].runtime == engine.runtime]
        plain = next((i for i in same_runtime if engines[i].name == "plain"), same_runtime[0])
        first = next(i for i in same_runtime if engines[i].weights == engine.weights)
        decode_rates = [one.decode_tokens_per_second for one in measured[position]]
        results.append(
            {
                "runtime": engine.runtime,
                "engine": engine.name,
                "num_draft_tokens": engine.num_draft_tokens,
                "threads": engine.threads,
                "weights": engine.weights,
                "forward_bytes": engine.forward_bytes,
                "batch": task_set.batch,
                "sampling": task_set.sampling,
                "tokens_per_second": round(statistics.median(rates[position]), 1),
                "tokens_per_second_rounds": [round(value, 1) for value in rates[position]],
                "decode_tokens_per_second": median(decode_rates, 1),
                "cpu_ms_per_token": median([one.cpu_ms_per_token for one in measured[position]], 4),
                "ratio_to_baseline": ratios(rates[position], rates[same_threads[0]]),
                "ratio_to_own_plain": ratios(rates[position], rates[plain]),
                "compared_to": None if task_set.sampled else label(engines[first]),
                "identical_rows": None if task_set.sampled else count_same_rows(texts[position], texts[first]),
                "rows": len(task_set.prompts),
                **step_means[position],
            }
        )
    return results


def time_prompts(
    engines: Sequence[Engine], prompts: Mapping[int, list[int]], rounds: int, on_progress: OnProgress
) -> list[dict[str, Any]]:
    """Tokens per second of reading a prompt, one row, by its length: a call of one new token."""
    candidates = {(position, length): engines[position] for position in range(len(engines)) for length in prompts}

    def tokens_per_second(engine: Engine, length: int, _: int) -> float:
        return length / run_tasks(engine, [Task([prompts[length]], 1)]).seconds

    rates = interleave(
        {key: partial(tokens_per_second, engine, key[1]) for key, engine in candidates.items()},
        rounds,
        warm_up=1,
        on_call=lambda key, _: on_progress(f"prompts of {key[1]} tokens: {label(engines[key[0]])}"),
    )
    return [
        {
            "runtime": engine.runtime,
            "threads": engine.threads,
            "weights": engine.weights,
            "prompt_tokens": length,
            "tokens_per_second": round(statistics.median(rates[position, length]), 1),
            "tokens_per_second_rounds": [round(value, 1) for value in rates[position, length]],
        }
        for (position, length), engine in candidates.items()
    ]


def mean_steps(engine: Engine, task_set: TaskSet) -> dict[str, float | None]:
    """Means of an engine's steps over all tasks: arithmetic of the times, harmonic of the tokens per step."""
    tasks = task_set.tasks()
    with engine.ready():
        steps = [engine.time_steps(task) for task in tasks * (1 if len(tasks) >= MIN_TIMED_CALLS else MIN_TIMED_CALLS)]
    means = {name: mean([getattr(one, name) for one in steps]) for name in asdict(steps[0])}
    emitted = [one.tokens_per_step for one in steps if one.tokens_per_step is not None]
    return means | {"tokens_per_step": round(statistics.harmonic_mean(emitted), 3) if emitted else None}


def ratios(rates: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest ratio within a round."""
    values = [a / b for a, b in zip(rates, others, strict=True)]
    return {"median": round(statistics.median(values), 3), "low": round(min(values), 3), "high": round(max(values), 3)}


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of those that are there, None where none is."""
    present = [value for value in values if value is not None]
    return round(statistics.fmean(present), 3) if present else None


def median(values: Sequence[float | None], digits: int) -> float | None:
    """The median of those that are there, None where none is."""
    present = [value for value in values if value is not None]
    return round(statistics.median(present), digits) if present else None


def label(engine: Engine) -> str:
    k = "" if engine.num_draft_tokens is None else f" K={engine.num_draft_tokens}"
    return f"{engine.runtime} {engine.name}{k}"
