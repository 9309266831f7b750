"""What a K that chooses itself costs where drafting does not pay, and how near it comes to the best constant K.

    OMP_NUM_THREADS=1 python scripts/bench_auto_k.py --output benchmarks/results/bench_auto_k.json

The embedded pair, compiled, greedy. A round writes the same prompts with every engine, in an order drawn anew, so a drift of the
machine meets all of them. Ratios are of sums over rounds, their 95 % intervals from rounds drawn anew. Plain is the same loop
with no drafter; it runs twice, and what the second differs in is noise. Profiles are made before the rounds; they stand in the
file as what a cold start costs. One JSON line comes last.
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
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec
from specdec import Draft, embedded
from specdec.generate import resolve_drafter
from specdec.provenance import provenance
from specdec.stats import Stats

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
    parser.add_argument("--rounds", type=int, default=24, help="rounds of each batch size (24)")
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    args = parser.parse_args()
    origin = provenance(args.device)
    tokenizer = AutoTokenizer.from_pretrained(embedded.TARGET, padding_side="left")
    folders = embedded.TARGET, embedded.DRAFT
    target, draft = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).to(args.device) for f in folders)
    generator = torch.Generator().manual_seed(0)
    drafters = {
        "always wrong": Proposes(lambda shape: torch.full(shape, tokenizer.pad_token_id)),
        "random": Proposes(lambda shape: torch.randint(target.config.vocab_size, shape, generator=generator)),
        "slow (the target itself)": resolve_drafter(copy.deepcopy(target), target),
        "draft": resolve_drafter(draft, target),
    }
    auto: dict[str, tuple[Any, int | str]] = {f"auto, {name}": (drafter, "auto") for name, drafter in drafters.items()}
    constant = {f"K={k}, draft": (drafters["draft"], k) for k in range(1, LARGEST_K + 1)}
    engines = {"plain": ("none", 1), "plain, again": ("none", 1)} | auto | constant
    prompts = [prompt["prompt"] for prompt in embedded.prompts()]

    def write(name: str, inputs: Any) -> tuple[float, Stats]:
        drafter, k = engines[name]
        specdec.enable(target, drafter, num_draft_tokens=k, compile=True)
        started = time.perf_counter()
        target.generate(
            **inputs, max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=[]
        )
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)
        seconds, stats = time.perf_counter() - started, specdec.last_stats(target)
        assert stats is not None
        return seconds, stats

    results = []
    for batch in args.batch:

        def inputs_of(number: int, batch: int = batch) -> Any:
            texts = [prompts[(number * batch + row) * 7 % len(prompts)] for row in range(batch)]
            return tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=128).to(args.device)

        cold_s = {}
        for name in engines:
            _, stats = write(name, inputs_of(0))
            cold_s[name] = stats.choice.profile_s if stats.choice else None
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        last: dict[str, Stats] = {}
        steps = {name: np.zeros(LARGEST_K + 1, dtype=int) for name in auto}
        for number in track(range(1, args.rounds + 1), description=f"batch {batch}", console=Console(stderr=True)):
            for name in random.Random(number).sample(list(engines), len(engines)):
                spent, last[name] = write(name, inputs_of(number))
                seconds[name].append(spent)
                if name in auto:
                    steps[name] += np.array(last[name].choice.steps_by_k)
        best = min(constant, key=lambda name: sum(seconds[name]))
        for name in engines:
            result = {
                "batch": batch,
                "engine": name,
                "tokens": batch * args.max_new_tokens * args.rounds,
                "tokens_per_second": round(batch * args.max_new_tokens * args.rounds / sum(seconds[name]), 1),
                "to_plain": ratio(seconds["plain"], seconds[name]),
                "to_best_constant": ratio(seconds[best], seconds[name]),
                "seconds": [round(value, 4) for value in seconds[name]],
            }
            if name in auto:
                result |= {
                    "steps_by_k": steps[name].tolist(),
                    "profile_s": round(cold_s[name] or 0, 3),
                    "last_choice": str(last[name].choice),
                }
            results.append(result)
    report = {
        "script": "bench_auto_k",
        "provenance": origin,
        "rounds": args.rounds,
        "max_new_tokens": args.max_new_tokens,
        "threads": torch.get_num_threads(),
        "results": results,
    }
    show(report, Console(stderr=True))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


def ratio(baseline: list[float], own: list[float]) -> dict[str, Any]:
    """Speed against the baseline: sums of the rounds' seconds, and the interval of rounds drawn anew."""
    pairs = np.array([baseline, own])
    drawn = pairs[:, np.random.default_rng(0).integers(len(own), size=(DRAWS, len(own)))].sum(2)
    low, high = np.quantile(drawn[0] / drawn[1], [0.025, 0.975])
    return {"ratio": round(sum(baseline) / sum(own), 4), "interval": [round(float(low), 4), round(float(high), 4)]}


def show(report: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{report['rounds']} rounds of {report['max_new_tokens']} tokens a row")
    for name in ("batch", "engine", "tokens/s", "× plain", "95 %", "× best constant K", "K by steps", "profile s"):
        table.add_column(name, justify="left" if name in ("engine", "K by steps") else "right")
    for result in report["results"]:
        to_plain, steps = result["to_plain"], result.get("steps_by_k", [])
        total = sum(steps)
        shares = sorted(((count / total, k) for k, count in enumerate(steps) if count), reverse=True)[:3]
        table.add_row(
            str(result["batch"]),
            result["engine"],
            f"{result['tokens_per_second']:.0f}",
            f"{to_plain['ratio']:.3f}",
            "{:.3f} to {:.3f}".format(*to_plain["interval"]),
            f"{result['to_best_constant']['ratio']:.3f}",
            ", ".join(f"{k}: {100 * share:.0f} %" for share, k in shares),
            f"{result['profile_s']:.2f}" if "profile_s" in result else "",
        )
    console.print(table)


if __name__ == "__main__":
    main()
