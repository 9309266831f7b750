"""Compare specdec with transformers and OpenVINO GenAI on one pair, in one run: interleaved, medians, one JSON.

    python scripts/bench_peers.py --setup-peers              # once: OpenVINO GenAI's own virtual environment
    python scripts/bench_peers.py --pair embedded --quick    # 3 minutes on two cores
    python scripts/bench_peers.py --pair 200m                # the embedded pair widened to 201 million parameters
    python scripts/bench_peers.py --pair folder              # one of your own: folder/target, folder/draft

All engines get the same prompts, of one length, and write the same number of ids; EOS ids are ignored. Each runtime
runs with the dtype and the number of threads at which its plain decoding is fastest, each speculative peer with its
fastest K, by batch and sampling; specdec's draft is in 4 bits, as OpenVINO's is, where that is faster. All of this is
measured first and recorded in the JSON. specdec runs compiled; compiling itself is not in the figures. Texts are
compared with those of the same runtime's first engine. How to read the results: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import widen_pair
from peers import openvino_engine as openvino
from peers import show
from peers.engines import (
    Engine,
    specdec_draft,
    specdec_lookup,
    specdec_plain,
    stock_assisted,
    stock_lookup,
    stock_plain,
)
from peers.measure import OnProgress, TaskSet, Tuning, compare, tune
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel
from transformers.utils import logging

from specdec.quant.config import Int4Config
from specdec.runtime.loading import load, load_tokenizer
from specdec.utils import embedded
from specdec.utils.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BUILT_PAIRS = ROOT / "build" / "pairs"
GROUP_SIZE = openvino.GROUP_SIZE  # the same for all
MAX_PROMPTS = 64
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Pair:
    """Folders of the target in full precision, the draft, and the target in 4 bits (None: quantized while loading)."""

    name: str
    target: Path
    draft: Path
    int4: Path | None = None

    def load_int4(self, dtype: str) -> PreTrainedModel:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="specdec keeps in full precision")  # of the head
            return load(str(self.int4 or self.target), dtype, "cpu", None if self.int4 else Int4Config(GROUP_SIZE))


@dataclass(frozen=True)
class RunSettings:
    """The dtype (fixed where it is empty) and the number of threads that a runtime runs with."""

    threads: int
    dtype: str = ""

    def __str__(self) -> str:
        return f"{self.dtype}{', ' if self.dtype else ''}{self.threads} thread{'s' if self.threads > 1 else ''}"


class Bench:
    """One run: each runtime's settings are chosen, then engines are compared by batch and sampling."""

    def __init__(self, pair: Pair, args: argparse.Namespace, on_progress: OnProgress) -> None:
        self.pair, self.args, self.on_progress = pair, args, on_progress
        self.tunings: list[Tuning] = []
        tokenizer, all_prompts = load_tokenizer(str(pair.target)), embedded.prompts()
        selected = all_prompts[:: max(1, len(all_prompts) // MAX_PROMPTS)]
        encoded = (tokenizer(prompt["prompt"]).input_ids for prompt in selected)
        self.prompts = [ids[: args.prompt_tokens] for ids in encoded if len(ids) >= args.prompt_tokens]
        if len(self.prompts) < max(args.batch):
            raise ValueError(
                f"only {len(self.prompts)} prompts have {args.prompt_tokens} tokens, --batch {max(args.batch)} needs"
                " that many"
            )
        self.worker = openvino.Worker() if args.openvino else None

    def task_set(self, batch: int, sampled: bool) -> TaskSet:
        count = batch * max(1, self.args.prompts // batch)
        return TaskSet(batch, sampled, self.prompts[:count], self.args.new_tokens)

    def choose_settings(self) -> None:
        """Choose each runtime's dtype and threads by its plain decoding, and load what it will run."""
        threads = sorted({1, self.args.threads})
        dense = {dtype: load(str(self.pair.target), dtype, "cpu") for dtype in DTYPES}
        quantized = {dtype: self.pair.load_int4(dtype) for dtype in DTYPES}
        candidates = [RunSettings(t, dtype) for dtype in DTYPES for t in threads]
        self.transformers = self._fastest(
            "transformers", {c: stock_plain("transformers", dense[c.dtype], c.threads) for c in candidates}
        )
        self.specdec = self._fastest("specdec", {c: specdec_plain(quantized[c.dtype], c.threads) for c in candidates})
        self.dense, self.quantized = dense[self.transformers.dtype], quantized[self.specdec.dtype]
        self.draft = load(str(self.pair.draft), self.transformers.dtype, "cpu")
        drafts = {
            self.specdec.dtype: load(str(self.pair.draft), self.specdec.dtype, "cpu"),
            "4 bits": load(str(self.pair.draft), self.specdec.dtype, "cpu", Int4Config(GROUP_SIZE)),
        }
        engines = {
            name: specdec_draft(self.quantized, self.specdec.threads, draft, 2) for name, draft in drafts.items()
        }
        _, tuning = tune("specdec's draft", engines, self.task_set(1, False), self.on_progress)
        self.tunings.append(tuning)
        self.specdec_draft = drafts[tuning.best]
        if self.worker is not None:
            self.exports = [openvino.export(path, self.on_progress) for path in (self.pair.target, self.pair.draft)]
            engines = {RunSettings(t): openvino.OpenVino(self.worker, self.exports[0], t) for t in threads}
            self.openvino = self._fastest("OpenVINO", engines)

    def _fastest(self, runtime: str, engines: dict[RunSettings, Any]) -> RunSettings:
        named = {str(settings): engine for settings, engine in engines.items()}
        _, tuning = tune(f"{runtime} plain", named, self.task_set(1, False), self.on_progress)
        self.tunings.append(tuning)
        return next(settings for settings in engines if str(settings) == tuning.best)

    def engines(self, task_set: TaskSet) -> list[Engine]:
        """All engines that can run the tasks; the first is the baseline."""
        ks, stock_threads, threads = self.args.num_draft_tokens, self.transformers.threads, self.specdec.threads
        engines: list[Engine] = [stock_plain("transformers", self.dense, stock_threads)]
        if task_set.batch == 1:
            assisted = {k: stock_assisted("transformers", self.dense, stock_threads, self.draft, k) for k in ks}
            lookup = {k: stock_lookup("transformers", self.dense, stock_threads, k) for k in ks}
            engines += [self._best_k(task_set, assisted), self._best_k(task_set, lookup)]
        if self.worker is not None:
            target, draft = self.exports
            engines.append(openvino.OpenVino(self.worker, target, self.openvino.threads))
            drafted = {k: openvino.OpenVino(self.worker, target, self.openvino.threads, draft, k) for k in ks}
            engines.append(self._best_k(task_set, drafted))
        engines.append(stock_plain("specdec", self.quantized, threads, "4-bit, stock loop"))
        engines.append(specdec_plain(self.quantized, threads))
        engines += [specdec_draft(self.quantized, threads, self.specdec_draft, k) for k in (*ks, "auto")]
        engines.append(self._best_k(task_set, {k: specdec_lookup(self.quantized, threads, k) for k in ks}))
        return engines

    def _best_k(self, task_set: TaskSet, engines: dict[int, Any]) -> Engine:
        first = next(iter(engines.values()))
        named = {f"K={k}": engine for k, engine in engines.items()}
        best, tuning = tune(f"{first.runtime} {first.name}, {task_set}", named, task_set, self.on_progress)
        self.tunings.append(tuning)
        return best

    def run(self) -> list[dict[str, Any]]:
        self.choose_settings()
        results = []
        for batch in self.args.batch:
            for sampled in (False, True):
                task_set = self.task_set(batch, sampled)
                results += compare(self.engines(task_set), task_set, self.args.rounds, self.on_progress)
        return results


def find_pair(name: str, console: Console) -> Pair:
    """The embedded pair, a widened one (cached in build/pairs), or a folder with target/ and draft/."""
    if name == "embedded":
        return Pair(name, widen_pair.ORIGINAL, embedded.DRAFT, embedded.TARGET)
    folder = BUILT_PAIRS / name if name in widen_pair.PAIRS else Path(name)
    if name in widen_pair.PAIRS and not (folder / "draft").exists():
        console.print(f"widening the embedded pair to {name}, once: {folder.relative_to(ROOT)}")
        widen_pair.main([name, "--output", str(folder)])
    for role in ("target", "draft"):
        if not (folder / role / "config.json").exists():
            raise ValueError(
                f"--pair {name}: no model in {folder / role}; pairs are embedded, {', '.join(widen_pair.PAIRS)}"
            )
    return Pair(folder.name, folder / "target", folder / "draft")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="embedded", help=f"embedded, {', '.join(widen_pair.PAIRS)}, or a folder")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 48 new tokens, 4 prompts")
    parser.add_argument("--num-draft-tokens", type=int, nargs="+", default=[1, 2, 3, 5], metavar="K")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, default=8, help="per engine and round; rounded to batches")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="at most; 1 is tried too")
    parser.add_argument("--no-openvino", dest="openvino", action="store_false", help="leave it out, installed or not")
    parser.add_argument("--setup-peers", action="store_true", help="install the peers and end; runs never install")
    parser.add_argument(
        "--output", type=Path, help="bench_peers-<pair>.json in benchmarks/results, of a quick run in build"
    )
    args = parser.parse_args(arguments)
    if args.setup_peers:
        return args
    if args.quick:
        args.rounds, args.new_tokens, args.prompts = 3, 48, 4
    if min(*args.num_draft_tokens, *args.batch, args.prompts, args.rounds, args.threads) < 1:
        parser.error("K, batches, prompts, rounds and threads begin at 1")
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
            openvino.setup(console.print)
            return 0
        report = measure(args, console)
    except (ValueError, openvino.PeerFailed) as error:
        console.print(f"bench_peers: {error}", style="red", highlight=False)
        return 1
    show_report(report)
    write(report, args)
    if any(r["runtime"] == "specdec" and r["identical_rows"] not in (None, r["rows"]) for r in report["results"]):
        console.print(
            "bench_peers: a greedy text of specdec differs from that of transformers' loop on the same model",
            style="red",
        )
        return 1
    return 0


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The report of a run, with its provenance."""
    missing = []
    if args.openvino and not openvino.is_set_up():
        args.openvino = False
        missing.append(openvino.NOT_SET_UP)
    origin: dict[str, Any] = provenance("cpu") | {"threads": args.threads}
    if args.openvino:
        origin["peers"] = openvino.versions()
    pair = find_pair(args.pair, console)
    results, tunings = run_bench(pair, args, console)
    return {
        "script": "bench_peers",
        "pair": pair.name,
        "provenance": origin,
        "workload": {name: getattr(args, name) for name in ("prompts", "prompt_tokens", "new_tokens", "rounds")},
        "missing": missing,
        "tuned": [asdict(one) for one in tunings],
        "results": results,
    }


def run_bench(pair: Pair, args: argparse.Namespace, console: Console) -> tuple[list[dict[str, Any]], list[Tuning]]:
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("loading", total=None)
        bench = Bench(pair, args, lambda text: progress.update(task, description=text, advance=1))
        try:
            return bench.run(), bench.tunings
        finally:
            if bench.worker is not None:
                bench.worker.close()


def show_report(report: dict[str, Any]) -> None:
    results, tuned = report["results"], report["tuned"]
    console = Console(width=max(100, Console().width))
    for title, group in show.groups(results):
        console.print("", show.speed_table(title, group), show.steps_table(title, group))
    settings = {one["what"].removesuffix(" plain"): one["best"] for one in tuned if one["what"].endswith(" plain")}
    baseline = show.name_of(results[0])
    console.print(f"baseline: {baseline}; texts are compared with those of the same runtime's first engine")
    console.print("; ".join(f"{runtime} runs with {best}" for runtime, best in settings.items()), "\n", highlight=False)
    for line in [*show.sentences(results), *report["missing"]]:
        console.print(line, highlight=False)


def write(report: dict[str, Any], args: argparse.Namespace) -> None:
    """Write the JSON and the plot."""
    pair, origin = report["pair"], report["provenance"]
    output = args.output or (ROOT / "build" if args.quick else RESULTS) / f"bench_peers-{pair}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot = output.with_suffix(".png")
    show.plot(report["results"], f"{pair} pair, {origin['device']}, {origin['date']}", plot)
    Console(width=max(100, Console().width)).print(f"written: {output} and {plot.name}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
