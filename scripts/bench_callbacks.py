"""Cost of callbacks: processors that specdec recognizes, against another checkout; lockstep, against calls without it.

    python scripts/bench_callbacks.py --before 3ecb545 --output benchmarks/results/bench_callbacks.json

The embedded pair, greedy. Each checkout runs in a process of its own; they take turns, in random order. The ratio of a
round is after / before, in steps per second. Processes restart for each block of rounds, since one process is a few per
cent faster than the next. `before` is a commit, checked out into a temporary folder. Lockstep is measured in this
checkout alone: a call with a processor that specdec does not recognize, which returns its scores, against the same call
without it. Medians of rounds, with a 95 % interval from a bootstrap over blocks. The last line is one JSON object.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common.interleaved import interleave, median_with_interval
from common.report import emit
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

ROOT = Path(__file__).parent.parent
DRAFTERS = {"plain": ("none", 1), "draft model K=3": ("model", 3), "prompt lookup K=3": ("prompt_lookup", 3)}
CALLS: dict[str, dict[str, Any]] = {
    "no processors": {},
    "by the scores": {"suppress_tokens": [3, 4, 5]},
    "by the prefix": {"repetition_penalty": 1.1},
}
NUM_PROMPTS = 24


class Unknown(LogitsProcessor):
    """Returns its scores. Not a lambda, whose signature transformers inspects at each position, which takes 0.3 ms."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


class Worker:
    """The embedded pair of the checkout that this process runs, and calls of it."""

    def __init__(self) -> None:
        import specdec

        try:
            from specdec.utils import embedded
        except ImportError:  # a commit from before the packages
            from specdec import embedded

        self.specdec = specdec
        self.tokenizer = AutoTokenizer.from_pretrained(embedded.TARGET, padding_side="left")
        folders = embedded.TARGET, embedded.DRAFT
        self.target, self.draft = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders
        )
        self.prompts = [prompt["prompt"] for prompt in embedded.prompts()]
        self.enabled: Any = None

    def call(
        self, number: int, drafter: str, compile: bool, batch: int, tokens: int, call: dict[str, Any]
    ) -> dict[str, Any]:
        """One call: its seconds, the steps of its loop, and the ids."""
        if self.enabled != (drafter, compile):
            name, k = DRAFTERS[drafter]
            draft: Any = self.draft if name == "model" else name
            self.specdec.enable(self.target, draft, num_draft_tokens=k, compile=compile)
            self.enabled = drafter, compile
        texts = [self.prompts[(number * batch + row) % len(self.prompts)] for row in range(batch)]
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=64)
        started = time.perf_counter()
        text = self.target.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **call
        )
        seconds = time.perf_counter() - started
        stats = self.specdec.last_stats(self.target)
        return {"seconds": seconds, "steps": stats.num_target_forwards, "ids": text.tolist()}


def serve() -> None:
    """A worker process: one line of JSON in, one out."""
    worker = Worker()
    for line in sys.stdin:
        print(json.dumps(worker.call(**json.loads(line))), flush=True)


