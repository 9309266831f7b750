"""`specdec bench MODEL`: transformers' loops, plain decoding and speculation side by side."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import specdec
from specdec.core.stats import Stats
from specdec.core.steps import RowStep
from specdec.drafters.model import ModelDrafter
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.resolve import AUTO
from specdec.experiments.report.estimates import MIN_UNITS, Estimate, resample_sums, with_bootstrap
from specdec.generation.enable import state_of
from specdec.generation.inspection import stock_loop
from specdec.runtime.prepare import Compile
from specdec.utils.provenance import provenance
from specdec_cli.audit_lossless import prompt_ids, workload_of
from specdec_cli.options import Options
from specdec_cli.setup import Pair, generation_arguments, load_pair

STOCK, ASSISTED = "transformers", "transformers assisted"
PLAIN, SPECULATIVE = "specdec plain", "specdec speculative"
MAX_PROMPT_TOKENS = 256


@dataclass(frozen=True)
class Engine:
    """A way to decode. num_draft_tokens: None where nothing is drafted. compile: as in specdec.enable()."""

    name: str
    num_draft_tokens: int | str | None = None
    compile: Compile = "auto"

    @property
    def label(self) -> str:
        return self.name if self.num_draft_tokens is None else f"{self.name}, K={self.num_draft_tokens}"


@dataclass
class Measured:
    """What an engine did with the prompts. seconds: by round, then by call. texts: of each row, up to its stop.

    is_compiled: whether the target's forwards ran compiled.
    """

    engine: Engine
    batch: int
    is_compiled: bool = False
    seconds: list[list[float]] = field(default_factory=list)
    texts: list[list[list[int]]] = field(default_factory=list)
    steps: list[RowStep] = field(default_factory=list)

    @property
    def call_seconds(self) -> Any:
        """[calls], the median over rounds."""
        return np.median(np.array(self.seconds), axis=0)

    @property
    def call_tokens(self) -> Any:
        """[calls], new tokens of all rows."""
        return np.array([sum(map(len, rows)) for rows in self.texts])

    @property
    def tokens_per_second(self) -> float:
        return float(self.call_tokens.sum() / self.call_seconds.sum())

    @property
    def stats(self) -> Stats:
        return Stats.of(self.steps, max((step.requested for step in self.steps), default=0), 0)

    def speedup(self, plain: Measured) -> Estimate:
        """Tokens per second over those of plain decoding.

        The interval resamples calls, each with the median of its rounds; of too few calls it is the range of rounds.
        """
        sums = np.stack([self.call_tokens, self.call_seconds, plain.call_tokens, plain.call_seconds], axis=1)
        value = float(_ratio(sums.sum(0)))
        if not is_range(len(sums)):
            estimate = with_bootstrap(value, _ratio(resample_sums(sums)), len(sums))
            if estimate.low is not None:  # None: all calls have the same ratio
                return estimate
        rounds = [
            float(_ratio(np.array([self.call_tokens.sum(), sum(own), plain.call_tokens.sum(), sum(other)])))
            for own, other in zip(self.seconds, plain.seconds, strict=True)
        ]
        return Estimate(value, min(value, *rounds), max(value, *rounds), len(sums))


def is_range(calls: int) -> bool:
    """Whether so few calls have the range of rounds instead of an interval."""
    return calls < MIN_UNITS


def _ratio(sums: Any) -> Any:
    """Tokens / seconds over tokens / seconds of plain decoding, from sums [..., 4]."""
    return sums[..., 0] / sums[..., 1] / (sums[..., 2] / sums[..., 3])


def run(options: Options) -> int:
    """Measure and compare; 0, since a slow setting is a result."""
    import_module("scipy.special")  # the intervals need it: without it, say so before anything is measured
    if min(options.batch) < 1:
        raise ValueError(f"--batch {','.join(map(str, options.batch))} must be whole numbers, 1 or more")
    if options.drafter == "none":
        raise ValueError(
            "--drafter none drafts nothing, so there is nothing to compare; plain decoding is always measured"
        )
    options.top_p = options.top_k = options.min_p = None
    num_prompts = max(options.max_prompts, *options.batch)
    workload = workload_of(options.prompts)
    pair = load_pair(options)
    prompts = prompt_ids(workload, pair.tokenizer, MAX_PROMPT_TOKENS)[:num_prompts]
    if len(prompts) < max(options.batch):
        where = options.prompts or "the embedded set"
        raise ValueError(f"--batch {max(options.batch)} needs as many prompts, and {where} has {len(prompts)}")
    arguments = generation_arguments(options, pair.tokenizer)
    results: list[Measured] = []
    for batch in options.batch:
        calls = [prompts[start : start + batch] for start in range(0, len(prompts) - batch + 1, batch)]
        engines = engines_of(pair, options.num_draft_tokens, batch, True if options.compile else "auto")
        inputs = [left_padded(call, pair) for call in calls]
        results += measure(pair, engines, inputs, arguments, options.rounds, options.seed)
    report = make_report(options, pair, results)
    if options.json:
        print(json.dumps(report))
    else:
        console = Console(highlight=False)
        for batch in options.batch:
            console.print(table([row for row in report["results"] if row["batch"] == batch], report))
        for sentence in report["verdict"]:
            console.print(sentence)
    return 0


def engines_of(pair: Pair, num_draft_tokens: Sequence[int | str], batch: int, compile: Compile) -> list[Engine]:
    """What is compared: transformers' assisted loop takes one row, and a draft model or prompt lookup."""
    drafter = pair.drafter
    is_assisted = batch == 1 and type(drafter) in (ModelDrafter, PromptLookup)
    engines = [Engine(STOCK)]
    engines += [Engine(ASSISTED, k) for k in num_draft_tokens if is_assisted and not _needs_number(drafter, k)]
    return [*engines, Engine(PLAIN, None, compile), *(Engine(SPECULATIVE, k, compile) for k in num_draft_tokens)]


