"""Microseconds of a call, by CUDA events around a CUDA graph of many calls; candidates take turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common.interleaved import interleave

from gpu_suite.messages import first_line, log

Call = Callable[[], Any]
MIN_CALLS = 128  # in a CUDA graph: launching it then adds a hundredth of a microsecond to each call
MAX_GRAPH_S = 0.05  # of calls in a graph
SLEEP_CYCLES = 4_000_000  # about 2 ms, in which the CPU enqueues what follows


@dataclass(frozen=True)
class CallTiming:
    """Median microseconds of a call; NaN where it cannot run, for the reason given.

    spread: the interquartile range of the rounds over their median. graph: whether calls ran in a CUDA graph.
    """

    us: float = math.nan
    spread: float = math.nan
    graph: bool = False
    reason: str = ""


@dataclass(frozen=True)
class PreparedRun:
    """run() makes num_calls calls; is_graph: as a CUDA graph, which hides what launches cost the CPU."""

    run: Call
    num_calls: int
    is_graph: bool


@dataclass(frozen=True)
class CallTimer:
    """Times candidates in interleaved rounds."""

    cuda: bool
    rounds: int
    min_calls: int

    def measure(self, candidates: dict[str, Sequence[Call]], graph: bool = True) -> dict[str, CallTiming]:
        """Time each candidate, a list of calls on buffers of their own. The first must run; another need not."""
        timings, prepared = {name: CallTiming() for name in candidates}, {}
        for name, calls in candidates.items():
            try:
                prepared[name] = self._prepare(calls, graph)
            except (RuntimeError, NotImplementedError) as error:  # torch.OutOfMemoryError is a RuntimeError
                if name == next(iter(candidates)):
                    raise
                timings[name] = CallTiming(reason=first_line(error))
        samples = interleave({name: partial(self._call_us, one) for name, one in prepared.items()}, self.rounds)
        for name, values in samples.items():
            low, us, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
            timings[name] = CallTiming(us, (high - low) / us, prepared[name].is_graph)
        return timings

    def _prepare(self, calls: Sequence[Call], graph: bool) -> PreparedRun:
        def run(cycles: int = 1) -> None:
            for _ in range(cycles):
                for call in calls:
                    call()

        run()  # compiles
        cycles = max(1, min(-(-self.min_calls // len(calls)), int(MAX_GRAPH_S / self._seconds(run))))
        num_calls, run_all = cycles * len(calls), partial(run, cycles)
        if self.cuda and graph:
            captured = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(captured):
                    run_all()
                captured.replay()
                torch.cuda.synchronize()
                return PreparedRun(captured.replay, num_calls, True)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                torch.cuda.synchronize()
                log(f"  no CUDA graph, so launches are timed too: {first_line(error)}")
        return PreparedRun(run_all, num_calls, False)

    def _call_us(self, prepared: PreparedRun, round_index: int) -> float:
        return 1e6 * self._seconds(prepared.run, prepared.is_graph) / prepared.num_calls

    def _seconds(self, run: Call, is_graph: bool = False) -> float:
        if not self.cuda:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if is_graph:
            torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
