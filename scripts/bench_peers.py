"""specdec and its peers on one pair, in one run: transformers, OpenVINO GenAI, specdec; interleaved, medians, one JSON.

    python scripts/bench_peers.py --setup-peers                     # once: OpenVINO GenAI's own virtual environment
    python scripts/bench_peers.py --pair embedded --quick           # 3 minutes on two cores
    python scripts/bench_peers.py --pair 200m                       # the embedded pair widened to 201 million parameters
    python scripts/bench_peers.py --pair folder                     # one of your own: folder/target, folder/draft

All engines get the same prompts, of one length, and write the same number of ids, ends of text ignored. Each runtime runs with
the dtype and the number of threads that serve its plain decoding best, each speculative peer with the K that serves it best, by
batch and sampling; specdec's draft is a 4-bit one, as OpenVINO's is, where that serves it better. All of this is measured first
and stands in the JSON. specdec runs compiled; compiling itself is not in the figures. Texts are held against those of the same
runtime's first engine. How to read it all: benchmarks/README.md.
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
from peers.measure import Cell, Tuned, compare, tune
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
BUILT = ROOT / "build" / "pairs"
GROUP_SIZE = openvino.GROUP_SIZE  # the same for all
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Pair:
    """Where its models lie: the target in full precision, in 4 bits (None: to be quantized), and the draft."""

    name: str
    target: Path
    draft: Path
    int4: Path | None = None

    def load_int4(self, dtype: str) -> PreTrainedModel:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="specdec keeps in full precision")  # the head, as always
            return load(str(self.int4 or self.target), dtype, "cpu", None if self.int4 else Int4Config(GROUP_SIZE))


@dataclass(frozen=True)
class Chosen:
    """What a runtime runs with."""

    threads: int
    dtype: str = ""

    def __str__(self) -> str:
        return f"{self.dtype}{', ' if self.dtype else ''}{self.threads} thread{'s' if self.threads > 1 else ''}"


class Bench:
    """One run: runtimes settle on dtype and threads, then each cell is measured."""

    def __init__(self, pair: Pair, args: argparse.Namespace, advance: Any) -> None:
        self.pair, self.args, self.advance = pair, args, advance
        self.tuned: list[Tuned] = []
        every = embedded.prompts()
        encoded = (
            load_tokenizer(str(pair.target))(prompt["prompt"]).input_ids
            for prompt in every[:: max(1, len(every) // 64)]
        )
        self.prompts = [ids[: args.prompt_tokens] for ids in encoded if len(ids) >= args.prompt_tokens]
        most = max(args.batch)
        if len(self.prompts) < most:
            raise ValueError(
                f"only {len(self.prompts)} prompts have {args.prompt_tokens} tokens, --batch {most} wants that many"
            )
        self.worker = openvino.Worker() if args.openvino else None

    def cell(self, batch: int, sampled: bool) -> Cell:
        count = batch * max(1, self.args.prompts // batch)
        return Cell(batch, sampled, self.prompts[:count], self.args.new_tokens)

    def settle(self) -> None:
        """Choose each runtime's dtype and threads by its plain decoding, and load what it will run."""
        threads = sorted({1, self.args.threads})
        dense = {dtype: load(str(self.pair.target), dtype, "cpu") for dtype in DTYPES}
        quantized = {dtype: self.pair.load_int4(dtype) for dtype in DTYPES}
        ways = [Chosen(t, dtype) for dtype in DTYPES for t in threads]
        self.stock = self._best(
            "transformers", {c: stock_plain("transformers", dense[c.dtype], c.threads) for c in ways}
        )
        self.ours = self._best("specdec", {c: specdec_plain(quantized[c.dtype], c.threads) for c in ways})
        self.dense, self.quantized = dense[self.stock.dtype], quantized[self.ours.dtype]
        self.draft = load(str(self.pair.draft), self.stock.dtype, "cpu")
        drafts = {
            self.ours.dtype: load(str(self.pair.draft), self.ours.dtype, "cpu"),
            "4 bits": load(str(self.pair.draft), self.ours.dtype, "cpu", Int4Config(GROUP_SIZE)),
        }
        engines = {name: specdec_draft(self.quantized, self.ours.threads, draft, 2) for name, draft in drafts.items()}
        _, tuned = tune("specdec's draft", engines, self.cell(1, False), self.advance)
        self.tuned.append(tuned)
        self.own_draft = drafts[tuned.best]
        if self.worker is not None:
            self.exports = [openvino.export(folder, self.advance) for folder in (self.pair.target, self.pair.draft)]
            engines = {Chosen(t): openvino.OpenVino(self.worker, self.exports[0], t) for t in threads}
            self.other = self._best("OpenVINO", engines)

    def _best(self, runtime: str, engines: dict[Chosen, Any]) -> Chosen:
        _, tuned = tune(
            f"{runtime} plain", {str(c): engine for c, engine in engines.items()}, self.cell(1, False), self.advance
        )
        self.tuned.append(tuned)
        return next(chosen for chosen in engines if str(chosen) == tuned.best)

    def engines(self, cell: Cell) -> list[Engine]:
        """All that can run a cell; the first is what the others are held against."""
        ks, stock, ours = self.args.num_draft_tokens, self.stock, self.ours
        engines: list[Engine] = [stock_plain("transformers", self.dense, stock.threads)]
        if cell.batch == 1:
            draft = self.draft
            engines.append(
                self._tune(cell, {k: stock_assisted("transformers", self.dense, stock.threads, draft, k) for k in ks})
            )
            engines.append(
                self._tune(cell, {k: stock_lookup("transformers", self.dense, stock.threads, k) for k in ks})
            )
        if self.worker is not None:
            target, draft = self.exports
            engines.append(openvino.OpenVino(self.worker, target, self.other.threads))
            engines.append(
                self._tune(cell, {k: openvino.OpenVino(self.worker, target, self.other.threads, draft, k) for k in ks})
            )
        engines.append(stock_plain("specdec", self.quantized, ours.threads, "4-bit, stock loop"))
        engines.append(specdec_plain(self.quantized, ours.threads))
        engines += [specdec_draft(self.quantized, ours.threads, self.own_draft, k) for k in (*ks, "auto")]
        engines.append(self._tune(cell, {k: specdec_lookup(self.quantized, ours.threads, k) for k in ks}))
        return engines

    def _tune(self, cell: Cell, engines: dict[int, Any]) -> Engine:
        first = next(iter(engines.values()))
        what = f"{first.runtime} {first.name}, batch {cell.batch}, {cell.sampling}"
        best, tuned = tune(what, {f"K={k}": engine for k, engine in engines.items()}, cell, self.advance)
        self.tuned.append(tuned)
        return best

    def run(self) -> list[dict[str, Any]]:
        self.settle()
        results = []
        for batch in self.args.batch:
            for sampled in (False, True):
                cell = self.cell(batch, sampled)
                results += compare(self.engines(cell), cell, self.args.rounds, self.advance)
        return results