def _needs_number(drafter: Any, k: int | str) -> bool:
    return isinstance(drafter, PromptLookup) and k == AUTO


def left_padded(prompts: Sequence[Sequence[int]], pair: Pair) -> dict[str, Tensor]:
    """Ids and mask [B, P] of prompts."""
    inputs = pair.tokenizer.pad({"input_ids": [list(prompt) for prompt in prompts]}, return_tensors="pt")
    return {name: inputs[name].to(pair.model.device) for name in ("input_ids", "attention_mask")}


def measure(
    pair: Pair,
    engines: Sequence[Engine],
    calls: Sequence[dict[str, Tensor]],
    arguments: dict[str, Any],
    rounds: int,
    seed: int,
) -> list[Measured]:
    """Run all calls by each engine, in interleaved rounds behind a warm-up, with a bar of progress."""
    batch = len(calls[0]["input_ids"])
    results = [Measured(engine, batch) for engine in engines]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=(rounds + 1) * len(engines))
        for round_index in range(rounds + 1):
            for result in results:
                when = f"round {round_index} of {rounds}" if round_index else "warm-up"
                progress.update(task, description=f"batch {batch}, {when}: {result.engine.label}")
                _run_round(pair, result, calls, arguments, seed, is_warm_up=round_index == 0)
                progress.advance(task)
    return results


def _run_round(
    pair: Pair,
    result: Measured,
    calls: Sequence[dict[str, Tensor]],
    arguments: dict[str, Any],
    seed: int,
    is_warm_up: bool,
) -> None:
    """Run the calls once; of a warm-up the first alone, and nothing is kept."""
    model: Any = pair.model
    seconds, texts, steps = [], [], []
    with prepared(pair, result.engine) as more:
        result.is_compiled = state_of(model).target.compiled is not None
        for call in calls[:1] if is_warm_up else calls:
            torch.manual_seed(seed)
            _synchronize(model)
            started = time.perf_counter()
            output = model.generate(**call, **arguments, **more)
            _synchronize(model)
            seconds.append(time.perf_counter() - started)
            texts.append(_answers(output[:, call["input_ids"].shape[1] :].tolist(), model))
            stats = specdec.last_stats(model) if result.engine.name in (PLAIN, SPECULATIVE) else None
            steps += [step for row in stats.per_row for step in row.steps] if stats else []
    if not is_warm_up:
        result.seconds.append(seconds)
        result.texts, result.steps = texts, steps


@contextmanager
def prepared(pair: Pair, engine: Engine) -> Iterator[dict[str, Any]]:
    """Within, the pair's target decodes by an engine; yields the arguments that generate() takes in addition."""
    model, drafter, k = pair.model, pair.drafter, engine.num_draft_tokens
    if engine.name in (PLAIN, SPECULATIVE):
        specdec.enable(model, drafter if k is not None else "none", num_draft_tokens=k or AUTO, compile=engine.compile)
        yield {}
        return
    specdec.enable(model, "none", compile=False)
    more: dict[str, Any] = {}
    if engine.name == ASSISTED and isinstance(drafter, PromptLookup):
        more = {"prompt_lookup_num_tokens": k}
    elif engine.name == ASSISTED:
        more = {"assistant_model": drafter.runner.model}  # type: ignore[attr-defined]
    with stock_loop(model), _assisting(more.get("assistant_model"), k):
        yield more


