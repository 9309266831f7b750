"""Calibration calls, which count in no figure: warm-up, peak memory, a sample, and step times by K."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel

from specdec.core.stats import Stats
from specdec.core.timing import STEP_PARTS
from specdec.drafters.heads import DraftHead
from specdec.drafters.none import NoDrafter
from specdec.experiments.config import ExperimentConfig
from specdec.experiments.pair import Likeliest, Pair
from specdec.experiments.records import SPECULATIVE, Costs, Memory, RecordFile, Run, Sample, SampleToken
from specdec.experiments.workloads import Prompt
from specdec.planning.footprint import footprint_of_head, measure_footprint
from specdec.planning.formulas import ModelFootprint
from specdec.planning.memory import MemoryPlan, plan_memory
from specdec.planning.peak_memory import PeakMemory
from specdec.quant.layers import is_4bit
from specdec.runtime.runner import context_of
from specdec.utils.text import pieces

WARM_UP_TOKENS = 8
SAMPLE_CHARACTERS = 400  # of the prompt's end
COST_ROUNDS = 10  # the repetitions of Costs; predictions have an interval from MIN_UNITS on
MAX_COST_S = 30.0  # no further round begins after so many seconds
READ_ROUNDS, MAX_READ_BYTES = 6, 1 << 30
MIN_COST_STEPS = 3  # of a call, if every draft is accepted
MIN_COST_TOKENS = 12  # of a call


def calibrate(
    config: ExperimentConfig,
    pair: Pair,
    first_batch: list[tuple[Prompt, list[int]]],
    file: RecordFile | None,
    previous: Run | None,
    show_status: Callable[[str], None],
) -> None:
    """Call every engine once, then measure what the records don't contain yet.

    file: where measurements are written; None in all processes but the main one. previous: the run that is resumed.
    """
    prompts = [ids for _, ids in first_batch]
    for drafter in pair.engines.values():
        pair.generate(drafter, prompts, 0, max_new_tokens=min(WARM_UP_TOKENS, pair.call["max_new_tokens"]))
    if file is None or SPECULATIVE not in pair.engines:
        return
    if previous is None or previous.memory is None:
        show_status("memory")
        file.write(_memory(config, pair, prompts))
    if previous is None or previous.sample is None:
        show_status("sample")
        file.write(_sample(pair, *first_batch[0]))
    if previous is None or previous.costs is None:
        show_status("step costs")
        if costs := _costs(config, pair, prompts):
            file.write(costs)


def _memory(config: ExperimentConfig, pair: Pair, prompts: list[list[int]]) -> Memory:
    predicted, unplanned = {}, None
    try:
        predicted = asdict(_plan(config, pair, max(map(len, prompts)), len(prompts)))
    except (ValueError, RuntimeError) as error:  # a model whose memory can't be predicted can still run
        unplanned = str(error).partition("\n")[0]
    with PeakMemory(pair.target.device, *pair.models) as peak:
        pair.generate(pair.engines[SPECULATIVE], prompts, 0)
    return Memory(predicted, peak.bytes, unplanned)


def _plan(config: ExperimentConfig, pair: Pair, prompt_length: int, batch_size: int) -> MemoryPlan:
    target, *drafts = pair.models
    return plan_memory(
        *map(_footprint, pair.models),
        context=prompt_length + pair.call["max_new_tokens"],
        batch=batch_size,
        num_draft_tokens=config.max_draft_tokens,
        prompt=prompt_length,
        sampled=pair.call["do_sample"],
        target_int4=is_4bit(target),
        draft_int4=any(map(is_4bit, drafts)),
    )


def _footprint(model: PreTrainedModel) -> ModelFootprint:
    if isinstance(model, DraftHead):
        return footprint_of_head(model, "draft head", model.dtype, model.device.type)
    return measure_footprint(model.config, dtype=model.dtype, device=model.device.type)


def _sample(pair: Pair, prompt: Prompt, ids: list[int]) -> Sample:
    """The tokens generated for one prompt, with the likeliest tokens of both models at each position."""
    pair.switch.record = True
    texts, stats, _ = pair.generate(pair.engines[SPECULATIVE], [ids], 0)
    pair.switch.record = False

    def decoded(likeliest: Likeliest) -> list[tuple[str, float]]:
        return [(pair.tokenizer.decode([token]), round(probability, 4)) for token, probability in likeliest]

    token_texts = pieces(pair.tokenizer, texts[0])
    origins = [origin for step in stats.per_row[0].steps for origin in step.origins()]
    tokens = [
        SampleToken(text, origin, decoded(target), decoded(draft))
        for text, origin, (target, draft) in zip(token_texts, origins, pair.switch.recorded, strict=True)
    ]
    return Sample(prompt.id, prompt.turns[0][-SAMPLE_CHARACTERS:], tokens)


def _costs(config: ExperimentConfig, pair: Pair, prompts: list[list[int]]) -> Costs | None:
    """Step times for each K from 0, in interleaved rounds; None where the texts have too few steps."""
    max_length = (context_of(pair.target) or 2**62) - max(map(len, prompts))
    rounds: list[list[list[float]]] = []  # of each: for each K, the seconds of STEP_PARTS
    started = time.perf_counter()
    while len(rounds) < COST_ROUNDS and (not rounds or time.perf_counter() - started < MAX_COST_S):
        medians = [_median_step(pair, prompts, k, max_length) for k in range(config.max_draft_tokens + 1)]
        if not all(medians):
            return None
        rounds.append(medians)
    draft_s, target_s, verification_s, other_s = (
        [[one_round[k][part] for one_round in rounds] for k in range(config.max_draft_tokens + 1)]
        for part in range(len(STEP_PARTS))
    )
    weights_bytes = _weights_bytes(pair.target)
    read_s = None if weights_bytes is None else _read_s(weights_bytes, pair.target.device)
    draft_s[0] = [0.0] * len(rounds)
    return Costs(len(prompts), draft_s, target_s, verification_s, other_s, weights_bytes, read_s)


def _weights_bytes(model: PreTrainedModel) -> int | None:
    """Bytes of the weights that one forward reads: all but an embedding that is no head; None where it reads a part."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    if any("expert" in name for name in tensors):
        return None
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    embedded = getattr(model.get_input_embeddings(), "weight", None)
    is_head = getattr(head, "weight", None) is embedded
    return sum(tensor.nbytes for tensor in tensors.values() if is_head or tensor is not embedded)


