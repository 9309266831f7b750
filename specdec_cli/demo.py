"""`specdec demo` and `specdec generate`: one prompt, completed by transformers, by the plain loop and speculatively."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

import specdec
from specdec.core.stats import Stats
from specdec.drafters.head_checkpoint import EAGLE3
from specdec.drafters.resolve import load_drafter
from specdec.runtime.loading import load, load_tokenizer
from specdec.utils import embedded
from specdec.utils.text import pieces

DEMO_PROMPT = "queue-3"
ROUNDS = 3
STOCK, PLAIN, SPECULATIVE = "transformers generate()", "specdec, plain loop", "specdec, speculative"
STYLES = {"accepted": "green", "recovered": "bold red", "bonus": "bold blue underline", "plain": ""}
MARKS = {"accepted": ("", ""), "recovered": ("⟨", "⟩"), "bonus": ("⟦", "⟧"), "plain": ("", "")}


@dataclass(frozen=True)
class Measurement:
    """The new ids of each engine's last round, its tokens per second (median), and the statistics of speculation."""

    ids: dict[str, Tensor]
    tokens_per_second: dict[str, float]
    stats: Stats

    @property
    def is_identical(self) -> bool:
        """Whether all engines wrote the same ids."""
        first, *others = self.ids.values()
        return all(torch.equal(first, other) for other in others)


def run(options: argparse.Namespace) -> int:
    """Complete one prompt with three engines, in interleaved rounds, and compare them; 1 where greedy texts differ."""
    if options.model is None and options.drafter == EAGLE3:
        options.drafter = str(embedded.EAGLE3)
    options.model, options.drafter = options.model or str(embedded.TARGET), options.drafter or str(embedded.DRAFT)
    if options.prompt is None:
        options.prompt = next(prompt["prompt"] for prompt in embedded.prompts() if prompt["id"] == DEMO_PROMPT)
    dtype = options.dtype or ("float32" if options.device == "cpu" or options.command == "demo" else "auto")
    stderr = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def describe(text: str) -> None:
            progress.update(task, description=text)

        describe(f"loading {options.model}")
        model: Any = load(options.model, dtype, options.device)
        tokenizer = load_tokenizer(options.model)
        describe(f"loading {options.drafter}")
        drafter = load_drafter(options.drafter, model, dtype)
        measured = measure(options, model, tokenizer, drafter, describe)

    report = make_report(options, model, tokenizer, measured)
    if options.json:
        print(json.dumps(report))
    else:
        origins = [origin for step in measured.stats.per_row[0].steps for origin in step.origins()]
        show(report, pieces(tokenizer, measured.ids[SPECULATIVE].tolist()), origins, Console())
    return 1 if report["identical"] is False else 0


def measure(
    options: argparse.Namespace, model: Any, tokenizer: Any, drafter: Any, describe: Callable[[str], None]
) -> Measurement:
    """Time transformers' loop, the plain loop and speculation in turns; the first round warms up."""
    inputs = tokenizer(options.prompt, return_tensors="pt").to(options.device)
    prompt_length = inputs["input_ids"].shape[1]
    if prompt_length == 0:
        raise ValueError("the prompt is empty; pass some text with --prompt")
    call: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": options.temperature > 0}
    if options.temperature > 0:
        call["temperature"] = options.temperature
    if tokenizer.pad_token_id is not None:
        call["pad_token_id"] = tokenizer.pad_token_id
    engines: dict[str, Callable[[], Any]] = {
        STOCK: lambda: specdec.enable(model),  # without a drafter the stock loop runs; the pair's cost model is kept
        PLAIN: lambda: specdec.enable(model, "none"),
        SPECULATIVE: lambda: specdec.enable(model, drafter, num_draft_tokens=options.num_draft_tokens),
    }
    ids: dict[str, Tensor] = {}
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for round_index in range(ROUNDS + 1):
        for name, prepare in engines.items():
            describe(f"{name}, round {round_index} of {ROUNDS}" if round_index else f"warm-up: {name}")
            prepare()
            torch.manual_seed(options.seed)
            started = time.perf_counter()
            ids[name] = model.generate(**inputs, **call)[0, prompt_length:]
            rates[name].append(len(ids[name]) / (time.perf_counter() - started))
    stats = specdec.last_stats(model)
    assert stats is not None
    return Measurement(ids, {name: statistics.median(values[1:]) for name, values in rates.items()}, stats)