@contextmanager
def _assisting(draft: Any, num_draft_tokens: int | str | None) -> Iterator[None]:
    """Within, transformers drafts so many tokens a step with this model; with "auto", by its own schedule.

    Its loop reads and changes the draft model's generation config, which is set back.
    """
    if draft is None:
        yield
        return
    before, draft.generation_config = draft.generation_config, copy.deepcopy(draft.generation_config)
    if isinstance(num_draft_tokens, int):
        draft.generation_config.num_assistant_tokens = num_draft_tokens
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
    try:
        yield
    finally:
        draft.generation_config = before


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _answers(rows: list[list[int]], model: Any) -> list[list[int]]:
    """New ids of each row up to its EOS id, which is counted."""
    eos = model.generation_config.eos_token_id
    stops = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    return [row[: next((i + 1 for i, token in enumerate(row) if token in stops), len(row))] for row in rows]


def make_report(options: Options, pair: Pair, results: Sequence[Measured]) -> dict[str, Any]:
    """What --json prints."""
    rows = []
    for result in results:
        plain = next(row for row in results if row.batch == result.batch and row.engine.name == PLAIN)
        speedup, stats = result.speedup(plain), result.stats
        texts = [text for rows_of_call in result.texts for text in rows_of_call]
        others = [text for rows_of_call in plain.texts for text in rows_of_call]
        rows.append(
            {
                "engine": result.engine.name,
                "is_compiled": result.is_compiled,
                "batch": result.batch,
                "num_draft_tokens": result.engine.num_draft_tokens,
                "tokens_per_second": result.tokens_per_second,
                "speedup": speedup.value,
                "speedup_low": speedup.low,
                "speedup_high": speedup.high,
                "calls": len(result.texts),
                "mean_acceptance_length": stats.mean_acceptance_length,
                "draft_acceptance_rate": stats.draft_acceptance_rate,
                "texts": len(texts),
                "identical": None
                if options.temperature > 0
                else sum(a == b for a, b in zip(texts, others, strict=True)),
                "call_seconds": result.seconds,
            }
        )
    return {
        "model": options.model,
        "drafter": options.drafter,
        "dtype": str(pair.model.dtype).removeprefix("torch."),
        "device": options.device,
        "temperature": options.temperature,
        "max_new_tokens": options.max_new_tokens,
        "rounds": options.rounds,
        "provenance": provenance(options.device),
        "results": rows,
        "verdict": [verdict(batch, rows) for batch in options.batch],
    }


def verdict(batch: int, rows: Sequence[dict[str, Any]]) -> str:
    """Whether speculation pays in this batch size, in words."""
    drafted = [row for row in rows if row["batch"] == batch and row["engine"] == SPECULATIVE]
    best = max(drafted, key=lambda row: row["speedup"])
    where = f"Batch {batch}"
    measured = f"{best['speedup']:.2f}×{between(best)} plain decoding"
    if best["speedup_low"] > 1:
        return f"{where}: drafting pays, most with K={best['num_draft_tokens']}: {measured}."
    if best["speedup_high"] < 1:
        return f"{where}: no setting pays; the best, K={best['num_draft_tokens']}, reaches {measured}."
    return (
        f"{where}: no clear difference; the best setting, K={best['num_draft_tokens']}, reaches {measured}."
        " More prompts (--max-prompts) or rounds tell more."
    )


def between(row: dict[str, Any]) -> str:
    """ " (1.10 to 1.32)"."""
    return f" ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"


def table(rows: Sequence[dict[str, Any]], report: dict[str, Any]) -> Table:
    """The results of one batch size."""
    batch, calls = rows[0]["batch"], rows[0]["calls"]
    how = f"{report['dtype']} on {report['device']}"
    has_range = is_range(calls)
    what = f"{calls} call{'s' if calls > 1 else ''} of up to {report['max_new_tokens']} tokens"
    result = Table(
        title=f"batch {batch}, {what}, {how}",
        caption=f"medians of {report['rounds']} interleaved rounds; × is relative to {PLAIN}, its "
        + ("range that of the rounds" if has_range else "95 % interval over calls")
        + "; τ: mean acceptance length, tokens of a step that drafts",
        caption_justify="left",
    )
    result.add_column("engine", no_wrap=True)
    for name in ("K", "tokens/s", "×", "range" if has_range else "95 %", "τ", "same text"):
        result.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        length, k = row["mean_acceptance_length"], row["num_draft_tokens"]
        is_plain = row["engine"] == PLAIN and row["speedup"] == 1  # what the others are compared with
        same = "" if row["identical"] is None or is_plain else f"{row['identical']} of {row['texts']}"
        result.add_row(
            f"{row['engine'].removeprefix('specdec ')}, compiled" if row["is_compiled"] else row["engine"],
            "" if k is None else str(k),
            f"{row['tokens_per_second']:,.1f}",
            f"{row['speedup']:.2f}",
            "" if is_plain else f"{row['speedup_low']:.2f}–{row['speedup_high']:.2f}",
            "" if length is None else f"{length:.2f}",
            same,
        )
    return result