class Checkout:
    """A worker process of a checkout."""

    def __init__(self, folder: Path) -> None:
        path = os.pathsep.join([str(folder), str(folder / "kernels")])
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        environment = os.environ | {"PYTHONPATH": path}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True)

    def call(self, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        result: dict[str, Any] = json.loads(self.process.stdout.readline())
        return result

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def summary(blocks: list[list[float]]) -> dict[str, Any]:
    """The median ratio with its 95 % interval, from a bootstrap over blocks, since processes differ in speed."""
    ratio, interval = median_with_interval(blocks)
    return {"ratio": ratio, "interval": interval, "blocks": blocks}


def compare_checkouts(before: Path, args: argparse.Namespace, rng: random.Random) -> list[dict[str, Any]]:
    """Steps per second of this checkout over the other's, by kind of call; both restart for each block of rounds."""
    cases = [(c, b, d, name) for c in (False, True) for b in args.batch for d in DRAFTERS for name in CALLS]
    ratios: dict[Any, list[list[float]]] = {case: [] for case in cases}
    speeds: dict[Any, dict[str, list[float]]] = {case: {"before": [], "after": []} for case in cases}
    for block, case in track([*product(range(args.blocks), cases)], "before and after", console=Console(stderr=True)):
        if case == cases[0]:
            checkouts = {"before": Checkout(before), "after": Checkout(ROOT)}
        settings = dict(zip(("compile", "batch", "drafter"), case, strict=False)) | {"call": CALLS[case[3]]}

        def run_call(checkout: Checkout, index: int, block: int = block, settings: Any = settings) -> dict[str, Any]:
            number = (block * args.rounds + index) % NUM_PROMPTS
            return checkout.call(number=number, tokens=args.max_new_tokens, **settings)

        candidates = {name: partial(run_call, checkout) for name, checkout in checkouts.items()}
        calls = interleave(candidates, args.rounds, warm_up=1, rng=rng)
        rates = {name: [call["steps"] / call["seconds"] for call in made] for name, made in calls.items()}
        for one, other in zip(calls["before"], calls["after"], strict=True):
            assert one["ids"] == other["ids"], "the checkouts write different texts"
        ratios[case].append([after / before for before, after in zip(rates["before"], rates["after"], strict=True)])
        for name, values in rates.items():
            speeds[case][name] += values
        if case == cases[-1]:
            for checkout in checkouts.values():
                checkout.close()
    rows = []
    for case in cases:
        names = dict(zip(("compiled", "batch", "drafter", "call"), case, strict=True))
        steps = {f"steps_per_second_{name}": statistics.median(values) for name, values in speeds[case].items()}
        rows.append({**names, **summary(ratios[case]), **steps})
    return rows


def measure_lockstep(args: argparse.Namespace, rng: random.Random) -> list[dict[str, Any]]:
    """Tokens per second with an unknown processor over those without it."""
    worker, rows = Worker(), []
    cases = [(c, b, d) for c in (False, True) for b in (1, 4) for d in DRAFTERS]
    for compile, batch, drafter in track(cases, "lockstep", console=Console(stderr=True)):
        settings = {"drafter": drafter, "compile": compile, "batch": batch, "tokens": args.max_new_tokens}

        def run_call(processors: list[Any], index: int, settings: Any = settings) -> dict[str, Any]:
            call = {"logits_processor": processors} if processors else {}
            return worker.call(number=index % NUM_PROMPTS, call=call, **settings)

        candidates = {"lockstep": partial(run_call, [Unknown()]), "without": partial(run_call, [])}
        calls = interleave(candidates, args.blocks * args.rounds, warm_up=2, rng=rng)
        pairs = list(zip(calls["lockstep"], calls["without"], strict=True))
        assert all(lockstep["ids"] == without["ids"] for lockstep, without in pairs)
        ratios = [[without["seconds"] / lockstep["seconds"]] for lockstep, without in pairs]
        steps = {name: sum(call["steps"] for call in made) for name, made in calls.items()}
        rows.append({"compiled": compile, "batch": batch, "drafter": drafter, **summary(ratios), "steps": steps})
    return rows


def show(console: Console, title: str, rows: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    table = Table(title=title)
    for name in (*names, "ratio", "95 % interval"):
        table.add_column(name)
    for row in rows:
        low, high = row["interval"]
        table.add_row(*(str(row[name]) for name in names), f"{row['ratio']:.3f}", f"{low:.3f} to {high:.3f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="HEAD", help="the commit to compare with (HEAD)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--blocks", type=int, default=8, help="of rounds, each with processes of its own (8)")
    parser.add_argument("--rounds", type=int, default=4, help="in a block (4)")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    from specdec.utils.provenance import provenance

    origin = provenance("cpu")
    rng, console = random.Random(0), Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        subprocess.run(
            ["git", "worktree", "add", "--detach", "--quiet", str(before), args.before], cwd=ROOT, check=True
        )
        try:
            checkouts = compare_checkouts(before, args, rng)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(before)], cwd=ROOT, check=True)
    lockstep = measure_lockstep(args, rng)
    show(console, f"steps per second over those of {args.before}", checkouts, ("compiled", "batch", "drafter", "call"))
    show(console, "tokens per second in lockstep over those without it", lockstep, ("compiled", "batch", "drafter"))
    result = {"provenance": origin, "before": args.before, "checkouts": checkouts, "lockstep": lockstep}
    emit(result, args.output)


if __name__ == "__main__":
    main()