def make_report(options: argparse.Namespace, model: Any, tokenizer: Any, measured: Measurement) -> dict[str, Any]:
    """What --json prints."""
    stats, rates, ids = measured.stats, measured.tokens_per_second, measured.ids[SPECULATIVE]
    return {
        "model": options.model,
        "draft": options.drafter,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": options.device,
        "num_draft_tokens": options.num_draft_tokens,
        "choice": None if stats.choice is None else str(stats.choice),
        "temperature": options.temperature,
        "prompt": options.prompt,
        "text": tokenizer.decode(ids, skip_special_tokens=True),
        "tokens": len(ids),
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "speedup": round(rates[SPECULATIVE] / rates[PLAIN], 3),
        "mean_acceptance_length": stats.mean_acceptance_length,
        "tokens_per_step": stats.tokens_per_step,
        "draft_acceptance_rate": stats.draft_acceptance_rate,
        "expected_acceptance": stats.expected_acceptance,
        "acceptance_histogram": stats.acceptance_histogram,
        "identical": measured.is_identical if options.temperature == 0 else None,
    }


def show(report: dict[str, Any], pieces: list[str], origins: list[str], console: Console) -> None:
    """Print the text by origin, the table, and whether the texts are identical."""
    has_no_colour = console.no_color or console.color_system is None

    def marked(text: str, origin: str) -> Text:
        if not has_no_colour:
            return Text(text, style=STYLES[origin])
        before, after = MARKS[origin]  # around the visible part, so that line breaks and indents stay where they are
        core = text.strip()
        start = text.find(core) if core else 0
        return Text(f"{text[:start]}{before}{core}{after}{text[start + len(core) :]}")

    generated = (marked(piece, origin) for piece, origin in zip(pieces, origins, strict=True))
    console.print(Text.assemble(Text(report["prompt"], style="dim"), *generated), soft_wrap=True)
    console.print()
    counts = [
        Text.assemble(marked(name, name), f" {origins.count(name)}  {meaning}")
        for name, meaning in (
            ("accepted", "the draft's, accepted"),
            ("recovered", "the target's, after a rejection"),
            ("bonus", "the target's, after a draft accepted in full"),
        )
    ]
    for line in counts:
        console.print(line)
    console.print()

    table = Table(
        title=f"{report['tokens']} tokens, K={report['num_draft_tokens']}, {report['dtype']} on {report['device']}"
    )
    table.add_column("median of 3 interleaved rounds")
    table.add_column("tokens/s", justify="right")
    table.add_column("× plain loop", justify="right")
    baseline = report["tokens_per_second"][PLAIN]
    for name, rate in report["tokens_per_second"].items():
        table.add_row(name, f"{rate:.1f}", f"{rate / baseline:.2f}")
    console.print(table)
    console.print(f"speedup: {report['speedup']:.2f}×")
    if report["choice"]:
        console.print(report["choice"])
    length, rate = report["mean_acceptance_length"], report["draft_acceptance_rate"]
    console.print(f"mean acceptance length: {'nothing was drafted' if length is None else f'{length:.2f}'}")
    console.print(f"tokens per step, steps without a draft included: {report['tokens_per_step']:.2f}")
    console.print(f"draft acceptance rate: {'nothing was drafted' if rate is None else f'{rate:.1%}'}")
    identical = {True: "yes", False: "no", None: "not compared, the text is sampled"}[report["identical"]]
    console.print(
        f"identical: {identical}", style={True: "bold green", False: "bold red", None: ""}[report["identical"]]
    )
