"""What callbacks cost: calls whose processors specdec knows, against another checkout; and lockstep, against calls without it.

    python scripts/bench_callbacks.py --before 3ecb545 --output benchmarks/results/bench_callbacks.json

The embedded pair, greedy. Both checkouts run in processes of their own and take turns, a call each, in an order drawn anew; the
ratio of a round is after / before, in steps per second. They start anew for each block of rounds, since one process is some per
cent faster than the next whatever it runs. `before` is a commit, checked out into a temporary folder. Lockstep is measured in
this checkout alone: the same call with a processor that returns its scores, which specdec cannot know to be harmless, and without
it, in turns. Medians of rounds, with a 95 % interval from blocks drawn anew. One JSON line comes last.
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
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

ROOT = Path(__file__).parent.parent
DRAWS = 4000
DRAFTERS = {"plain": ("none", 1), "draft model K=3": ("model", 3), "prompt lookup K=3": ("prompt_lookup", 3)}
CALLS: dict[str, dict[str, Any]] = {
    "no processors": {},
    "by the scores": {"suppress_tokens": [3, 4, 5]},
    "by the prefix": {"repetition_penalty": 1.1},
}
PROMPTS = 24


class Unknown(LogitsProcessor):
    """Returns its scores. No lambda: transformers asks for the signature of each at each position, which takes 0.3 ms there."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


class Worker:
    """The embedded pair of the checkout that this process runs, and calls of it."""

    def __init__(self) -> None:
        import specdec
        from specdec.utils import embedded

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
        """Seconds of one call, steps of its loop, and the ids it wrote."""
        if self.enabled != (drafter, compile):
            kind, k = DRAFTERS[drafter]
            draft: Any = self.draft if kind == "model" else kind
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

    def call(self, **asked: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def summary(blocks: list[list[float]]) -> dict[str, Any]:
    """The median of all rounds' ratios, with a 95 % interval from blocks drawn anew: a process has a pace of its own."""
    values, chosen = (
        [np.array(block) for block in blocks],
        np.random.default_rng(0).integers(len(blocks), size=(DRAWS, len(blocks))),
    )
    medians = [np.median(np.concatenate([values[at] for at in draw])) for draw in chosen]
    low, high = np.quantile(medians, [0.025, 0.975])
    return {"ratio": float(np.median(np.concatenate(values))), "interval": [float(low), float(high)], "blocks": blocks}


def against(before: Path, args: argparse.Namespace, coins: random.Random) -> list[dict[str, Any]]:
    """Steps per second of this checkout over those of the other, by kind of call; both start anew for each block of rounds."""
    cases = [(c, b, d, name) for c in (False, True) for b in args.batch for d in DRAFTERS for name in CALLS]
    ratios: dict[Any, list[list[float]]] = {case: [] for case in cases}
    speeds: dict[Any, dict[str, list[float]]] = {case: {"before": [], "after": []} for case in cases}
    for block, case in track([*product(range(args.blocks), cases)], "before and after", console=Console(stderr=True)):
        if case == cases[0]:
            sides = {"before": Checkout(before), "after": Checkout(ROOT)}
        compile, batch, drafter, name = case
        ratios[case].append([])
        for number in range(-1, args.rounds):
            order = list(sides)
            coins.shuffle(order)
            asked = {
                "drafter": drafter,
                "compile": compile,
                "batch": batch,
                "tokens": args.max_new_tokens,
                "call": CALLS[name],
            }
            place = (block * args.rounds + number) % PROMPTS
            answers = {side: sides[side].call(number=place, **asked) for side in order}
            assert answers["before"]["ids"] == answers["after"]["ids"], "the checkouts write different texts"
            if number < 0:
                continue
            speed = {side: answer["steps"] / answer["seconds"] for side, answer in answers.items()}
            ratios[case][-1].append(speed["after"] / speed["before"])
            for side in sides:
                speeds[case][side].append(speed[side])
        if case == cases[-1]:
            for side in sides.values():
                side.close()
    rows = []
    for case in cases:
        names = dict(zip(("compiled", "batch", "drafter", "call"), case, strict=True))
        steps = {f"steps_per_second_{side}": statistics.median(values) for side, values in speeds[case].items()}
        rows.append({**names, **summary(ratios[case]), **steps})
    return rows


def lockstep(args: argparse.Namespace, coins: random.Random) -> list[dict[str, Any]]:
    """Tokens per second with an unknown processor over those without it."""
    worker, rows = Worker(), []
    cases = [(c, b, d) for c in (False, True) for b in (1, 4) for d in DRAFTERS]
    for compile, batch, drafter in track(cases, "lockstep", console=Console(stderr=True)):
        ratios: list[list[float]] = []
        steps = {"lockstep": 0, "without": 0}
        for number in range(-2, args.blocks * args.rounds):
            calls: dict[str, Any] = {"lockstep": {"logits_processor": [Unknown()]}, "without": {}}
            order = list(calls)
            coins.shuffle(order)
            asked = {"drafter": drafter, "compile": compile, "batch": batch, "tokens": args.max_new_tokens}
            answers = {kind: worker.call(number=number % PROMPTS, **asked, call=calls[kind]) for kind in order}
            assert answers["lockstep"]["ids"] == answers["without"]["ids"]
            if number >= 0:
                ratios.append([answers["without"]["seconds"] / answers["lockstep"]["seconds"]])
                for kind in steps:
                    steps[kind] += answers[kind]["steps"]
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
    coins, console = random.Random(0), Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        subprocess.run(
            ["git", "worktree", "add", "--detach", "--quiet", str(before), args.before], cwd=ROOT, check=True
        )
        try:
            checkouts = against(before, args, coins)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(before)], cwd=ROOT, check=True)
    priced = lockstep(args, coins)
    show(console, f"steps per second over those of {args.before}", checkouts, ("compiled", "batch", "drafter", "call"))
    show(console, "tokens per second in lockstep over those without it", priced, ("compiled", "batch", "drafter"))
    result = {"provenance": origin, "before": args.before, "checkouts": checkouts, "lockstep": priced}
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
