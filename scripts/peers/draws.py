"""Do engines draw from plain decoding's law when they speculate? Many draws of each, compared by a two-sample test."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from peers.engines import Engine, Ids, SpecdecEngine, Task, TransformersEngine
from peers.measure import OnProgress, TaskSet, label, mean_steps, run_tasks
from peers.pairs import Pair
from peers.runtimes import Conditions, Runtime
from specdec.audit.controls import CONTROLS
from specdec.audit.statistics import TwoSamples, repetition_p_value

ALPHA = 0.001  # rate of false alarms of each comparison
COMPARED_TOKENS, NEW_TOKENS = 3, 4  # of a call: one more id than is compared, so that none of these is the last
CONTEXT_TOKENS, REPEATED_TOKENS = 16, 8  # of a prompt, and its first ones once more, for lookups to find
LIKELIEST = (0.3, 0.8)  # probability of the most likely next id: neither flat nor certain
STEP_TOKENS = 16  # of the calls whose tokens per step are counted
TEMPERATURE = 1.2  # of a control, in place of 1
MISTAKE = "last_id"  # of a control

Draws = list[list[tuple[int, ...]]]  # by context


def contexts_of(pair: Pair, prompts: Ids, count: int) -> Ids:
    """Beginnings of the first `count` prompts whose next id is open."""
    model = pair.load_dense("float32")
    contexts = []
    for prompt in prompts:
        context = prompt[:CONTEXT_TOKENS] + prompt[:REPEATED_TOKENS]
        with torch.inference_mode():
            largest = float(model(torch.tensor([context])).logits[0, -1].softmax(-1).max())
        if LIKELIEST[0] <= largest <= LIKELIEST[1]:
            contexts.append(context)
        if len(contexts) == count:
            return contexts
    raise ValueError(f"only {len(contexts)} prompts have an open next id, --contexts is {count}")


def compare_draws(
    runtime: Runtime, contexts: Ids, num_draws: int, k: int, on_progress: OnProgress
) -> Iterator[dict[str, Any]]:
    """A result for each engine but the first of its weights, which decodes plainly and is what they are compared with.

    Of each context num_draws calls of a single row are made, each with a seed of its own.
    """
    conditions = Conditions(TaskSet(1, True, contexts, NEW_TOKENS), 1, (k,), float32_of)
    engines = [engine for engine in runtime.engines(conditions) if engine.num_draft_tokens in (None, k)]
    plain: dict[str, Draws] = {}
    for engine in [*engines, *wrong_engines(engines)]:
        on_progress(f"{num_draws} draws of {len(contexts)} contexts: {label(engine)}")
        draws = draw(engine, contexts, num_draws)
        if engine.weights not in plain:
            plain[engine.weights] = draws
            continue
        samples = TwoSamples(plain[engine.weights], draws)
        yield {
            "runtime": engine.runtime,
            "engine": engine.name,
            "weights": engine.weights,
            "num_draft_tokens": engine.num_draft_tokens,
            "is_control": engine not in engines,
            "tokens_per_step": mean_steps(engine, replace(conditions.task_set, new_tokens=STEP_TOKENS))[
                "tokens_per_step"
            ],
            "draws": len(contexts) * num_draws,
            "distinct": sum(len(set(some)) for some in draws),
            "repetition_p_value": repetition_p_value(draws),
            "p_value": samples.p_value,
            "smallest_shift": round(samples.smallest_shift(ALPHA), 4),
        }


def draw(engine: Engine, contexts: Ids, num_draws: int) -> Draws:
    seeds = random.Random(f"{label(engine)} {engine.weights}")
    tasks = [
        Task([context], NEW_TOKENS, sampled=True, seed=seeds.getrandbits(31))
        for context in contexts
        for _ in range(num_draws)
    ]
    drawn = [tuple(ids[:COMPARED_TOKENS]) for ids in run_tasks(engine, tasks).ids]
    return [drawn[at : at + num_draws] for at in range(0, len(drawn), num_draws)]


def float32_of(name: str, candidates: Mapping[str, Engine]) -> Engine:
    """In float32 where that can be chosen: there, no rounding moves a law."""
    return candidates.get("float32") or next(iter(candidates.values()))


@dataclass
class WrongEngine(SpecdecEngine):
    """specdec with a loop that is broken on purpose."""

    compiled: bool = False  # compiled forwards do not call what is replaced

    @contextmanager
    def ready(self) -> Iterator[None]:
        with super().ready(), CONTROLS[MISTAKE].apply():
            yield


def wrong_engines(engines: Sequence[Engine]) -> Iterator[Engine]:
    """Engines that draw from another law on purpose, which the test must find."""
    for engine in engines:
        if isinstance(engine, SpecdecEngine):
            if engine.name == "draft model":
                name = f"{engine.name}, {CONTROLS[MISTAKE].what}"
                k, drafter = engine.num_draft_tokens, engine.drafter
                yield WrongEngine(engine.runtime, name, engine.target, engine.threads, None, k, drafter=drafter)
        elif isinstance(engine, TransformersEngine) and engine.runtime == "transformers" and engine.name == "plain":
            yield replace(engine, name=f"plain, temperature {TEMPERATURE}", options={"temperature": TEMPERATURE})
