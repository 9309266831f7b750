"""What Stats.timing costs: calls with it and without it in turns, on the embedded pair; one JSON line last.

    python scripts/bench_clock.py --output benchmarks/results/bench_clock.json

A machine's noise is larger than what is measured, so it is looked at twice: the median of paired ratios of whole calls, with its
interval, and the cost of the marks alone against a step.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

import specdec
from specdec.core.timing import STEP_PARTS, StepTimer
from specdec.runtime.loading import load, load_tokenizer
from specdec.utils import embedded
from specdec.utils.provenance import provenance

MARKS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    args = parser.parse_args()
    origin = provenance(args.device)
    tokenizer = load_tokenizer(str(embedded.TARGET))
    inputs = tokenizer(embedded.prompts()[0]["prompt"], return_tensors="pt").to(args.device)
    folders = embedded.TARGET, embedded.DRAFT
    target, draft = (load(str(folder), "float32", args.device) for folder in folders)

    def seconds(timing: bool) -> float:
        specdec.enable(
            target, draft, num_draft_tokens=5, timing=timing
        )  # one and the same model: where weights lie matters more than a mark
        started = time.perf_counter()
        target.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=1)
        return time.perf_counter() - started

    ratios = []
    for index in track(range(args.rounds + 3), description="calls", console=Console(stderr=True)):
        first = bool(index % 2)  # each of them first in turn
        spent = {first: seconds(first), (not first): seconds(not first)}
        if index >= 3:
            ratios.append(spent[True] / spent[False])
    seconds(True)
    stats = specdec.last_stats(target)
    step_s = statistics.median(sum(asdict(step).values()) for step in stats.timing.steps)
    clock, started = StepTimer(torch.device(args.device)), time.perf_counter()
    for _ in range(MARKS):
        clock.mark("draft")
    mark_s = (time.perf_counter() - started) / MARKS
    draws = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
    report = {
        "provenance": origin,
        "calls": {
            "ratio": round(statistics.median(ratios), 5),
            "interval": [round(float(value), 5) for value in np.quantile(draws, [0.025, 0.975])],
            "rounds": args.rounds,
        },
        "marks": {
            "mark_us": round(1e6 * mark_s, 3),
            "step_us": round(1e6 * step_s, 1),
            "share_of_a_step": round(len(STEP_PARTS) * mark_s / step_s, 6),
        },
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
