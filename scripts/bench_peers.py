"""Compare specdec with transformers, OpenVINO GenAI, ONNX Runtime GenAI and llama.cpp on one pair, in one run.

    python scripts/bench_peers.py --setup-peers              # once: the peers' packages, llama.cpp from source, SmolLM2
    python scripts/bench_peers.py --pair embedded --quick    # under 6 minutes on two cores
    python scripts/bench_peers.py --pair 200m                # the embedded pair widened to 201 million parameters
    python scripts/bench_peers.py --pair 1b                  # to 1.2 billion; specdec and llama.cpp alone
    python scripts/bench_peers.py --pair smollm2             # SmolLM2-135M-Instruct, without a draft model
    python scripts/bench_peers.py --pair folder              # one of your own: folder/target, folder/draft

All engines get the same prompts, of one length, and write the same number of ids; EOS ids are ignored. Each engine runs
with one thread and with --threads, and with its fastest settings for each (dtype or format, K), which are measured
first and recorded in the JSON. Rounds are interleaved. specdec runs compiled; compiling itself is not in the figures.
The report also gives what this machine's memory allows, measured in the same run, and how idle the machine was: below
95 % no ratios are printed. How to read the results: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peers import machine, setup, show
from peers.engines import Engine
from peers.measure import OnProgress, TaskSet, Tuning, compare, time_prompts, tune
from peers.pairs import NAMES, Pair, find_pair
from peers.runtimes import NOT_SET_UP, RUNTIMES, Conditions, Runtime
from peers.worker import PeerFailed
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging

from specdec.runtime.loading import load_tokenizer
from specdec.utils import embedded
from specdec.utils.provenance import provenance

RESULTS = setup.ROOT / "benchmarks" / "results"
MAX_PROMPTS = 64
SECONDS_A_LINE = 10  # of progress, where there is no terminal
LARGE = {"1b": ("llamacpp", "specdec")}  # the fastest alone: the others take hours


class Bench:
    """One run: engines are compared by batch and sampling, at each number of threads; then prompts are timed."""

    def __init__(self, pair: Pair, args: argparse.Namespace, on_progress: OnProgress) -> None:
        self.args, self.on_progress = args, on_progress
        self.tunings: list[Tuning] = []
        tokenizer, all_prompts = load_tokenizer(str(pair.target)), embedded.prompts()
        selected = all_prompts[:: max(1, len(all_prompts) // MAX_PROMPTS)]
        encoded = [tokenizer(prompt["prompt"]).input_ids for prompt in selected]
        self.prompts = [ids[: args.prompt_tokens] for ids in encoded if len(ids) >= args.prompt_tokens]
        if len(self.prompts) < max(args.batch):
            raise ValueError(
                f"only {len(self.prompts)} prompts have {args.prompt_tokens} tokens, --batch {max(args.batch)} needs"
                " that many"
            )
        context = json.loads((pair.target / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
        text = [token for ids in encoded for token in ids]
        lengths = [length for length in args.prompt_lengths if length < min(context or len(text), len(text))]
        self.long_prompts = {length: text[:length] for length in lengths}
        longest = max([args.prompt_tokens + args.new_tokens, *(length + 1 for length in lengths)])
        self.runtimes: list[Runtime] = [RUNTIMES[name](pair, longest, on_progress) for name in args.runtimes]

    def task_set(self, batch: int, sampled: bool) -> TaskSet:
        count = batch * max(1, self.args.prompts // batch)
        return TaskSet(batch, sampled, self.prompts[:count], self.args.new_tokens)

    def engines(self, task_set: TaskSet) -> list[Engine]:
        """All engines that can run the tasks, by threads; the first of each number of threads is the baseline."""
        return [
            engine
            for threads in sorted({1, self.args.threads})
            for runtime in self.runtimes
            for engine in runtime.engines(self._conditions(runtime, task_set, threads))
        ]

    def _conditions(self, runtime: Runtime, task_set: TaskSet, threads: int) -> Conditions:
        def choose(name: str, candidates: Mapping[str, Engine]) -> Engine:
            if len(candidates) == 1:
                return next(iter(candidates.values()))
            what = f"{runtime.name} {name}, {task_set}, {show.threads_of(threads)}"
            best, tuning = tune(what, candidates, task_set, self.on_progress)
            self.tunings.append(tuning)
            return best

        return Conditions(task_set, threads, self.args.num_draft_tokens, choose)

    def run(self) -> Iterator[dict[str, Any]]:
        """Results of whole calls, of reading prompts, what was tuned, and how idle the machine was meanwhile.

        Given again with every batch and sampling that is measured; the last time with prompts too.
        """
        results: list[dict[str, Any]] = []
        plain: list[Engine] = []
        before = machine.CpuTimes.now()

        def measured(prompts: list[dict[str, Any]]) -> dict[str, Any]:
            after = machine.CpuTimes.now()
            idle = None if before is None or after is None else round(before.idle_otherwise(after), 3)
            return {
                "idle_otherwise": idle,
                "tuned": [asdict(one) for one in self.tunings],
                "results": results,
                "prompt_processing": prompts,
            }

        for batch in self.args.batch:
            for sampled in (False,) if self.args.quick else (False, True):
                task_set = self.task_set(batch, sampled)
                engines = self.engines(task_set)
                results += compare(engines, task_set, self.args.rounds, self.on_progress)
                yield measured([])
                if not plain:
                    plain = [engine for engine in engines if engine.name == "plain"]
        if min(self.args.batch) > 1:  # their pipelines may hold more rows
            plain = []
        yield measured(time_prompts(plain, self.long_prompts, self.args.rounds, self.on_progress))

    def close(self) -> None:
        for runtime in self.runtimes:
            runtime.close()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="embedded", help=f"{', '.join(NAMES)}, or a folder")
    parser.add_argument(
        "--quick", action="store_true", help="greedy, 3 rounds of 48 new tokens, 4 prompts, K of 2 and 3"
    )
    parser.add_argument("--runtimes", nargs="+", choices=list(RUNTIMES), help="all that are set up; 1b: the fastest")
    parser.add_argument("--num-draft-tokens", type=int, nargs="+", metavar="K", help="1 2 3 5")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, default=8, help="per engine and round; rounded to batches")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--prompt-lengths", type=int, nargs="*", default=[64, 512, 2048], help="prompts that are timed")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="one thread is measured too")
    parser.add_argument("--setup-peers", action="store_true", help="install the peers and end; runs never install")
    parser.add_argument(
        "--output", type=Path, help="bench_peers-<pair>.json in benchmarks/results, of a quick run in build"
    )
    args = parser.parse_args(arguments)
    if args.setup_peers:
        return args
    if args.quick:
        args.rounds, args.new_tokens, args.prompts = 3, 48, 4
    args.num_draft_tokens = args.num_draft_tokens or ([2, 3] if args.quick else [1, 2, 3, 5])
    folder = setup.ROOT / "build" if args.quick else RESULTS
    args.output = args.output or folder / f"bench_peers-{Path(args.pair).name}.json"
    args.runtimes = args.runtimes or LARGE.get(args.pair) or tuple(RUNTIMES)
    counts = (*args.num_draft_tokens, *args.batch, *args.prompt_lengths, args.prompts, args.rounds, args.threads)
    if min(counts) < 1:
        parser.error("K, batches, prompts, their lengths, rounds and threads begin at 1")
    if args.new_tokens < max(args.num_draft_tokens) + 2:  # a call's first step is not counted
        parser.error(
            f"--new-tokens {args.new_tokens} may be one step at K={max(args.num_draft_tokens)}; K + 2 at least make two"
        )
    if find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib: pip install 'specdec-lossless[experiments]'")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, or set up the peers: 0, or 1 where something failed or a greedy text differs."""
    args, console = parse(arguments), Console(stderr=True)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        if args.setup_peers:
            setup.setup(console.print)
            return 0
        partial = args.output.with_suffix(".part.json")  # a run that is cut off leaves what it has measured
        for report in measure(args, console):
            write(report, partial)
        write(report, args.output)
        partial.unlink()
    except (ValueError, PeerFailed, UserWarning) as error:
        console.print(f"bench_peers: {error}", style="red", highlight=False)
        return 1
    show.print_report(report)
    origin, plot = report["provenance"], args.output.with_suffix(".png")
    show.plot(report["results"], f"{report['pair']} pair, {origin['device']}, {origin['date']}", plot)
    Console(width=max(100, Console().width)).print(f"written: {args.output} and {plot.name}", highlight=False)
    if any(r["runtime"] == "specdec" and r["identical_rows"] not in (None, r["rows"]) for r in report["results"]):
        console.print(
            "bench_peers: a greedy text of specdec differs from that of transformers' loop on the same model",
            style="red",
        )
        return 1
    return 0


