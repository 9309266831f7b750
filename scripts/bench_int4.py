"""Time the quantized layers against a bfloat16 nn.Linear on this CPU, 1 … 16 rows: interleaved, medians, one JSON line.

llama.cpp's products with weights of the same shape are timed too where `bench_peers.py --setup-peers` has built it.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common.report import emit
from peers import setup
from peers.machine import Bandwidth
from peers.runtimes import NOT_SET_UP, LlamaCpp
from peers.worker import Worker
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
LLAMACPP_TYPES = ("Q4_0", "Q8_0")
PAUSE_S = 0.01  # OpenMP's threads, PyTorch's and llama.cpp's, wait for work in a loop, and take the CPU from others


@dataclass(frozen=True)
class Layer:
    """One weight. time: seconds of a product with so many rows."""

    time: Callable[[int], float]
    weight_bytes: int


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
    with llamacpp() as worker:
        for shape in args.shapes:
            columns, rows_out = map(int, shape.split("x"))
            quantized, dense = own_layers(columns, rows_out, args)
            peers = {} if worker is None else llamacpp_layers(columns, rows_out, worker)
            results += measure(columns, rows_out, [quantized, dense, peers], args, bandwidth)
    report = {
        "script": "bench_int4",
        "provenance": provenance("cpu"),
        "threads": torch.get_num_threads(),
        "group_size": args.group_size,
        "peers": {} if worker is None else {setup.LLAMACPP_PACKAGE: setup.LLAMACPP_VERSION},
        "results": results,
    }
    show(results)
    emit(report, args.output)


@contextmanager
def llamacpp() -> Iterator[Worker | None]:
    """llama.cpp's process; None where it is not set up."""
    if not LlamaCpp.is_set_up():
        Console(stderr=True).print(NOT_SET_UP.format(LlamaCpp.name))
        yield None
        return
    worker = Worker(LlamaCpp.name, [str(setup.LLAMACPP_WORKER)], setup.BUILD / "LlamaCpp.log")
    try:
        yield worker
    finally:
        worker.close()


def own_layers(columns: int, rows_out: int, args: argparse.Namespace) -> tuple[dict[str, Layer], dict[str, Layer]]:
    """The quantized layers, and PyTorch's."""
    torch.manual_seed(0)
    dense = nn.Linear(columns, rows_out, bias=False, dtype=torch.bfloat16).eval()
    codes = round_to_nearest(dense.weight, args.group_size, symmetric=True)
    modules: dict[str, Any] = {
        "4 bits, inputs in 8": Int4Linear(codes),
        "4 bits, inputs in 16": Int4Linear(codes),
        "8 bits, inputs in 8": Int8Linear(*round_rows(dense.weight)),
        BASELINE: dense,
    }
    modules["4 bits, inputs in 16"].int8_inputs = False
    inputs = {rows: torch.randn(1, rows, columns, dtype=torch.bfloat16) for rows in args.rows}

    def time_module(module: nn.Module, rows: int) -> float:
        started = time.perf_counter()
        module(inputs[rows])
        return time.perf_counter() - started

    layers = {name: Layer(partial(time_module, module.eval()), bytes_read(module)) for name, module in modules.items()}
    return layers, {BASELINE: layers.pop(BASELINE)}


def llamacpp_layers(columns: int, rows_out: int, worker: Worker) -> dict[str, Layer]:
    def product(kind: str, rows: int) -> dict[str, Any]:
        shape = {"in": columns, "out": rows_out, "rows": rows}
        return worker.request(op="linear", type=kind, threads=torch.get_num_threads(), **shape)

    def time_product(kind: str, rows: int) -> float:
        seconds: float = product(kind, rows)["seconds"]
        return seconds

    return {
        f"{LlamaCpp.name}, {kind}": Layer(partial(time_product, kind), product(kind, 1)["bytes"])
        for kind in LLAMACPP_TYPES
    }


@torch.inference_mode()
def measure(
    columns: int,
    rows_out: int,
    groups: Sequence[Mapping[str, Layer]],
    args: argparse.Namespace,
    bandwidth: Bandwidth,
) -> list[dict[str, Any]]:
    """Times of all layers; groups: those with the same threads, which are timed one after another."""
    layers = {name: layer for group in groups for name, layer in group.items()}
    times: dict[tuple[str, int], list[float]] = {(name, rows): [] for name in layers for rows in args.rows}
    for round_number in track(range(args.rounds + 1), f"{columns} -> {rows_out}", console=Console(stderr=True)):
        for group in groups:
            time.sleep(PAUSE_S)
            for layer in group.values():
                layer.time(args.rows[0])  # the first calls after a pause take longer
            for rows in args.rows:
                for name, layer in group.items():
                    seconds = layer.time(rows)
                    if round_number:  # the first one warms up
                        times[name, rows].append(seconds)
    results = []
    for name, layer in layers.items():
        read = bandwidth.gb_per_second(layer.weight_bytes, torch.get_num_threads())
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
                "gb_per_second": round(1e-9 * layer.weight_bytes / seconds, 2),
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
