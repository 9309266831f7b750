"""Rows of the tables: times with the bytes that had to move and the baselines' times; goals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_suite.messages import log
from gpu_suite.suite import Row, Suite
from gpu_suite.timing import CallTiming


def timing_row(suite: Suite, times: dict[str, CallTiming], num_bytes: int, **labels: Any) -> Row:
    """The first candidate's time, the bytes that it has to move, and the other candidates' times."""
    measured, bandwidth_us = next(iter(times.values())), num_bytes / suite.bandwidth["copy_gbps"] / 1e3
    row = labels | {
        "bytes": num_bytes,
        "graph": measured.graph,
        "time_us": measured.us,
        "spread": measured.spread,
        "gbps": num_bytes / measured.us / 1e3,
        "bandwidth_us": bandwidth_us,
        "ratio_to_bandwidth": measured.us / bandwidth_us,
        "fraction_of_copy": bandwidth_us / measured.us,
    }
    for name, timing in list(times.items())[1:]:
        row |= {f"{name}_us": timing.us, f"ratio_to_{name}": timing.us / measured.us, f"{name}_graph": timing.graph}
        row |= {f"{name}_absent": timing.reason} if timing.reason else {}
    log(f"  timed: {', '.join(f'{name} {value}' for name, value in labels.items())}")
    return row


def matmul_rows(
    suite: Suite,
    candidates: dict[str, list[Callable[[Tensor], Tensor]]],
    shape: tuple[int, int],
    rows: Sequence[int],
    num_bytes: int,
    form: str,
    dtype: torch.dtype,
) -> list[Row]:
    """Times of products by one weight W [N, K] at each number of rows of x.

    candidates: functions of x [M, K], each with a copy of the weight of its own. num_bytes: of a weight.
    """
    (k, n), results = shape, list[Row]()
    for m in rows:
        num_inputs = max(map(len, candidates.values()))
        xs = [torch.randn(m, k, device=suite.device).to(dtype) for _ in range(num_inputs)]
        times = suite.timer.measure(
            {
                name: [partial(function, x) for function, x in zip(functions, xs, strict=False)]
                for name, functions in candidates.items()
            }
        )
        moved = num_bytes + m * (k + n) * dtype.itemsize
        results.append(timing_row(suite, times, moved, shape=f"{k}->{n}", form=form, rows=m))
        results[-1]["cost_in_one_row"] = results[-1]["time_us"] / results[0]["time_us"]
    return results


def goal(text: str, figure: str, worst: Callable, bound: float, rows: Sequence[Row]) -> Row:
    """A goal, and the row whose figure is furthest from it. met: None where a row lacks the figure.

    worst: `min` where more is better, so that the bound is a lower one; else `max`.
    """
    worst_row = worst(rows, key=lambda row: row[figure])
    value = worst_row[figure]
    met = value >= bound if worst is min else value <= bound
    return {
        "goal": text,
        "figure": figure,
        "bound": bound,
        "worst": value,
        "at": ", ".join(
            f"{name} {worst_row[name]}" for name in ("shape", "rows", "batch", "keys") if name in worst_row
        ),
        "met": None if any(math.isnan(row[figure]) for row in rows) else met,
    }