def measure(args: argparse.Namespace, console: Console) -> Iterator[dict[str, Any]]:
    """The report of a run, with its provenance, as far as it has come; the last one is whole."""
    absent = [name for name in args.runtimes if not RUNTIMES[name].is_set_up()]
    args.runtimes = [name for name in args.runtimes if name not in absent]
    if not args.runtimes:
        raise ValueError("no runtime is left; " + NOT_SET_UP.format(", ".join(RUNTIMES[name].name for name in absent)))
    origin: dict[str, Any] = provenance("cpu") | {"threads": args.threads}
    if not set(args.runtimes) <= {"transformers", "specdec"}:
        origin["peers"] = setup.versions()
    pair, bandwidth = find_pair(args.pair, console), cache(machine.Bandwidth)
    with shown_progress(console) as on_progress:
        bench = Bench(pair, args, on_progress)
        try:
            for measured in bench.run():
                missing = [NOT_SET_UP.format(RUNTIMES[name].name) for name in absent]
                workload = ("prompts", "prompt_tokens", "new_tokens", "rounds")
                yield {
                    "script": "bench_peers",
                    "pair": pair.name,
                    "provenance": origin | {"idle_otherwise": measured.pop("idle_otherwise")},
                    "workload": {name: getattr(args, name) for name in workload},
                    "missing": missing,
                    **measure_bounds(measured["results"], bandwidth, missing),
                    **measured,
                }
        finally:
            bench.close()


