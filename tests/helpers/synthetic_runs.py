"""Synthetic runs with known acceptance probabilities, made without a model."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specdec.core.steps import RowStep
from specdec.experiments.records import (
    PLAIN,
    SPECULATIVE,
    Costs,
    Header,
    Memory,
    Record,
    RecordFile,
    Run,
    Sample,
    SampleToken,
    Seconds,
)

PREFILL_S, STEP_S, DRAFT_S, VERIFY_S, OTHER_S = 0.020, 0.010, 0.002, 0.0005, 0.0005
COST_PARTS = ("draft_s", "target_s", "verification_s", "other_s")
CONFIG: dict[str, Any] = {
    "name": "synthetic",
    "target": {"_target_": "specdec.experiments.config.TargetConfig", "path": "models/target", "dtype": "auto"},
    "drafter": {"_target_": "specdec.experiments.config.DraftModel", "path": "models/draft", "dtype": "auto"},
    "quant": {"_target_": "specdec.experiments.config.QuantConfig", "int4": False},
    "sampling": {"_target_": "specdec.experiments.config.SamplingConfig", "temperature": 0.0, "max_new_tokens": 64},
    "workload": {"_target_": "specdec.experiments.workloads.Stdlib", "limit": None},
    "num_draft_tokens": 4,
    "batch_size": 1,
    "repetitions": 1,
    "seed": 0,
    "baseline": True,
    "folder": "runs/synthetic",
    "resume": False,
}
PROVENANCE: dict[str, Any] = {
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
    "command": "specdec experiment experiment=demo num_draft_tokens=4",
    "python": "3.13.5",
    "torch": "2.12.0",
    "device": "x86_64, AVX512",
    "threads": 1,
    "date": "2026-10-01",
}


def config(**changes: Any) -> dict[str, Any]:
    """CONFIG with changes by dotted name, written sampling__temperature=1.0."""
    result = copy.deepcopy(CONFIG)
    for name, value in changes.items():
        *path, last = name.split("__")
        group = result
        for part in path:
            group = group[part]
        group[last] = value
    return result


def synthetic_steps(rng: random.Random, chances: Sequence[float], k: int, is_greedy: bool) -> list[RowStep]:
    """Steps of a text that ends at the length limit; a draft token at position t is accepted with chances[t].

    Where greedy, acceptance is drawn once for each position, and its overlap is 1 or 0.
    """
    if is_greedy:
        chances = [float(rng.random() < chance) for chance in chances]
    steps, position = [], 0
    while position < len(chances):
        drafted = min(k, len(chances) - position - 1)
        accepted, overlap = 0, []
        for chance in chances[position : position + drafted]:
            overlap.append(chance)
            if rng.random() >= chance:
                break
            accepted += 1
        steps.append(RowStep(drafted, drafted, accepted, accepted + 1, overlap))
        position += accepted + 1
    return steps


def synthetic_run(
    prompts: int = 24,
    k: int = 4,
    chances: Sequence[float] = (0.95, 0.85, 0.7),
    seed: int = 0,
    prompts_seed: int = 0,
    spread: float = 0.1,
    repetitions: int = 1,
    tasks: int = 3,
    speed: float = 1.0,
    baseline: bool = True,
    extras: bool = True,
    noise: float = 0.0,
    **changes: Any,
) -> Run:
    """A run of both engines on the same prompts.

    chances: acceptance probabilities, from which one is drawn for each position of each text. spread: each prompt adds
    a value from -spread … spread to its probabilities. prompts_seed: seeds these values; seed: everything else. speed:
    of the target, in both engines. extras: with step costs, memory and a sample. noise: of the step costs, see
    synthetic_costs(). changes: of the config, see config().
    """
    settings = config(num_draft_tokens=k, repetitions=repetitions, baseline=baseline, **changes)
    is_greedy, length = settings["sampling"]["temperature"] == 0, settings["sampling"]["max_new_tokens"]
    rng = random.Random(seed)
    run = Run(Path(settings["folder"]), Header(PROVENANCE, settings))
    for number in range(prompts):
        shift = random.Random(f"{prompts_seed}/{number}").uniform(-spread, spread)
        for repetition in range(repetitions):
            own_chances = [min(max(rng.choice(chances) + shift, 0.0), 1.0) for _ in range(length)]
            steps = synthetic_steps(rng, own_chances, k, is_greedy)
            ids = [rng.randrange(1000) for _ in range(length)]
            shared = {
                "prompt_id": f"prompt-{number:03}",
                "task": f"task {'abcdefghijklmnopqrstuvwxyz'[number % tasks]}",
                "turn": 0,
                "repetition": repetition,
                "seed": 0,
                "rows": 1,
                "num_prompt_tokens": 40,
                "prompt_hash": f"hash-{number}",
                "ids": ids,
                "tokens": [f"{token} " for token in ids],
            }
            run.records.append(_speculative(shared, steps, k, speed * rng.uniform(0.95, 1.05)))
            if baseline:
                run.records.append(_plain(shared, length, speed * rng.uniform(0.95, 1.05)))
    if extras:
        run.costs = synthetic_costs(k, noise, seed=seed)
        run.memory = Memory(
            {"target_weights_bytes": 3_000_000, "target_kv_bytes": 900_000, "logits_bytes": 300_000}, 4_350_000
        )
        run.sample = _sample(rng)
    return run


def synthetic_costs(k: int, noise: float, repetitions: int = 10, seed: int = 0) -> Costs:
    """Step times whose logarithms have a normal error, half of it shared by the steps of a repetition."""
    rng = np.random.default_rng(seed)
    shared, own = rng.normal(0, noise / 2**0.5, (1, repetitions)), rng.normal(0, noise / 2**0.5, (k + 1, repetitions))
    factors = np.exp(shared + own)

    def part(seconds: list[float]) -> list[list[float]]:
        return (np.array(seconds)[:, None] * factors).tolist()  # type: ignore[no-any-return]

    return Costs(
        1,
        part([DRAFT_S * drafted for drafted in range(k + 1)]),
        part([STEP_S * (1 + 0.03 * drafted) for drafted in range(k + 1)]),
        part([VERIFY_S] * (k + 1)),
        part([OTHER_S] * (k + 1)),
    )


def _speculative(shared: dict[str, Any], steps: list[RowStep], k: int, speed: float) -> Record:
    draft, target = DRAFT_S * sum(step.drafted for step in steps), STEP_S * len(steps) * (1 + 0.03 * k) / speed
    verify, other = VERIFY_S * len(steps), OTHER_S * len(steps)
    total = PREFILL_S + draft + target + verify + other
    seconds = Seconds(
        total, PREFILL_S + STEP_S, (total - PREFILL_S - STEP_S) / 63, PREFILL_S, draft, target, verify, other
    )
    call = 2 * int(shared["prompt_id"][-3:])
    return Record(**shared, engine=SPECULATIVE, call=call, steps=steps, seconds=seconds)


def _plain(shared: dict[str, Any], length: int, speed: float) -> Record:
    target, other = STEP_S * length / speed, (VERIFY_S + OTHER_S) * length
    total = PREFILL_S + target + other
    seconds = Seconds(total, PREFILL_S + STEP_S, (total - PREFILL_S - STEP_S) / 63, PREFILL_S, 0.0, target, 0.0, other)
    call = 2 * int(shared["prompt_id"][-3:]) + 1
    return Record(
        **shared, engine=PLAIN, call=call, steps=[RowStep(0, 0, 0, 1, []) for _ in range(length)], seconds=seconds
    )


def _sample(rng: random.Random) -> Sample:
    text = ["self", ".", "_items", " =", " []", "\n", "        ", "return", " <None>", " & '", '"x"', "\n\n"] * 4
    origins = ["accepted", "accepted", "recovered", "accepted", "accepted", "accepted", "accepted", "bonus"] * 6
    tokens = []
    for word, origin in zip(text, origins, strict=True):
        top = rng.uniform(0.5, 0.95)
        target = [(word, top), ("other", 1 - top)]
        draft = [] if origin == "bonus" else [("wrong" if origin == "recovered" else word, 0.7), ("other", 0.2)]
        tokens.append(SampleToken(word, origin, target, draft))
    return Sample(
        "prompt-000",
        'class Stack:\n    """Last in, first out: <b>&amp;</b>."""\n\n    def __init__(self):\n        ',
        tokens,
    )


def write_run(run: Run, folder: Path) -> Path:
    """Write the run as specdec experiment does."""
    folder.mkdir(parents=True)
    file = RecordFile(folder / "records.jsonl", run.header)
    for line in (run.costs, run.memory, run.sample, *run.records, *run.failures, *run.skipped):
        if line is not None:
            file.write(line)
    file.close()
    return folder
