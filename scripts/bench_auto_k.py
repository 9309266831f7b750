"""What num_draft_tokens="auto" costs where drafting does not pay, and how near it comes to the best constant K.

    python scripts/bench_auto_k.py --output benchmarks/results/bench_auto_k.json

The embedded pair, compiled, greedy. A comparison is a pair of calls with the same prompts, one right after the other in
random order, so that both run under the same load of the machine. Its ratio is the median of the ratios of all rounds,
with a 95 % bootstrap interval over the rounds. The ratio of the sums gives rare slow calls their full weight, including
those that other processes slow down. "plain" is the same loop without a drafter; compared with itself it shows the
noise. The best constant K, 0 included, comes from a sweep before. Profiles are made before the rounds and recorded as
the cost of a cold start. The last line of stdout is the report as JSON.
"""

import argparse
import copy
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.report import emit
from rich.console import Console
from rich.progress import track
from rich.table import Table

import specdec
from specdec import Draft
from specdec.core.stats import Stats
from specdec.draft_length.settings import MAX_DRAFT_TOKENS
from specdec.drafters.resolve import resolve_drafter
from specdec.runtime.loading import load, load_tokenizer
from specdec.utils import embedded
from specdec.utils.provenance import provenance

BOOTSTRAP_SAMPLES = 4000


class SyntheticDrafter:
    """A drafter without a model: ids(shape [B, K]) gives its draft ids."""

    def __init__(self, ids: Callable[[tuple[int, int]], torch.Tensor]) -> None:
        self.ids = ids

    def begin(self, sequences: Any, sampling: Any) -> None:
        pass

    def propose(self, sequences: Any, limit: torch.Tensor) -> Draft:
        return Draft(self.ids((len(limit), int(limit.max()))).to(limit.device), None, limit)

    def observe(self, result: Any) -> None:
        pass


