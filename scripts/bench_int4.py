"""Time Int4Linear against a bfloat16 nn.Linear on this CPU, 1 … 16 rows: interleaved, medians, one JSON line last.

    OMP_NUM_THREADS=1 python scripts/bench_int4.py python scripts/bench_int4.py --shapes 4096x4096 14336x4096 --output
    benchmarks/results/bench_int4.json

The ratios show the cost of verification: K+1 rows at once against one row.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from specdec.quant.linear import Int4Linear
from specdec.quant.rounding import round_to_nearest
from specdec.utils.provenance import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "256x512"], metavar="INxOUT")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 8, 12, 16])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    args = parser.parse_args()
    origin = provenance("cpu")
    results = []
    for shape in args.shapes:
        columns, rows_out = map(int, shape.split("x"))
        results += measure(columns, rows_out, args)
    report = {"script": "bench_int4", "provenance": origin, "group_size": args.group_size, "results": results}
    show(results)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


@torch.inference_mode()
def measure(columns: int, rows_out: int, args: argparse.Namespace) -> list[dict]:
    torch.manual_seed(0)
    dense = nn.Linear(columns, rows_out, bias=False, dtype=torch.bfloat16).eval()
    int4 = Int4Linear(round_to_nearest(dense.weight, args.group_size, symmetric=True)).eval()
    layers = {"int4": int4, "bf16": dense}
    inputs = {rows: torch.randn(1, rows, columns, dtype=torch.bfloat16) for rows in args.rows}
    for x in inputs.values():
        for layer in layers.values():
            layer(x)
    bytes_per_weight = sum(t.nbytes for t in (*int4.parameters(), *int4.buffers())) / (columns * rows_out)
    times: dict[tuple[str, int], list[float]] = {(name, rows): [] for name in layers for rows in inputs}
    for _ in track(range(args.rounds), description=f"{columns} -> {rows_out}", console=Console(stderr=True)):
        for rows, x in inputs.items():
            for name, layer in layers.items():
                times[name, rows].append(timed(lambda layer=layer, x=x: layer(x)))
    median = {key: statistics.median(values) for key, values in times.items()}
    return [
        {
            "in": columns,
            "out": rows_out,
            "rows": rows,
            "int4_us": round(1e6 * median["int4", rows], 1),
            "bf16_us": round(1e6 * median["bf16", rows], 1),
            "ratio_to_bf16": round(statistics.median(b / a for a, b in paired(times, rows)), 2),
            "cost_in_one_row": round(median["int4", rows] / median["int4", args.rows[0]], 2),
            "bytes_per_weight": round(bytes_per_weight, 4),
        }
        for rows in args.rows
    ]


def paired(times: dict[tuple[str, int], list[float]], rows: int) -> list[tuple[float, float]]:
    """(int4, bf16) seconds of the same round."""
    return list(zip(times["int4", rows], times["bf16", rows], strict=True))


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def show(results: list[dict]) -> None:
    table = Table(title="one linear layer, medians")
    table.add_column("shape", no_wrap=True)
    for column in ("rows", "int4, us", "bf16, us", "× bf16", "× one row", "B/weight"):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            f"{r['in']} -> {r['out']}", str(r["rows"]), f"{r['int4_us']:,.0f}", f"{r['bf16_us']:,.0f}",
            f"{r['ratio_to_bf16']:.2f}", f"{r['cost_in_one_row']:.2f}", f"{r['bytes_per_weight']:.3f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
