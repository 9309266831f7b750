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


def run_tasks(engine: Engine, tasks: Sequence[Task]) -> tuple[float, Ids]:
    """Tokens per second over the tasks, and the ids of all rows; RuntimeError where an engine wrote too few or many."""
    ids: Ids = []
    seconds = 0.0
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
    return sum(task.num_tokens for task in tasks) / seconds, ids


def tune(
    what: str, candidates: Mapping[Any, Engine], task_set: TaskSet, on_progress: OnProgress
) -> tuple[Engine, Tuning]:
    """The fastest of the candidates, by their setting, on a short version of the tasks; the first round warms up."""
    tasks = task_set.short().tasks()

    def tokens_per_second(engine: Engine, _: int) -> float:
        return run_tasks(engine, tasks)[0]

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

    Greedy texts are compared with those of the same runtime's first engine.
    """
    texts, step_means = [], []
    for engine in engines:  # also warms up
        texts.append(run_tasks(engine, task_set.tasks())[1])
        step_means.append(mean_steps(engine, task_set))
        on_progress(f"{task_set}: {label(engine)}, warm-up")

    def tokens_per_second(engine: Engine, index: int) -> float:
        return run_tasks(engine, task_set.tasks(seed=1000 * (index + 1)))[0]

    rates = interleave(
        {position: partial(tokens_per_second, engine) for position, engine in enumerate(engines)},
        rounds,
        on_call=lambda position, index: on_progress(f"{task_set}: {label(engines[position])}, round {index + 1}"),
    )
    results = []
    for position, engine in enumerate(engines):
        same_runtime = [i for i, other in enumerate(engines) if other.runtime == engine.runtime]
        first = same_runtime[0]
        plain = next((i for i in same_runtime if engines[i].name == "plain"), first)
        results.append(
            {
                "runtime": engine.runtime,
                "engine": engine.name,
                "num_draft_tokens": engine.num_draft_tokens,
                "batch": task_set.batch,
                "sampling": task_set.sampling,
                "tokens_per_second": round(statistics.median(rates[position]), 1),
                "tokens_per_second_rounds": [round(value, 1) for value in rates[position]],
                "ratio_to_baseline": ratios(rates[position], rates[0]),
                "ratio_to_own_plain": ratios(rates[position], rates[plain]),
                "compared_to": None if task_set.sampled else label(engines[first]),
                "identical_rows": None if task_set.sampled else count_same_rows(texts[position], texts[first]),
                "rows": len(task_set.prompts),
                **step_means[position],
            }
        )
    return results


def mean_steps(engine: Engine, task_set: TaskSet) -> dict[str, float | None]:
    """Means of an engine's steps over all tasks: arithmetic of the times, harmonic of the tokens per step."""
    tasks = task_set.tasks()
    with engine.ready():
        steps = [engine.time_steps(task) for task in tasks * (1 if len(tasks) >= MIN_TIMED_CALLS else MIN_TIMED_CALLS)]
    means = {name: mean([getattr(one, name) for one in steps]) for name in asdict(steps[0])}
    return means | {"tokens_per_step": round(statistics.harmonic_mean([one.tokens_per_step for one in steps]), 3)}


def ratios(rates: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest ratio within a round."""
    values = [a / b for a, b in zip(rates, others, strict=True)]
    return {"median": round(statistics.median(values), 3), "low": round(min(values), 3), "high": round(max(values), 3)}


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of those that are there, None where none is."""
    present = [value for value in values if value is not None]
    return round(statistics.fmean(present), 3) if present else None


def label(engine: Engine) -> str:
    k = "" if engine.num_draft_tokens is None else f" K={engine.num_draft_tokens}"
    return f"{engine.runtime} {engine.name}{k}"
