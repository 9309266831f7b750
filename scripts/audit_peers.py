"""Which engines write plain decoding's greedy texts when they speculate, and when rows share a batch?

With --sampled: do they draw from plain decoding's law?

    python scripts/bench_peers.py --setup-peers           # once
    python scripts/audit_peers.py                         # the embedded pair, 48 prompts, batches of 1 and 4
    python scripts/audit_peers.py --pair smollm2 --output benchmarks/results/audit_peers-smollm2.json
    python scripts/audit_peers.py --sampled --draws 200   # of each of 3 contexts, one row at a time

Each text is compared, id by id, with the one that the same runtime writes by plain decoding of single rows, from the
same weights. Runtimes hold the target in their own 4-bit formats, so their texts are not compared with each other.
All engines get the same prompts, of one length, and write the same number of ids; EOS ids are ignored. Sampled ids are
compared likewise: many draws of the next ids, by peers/draws.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_peers import shown_progress
from common.report import emit
from peers import setup
from peers.draws import compare_draws, contexts_of
from peers.engines import Engine, Ids
from peers.measure import OnProgress, TaskSet, label, run_tasks
from peers.pairs import NAMES, find_pair
from peers.runtimes import NOT_SET_UP, RUNTIMES, Conditions, Runtime
from peers.worker import PeerFailed
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from specdec.audit.identity import first_difference
from specdec.audit.statistics import clopper_pearson
from specdec.runtime.loading import load_tokenizer
from specdec.utils import embedded
from specdec.utils.provenance import provenance

THREADS = 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="embedded", help=f"{', '.join(NAMES)}, or a folder")
    parser.add_argument("--runtimes", nargs="+", choices=list(RUNTIMES), default=list(RUNTIMES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="1 comes first")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--num-draft-tokens", type=int, default=3, metavar="K")
    parser.add_argument("--sampled", action="store_true", help="compare sampled ids instead of greedy texts")
    parser.add_argument("--contexts", type=int, default=3, help="with --sampled: prompts, each a short one")
    parser.add_argument("--draws", type=int, default=200, help="with --sampled: of each context")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    args = parser.parse_args(arguments)
    if args.batch[0] != 1 or args.prompts % max(args.batch):
        parser.error("--batch begins with 1, whose plain texts are compared with, and --prompts is a multiple of each")
    console = Console(stderr=True)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        report = audit(args, console)
    except (ValueError, PeerFailed, UserWarning) as error:
        console.print(f"audit_peers: {error}", style="red", highlight=False)
        return 1
    show(report, console)
    emit(report, args.output)
    return 0


def audit(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    absent = [name for name in args.runtimes if not RUNTIMES[name].is_set_up()]
    present = [name for name in args.runtimes if name not in absent]
    origin: dict[str, Any] = provenance("cpu")
    if not set(present) <= {"transformers", "specdec"}:
        origin["peers"] = setup.versions()
    pair = find_pair(args.pair, console)
    tokenizer = load_tokenizer(str(pair.target))
    encoded = [tokenizer(prompt["prompt"]).input_ids[: args.prompt_tokens] for prompt in embedded.prompts()]
    prompts = [ids for ids in encoded if len(ids) == args.prompt_tokens]
    if len(prompts) < args.prompts:
        raise ValueError(f"only {len(prompts)} prompts have {args.prompt_tokens} tokens, --prompts is {args.prompts}")
    workload = {name: getattr(args, name) for name in ("prompts", "prompt_tokens", "new_tokens")}
    if args.sampled:
        prompts = contexts_of(pair, prompts, args.contexts)
        workload = {"contexts": args.contexts, "draws": args.draws}
    results: list[dict[str, Any]] = []
    with shown_progress(console) as on_progress:
        for name in present:
            runtime = RUNTIMES[name](pair, args.prompt_tokens + args.new_tokens, on_progress)
            try:
                if args.sampled:
                    results += compare_draws(runtime, prompts, args.draws, args.num_draft_tokens, on_progress)
                else:
                    results += audit_runtime(runtime, prompts[: args.prompts], args, on_progress)
            finally:
                runtime.close()
    return {
        "script": "audit_peers",
        "pair": pair.name,
        "provenance": origin,
        "workload": workload,
        "missing": [NOT_SET_UP.format(RUNTIMES[name].name) for name in absent],
        "results": results,
    }


def audit_runtime(
    runtime: Runtime, prompts: Ids, args: argparse.Namespace, on_progress: OnProgress
) -> Iterator[dict[str, Any]]:
    """One result for each engine and batch size."""
    plain: dict[str, Ids] = {}  # texts of single rows, by the format of the weights
    for batch in args.batch:
        task_set = TaskSet(batch, False, prompts, args.new_tokens)
        for engine in runtime.engines(Conditions(task_set, THREADS, (args.num_draft_tokens,), first_of)):
            on_progress(f"batch {batch}: {label(engine)}")
            texts = run_tasks(engine, task_set.tasks()).ids
            plain.setdefault(engine.weights, texts)  # the first engine of a runtime decodes plainly
            differences = [first_difference(a, b) for a, b in zip(plain[engine.weights], texts, strict=True)]
            found = [position for position in differences if position is not None]
            identical = len(texts) - len(found)
            yield {
                "runtime": engine.runtime,
                "engine": engine.name,
                "weights": engine.weights,
                "num_draft_tokens": engine.num_draft_tokens,
                "batch": batch,
                "texts": len(texts),
                "identical": identical,
                "interval": [round(bound, 4) for bound in clopper_pearson(identical, len(texts))],
                "median_first_difference": statistics.median(found) if found else None,
            }


def first_of(name: str, candidates: Mapping[str, Engine]) -> Engine:
    return next(iter(candidates.values()))


def show(report: dict[str, Any], console: Console) -> None:
    is_sampled = "draws" in report["workload"]
    header, *rows = (draw_rows if is_sampled else table_rows)(report)
    title = (
        "sampled ids against plain decoding's"
        if is_sampled
        else "greedy texts that are plain decoding's of single rows"
    )
    table = Table(title=f"{title}, {report['pair']} pair")
    for column in header:
        table.add_column(column, justify="left" if column in header[:2] else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=max(150, Console().width)).print(table)
    for line in report["missing"]:
        console.print(line, highlight=False)


def names_of(result: dict[str, Any]) -> tuple[str, str]:
    k = "" if result["num_draft_tokens"] is None else f", K={result['num_draft_tokens']}"
    return f"{result['runtime']}, {result['weights']}", result["engine"] + k


def draw_rows(report: dict[str, Any]) -> list[list[str]]:
    """The header, and a row for each engine whose draws were compared."""
    rows = [
        [
            *names_of(r),
            "" if r["tokens_per_step"] is None else f"{r['tokens_per_step']:.2f}",
            f"{r['draws']:,}",
            f"{r['p_value']:.4f}",
            f"{r['smallest_shift']:.3f}",
        ]
        for r in report["results"]
    ]
    return [["runtime, weights", "engine", "tokens a step", "draws", "p-value", "smallest shift found"], *rows]


def table_rows(report: dict[str, Any]) -> list[list[str]]:
    """The header, and a row for each engine with a cell for each batch size."""
    by_engine: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for r in report["results"]:
        by_engine.setdefault(names_of(r), {})[r["batch"]] = r
    batches = list(dict.fromkeys(r["batch"] for r in report["results"]))
    rows = [
        [runtime, engine, *(cell_of(by_batch.get(batch)) for batch in batches)]
        for (runtime, engine), by_batch in by_engine.items()
    ]
    return [["runtime, weights", "engine", *(f"batch {batch}" for batch in batches)], *rows]


def cell_of(result: dict[str, Any] | None) -> str:
    """The share of identical texts with its 95 % interval."""
    if result is None:
        return ""
    low, high = result["interval"]
    return f"{result['identical']} of {result['texts']} ({low:.0%} to {high:.0%})"


if __name__ == "__main__":
    sys.exit(main())