class Bench:
    """The embedded pair with its engines: by name, a drafter and its num_draft_tokens.

    constant: plain decoding and each K with the draft model. auto: "auto" with each drafter.
    """

    def __init__(self, device: str, max_new_tokens: int) -> None:
        self.device, self.max_new_tokens = device, max_new_tokens
        self.tokenizer = load_tokenizer(str(embedded.TARGET))
        self.target, draft = (load(str(folder), "float32", device) for folder in (embedded.TARGET, embedded.DRAFT))
        self.prompts = [prompt["prompt"] for prompt in embedded.prompts()]
        vocab_size, pad_token_id = self.target.config.vocab_size, self.tokenizer.pad_token_id
        generator = torch.Generator().manual_seed(0)
        drafters = {
            "always wrong": SyntheticDrafter(lambda shape: torch.full(shape, pad_token_id)),
            "random": SyntheticDrafter(lambda shape: torch.randint(vocab_size, shape, generator=generator)),
            "slow (the target itself)": resolve_drafter(copy.deepcopy(self.target), self.target),
            "draft": resolve_drafter(draft, self.target),
        }
        self.constant: dict[str, tuple[Any, int | str]] = {"plain": ("none", 1)}
        self.constant |= {f"K={k}, draft": (drafters["draft"], k) for k in range(1, MAX_DRAFT_TOKENS + 1)}
        self.auto = {f"auto, {name}": (drafter, "auto") for name, drafter in drafters.items()}

    def run(self, engine: str, round_number: int, batch: int) -> tuple[float, Stats]:
        """One call with the prompts of a round: -> its seconds and statistics."""
        texts = [self.prompts[(round_number * batch + row) * 7 % len(self.prompts)] for row in range(batch)]
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=128)
        inputs = inputs.to(self.device)
        drafter, num_draft_tokens = (self.constant | self.auto)[engine]
        specdec.enable(self.target, drafter, num_draft_tokens=num_draft_tokens, compile=True)
        started = time.perf_counter()
        self.target.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=[],
        )
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        seconds, stats = time.perf_counter() - started, specdec.last_stats(self.target)
        assert stats is not None
        return seconds, stats

    def profile_seconds(self, batch: int) -> dict[str, float]:
        """Run each engine once: -> seconds of the profiles that were made, by engine."""
        choices = {engine: self.run(engine, 0, batch)[1].choice for engine in self.constant | self.auto}
        return {engine: choice.profile_s or 0.0 for engine, choice in choices.items() if choice is not None}

    def sweep(self, batch: int, rounds: int, console: Console) -> dict[str, float]:
        """Tokens a second of plain decoding and of each constant K."""
        seconds = dict.fromkeys(self.constant, 0.0)
        for number in progress(rounds, f"batch {batch}, constant K", console):
            for engine in random.Random(number).sample(list(self.constant), len(self.constant)):
                seconds[engine] += self.run(engine, number, batch)[0]
        return {engine: rounds * batch * self.max_new_tokens / spent for engine, spent in seconds.items()}

    def compare(
        self, pairs: list[tuple[str, str]], batch: int, rounds: int, profile_s: dict[str, float], console: Console
    ) -> list[dict[str, Any]]:
        """Compare pairs of a baseline and an engine, in interleaved rounds."""
        seconds: list[tuple[list[float], list[float]]] = [([], []) for _ in pairs]
        last: dict[str, Stats] = {}
        steps_by_k = {engine: np.zeros(MAX_DRAFT_TOKENS + 1, dtype=int) for engine in self.auto}
        for number in progress(rounds, f"batch {batch}, comparisons", console):
            rng = random.Random(number)
            for pair in rng.sample(range(len(pairs)), len(pairs)):
                for side in rng.sample((0, 1), 2):
                    engine = pairs[pair][side]
                    spent, last[engine] = self.run(engine, number, batch)
                    seconds[pair][side].append(spent)
                    choice = last[engine].choice
                    if choice is not None:
                        steps_by_k[engine] += np.array(choice.steps_by_k)
        comparisons = []
        tokens = batch * self.max_new_tokens * rounds
        for (baseline, engine), (baseline_s, engine_s) in zip(pairs, seconds, strict=True):
            comparison = {
                "batch": batch,
                "engine": engine,
                "baseline": baseline,
                "tokens": tokens,
                "tokens_per_second": round(tokens / sum(engine_s), 1),
                **ratio(baseline_s, engine_s),
                "seconds": [round(value, 4) for value in engine_s],
                "baseline_seconds": [round(value, 4) for value in baseline_s],
            }
            if engine in self.auto:
                comparison |= {
                    "steps_by_k": steps_by_k[engine].tolist(),
                    "profile_s": round(profile_s[engine], 3),
                    "last_choice": str(last[engine].choice),
                }
            comparisons.append(comparison)
        return comparisons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=150, help="of comparisons, for each batch size (150)")
    parser.add_argument("--sweep-rounds", type=int, default=24, help="of constant K, before them (24)")
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    args = parser.parse_args()
    origin = provenance(args.device)
    console = Console(stderr=True)
    bench = Bench(args.device, args.max_new_tokens)

    sweeps, comparisons = [], []
    for batch in args.batch:
        profile_s = bench.profile_seconds(batch)
        rates = bench.sweep(batch, args.sweep_rounds, console)
        sweeps += [
            {"batch": batch, "engine": engine, "tokens_per_second": round(rate, 1)} for engine, rate in rates.items()
        ]
        best = max(rates, key=rates.__getitem__)
        pairs = [("plain", "plain"), *(("plain", engine) for engine in bench.auto), (best, "auto, draft")]
        comparisons += bench.compare(list(dict.fromkeys(pairs)), batch, args.rounds, profile_s, console)
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
    emit(report, args.output)


def progress(rounds: int, description: str, console: Console) -> Iterator[int]:
    """The numbers 1 … rounds, with a progress bar."""
    yield from track(range(1, rounds + 1), description=description, console=console)


def ratio(baseline_s: list[float], engine_s: list[float]) -> dict[str, Any]:
    """Speed relative to the baseline: the median of the rounds and the ratio of the sums, with their intervals."""
    pairs = np.array([baseline_s, engine_s])
    drawn = pairs[:, np.random.default_rng(0).integers(len(engine_s), size=(BOOTSTRAP_SAMPLES, len(engine_s)))]
    medians, sums = np.median(drawn[0] / drawn[1], axis=1), drawn[0].sum(1) / drawn[1].sum(1)

    def interval(values: Any) -> list[float]:
        return [round(float(value), 4) for value in np.quantile(values, [0.025, 0.975])]

    return {
        "ratio": round(float(np.median(pairs[0] / pairs[1])), 4),
        "interval": interval(medians),
        "ratio_of_sums": round(sum(baseline_s) / sum(engine_s), 4),
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
