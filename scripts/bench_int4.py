"""Time the quantized layers against a bfloat16 nn.Linear on this CPU, 1 … 16 rows: interleaved, medians, one JSON line.

    OMP_NUM_THREADS=1 python scripts/bench_int4.py
    python scripts/bench_int4.py --shapes 4096x4096 256x1024 --output benchmarks/results/bench_int4.json

"x one row" is the cost of verification: K+1 rows at once against one. GB/s counts the weights that a call reads, scales
included; a weight that a cache holds between the calls is read from there. "read" is what this machine reads from a
buffer of the same size with as many threads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common.report import emit
from peers.machine import Bandwidth
from rich.console import Console
from rich.progress import track
from rich.table import Table
from specdec_kernels import cpu
from torch import nn

from specdec.quant.int8 import Int8Linear, round_rows
from specdec.quant.linear import Int4Linear
from specdec.quant.rounding import round_to_nearest
from specdec.utils.provenance import provenance

BASELINE = "bfloat16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "256x1024"], metavar="INxOUT")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 8, 12, 16])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    args = parser.parse_args()
    cpu.build()
    results, bandwidth = [], Bandwidth()
    for shape in args.shapes:
        columns, rows_out = map(int, shape.split("x"))
        results += measure(columns, rows_out, args, bandwidth)
    report = {
        "script": "bench_int4",
        "provenance": provenance("cpu"),
        "threads": torch.get_num_threads(),
        "group_size": args.group_size,
        "results": results,
    }
    show(results)
    emit(report, args.output)


def layers_of(columns: int, rows_out: int, group_size: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    dense = nn.Linear(columns, rows_out, bias=False, dtype=torch.bfloat16).eval()
    codes = round_to_nearest(dense.weight, group_size, symmetric=True)
    layers: dict[str, Any] = {
        "4 bits, inputs in 8": Int4Linear(codes),
        "4 bits, inputs in 16": Int4Linear(codes),
        "8 bits, inputs in 8": Int8Linear(*round_rows(dense.weight)),
    }
    layers["4 bits, inputs in 16"].int8_inputs = False
    return {name: layer.eval() for name, layer in layers.items()} | {BASELINE: dense}


@torch.inference_mode()
def measure(columns: int, rows_out: int, args: argparse.Namespace, bandwidth: Bandwidth) -> list[dict[str, Any]]:
    layers = layers_of(columns, rows_out, args.group_size)
    inputs = {rows: torch.randn(1, rows, columns, dtype=torch.bfloat16) for rows in args.rows}
    times: dict[tuple[str, int], list[float]] = {(name, rows): [] for name in layers for rows in inputs}
    for round_number in track(range(args.rounds + 1), f"{columns} -> {rows_out}", console=Console(stderr=True)):
        for rows, x in inputs.items():
            for name, layer in layers.items():
                started = time.perf_counter()
                layer(x)
                if round_number:  # the first one warms up
                    times[name, rows].append(time.perf_counter() - started)
    results = []
    for name, layer in layers.items():
        weight_bytes = bytes_read(layer)
        read = bandwidth.gb_per_second(weight_bytes, torch.get_num_threads())
        one_row = statistics.median(times[name, args.rows[0]])
        for rows in args.rows:
            seconds = statistics.median(times[name, rows])
            speedups = [a / b for a, b in zip(times[BASELINE, rows], times[name, rows], strict=True)]
            results.append({
                "in": columns,
                "out": rows_out,
                "layer": name,
                "rows": rows,
                "us": round(1e6 * seconds, 1),
                "gb_per_second": round(1e-9 * weight_bytes / seconds, 2),
                "read_gb_per_second": read,
                "giga_operations_per_second": round(2e-9 * rows * columns * rows_out / seconds, 1),
                "cost_in_one_row": round(seconds / one_row, 2),
                "ratio_to_bfloat16": round(statistics.median(speedups), 2),
            })  # fmt: skip
    return results


def bytes_read(layer: nn.Module) -> int:
    """Bytes of the weight that a call reads: codes and scales in the kernel's layout, or the dense weight."""
    tensors = [
        layer.weight,
        layer.kernel_scale if isinstance(layer, Int4Linear) else getattr(layer, "weight_scale", None),
    ]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def show(results: list[dict[str, Any]]) -> None:
    table = Table(title=f"one linear layer, medians, {torch.get_num_threads()} threads")
    table.add_column("shape", no_wrap=True)
    table.add_column("layer", no_wrap=True)
    for column in ("rows", "us", "GB/s", "read", "GOP/s", "x one row", "x bfloat16"):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            f"{r['in']} -> {r['out']}", r["layer"], str(r["rows"]), f"{r['us']:,.0f}", f"{r['gb_per_second']:.1f}",
            f"{r['read_gb_per_second']:.1f}", f"{r['giga_operations_per_second']:,.0f}", f"{r['cost_in_one_row']:.2f}",
            f"{r['ratio_to_bfloat16']:.2f}",
        )  # fmt: skip
    Console(width=max(100, Console().width)).print(table)


if __name__ == "__main__":
    main()
