"""Engines in turns on the same tasks: every round runs each of them once, so that a machine's drift meets all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from peers.engines import Engine, Ids, Task, same_rows

Advance = Callable[[str], None]
TUNING_ROUNDS = 3
WATCHED = 3  # calls at least, to see where their steps' time goes


@dataclass(frozen=True)
class Cell:
    """What engines are compared on: all prompts, `batch` at a time."""

    batch: int
    sampled: bool
    prompts: Ids
    new_tokens: int

    def tasks(self, seed: int = 0) -> list[Task]:
        starts = range(0, len(self.prompts), self.batch)
        return [Task(self.prompts[at : at + self.batch], self.new_tokens, self.sampled, seed + at) for at in starts]

    def short(self) -> Cell:
        """A quarter of the prompts, at least a batch, and half the text: to choose settings by."""
        count = max(1, len(self.prompts) // self.batch // 4) * self.batch
        return replace(self, prompts=self.prompts[:count], new_tokens=max(8, self.new_tokens // 2))

    @property
    def sampling(self) -> str:
        return "sampled" if self.sampled else "greedy"


@dataclass(frozen=True)
class Tuned:
    """A choice that was made by measuring: the best of each candidate's calls, in tokens per second."""

    what: str
    best: str
    tokens_per_second: dict[str, float]


def rate(engine: Engine, tasks: Sequence[Task]) -> tuple[float, Ids]:
    """Tokens per second over the tasks, and the ids of all rows; raises where an engine wrote more or less than it was asked."""
    ids: Ids = []
    seconds = 0.0
    with engine.ready():
        engine.rehearse(tasks[0])
        for task in tasks:
            answer = engine.generate(task)
            if [len(row) for row in answer.ids] != [task.new_tokens] * len(task.prompts):
                lengths = [len(row) for row in answer.ids]
                raise RuntimeError(
                    f"{label(engine)} wrote {lengths} ids, asked for {task.new_tokens} of {len(task.prompts)} rows"
                )
            ids += answer.ids
            seconds += answer.seconds
    return sum(task.num_tokens for task in tasks) / seconds, ids


def tune(what: str, candidates: dict[str, Engine], cell: Cell, advance: Advance) -> tuple[Engine, Tuned]:
    """The fastest of the candidates on a short version of the cell."""
    rates: dict[str, float] = dict.fromkeys(candidates, 0.0)
    tasks = cell.short().tasks()
    for turn in range(1 + TUNING_ROUNDS):  # the first one warms up
        for name, engine in candidates.items():
            found, _ = rate(engine, tasks)
            rates[name] = max(rates[name], found) if turn else 0.0
            advance(f"{what}: {name}")
    best = max(rates, key=rates.__getitem__)
    return candidates[best], Tuned(what, best, {name: round(value, 1) for name, value in rates.items()})


def compare(engines: Sequence[Engine], cell: Cell, rounds: int, advance: Advance) -> list[dict[str, Any]]:
    """One result an engine. Ratios are taken within a round; the first engine is the baseline of all.

    Greedy texts are compared to those of the same runtime's first engine.
    """
    rates: list[list[float]] = [[] for _ in engines]
    texts: list[Ids] = []
    steps = []
    for engine in engines:  # also warms up
        texts.append(rate(engine, cell.tasks())[1])
        with engine.ready():
            tasks = cell.tasks() * (1 if len(cell.tasks()) >= WATCHED else WATCHED)
            watched = [engine.steps(task) for task in tasks]
        steps.append({name: mean([getattr(one, name) for one in watched]) for name in asdict(watched[0])})
        steps[-1]["tokens_per_step"] = round(statistics.harmonic_mean([one.tokens_per_step for one in watched]), 3)
        advance(f"{describe(cell)}: {label(engine)}, warm-up")
    for turn in range(rounds):
        order = range(len(engines)) if turn % 2 == 0 else reversed(range(len(engines)))
        for index in order:
            found, _ = rate(engines[index], cell.tasks(seed=1000 * (turn + 1)))
            rates[index].append(found)
            advance(f"{describe(cell)}: {label(engines[index])}, round {turn + 1}")
    results = []
    for index, engine in enumerate(engines):
        own = [i for i, other in enumerate(engines) if other.runtime == engine.runtime]
        plain = next((i for i in own if engines[i].name == "plain"), own[0])
        results.append(
            {
                "runtime": engine.runtime,
                "engine": engine.name,
                "num_draft_tokens": engine.num_draft_tokens,
                "batch": cell.batch,
                "sampling": cell.sampling,
                "tokens_per_second": round(statistics.median(rates[index]), 1),
                "tokens_per_second_rounds": [round(value, 1) for value in rates[index]],
                "ratio_to_baseline": spread(rates[index], rates[0]),
                "ratio_to_own_plain": spread(rates[index], rates[plain]),
                "compared_to": None if cell.sampled else label(engines[own[0]]),
                "identical_rows": None if cell.sampled else same_rows(texts[index], texts[own[0]]),
                "rows": len(cell.prompts),
                **steps[index],
            }
        )
    return results


def spread(rates: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of the ratios of the same round."""
    ratios = [a / b for a, b in zip(rates, others, strict=True)]
    return {"median": round(statistics.median(ratios), 3), "low": round(min(ratios), 3), "high": round(max(ratios), 3)}


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.fmean(known), 3) if known else None


def label(engine: Engine) -> str:
    k = "" if engine.num_draft_tokens is None else f" K={engine.num_draft_tokens}"
    return f"{engine.runtime} {engine.name}{k}"


def describe(cell: Cell) -> str:
    return f"batch {cell.batch}, {cell.sampling}"
