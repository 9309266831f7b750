"""Cost of Stats.timing: interleaved calls with and without it, on the embedded pair; the last line is one JSON object.

    python scripts/bench_timing.py --output benchmarks/results/bench_timing.json

The noise of a machine is larger than the cost, so it is measured in two ways: the median of paired ratios of whole
calls, with its interval, and the time of the marks alone against a step.
"""

import argparse
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
from common.interleaved import interleave, median_with_interval
from common.report import emit
from rich.console import Console
from rich.progress import Progress

import specdec
from specdec.core.timing import STEP_PARTS, StepTimer
from specdec.runtime.loading import load, load_tokenizer
from specdec.utils import embedded
from specdec.utils.provenance import provenance

MARKS = 20_000
WARM_UP_ROUNDS = 3


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
        # one model for both: where weights lie in memory matters more than a mark
        specdec.enable(target, draft, num_draft_tokens=5, timing=timing)
        started = time.perf_counter()
        target.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=1)
        return time.perf_counter() - started

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("calls", total=2 * (args.rounds + WARM_UP_ROUNDS))
        spent = interleave(
            {timing: lambda _, timing=timing: seconds(timing) for timing in (False, True)},
            args.rounds,
            warm_up=WARM_UP_ROUNDS,
            on_call=lambda *_: progress.advance(task),
        )
    ratio, interval = median_with_interval([[a / b] for a, b in zip(spent[True], spent[False], strict=True)])
    seconds(True)
    stats = specdec.last_stats(target)
    step_s = statistics.median(sum(asdict(step).values()) for step in stats.timing.steps)
    timer, started = StepTimer(torch.device(args.device)), time.perf_counter()
    for _ in range(MARKS):
        timer.mark("draft")
    mark_s = (time.perf_counter() - started) / MARKS
    report = {
        "provenance": origin,
        "calls": {
            "ratio": round(ratio, 5),
            "interval": [round(value, 5) for value in interval],
            "rounds": args.rounds,
        },
        "marks": {
            "mark_us": round(1e6 * mark_s, 3),
            "step_us": round(1e6 * step_s, 1),
            "share_of_a_step": round(len(STEP_PARTS) * mark_s / step_s, 6),
        },
    }
    emit(report, args.output)


if __name__ == "__main__":
    main()
