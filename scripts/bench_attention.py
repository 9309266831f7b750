"""Time attention of a verification's queries over a KV cache on this CPU: interleaved, medians; the last line is JSON.

    OMP_NUM_THREADS=1 python scripts/bench_attention.py
    python scripts/bench_attention.py --slots 1024 --output benchmarks/results/bench_attention.json

One row of a bfloat16 model with grouped heads, K+1 queries at the end of the text: specdec's operator against PyTorch's
scaled_dot_product_attention. "x one query" is what verification costs beyond a plain step. GB/s counts keys and values
of the slots in use, each once; "read" is what this machine reads from a buffer of that size with as many threads. A
buffer of twice as many slots shows what unused ones cost.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common.interleaved import interleave
from common.report import emit
from peers.machine import Bandwidth
from rich.console import Console
from rich.progress import track
from rich.table import Table
from specdec_kernels import cpu
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from specdec.utils.provenance import provenance

PYTORCH, SPECDEC, UNUSED = "PyTorch", "specdec", "specdec, half unused"
CALLS = 10  # of a measurement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 2, 4, 8], help="positions, K+1")
    parser.add_argument("--slots", type=int, nargs="+", default=[256, 1024, 4096, 8192], help="positions in the cache")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    args = parser.parse_args()
    if min(args.slots) < max(args.queries):
        parser.error(f"--slots {min(args.slots)} are fewer than --queries {max(args.queries)}")
    args.queries = sorted({1, *args.queries})  # costs are given in those of one query
    cpu.build()
    bandwidth, results = Bandwidth(), []
    for slots in track(args.slots, "slots", console=Console(stderr=True)):
        results += measure(slots, args, bandwidth)
    report = {
        "script": "bench_attention",
        "provenance": provenance("cpu"),
        "threads": torch.get_num_threads(),
        "heads": args.heads,
        "kv_heads": args.kv_heads,
        "dim": args.dim,
        "results": results,
    }
    show(results)
    emit(report, args.output)


def calls_of(slots: int, queries: int, args: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    random = partial(torch.randn, generator=generator, dtype=torch.bfloat16)
    query = random(1, args.heads, queries, args.dim)
    key, value = (random(1, args.kv_heads, 2 * slots, args.dim) for _ in range(2))
    last = torch.arange(slots - queries, slots, dtype=torch.int32)[None]  # slots that each query attends to: 0 … last
    visible = torch.arange(slots) <= last[0, :, None]
    full = key[:, :, :slots].contiguous(), value[:, :, :slots].contiguous()
    attention, scale = torch.ops.specdec.attention, args.dim**-0.5
    first = torch.zeros_like(last)
    return {
        PYTORCH: lambda: scaled_dot_product_attention(query, *full, attn_mask=visible, enable_gqa=True),
        SPECDEC: lambda: attention(query, *full, first, last, scale),
        UNUSED: lambda: attention(query, key, value, first, last, scale),
    }


def seconds_of(call: Callable[[], Tensor], _round: int) -> float:
    started = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - started) / CALLS


@torch.inference_mode()
def measure(slots: int, args: argparse.Namespace, bandwidth: Bandwidth) -> list[dict[str, Any]]:
    calls = {queries: calls_of(slots, queries, args) for queries in args.queries}
    for by_name in calls.values():
        torch.testing.assert_close(by_name[SPECDEC]().transpose(1, 2), by_name[PYTORCH](), rtol=0.02, atol=0.02)
    candidates = {
        (name, queries): partial(seconds_of, by_name[name]) for queries, by_name in calls.items() for name in by_name
    }
    times = interleave(candidates, args.rounds, warm_up=1)
    num_bytes = 2 * slots * args.kv_heads * args.dim * torch.bfloat16.itemsize
    read = bandwidth.gb_per_second(num_bytes, torch.get_num_threads())
    results = []
    for name, queries in product((PYTORCH, SPECDEC, UNUSED), args.queries):
        seconds = statistics.median(times[name, queries])
        ratios = [a / b for a, b in zip(times[PYTORCH, queries], times[name, queries], strict=True)]
        results.append({
            "slots": slots,
            "attention": name,
            "queries": queries,
            "us": round(1e6 * seconds, 1),
            "gb_per_second": round(1e-9 * num_bytes / seconds, 2),
            "read_gb_per_second": read,
            "cost_in_one_query": round(seconds / statistics.median(times[name, 1]), 2),
            "ratio_to_pytorch": round(statistics.median(ratios), 2),
        })  # fmt: skip
    return results


def show(results: list[dict[str, Any]]) -> None:
    table = Table(title=f"attention of one layer, medians, {torch.get_num_threads()} threads")
    table.add_column("slots", justify="right")
    table.add_column("attention", no_wrap=True)
    for column in ("queries", "us", "GB/s", "read", "x one query", "x PyTorch"):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            f"{r['slots']:,}", r["attention"], str(r["queries"]), f"{r['us']:,.0f}", f"{r['gb_per_second']:.1f}",
            f"{r['read_gb_per_second']:.1f}", f"{r['cost_in_one_query']:.2f}", f"{r['ratio_to_pytorch']:.2f}",
        )  # fmt: skip
    Console(width=max(100, Console().width)).print(table)


if __name__ == "__main__":
    main()
