"""What a K that chooses itself costs where drafting does not pay, and how near it comes to the best constant K.

    python scripts/bench_auto_k.py --output benchmarks/results/bench_auto_k.json

The embedded pair, compiled, greedy. A comparison is a pair of calls for the same prompts, one right behind the other, in an order
drawn anew, so what the machine does meets both. Its ratio is the median of the rounds' ratios, with a 95 % interval from rounds
drawn anew; that of the sums stands beside it, where rare dear calls weigh in full, those of other tenants too. Plain is the same
loop with no drafter; compared with itself it shows what noise comes to. The best constant K, 0 among them, comes from a sweep
before. Profiles are made before the rounds; they stand in the file as what a cold start costs. One JSON line comes last.
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import specdec
from specdec import Draft
from specdec.core.stats import Stats
from specdec.drafters.resolve import resolve_drafter
from specdec.runtime.loading import load, load_tokenizer
from specdec.utils import embedded
from specdec.utils.provenance import provenance

DRAWS = 4000
LARGEST_K = 8


class Proposes:
    """Draft ids from anywhere but a model: ids(shape) of what is asked for."""

    def __init__(self, ids: Callable[[tuple[int, int]], torch.Tensor]) -> None:
        self.ids = ids

    def begin(self, sequences: Any, sampling: Any) -> None:
        pass

    def propose(self, sequences: Any, limit: torch.Tensor) -> Draft:
        return Draft(self.ids((len(limit), int(limit.max()))).to(limit.device), None, limit)

    def observe(self, outcome: Any) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=150, help="of comparisons, for each batch size (150)")
    parser.add_argument("--sweep-rounds", type=int, default=24, help="of constant K, before them (24)")
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    args = parser.parse_args()
    origin = provenance(args.device)
    console = Console(stderr=True)
    tokenizer = load_tokenizer(str(embedded.TARGET))
    folders = embedded.TARGET, embedded.DRAFT
    target, draft = (load(str(folder), "float32", args.device) for folder in folders)
    generator = torch.Generator().manual_seed(0)
    drafters = {
        "always wrong": Proposes(lambda shape: torch.full(shape, tokenizer.pad_token_id)),
        "random": Proposes(lambda shape: torch.randint(target.config.vocab_size, shape, generator=generator)),
        "slow (the target itself)": resolve_drafter(copy.deepcopy(target), target),
        "draft": resolve_drafter(draft, target),
    }
    auto: dict[str, tuple[Any, int | str]] = {f"auto, {name}": (drafter, "auto") for name, drafter in drafters.items()}
    constant = {"plain": ("none", 1)} | {f"K={k}, draft": (drafters["draft"], k) for k in range(1, LARGEST_K + 1)}
    engines = constant | auto
    prompts = [prompt["prompt"] for prompt in embedded.prompts()]

    def inputs_of(number: int, batch: int) -> Any:
        texts = [prompts[(number * batch + row) * 7 % len(prompts)] for row in range(batch)]
        return tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=128).to(args.device)

    def write(name: str, inputs: Any) -> tuple[float, Stats]:
        drafter, k = engines[name]
        specdec.enable(target, drafter, num_draft_tokens=k, compile=True)
        started = time.perf_counter()
        target.generate(
            **inputs,
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=[],
        )
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)
        seconds, stats = time.perf_counter() - started, specdec.last_stats(target)
        assert stats is not None
        return seconds, stats

    sweeps, comparisons = [], []
    for batch in args.batch:
        cold_s = {}
        for name in engines:
            _, stats = write(name, inputs_of(0, batch))
            cold_s[name] = stats.choice.profile_s if stats.choice else None

        swept: dict[str, list[float]] = {name: [] for name in constant}
        for number in track(range(1, args.sweep_rounds + 1), description=f"batch {batch}, constant K", console=console):
            for name in random.Random(number).sample(list(constant), len(constant)):
                swept[name].append(write(name, inputs_of(number, batch))[0])
        best = min(constant, key=lambda name: sum(swept[name]))
        tokens = batch * args.max_new_tokens
        sweeps += [
            {"batch": batch, "engine": name, "tokens_per_second": round(tokens * len(seconds) / sum(seconds), 1)}
            for name, seconds in swept.items()
        ]

        pairs = list(dict.fromkeys([("plain", "plain"), *(("plain", name) for name in auto), (best, "auto, draft")]))
        seconds: list[tuple[list[float], list[float]]] = [([], []) for _ in pairs]
        last: dict[str, Stats] = {}
        steps = {name: np.zeros(LARGEST_K + 1, dtype=int) for name in auto}
        for number in track(range(1, args.rounds + 1), description=f"batch {batch}, comparisons", console=console):
            coins = random.Random(number)
            for at in coins.sample(range(len(pairs)), len(pairs)):
                for side in coins.sample((0, 1), 2):
                    name = pairs[at][side]
                    spent, last[name] = write(name, inputs_of(number, batch))
                    seconds[at][side].append(spent)
                    choice = last[name].choice
                    if choice is not None:
                        steps[name] += np.array(choice.steps_by_k)
        for (baseline, name), (baseline_s, own_s) in zip(pairs, seconds, strict=True):
            comparison = {
                "batch": batch,
                "engine": name,
                "baseline": baseline,
                "tokens": tokens * args.rounds,
                "tokens_per_second": round(tokens * args.rounds / sum(own_s), 1),
                **ratio(baseline_s, own_s),
                "seconds": [round(value, 4) for value in own_s],
                "baseline_seconds": [round(value, 4) for value in baseline_s],
            }
            if name in auto:
                comparison |= {
                    "steps_by_k": steps[name].tolist(),
                    "profile_s": round(cold_s[name] or 0, 3),
                    "last_choice": str(last[name].choice),
                }
            comparisons.append(comparison)
    report = {
        "script": "bench_auto_k",
        "provenance": origin,
        "rounds": args.rounds,
        "max_new_tokens": args.max_new_tokens,
        "threads": torch.get_num_threads(),
        "sweep": sweeps,
        "comparisons": comparisons,
    }
    show(report, console)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(json.dumps(report))


def ratio(baseline: list[float], own: list[float]) -> dict[str, Any]:
    """Speed against the baseline, as the median of rounds and of their sums, each with the interval of rounds drawn anew."""
    pairs = np.array([baseline, own])
    drawn = pairs[:, np.random.default_rng(0).integers(len(own), size=(DRAWS, len(own)))]
    medians, sums = np.median(drawn[0] / drawn[1], axis=1), drawn[0].sum(1) / drawn[1].sum(1)

    def interval(values: Any) -> list[float]:
        return [round(float(value), 4) for value in np.quantile(values, [0.025, 0.975])]

    return {
        "ratio": round(float(np.median(pairs[0] / pairs[1])), 4),
        "interval": interval(medians),
        "ratio_of_sums": round(sum(baseline) / sum(own), 4),
        "interval_of_sums": interval(sums),
    }


def show(report: dict[str, Any], console: Console) -> None:
    table = Table(title="Constant K, tokens/s")
    batches = sorted({result["batch"] for result in report["sweep"]})
    for column in ("engine", *(f"batch {batch}" for batch in batches)):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for name in dict.fromkeys(result["engine"] for result in report["sweep"]):
        table.add_row(name, *(f"{r['tokens_per_second']:.0f}" for r in report["sweep"] if r["engine"] == name))
    console.print(table)
    table = Table(title=f"{report['rounds']} rounds of {report['max_new_tokens']} tokens a row")
    for column in ("batch", "engine", "to", "tokens/s", "ratio", "95 %", "of sums", "K by steps", "profile s"):
        table.add_column(column, justify="left" if column in ("engine", "to", "K by steps") else "right")
    for result in report["comparisons"]:
        steps = result.get("steps_by_k", [])
        total = sum(steps)
        shares = sorted(((count / total, k) for k, count in enumerate(steps) if count), reverse=True)[:3]
        table.add_row(
            str(result["batch"]),
            result["engine"],
            result["baseline"],
            f"{result['tokens_per_second']:.0f}",
            f"{result['ratio']:.3f}",
            "{:.3f} to {:.3f}".format(*result["interval"]),
            f"{result['ratio_of_sums']:.3f}",
            ", ".join(f"{k}: {100 * share:.1f} %" for share, k in shares),
            f"{result['profile_s']:.2f}" if "profile_s" in result else "",
        )
    console.print(table)


if __name__ == "__main__":
    main()