@contextmanager
def shown_progress(console: Console) -> Iterator[OnProgress]:
    """A bar; where the console is no terminal, a line every SECONDS_A_LINE at most."""
    if console.is_terminal:
        with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress:
            task = progress.add_task("loading", total=None)
            yield lambda text: progress.update(task, description=text, advance=1)
        return
    started, last = time.monotonic(), -float(SECONDS_A_LINE)

    def print_line(text: str) -> None:
        nonlocal last
        elapsed = time.monotonic() - started
        if elapsed - last >= SECONDS_A_LINE:
            last = elapsed
            console.print(f"{elapsed:5.0f} s  {text}", highlight=False, soft_wrap=True)

    yield print_line


def measure_bounds(
    results: Sequence[dict[str, Any]], find_bandwidth: Callable[[], machine.Bandwidth], missing: list[str]
) -> dict[str, Any]:
    """Read bandwidth by threads, and for each engine that decodes plainly, what it allows and the share reached.

    Where it cannot be measured, the reason is added to `missing`.
    """
    try:
        bandwidth = find_bandwidth()
        threads = sorted({result["threads"] for result in results})
        memory = {str(t): bandwidth.gb_per_second(bandwidth.memory_bytes(), t) for t in threads}
        bounds = machine.bounds(results, bandwidth.gb_per_second)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        missing.append(f"no bound: {error}")
        return {"memory_gb_per_second": {}, "bounds": []}
    return {"memory_gb_per_second": memory, "bounds": bounds}


def write(report: dict[str, Any], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