def _read_s(num_bytes: int, device: torch.device) -> float:
    """Seconds to read so many bytes: the fastest of READ_ROUNDS sums of a buffer, of MAX_READ_BYTES at most."""
    buffer = torch.zeros(max(min(num_bytes, MAX_READ_BYTES) // 8, 1), dtype=torch.int64, device=device)
    times = []
    for _ in range(READ_ROUNDS):
        started = time.perf_counter()
        buffer.sum().item()  # waits for the device
        times.append(time.perf_counter() - started)
    return min(times) * num_bytes / buffer.nbytes


def _median_step(pair: Pair, prompts: list[list[int]], k: int, max_length: int) -> list[float]:
    """Median seconds of STEP_PARTS in one call with this K; [] where no step is representative."""
    changes: dict[str, Any] = {"num_assistant_tokens": k} if k else {}
    length = min(max(MIN_COST_STEPS * (k + 1), MIN_COST_TOKENS), max_length)
    drafter = pair.engines[SPECULATIVE] if k else NoDrafter()
    _, stats, _ = pair.generate(drafter, prompts, 0, max_new_tokens=length, **changes)
    assert stats.timing is not None
    steps = [timing for at, timing in enumerate(stats.timing.steps) if _is_representative(at, stats.per_row, k, length)]
    return [statistics.median(getattr(step, f"{part}_s") for step in steps) for part in STEP_PARTS] if steps else []


def _is_representative(step: int, rows: list[Stats], k: int, length: int) -> bool:
    """Whether all rows take part in the step and may draft k ids; never the first step, where drafters read prompts."""
    if step == 0 or any(step >= len(row.steps) - 1 for row in rows):
        return False
    return all(length - sum(earlier.emitted for earlier in row.steps[:step]) > k for row in rows)
