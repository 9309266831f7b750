"""`specdec demo`: one text of the embedded pair as it comes, then the same with and without drafting, timed."""

from __future__ import annotations

import json
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from specdec.drafters.head_checkpoint import EAGLE3
from specdec.generation.enable import state_of
from specdec.utils import embedded
from specdec_cli.bench import PLAIN, SPECULATIVE, STOCK, Engine, Measured, make_report, measure, table
from specdec_cli.options import Options
from specdec_cli.setup import Pair, enable, generation_arguments, load_pair
from specdec_cli.stream import describe_k, legend, warm_up, write_answer, writer

PROMPT = "mailbox-9"
ROUNDS = 3


def run(options: Options) -> int:
    """Complete one prompt with each engine and compare them; 1 where greedy texts differ."""
    if options.device == "cpu":
        torch.set_num_threads(1)  # a model as small gains nothing from more, and threads on busy cores wait long
    drafter = str(embedded.EAGLE3) if options.drafter == EAGLE3 else options.drafter or str(embedded.DRAFT)
    options.model, options.drafter = str(embedded.TARGET), drafter
    options.dtype = options.dtype or "float32"
    options.top_p = options.top_k = options.min_p = None
    options.rounds, options.batch = ROUNDS, (1,)
    if options.prompt is None:
        options.prompt = next(prompt["prompt"] for prompt in embedded.prompts() if prompt["id"] == PROMPT)
    if not options.prompt.strip():
        raise ValueError("--prompt is empty; give it at least one word")
    pair = load_pair(options)
    inputs = dict(pair.tokenizer(options.prompt, return_tensors="pt").to(pair.model.device))
    arguments = generation_arguments(options, pair.tokenizer)
    enable(pair, options)
    is_compiled = state_of(pair.model).target.compiled is not None
    if not options.json:
        show_text(pair, inputs, arguments, options)
    k = options.num_draft_tokens
    engines = [Engine(STOCK), Engine(PLAIN, compile=False), Engine(SPECULATIVE, k, compile=False)]
    if is_compiled:
        engines += [Engine(PLAIN), Engine(SPECULATIVE, k)]
    results = measure(pair, engines, [inputs], arguments, ROUNDS, options.seed)
    report = make_report(options, pair, results) | figures(options, pair, results)
    if options.json:
        print(json.dumps(report))
    else:
        show(report, results[2], is_compiled)
    return 1 if report["identical"] is False else 0


def show_text(pair: Pair, inputs: dict[str, Any], arguments: dict[str, Any], options: Options) -> None:
    """The prompt, and the text as it comes, with the origin of each token."""
    console = Console(highlight=False)
    warm_up(pair, inputs, arguments)
    console.print(Text(options.prompt, style="dim"), end="", soft_wrap=True)
    answer = write_answer(pair, inputs, arguments, options.seed, writer(shows_drafts=True))
    console.print("\n")
    if answer.is_interrupted:
        raise KeyboardInterrupt
    for line in legend(answer.origins, console):
        console.print(line)
    console.print()


def figures(options: Options, pair: Pair, results: list[Measured]) -> dict[str, Any]:
    """What --json prints of the demo itself; the speculative text and its counts are those of the eager run."""
    speculative = results[2]
    stats = speculative.stats
    return {
        "prompt": options.prompt,
        "text": pair.tokenizer.decode(speculative.texts[0][0], skip_special_tokens=True),
        "tokens": len(speculative.texts[0][0]),
        "num_draft_tokens": options.num_draft_tokens,
        "speedup": speculative.speedup(results[1]).value,
        "mean_acceptance_length": stats.mean_acceptance_length,
        "tokens_per_step": stats.tokens_per_step,
        "draft_acceptance_rate": stats.draft_acceptance_rate,
        "expected_acceptance": stats.expected_acceptance,
        "acceptance_histogram": stats.acceptance_histogram,
        "identical": None if options.temperature > 0 else all(result.texts == speculative.texts for result in results),
    }


def show(report: dict[str, Any], speculative: Measured, is_compiled: bool) -> None:
    """Print the table, the acceptance, and whether the texts are identical."""
    console = Console(highlight=False)
    console.print(table(report["results"], report))
    length, rate = report["mean_acceptance_length"], report["draft_acceptance_rate"]
    k = describe_k(report["num_draft_tokens"], speculative.steps)
    console.print(f"mean acceptance length: {'nothing was drafted' if length is None else f'{length:.2f}'} ({k})")
    console.print(f"tokens per step, steps without a draft included: {report['tokens_per_step']:.2f}")
    console.print(f"draft acceptance rate: {'nothing was drafted' if rate is None else f'{rate:.1%}'}")
    identical = {True: "yes", False: "no", None: "not compared, the text is sampled"}[report["identical"]]
    style = {True: "bold green", False: "bold red", None: ""}[report["identical"]]
    console.print(f"identical: {identical}", style=style)
    if not is_compiled and report["device"] == "cpu":
        console.print(
            "Compiled forwards are what makes a small model fast on a CPU. They are not built for this machine yet:"
            " `specdec demo --compile` does it, once, in about a minute, and shows what they bring."
        )