def find_pair(name: str, console: Console) -> Pair:
    """The embedded pair, one that widening makes (kept in build/pairs), or a folder with target/ and draft/."""
    if name == "embedded":
        return Pair(name, widen_pair.ORIGINAL, embedded.DRAFT, embedded.TARGET)
    folder = BUILT / name if name in widen_pair.PAIRS else Path(name)
    if name in widen_pair.PAIRS and not (folder / "draft").exists():
        console.print(f"widening the embedded pair to {name}, once: {folder.relative_to(ROOT)}")
        widen_pair.main([name, "--output", str(folder)])
    for seat in ("target", "draft"):
        if not (folder / seat / "config.json").exists():
            raise ValueError(
                f"--pair {name}: there is no model in {folder / seat}; known pairs: embedded, {', '.join(widen_pair.PAIRS)}"
            )
    return Pair(folder.name, folder / "target", folder / "draft")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="embedded", help=f"embedded, {', '.join(widen_pair.PAIRS)}, or a folder")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 48 ids, 4 prompts")
    parser.add_argument("--num-draft-tokens", type=int, nargs="+", default=[1, 2, 3, 5], metavar="K")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, default=8, help="a round, of each engine; rounded to batches")
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
    console = Console(stderr=True)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if args.setup_peers:
        try:
            openvino.setup(console.print)
        except openvino.Failed as error:
            console.print(f"bench_peers: {error}", style="red", highlight=False)
            return 1
        return 0
    if args.quick:
        args.rounds, args.new_tokens, args.prompts = 3, 48, 4
    if min(*args.num_draft_tokens, *args.batch, args.prompts, args.rounds, args.threads) < 1:
        parser.error("K, batches, prompts, rounds and threads begin at 1")
    if args.new_tokens < max(args.num_draft_tokens) + 2:  # a call's first step is not looked at
        parser.error(
            f"--new-tokens {args.new_tokens} may be one step at K={max(args.num_draft_tokens)}; K + 2 at least make two"
        )
    if find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib: pip install 'specdec-lossless[experiments]'")
    missing = []
    if args.openvino and not openvino.is_set_up():
        args.openvino = False
        missing.append(openvino.HOW_TO_GET)
    origin = provenance("cpu") | {"threads": args.threads}
    if args.openvino:
        origin["peers"] = openvino.versions()
    try:
        pair = find_pair(args.pair, console)
        results, tuned = measure(pair, args, console)
    except (ValueError, openvino.Failed) as error:
        console.print(f"bench_peers: {error}", style="red", highlight=False)
        return 1
    workload = {
        "prompts": args.prompts,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
    }
    report = {
        "script": "bench_peers",
        "pair": pair.name,
        "provenance": origin,
        "workload": workload,
        "missing": missing,
    }
    report |= {"tuned": [asdict(one) for one in tuned], "results": results}
    out = Console(width=max(100, Console().width))
    for cell, group in show.cells(results):
        out.print("", show.speed_table(cell, group), show.steps_table(cell, group))
    settings = {one.what.removesuffix(" plain"): one.best for one in tuned if one.what.endswith(" plain")}
    out.print(f"baseline: {show.name_of(results[0])}; a runtime's texts are held against those of its own first engine")
    out.print("; ".join(f"{runtime} runs with {chosen}" for runtime, chosen in settings.items()), "\n", highlight=False)
    for line in [*show.sentences(results), *missing]:
        out.print(line, highlight=False)
    output = args.output or (ROOT / "build" if args.quick else RESULTS) / f"bench_peers-{pair.name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show.plot(results, f"{pair.name} pair, {origin['device']}, {origin['date']}", output.with_suffix(".png"))
    out.print(f"written: {output} and {output.with_suffix('.png').name}", highlight=False)
    if any(r["runtime"] == "specdec" and r["identical_rows"] not in (None, r["rows"]) for r in results):
        console.print(
            "bench_peers: a greedy text of specdec differs from that of transformers' loop on the same model",
            style="red",
        )
        return 1
    return 0


def measure(pair: Pair, args: argparse.Namespace, console: Console) -> tuple[list[dict[str, Any]], list[Tuned]]:
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("loading", total=None)
        bench = Bench(pair, args, lambda words: progress.update(task, description=words, advance=1))
        try:
            return bench.run(), bench.tuned
        finally:
            if bench.worker is not None:
                bench.worker.close()


if __name__ == "__main__":
    sys.exit(main())
