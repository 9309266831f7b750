"""What is measured beside the prompts, in calls that no figure counts: memory, a sample, the times of a step by its width."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from specdec.core.stats import Stats
from specdec.drafters.none import NoDrafter
from specdec.experiments.config import ExperimentConfig
from specdec.experiments.pair import Pair
from specdec.experiments.records import SPECULATIVE, Costs, Memory, RecordFile, Run, Sample, SampleToken
from specdec.experiments.workloads import Prompt
from specdec.planning.footprint import measure_footprint
from specdec.planning.memory import MemoryPlan, plan_memory
from specdec.planning.peak_memory import PeakMemory
from specdec.quant.quantizer import is_4bit
from specdec.runtime.runner import context_of
from specdec.utils.text import pieces

COST_ROUNDS, COST_SECONDS = 3, 10.0  # no further round begins after so many seconds
COST_STEPS, COST_TOKENS = 3, 12  # the least of a call: steps, should every draft be accepted, and tokens
WARM_UP_TOKENS = 8
SAMPLE_CHARACTERS = 400  # of the prompt's end


def warm_up(
    config: ExperimentConfig,
    pair: Pair,
    first: list[tuple[Prompt, list[int]]],
    file: RecordFile | None,
    before: Run | None,
    say: Callable[[str], None],
) -> None:
    """Every engine once; then, where there is a file, what it does not hold yet. say: told what is being done."""
    prompts = [ids for _, ids in first]
    for drafter in pair.engines.values():
        pair.generate(drafter, prompts, 0, max_new_tokens=min(WARM_UP_TOKENS, pair.call["max_new_tokens"]))
    if file is None or SPECULATIVE not in pair.engines:
        return
    if before is None or before.memory is None:
        say("memory")
        file.write(_memory(config, pair, prompts))
    if before is None or before.sample is None:
        say("sample")
        file.write(_sample(pair, *first[0]))
    if before is None or before.costs is None:
        say("step costs")
        if costs := _costs(config, pair, prompts):
            file.write(costs)


def _memory(config: ExperimentConfig, pair: Pair, prompts: list[list[int]]) -> Memory:
    predicted, unplanned = {}, None
    try:
        predicted = asdict(_plan(config, pair, max(map(len, prompts)), len(prompts)))
    except (ValueError, RuntimeError) as error:  # a model that runs and cannot be planned is no reason to end
        unplanned = str(error).partition("\n")[0]
    with PeakMemory(pair.target.device, *pair.models) as peak:
        pair.generate(pair.engines[SPECULATIVE], prompts, 0)
    return Memory(predicted, peak.bytes, unplanned)


def _plan(config: ExperimentConfig, pair: Pair, longest: int, batch: int) -> MemoryPlan:
    target, *drafts = pair.models
    return plan_memory(
        *(measure_footprint(model.config, dtype=model.dtype, device=model.device.type) for model in pair.models),
        context=longest + pair.call["max_new_tokens"],
        batch=batch,
        num_draft_tokens=config.max_draft_tokens,
        prompt=longest,
        sampled=pair.call["do_sample"],
        target_int4=is_4bit(target),
        draft_int4=any(map(is_4bit, drafts)),
    )


def _sample(pair: Pair, prompt: Prompt, ids: list[int]) -> Sample:
    """What one prompt came to, with the likeliest tokens at each place."""
    pair.seat.watch = True
    texts, stats, _ = pair.generate(pair.engines[SPECULATIVE], [ids], 0)
    pair.seat.watch = False

    def named(likeliest: list[tuple[int, float]]) -> list[tuple[str, float]]:
        return [(pair.tokenizer.decode([token]), round(probability, 4)) for token, probability in likeliest]

    origins = [origin for step in stats.per_row[0].steps for origin in step.origins()]
    tokens = [
        SampleToken(text, origin, named(target), named(draft))
        for text, origin, (target, draft) in zip(
            pieces(pair.tokenizer, texts[0]), origins, pair.seat.watched, strict=True
        )
    ]
    return Sample(prompt.id, prompt.turns[0][-SAMPLE_CHARACTERS:], tokens)


def _costs(config: ExperimentConfig, pair: Pair, prompts: list[list[int]]) -> Costs | None:
    """Steps of every width, 0 … K drafted ids, in interleaved rounds; None where the texts are too short to tell."""
    context = context_of(pair.target)
    room = (context or 2**62) - max(map(len, prompts))
    steps: dict[int, list[Any]] = {k: [] for k in range(config.max_draft_tokens + 1)}
    started = time.perf_counter()
    for index in range(COST_ROUNDS):
        if index and time.perf_counter() - started > COST_SECONDS:
            break
        for k, timed in steps.items():
            changes = {"num_assistant_tokens": k} if k else {}
            length = min(max(COST_STEPS * (k + 1), COST_TOKENS), room)
            drafter = pair.engines[SPECULATIVE] if k else NoDrafter()
            _, stats, _ = pair.generate(drafter, prompts, 0, max_new_tokens=length, **changes)
            assert stats.timing is not None
            timed += [step for at, step in enumerate(stats.timing.steps) if _is_typical(at, stats.per_row, k, length)]
    if not all(steps.values()):
        return None
    draft, target, verification, other = (
        [statistics.median(getattr(step, part) for step in timed) for timed in steps.values()]
        for part in ("draft_s", "target_s", "verification_s", "other_s")
    )
    return Costs(len(prompts), [0.0, *draft[1:]], target, verification, other)


def _is_typical(index: int, rows: list[Stats], k: int, length: int) -> bool:
    """Whether all rows took part in the step, with room for k ids; the first one, where drafts read their prompts, is not."""
    if index == 0 or any(index >= len(row.steps) - 1 for row in rows):
        return False
    return all(length - sum(step.emitted for step in row.steps[:index]) > k for row in rows)
