"""What only a GPU can say, in one command: are the kernels right, and how near do they come to its memory's speed.

A step of decoding reads every weight, key and value once, so its time is bytes / bandwidth and nothing else: 3.6 GB of 4-bit
weights at 4.3 TB/s are 0.84 ms, whether one row is multiplied or six. A kernel is good when it comes near that time and stays
there while rows are added. So each time stands beside the bytes that had to move and the speed of a copy on this device.

    PYTHONPATH=.:kernels python scripts/gpu_suite.py                                # all sections, some 20 minutes
    PYTHONPATH=.:kernels python scripts/gpu_suite.py --section correctness w4a16
    PYTHONPATH=.:kernels python scripts/gpu_suite.py --dry                          # tiny shapes, no figures, no GPU needed

It needs a CUDA device (compute capability 8.0 or more), torch, triton, transformers and this checkout. An op whose results are
wrong is not timed. Sections go to one JSON as they end, each with its time and its origin. Exit code 1: something is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

HAS_CUDA = torch.cuda.is_available()
if HAS_CUDA or "--dry" in sys.argv:  # triton reads it when it is imported, which transformers does
    os.environ["TRITON_INTERPRET"] = "0" if HAS_CUDA else "1"

# ruff: noqa: E402
import widen_pair
from peers.engines import Engine, specdec_draft, specdec_plain, stock_assisted, stock_plain
from peers.measure import Cell, Tuned, compare, tune
from specdec_kernels import rejection, trial
from specdec_kernels.attention import attention as attention_op
from specdec_kernels.w4a16 import PackedWeight, matmul, prepack
from specdec_kernels.w4a16.layout import E2M1
from transformers import AutoTokenizer, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import specdec
from specdec.core import verification
from specdec.core.steps import Draft
from specdec.quant.config import Int4Config
from specdec.quant.int4 import Int4Tensor, pack, unpack
from specdec.quant.linear import Int4Linear
from specdec.runtime.loading import load
from specdec.utils import embedded
from specdec.utils.provenance import provenance

Row = dict[str, Any]
Call = Callable[[], Any]
ROOT = Path(__file__).resolve().parent.parent
TESTS_LIMIT_S = 450
CALLS = 128  # in a CUDA graph, at least: what starting it takes is then a hundredth of a microsecond of each
GRAPH_S = 0.05  # of calls in a graph, at most
NEAR_TIE = 0.25  # between the two best logits: bfloat16's rounding may decide
SPREAD = 4  # between the largest errors of repetitions, at most; one that moves more comes from something left over
FIGURE = re.compile(
    r"_us$|gbps$|^ratio|^fraction|^cost|^spread|^seconds$|^worst$|^met$|^launches|^at$|_ms$|^tokens_per_second|^build_s$"
)  # none in a dry run


@dataclass(frozen=True)
class Form:
    """How a 4-bit weight is held, and the dtype of what it is multiplied by."""

    name: str
    group_size: int = 128
    asymmetric: bool = False
    e2m1: bool = False
    dtype: torch.dtype = torch.bfloat16


MAIN = Form("symmetric, 128")
OTHERS = (
    Form("asymmetric, 128", asymmetric=True),
    Form("symmetric, 64", 64),
    Form("symmetric, 32", 32),
    Form("e2m1, 32", 32, e2m1=True),
    Form("symmetric, 128, fp16", dtype=torch.float16),
)


@dataclass(frozen=True)
class Sizes:
    """What is run: the matmuls of Llama-3-8B as (K, N), its attention, its vocabulary."""

    shapes: tuple[tuple[int, int], ...] = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256))
    other_shape: tuple[int, int] = (4096, 28672)  # of the other forms, at 6 rows
    rows: tuple[int, ...] = (1, 2, 4, 6, 8, 16, 32, 64)
    checked_rows: tuple[int, ...] = tuple(range(1, 65))
    width: int = 6
    heads: tuple[int, int, int] = (32, 8, 128)  # of queries, of keys, their width
    keys: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    goal_keys: int = 8192
    attention_batches: tuple[int, ...] = (1, 16)
    vocab_size: int = 128256
    num_ids: int = 5
    rejection_batches: tuple[int, ...] = (1, 8, 32)
    copy_bytes: int = 1 << 30
    prompts: int = 24
    new_tokens: int = 64
    rounds: int = 15
    repetitions: int = 4
    target_shape: widen_pair.Shape = widen_pair.SHAPES["8b"]
    draft_shapes: tuple[tuple[str, widen_pair.Shape], ...] = tuple(
        (name, widen_pair.SHAPES[name]) for name in ("1b", "100m")
    )
    peer_batches: tuple[int, ...] = (1, 4, 16)
    peer_ids: tuple[int, ...] = (1, 3, 5)  # K
    peer_rounds: int = 3


DRY = Sizes(
    shapes=((256, 128), (128, 384)), other_shape=(128, 256), rows=(1, 16), checked_rows=(1, 17), width=3, heads=(4, 2, 16),
    keys=(70, 300), goal_keys=300, attention_batches=(1, 2), vocab_size=5000, rejection_batches=(1, 3), copy_bytes=1 << 16,
    prompts=2, new_tokens=6, rounds=1, repetitions=2,
    target_shape=widen_pair.Shape(384, 512, 12, 4, 1, 64, 4200, False), peer_batches=(1, 2), peer_ids=(1, 3), peer_rounds=1,
    draft_shapes=(("small", widen_pair.Shape(384, 512, 2, 4, 1, 64, 4200, True)),),
)  # fmt: skip


class Refused(Exception):
    """A timing that is not taken, because the op is wrong."""


class Skipped(Exception):
    """A section that cannot run here."""


@dataclass
class Suite:
    """One run: where, how much, and what is known so far."""

    device: torch.device
    dry: bool
    verdicts: dict[str, list[Row]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cuda = self.device.type == "cuda"
        self.sizes = DRY if self.dry else Sizes()
        self.timer = Timer(self.cuda, self.sizes.rounds, 1 if self.dry else CALLS)
        self.dtype = self.form(MAIN).dtype

    def form(self, form: Form) -> Form:
        """The form itself; in float16 under the interpreter, which computes bfloat16 wrongly."""
        return form if self.cuda or form.e2m1 else replace(form, dtype=torch.float16)

    def copies(self, size: int) -> int:
        """How many buffers of a size to go round, so that none is in the cache when its turn comes: over three times the L2."""
        return 2 if self.dry else max(2, 1 - (-3 * torch.cuda.get_device_properties(self.device).L2_cache_size // size))

    @cached_property
    def bandwidth(self) -> dict[str, float]:
        """Measured: GB/s of a copy, read and written bytes counted, and of a sum, which only reads."""
        free = torch.cuda.mem_get_info(self.device)[0] if self.cuda else 1 << 30
        source = torch.ones(min(self.sizes.copy_bytes, free // 8) // 4, device=self.device)
        target = torch.empty_like(source)
        times = self.timer.measure({"copy": [lambda: target.copy_(source)], "read": [source.sum]})
        return {
            "copy_gbps": 2 * source.nbytes / times["copy"].us / 1e3,
            "read_gbps": source.nbytes / times["read"].us / 1e3,
        }

    def verdict(self, op: str) -> list[Row]:
        """The checks of an op, run once."""
        if op not in self.verdicts:
            say(f"checking {op}")
            try:
                with torch.inference_mode():
                    self.verdicts[op] = CHECKS[op](self)
            except Exception as error:  # the other ops are checked all the same
                traceback.print_exc()
                self.verdicts[op] = [{"op": op, "case": f"{type(error).__name__}: {first_line(error)}", "ok": False}]
            # what failed its trial is right by PyTorch's operators, which are not what is measured here
            unused = [name for (_, name), passed in trial._PASSED.items() if name.startswith(op) and not passed]
            self.verdicts[op] += [
                {"op": op, "case": f"{name} is not used on this device", "ok": False} for name in unused
            ]
            self.tidy()
        return self.verdicts[op]

    def require(self, op: str) -> None:
        """A time of a wrong result is no time."""
        if wrong := [row["case"] for row in self.verdict(op) if not row["ok"]]:
            raise Refused(f"{op} gives wrong results ({len(wrong)} cases, the first: {wrong[0]}), so it is not timed")

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def tidy(self) -> None:
        if self.cuda:
            with suppress(
                RuntimeError
            ):  # after an illegal access every call fails, and the report is still to be written
                torch.cuda.empty_cache()


# Measuring


@dataclass(frozen=True)
class Timing:
    """Median microseconds of a call, NaN for the reason given; spread: of the middle half of the rounds, over the median."""

    us: float = math.nan
    spread: float = math.nan
    graph: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Timer:
    """Times candidates in turns, so that a clock that drifts meets all of them."""

    cuda: bool
    rounds: int
    min_calls: int

    def measure(self, candidates: dict[str, Sequence[Call]], graph: bool = True) -> dict[str, Timing]:
        """Each candidate is a list of calls on buffers of its own. The first is ours, and must run; another need not."""
        timings, runs = {name: Timing() for name in candidates}, {}
        for name, calls in candidates.items():
            try:
                runs[name] = self._prepared(calls, graph)
            except (RuntimeError, NotImplementedError) as error:  # out of memory is one of them
                if name == next(iter(candidates)):
                    raise
                timings[name] = Timing(reason=first_line(error))
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.rounds):
            for name, (run, count, captured) in runs.items():
                samples[name].append(1e6 * self._seconds(run, captured) / count)
        for name, values in samples.items():
            low, us, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
            timings[name] = Timing(us, (high - low) / us, runs[name][2])
        return timings

    def _prepared(self, calls: Sequence[Call], graph: bool) -> tuple[Call, int, bool]:
        """What to run, how many calls that is, and whether it is a CUDA graph, which hides what launches cost the CPU."""

        def run(turns: int = 1) -> None:
            for _ in range(turns):
                for call in calls:
                    call()

        run()  # compiles
        turns = max(1, min(-(-self.min_calls // len(calls)), int(GRAPH_S / self._seconds(run))))
        count, run_all = turns * len(calls), partial(run, turns)
        if self.cuda and graph:
            captured = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(captured):
                    run_all()
                captured.replay()
                torch.cuda.synchronize()
                return captured.replay, count, True
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                torch.cuda.synchronize()
                say(f"  no CUDA graph, so launches are timed too: {first_line(error)}")
        return run_all, count, False

    def _seconds(self, run: Call, captured: bool = False) -> float:
        if not self.cuda:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if captured:
            torch.cuda._sleep(4_000_000)  # cycles, about 2 ms, in which the CPU gets ahead
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def compared(suite: Suite, times: dict[str, Timing], moved: int, **labels: Any) -> Row:
    """A row of a table: the first candidate's time, the bytes that it had to move, and the others beside it."""
    ours, least = next(iter(times.values())), moved / suite.bandwidth["copy_gbps"] / 1e3
    row = labels | {
        "bytes": moved,
        "graph": ours.graph,
        "time_us": ours.us,
        "spread": ours.spread,
        "gbps": moved / ours.us / 1e3,
    }
    row |= {"bandwidth_us": least, "ratio_to_bandwidth": ours.us / least, "fraction_of_copy": least / ours.us}
    for name, timing in list(times.items())[1:]:
        row |= {f"{name}_us": timing.us, f"ratio_to_{name}": timing.us / ours.us, f"{name}_graph": timing.graph}
        row |= {f"{name}_absent": timing.reason} if timing.reason else {}
    say(f"  timed: {', '.join(f'{name} {value}' for name, value in labels.items())}")
    return row


def goal(text: str, figure: str, worst: Callable, bound: float, rows: Sequence[Row]) -> Row:
    """A goal and the figure furthest from it; worst is min where more is better. Not judged where a row lacks the figure."""
    at = worst(rows, key=lambda row: row[figure])
    place = ", ".join(f"{name} {at[name]}" for name in ("shape", "rows", "batch", "keys") if name in at)
    met = at[figure] >= bound if worst is min else at[figure] <= bound
    known = not any(math.isnan(row[figure]) for row in rows)
    return {
        "goal": text,
        "figure": figure,
        "bound": bound,
        "worst": at[figure],
        "at": place,
        "met": met if known else None,
    }


# Being right


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty hands out garbage, NaN where it can, so that nothing that was not written passes."""
    empty = torch.empty

    def filled(*size: Any, **options: Any) -> Tensor:
        made = empty(*size, **options)
        return made.fill_(torch.nan if made.is_floating_point() else 77)

    with mock.patch.object(torch, "empty", filled):
        yield


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest |got - want| / (|want| + rms(want)); NaN where anything is."""
    return ((got.double() - want).abs() / (want.abs() + want.square().mean().sqrt())).max().item()


def share_of_others(got: Tensor, want: Tensor) -> float:
    return (got != want).double().mean().item()


def checked(
    suite: Suite, op: str, case: str, make: Callable[[], tuple], call: Callable[..., Tensor], want: Callable[..., Tensor],
    same_bits: Callable[..., bool], error: Callable[[Tensor, Tensor], float], bound: float,
) -> Row:  # fmt: skip
    """call(*make()) against want(*make()) on fresh inputs in fresh memory, then same_bits(result, *inputs).

    Errors must stay under the bound and of one size, and every output must differ from the one before: a kernel that leaves old
    results standing, or takes in what another launch left, is right once at most.
    """
    errors, kept, changes = [], [], True
    for repetition in range(suite.sizes.repetitions):
        torch.manual_seed(repetition)
        inputs = make()
        with poisoned():
            got = call(*inputs)
        errors.append(error(got, want(*inputs)))
        changes &= not kept or not got.equal(kept[-1][0])
        kept.append((got, inputs))  # so that the next ones lie elsewhere
    row = {"op": op, "case": case, "max_error": max(errors), "bound": bound, "changes": changes}
    row["bounded"] = all(e <= bound for e in errors)  # False for NaN
    row["stable"] = max(errors) <= SPREAD * min(errors)
    with poisoned():
        row["same_bits"] = same_bits(*kept[-1][:1], *kept[-1][1])
    row["ok"] = all(row[name] for name in ("bounded", "stable", "changes", "same_bits"))
    say(f"  {case}: {'right' if row['ok'] else f'WRONG, {row}'}")
    return row


# The 4-bit matmul


def w4a16(x: Tensor, weight: PackedWeight) -> Tensor:
    """The op as a model calls it. Without a GPU: the interpreted kernel where that computes rightly."""
    if x.is_cuda or x.dtype != torch.float16:
        return matmul(x, weight)
    from specdec_kernels.w4a16 import kernel

    return kernel.launch(x, weight, None)


def random_weight(form: Form, k: int, n: int, device: torch.device) -> tuple[Int4Tensor, PackedWeight]:
    """A weight [N, K] in its canonical form and in the kernel's."""
    codes, groups = torch.randint(16, (n, k), dtype=torch.uint8, device=device), (n, k // form.group_size)
    if form.e2m1:
        scale = torch.randint(118, 123, groups, dtype=torch.uint8, device=device).view(torch.float8_e8m0fnu)
        int4 = Int4Tensor(pack(codes), scale, codebook=torch.tensor(E2M1, device=device))
    else:
        scale = ((torch.rand(groups, device=device) + 0.5) / 64).to(form.dtype)
        zero = torch.randint(16, groups, dtype=torch.uint8, device=device) if form.asymmetric else None
        int4 = Int4Tensor(pack(codes), scale, zero)
    packed = prepack(codes, int4.scale, int4.zero, int4.codebook)
    assert packed is not None
    return int4, packed


def product(x: Tensor, int4: Int4Tensor) -> Tensor:
    """x W^T in float64, from the canonical form, some rows of W at a time."""
    parts = []
    for start in range(0, len(int4.weight), 4096):
        part = int4[start : start + 4096]
        codes = unpack(part.weight)
        values = codes.double() if part.codebook is None else part.codebook.double()[codes.int()]
        groups = values.unflatten(1, (part.scale.shape[1], -1))
        if part.codebook is None:
            groups = groups - (8.0 if part.zero is None else part.zero.double()[..., None])
        parts.append(x.double() @ (groups * part.scale.float().double()[..., None]).flatten(1).T)
    return torch.cat(parts, 1)


def check_w4a16(suite: Suite) -> list[Row]:
    """All shapes and forms; a row of x alone, among any number of others, and at any place."""
    sizes = suite.sizes

    def make(form: Form, k: int, n: int) -> tuple:
        return torch.randn(max(sizes.checked_rows), k, device=suite.device).to(form.dtype), *random_weight(
            form, k, n, suite.device
        )

    def same_bits(whole: Tensor, x: Tensor, _: Int4Tensor, packed: PackedWeight) -> bool:
        first = all(w4a16(x[:m].contiguous(), packed).equal(whole[:m]) for m in sizes.checked_rows)
        return first and all(w4a16(x.roll(m, 0), packed).equal(whole.roll(m, 0)) for m in sizes.checked_rows)

    def check(form: Form, k: int, n: int) -> Row:
        bound = torch.finfo(form.dtype).eps / 2 + 1e-3  # rounded once; sums in float32 take their share
        return checked(
            suite, "w4a16", f"{k}->{n}, {form.name}", partial(make, form, k, n), lambda x, int4, packed: w4a16(x, packed),
            lambda x, int4, packed: product(x, int4), same_bits, relative_error, bound,
        )  # fmt: skip

    cases = [(MAIN, shape) for shape in sizes.shapes] + [(form, sizes.other_shape) for form in OTHERS]
    return [check(suite.form(form), *shape) for form, shape in cases]


def torch_int4(int4: Int4Tensor) -> Callable[[Tensor], Tensor]:
    """PyTorch's own 4-bit matmul on a symmetric weight; raises where it is not there, or gives something else."""
    ops, codes, scale = torch.ops.aten, int4.codes(), int4.scale.bfloat16().T
    scales_and_zeros = torch.stack((scale, torch.zeros_like(scale)), -1).contiguous()
    if codes.is_cuda:
        packed = ops._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
        op = ops._weight_int4pack_mm
    else:
        packed = ops._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        op = ops._weight_int4pack_mm_for_cpu
    x = torch.randn(2, codes.shape[1], device=codes.device).bfloat16()
    error = relative_error(op(x, packed, int4.group_size, scales_and_zeros), product(x, int4))
    if not error < 0.05:
        raise RuntimeError(f"its result is off by {error:.2g}")
    return lambda x: op(x, packed, int4.group_size, scales_and_zeros)


def absent(reason: Exception, x: Tensor) -> Tensor:
    raise reason


def dequantizing(int4: Int4Tensor) -> Int4Linear:
    """What serves prefill: slabs in full precision, one after the other, straight from the canonical codes."""
    layer = Int4Linear(int4).eval()
    layer.use_kernel, layer.has_chosen_kernel = False, True
    return layer


def time_w4a16(suite: Suite, form: Form, shape: tuple[int, int], rows: Sequence[int], thorough: bool) -> list[Row]:
    """One weight at each number of rows, beside all baselines (thorough) or cuBLAS alone."""
    k, n = shape
    int4, packed = random_weight(form, k, n, suite.device)
    size = packed.tiles.nbytes + packed.scale.nbytes
    ring = [replace(packed, tiles=packed.tiles.clone(), scale=packed.scale.clone()) for _ in range(suite.copies(size))]
    ways: dict[str, list[Callable[[Tensor], Tensor]]] = {"w4a16": [partial(w4a16, weight=weight) for weight in ring]}
    dense = [int4.dequantize(form.dtype) for _ in range(suite.copies(2 * k * n))]
    ways["cublas"] = [partial(F.linear, weight=weight) for weight in dense]
    if thorough:
        ways["dequantize"] = [dequantizing(replace(int4, weight=int4.weight.clone())) for _ in range(2)]
        try:
            ways["torch_int4"] = [torch_int4(int4) for _ in ring]
        except (RuntimeError, NotImplementedError) as error:
            ways["torch_int4"] = [partial(absent, error)]
    results: list[Row] = []
    for m in rows:
        xs = [torch.randn(m, k, device=suite.device).to(form.dtype) for _ in range(max(map(len, ways.values())))]
        inputs = {name: [x.bfloat16() for x in xs] if name == "torch_int4" else xs for name in ways}
        times = suite.timer.measure(
            {name: [partial(f, x) for f, x in zip(way, inputs[name], strict=False)] for name, way in ways.items()}
        )
        moved = size + m * (k + n) * form.dtype.itemsize
        results.append(compared(suite, times, moved, shape=f"{k}->{n}", form=form.name, rows=m))
        results[-1]["cost_in_one_row"] = results[-1]["time_us"] / results[0]["time_us"]
    return results


def run_w4a16(suite: Suite) -> Row:
    suite.require("w4a16")
    sizes, main, others = suite.sizes, [], []
    for shape in sizes.shapes:
        main += time_w4a16(suite, suite.form(MAIN), shape, sizes.rows, thorough=True)
        suite.tidy()
    for form in OTHERS:
        others += time_w4a16(suite, suite.form(form), sizes.other_shape, (6,), thorough=False)
        suite.tidy()
    large = {f"{k}->{n}" for k, n in sorted(sizes.shapes, key=math.prod)[-3:]}
    large_few = [row for row in main if row["shape"] in large and row["rows"] <= 16]
    goals = [
        goal(">= 85 % of a copy's speed, M = 1..16, three largest shapes", "fraction_of_copy", min, 0.85, large_few),
        goal("T(16) / T(1) <= 1.10", "cost_in_one_row", max, 1.10, [row for row in main if row["rows"] == 16]),
        goal(">= 3.4 x cuBLAS bf16, M <= 8", "ratio_to_cublas", min, 3.4, [row for row in main if row["rows"] <= 8]),
        goal("never slower than dequantize + matmul", "ratio_to_dequantize", min, 1.0, main),
    ]
    return {"bandwidth": suite.bandwidth, "results": main, "other_forms": others, "goals": goals}


# Attention


def attention(query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor, scale: float) -> Tensor:
    """The op as a model calls it; without a GPU the interpreted kernel."""
    if query.is_cuda:
        return attention_op(query, key, value, first, last, scale)
    from specdec_kernels.attention import kernel

    return kernel.launch(query, key, value, first, last, scale)


def random_states(suite: Suite, batch: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value as a model has them."""
    heads, kv_heads, dim = suite.sizes.heads
    options = {"device": suite.device, "dtype": suite.dtype}
    query = torch.randn(batch, suite.sizes.width, heads, dim, **options).transpose(1, 2)
    return query, torch.randn(batch, kv_heads, keys, dim, **options), torch.randn(batch, kv_heads, keys, dim, **options)


def attended(query: Tensor, key: Tensor, value: Tensor, first: Tensor, last: Tensor, scale: float) -> Tensor:
    """The formula in float64, one row of the batch at a time: [B, W, H, D]."""
    rows = []
    for q, k, v, low, high in zip(query, key, value, first, last, strict=True):
        slot = torch.arange(int(low.min()), int(high.max()) + 1, device=k.device)
        seen = (slot >= low[:, None]) & (slot <= high[:, None])
        scores = q.double().unflatten(0, (len(k), -1)) @ k[:, None, slot].double().transpose(2, 3) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        rows.append((weights @ v[:, None, slot].double()).flatten(0, 1).transpose(0, 1))
    return torch.stack(rows)


def check_attention(suite: Suite) -> list[Row]:
    """Ragged rows, every other one with a sliding window; a query alone, over its own slots only, and in another row."""
    width = suite.sizes.width

    def make(batch: int, keys: int) -> tuple:
        query, key, value = random_states(suite, batch, keys)
        start = torch.randint(keys // 2, keys - width + 1, (batch, 1), device=suite.device)
        last = (start + torch.arange(width, device=suite.device)).int()
        first = (last - keys // 4) * (torch.arange(batch, device=suite.device) % 2)[:, None].int()
        slot = torch.arange(keys, device=suite.device)
        hidden = (slot < first.amin(1, keepdim=True)) | (slot > last.amax(1, keepdim=True))
        for state in (key, value):
            state.masked_fill_(hidden[:, None, :, None], torch.nan)
        return query, key, value, first, last, query.shape[-1] ** -0.5

    def same_bits(whole: Tensor, *inputs: Any) -> bool:
        query, key, value, first, last, scale = inputs
        same = attention(*(tensor.roll(1, 0) for tensor in inputs[:-1]), scale).equal(whole.roll(1, 0))
        for b in {0, len(query) - 1}:
            for w in range(width):
                row, one, seen = slice(b, b + 1), slice(w, w + 1), slice(int(last[b, w]) + 1)
                alone = query[row, :, one], key[row, :, seen], value[row, :, seen], first[row, one], last[row, one]
                same &= attention(*alone, scale).equal(whole[row, one])
        return same

    bound = 2 * torch.finfo(suite.dtype).eps  # weights, too, are rounded before they are multiplied
    cases = [(b, s) for b in suite.sizes.attention_batches for s in suite.sizes.keys if b * s <= 1 << 17]
    return [
        checked(
            suite,
            "attention",
            f"batch {b}, {s} keys",
            partial(make, b, s),
            attention,
            attended,
            same_bits,
            relative_error,
            bound,
        )
        for b, s in cases
    ]


def time_attention(suite: Suite, batch: int, keys: int) -> Row:
    """The last positions of full rows, beside sdpa with a mask: as transformers calls it, and with grouped heads."""
    heads, kv_heads, dim = suite.sizes.heads
    moved = 2 * batch * kv_heads * keys * dim * suite.dtype.itemsize
    ring = [random_states(suite, batch, keys) for _ in range(suite.copies(moved))]
    last = torch.arange(keys - suite.sizes.width, keys, dtype=torch.int32, device=suite.device).repeat(batch, 1)
    first = torch.zeros_like(last)
    mask = (torch.arange(keys, device=suite.device) <= last[..., None])[:, None]
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True, training=False)
    grouped = partial(F.scaled_dot_product_attention, attn_mask=mask, enable_gqa=True)
    candidates = {
        "attention": [partial(attention, *states, first, last, dim**-0.5) for states in ring],
        "sdpa": [partial(sdpa_attention_forward, module, *states, mask) for states in ring],
        "sdpa_gqa": [partial(grouped, *states) for states in ring],
    }
    return compared(suite, suite.timer.measure(candidates), moved, batch=batch, keys=keys)


def run_attention(suite: Suite) -> Row:
    suite.require("attention")
    results = []
    for batch in suite.sizes.attention_batches:
        for keys in suite.sizes.keys:
            results.append(time_attention(suite, batch, keys))
            suite.tidy()
    text = "within 1.2 of the time that K and V take once, 8k keys"
    at_goal = [row for row in results if row["keys"] == suite.sizes.goal_keys]
    goals = [goal(text, "ratio_to_bandwidth", max, 1.2, [row]) for row in at_goal]
    return {"bandwidth": suite.bandwidth, "results": results, "goals": goals}


# Rejection sampling


def verify(p: Tensor, ids: Tensor, q: Tensor | None, lengths: Tensor, uniforms: Tensor) -> Tensor:
    """[B, 2]: how many ids are accepted, the id behind them."""
    return torch.stack(rejection.verify(p, ids, q, lengths, uniforms), 1)


def verify_in_torch(p: Tensor, ids: Tensor, q: Tensor | None, lengths: Tensor, uniforms: Tensor) -> Tensor:
    """The same by what runs where there is no kernel; under `torch_path`."""
    verdict = verification.verify(Draft(ids, q, lengths), p, uniforms)
    return torch.stack((verdict.accepted, verdict.next_ids), 1)


def torch_path() -> Any:
    return mock.patch.object(verification, "_takes_kernel", return_value=False)


def random_draft(suite: Suite, batch: int, one_hot: bool) -> tuple:
    """Arguments of verify: ids drawn near the target's distribution, so that some are kept; half of them its likeliest."""
    k, vocab = suite.sizes.num_ids, suite.sizes.vocab_size
    logits = 6 * torch.randn(batch, k + 1, vocab, device=suite.device)
    p = logits.softmax(-1)
    q = (logits[:, :k] + 0.5 * torch.randn(batch, k, vocab, device=suite.device)).softmax(-1)
    drawn = q.flatten(0, 1).multinomial(1).view(batch, k)
    ids = torch.where(torch.rand(batch, k, device=suite.device) < 0.5, p[:, :k].argmax(-1), drawn)
    lengths = torch.randint(k - 1, k + 1, (batch,), device=suite.device)
    return p, ids, None if one_hot else q, lengths, torch.rand(batch, k + 1, dtype=torch.float64, device=suite.device)


def draft_cases(suite: Suite) -> list[tuple[int, bool]]:
    return [(batch, one_hot) for batch in suite.sizes.rejection_batches for one_hot in (False, True)]


def check_rejection(suite: Suite) -> list[Row]:
    """The verdicts of specdec.core.verification, which sums in float64; a row alone gets its verdict in the batch."""

    def same_bits(whole: Tensor, *inputs: Tensor | None) -> bool:
        rows = range(len(whole))
        alone = [verify(*(x if x is None else x[row : row + 1] for x in inputs)) for row in rows]
        return torch.cat(alone).equal(whole)

    def check(batch: int, one_hot: bool) -> Row:
        return checked(
            suite, "rejection", f"batch {batch}, {'one-hot' if one_hot else 'sampled'}",
            partial(random_draft, suite, batch, one_hot), verify, verify_in_torch, same_bits, share_of_others, 0.0,
        )  # fmt: skip

    with torch_path():
        return [check(*case) for case in draft_cases(suite)]


def launches(call: Call) -> int | None:
    """Kernels that a call launches; None where the profiler sees none."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA][: 1 + HAS_CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
    names = ("cudaLaunchKernel", "cuLaunchKernel")
    return sum(event.count for event in profile.key_averages() if event.key.startswith(names)) or None


def run_rejection(suite: Suite) -> Row:
    """In a CUDA graph, and launched one by one, as a generate() loop does."""
    suite.require("rejection")
    results = []
    for batch, one_hot in draft_cases(suite):
        moved = (1 if one_hot else 2) * batch * suite.sizes.vocab_size * 4  # one p and one q of each row
        ring = [random_draft(suite, batch, one_hot) for _ in range(suite.copies(moved))]
        ways = {"kernel": rejection.verify, "torch": verify_in_torch}
        candidates = {name: [partial(way, *inputs) for inputs in ring] for name, way in ways.items()}
        with torch_path():
            times, eager = suite.timer.measure(candidates), suite.timer.measure(candidates, graph=False)
            counts = {name: launches(calls[0]) for name, calls in candidates.items()}
        row = compared(suite, times, moved, batch=batch, draft="one-hot" if one_hot else "sampled")
        row |= {"eager_us": eager["kernel"].us, "torch_eager_us": eager["torch"].us}
        row |= {"ratio_to_torch_eager": eager["torch"].us / eager["kernel"].us}
        results.append(row | {"launches": counts["kernel"], "launches_torch": counts["torch"]})
        suite.tidy()
    return {"bandwidth": suite.bandwidth, "results": results}


# Whole texts


@dataclass(frozen=True)
class Writer:
    """Greedy texts of a target."""

    target: Any
    tokenizer: Any

    def write(self, prompts: list[str], limit: int, **options: Any) -> tuple[Any, list[list[int]]]:
        """generate()'s output, and each prompt's continuation up to its end."""
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(self.target.device)
        ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        options |= {"do_sample": False, "return_dict_in_generate": True, "pad_token_id": self.tokenizer.pad_token_id}
        output = self.target.generate(**ids, max_new_tokens=limit, **options)
        rows = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        end = self.target.generation_config.eos_token_id
        return output, [row[: row.index(end) + 1] if end in row else row for row in rows]

    def difference(self, prompts: list[str], index: int, got: list[int], want: list[int]) -> Row:
        """Where a text parts from the plain one, and how near a tie plain decoding was there."""
        at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
        output, _ = self.write(prompts, at + 1, output_logits=True)
        best = output.logits[-1][index].float().topk(2).values
        return {"position": at, "margin": (best[0] - best[1]).item()}

    def compare(self, drafter: Any, name: str, prompts: list[dict[str, str]], batch: int, limit: int) -> Row:
        """Plain generate() against speculation, batch by batch."""
        row = {"batch": batch, "drafter": name, "texts": len(prompts), "identical": 0, "accepted": 0, "drafted": 0}
        row["differences"] = []
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            said = [prompt["prompt"] for prompt in part]
            _, plain = self.write(said, limit)
            specdec.enable(self.target, drafter, num_draft_tokens=5)
            output, ours = self.write(said, limit)
            specdec.disable(self.target)
            row["accepted"] += output.speculation.num_accepted_draft_tokens
            row["drafted"] += output.speculation.num_draft_tokens
            for index, (got, want) in enumerate(zip(ours, plain, strict=True)):
                row["identical"] += got == want
                if got != want:
                    row["differences"].append({"prompt": part[index]["id"]} | self.difference(said, index, got, want))
        say(f"  batch {batch}, {name}: {row['identical']} of {row['texts']} identical")
        return row


def run_lossless(suite: Suite) -> Row:
    """The embedded pair: its 4-bit target by generate() as it is, and with speculation."""
    dtype, count = "bfloat16" if suite.cuda else "float32", suite.sizes.prompts
    target, draft = (load(str(path), dtype, str(suite.device)) for path in (embedded.TARGET, embedded.DRAFT))
    writer = Writer(target, AutoTokenizer.from_pretrained(str(embedded.TARGET)))
    everything = embedded.prompts()
    prompts = [everything[i * len(everything) // count] for i in range(count)]
    ways = [
        (batch, *way) for batch in (1, 4) for way in ((draft, "embedded draft"), ("prompt_lookup", "prompt lookup"))
    ]
    results = [writer.compare(drafter, name, prompts, batch, suite.sizes.new_tokens) for batch, drafter, name in ways]
    kernels = [type(module.kernel).__name__ for module in target.modules() if isinstance(module, Int4Linear)]
    report = {
        "dtype": dtype,
        "kernels": {name: kernels.count(name) for name in sorted(set(kernels))},
        "results": results,
    }
    if suite.cuda and "CudaKernel" not in kernels:
        return report | failed("no 4-bit layer ran the kernel")
    if any(difference["margin"] > NEAR_TIE for row in results for difference in row["differences"]):
        return report | failed("texts part where no tie is near")
    return report


# Against transformers' own loops


def run_peers(suite: Suite) -> Row:
    """The embedded pair in large shapes, the target in 4 bits: greedy, ours recorded as CUDA graphs, in turns."""
    sizes, options = suite.sizes, {"device": str(suite.device), "dtype": torch.bfloat16}
    started = time.perf_counter()
    target = widen_pair.widen(
        load(str(widen_pair.ORIGINAL), "float32", "cpu"), sizes.target_shape, int4=Int4Config(64), **options
    )
    suite.synchronize()
    built = {"parameters": sizes.target_shape.num_parameters, "build_s": time.perf_counter() - started}
    say(f"  built {built['parameters'] / 1e6:,.0f} million parameters in {built['build_s']:.0f} s")
    source = load(str(embedded.DRAFT), "float32", "cpu")
    drafts = {name: widen_pair.widen(source, shape, **options) for name, shape in sizes.draft_shapes}
    every = (
        AutoTokenizer.from_pretrained(str(embedded.TARGET))(prompt["prompt"]).input_ids for prompt in embedded.prompts()
    )
    prompts = [ids[:64] for ids in every if len(ids) >= 64]
    results, tuned = [], []
    for batch in sizes.peer_batches:
        cell = Cell(batch, False, prompts[: max(batch, 2)], sizes.new_tokens)
        engines, found = peers_of(target, drafts, cell, sizes.peer_ids)
        results += compare(engines, cell, sizes.peer_rounds, lambda words: say(f"  {words}"))
        tuned += found
    for row in results:
        row |= {f"ratio_to_{name}": row[f"ratio_to_{name}"]["median"] for name in ("baseline", "own_plain")}
    bounded(results, sizes.new_tokens)
    goals = [goal("8 billion parameters built in a minute", "build_s", max, 60, [built]), *goals_of_peers(results)]
    return built | {"results": results, "tuned": [vars(one) for one in tuned], "goals": goals}


def bounded(results: Sequence[Row], new_tokens: int) -> None:
    """Beside each step that drafts, what the cost model says it could come to, from its parts timed alone; and what lay idle.

    ratio_bound: tokens a step * T_target(1) / (T_target(K+1) + K T_draft). fraction_idle: of an unwatched call's step, what the
    device was not at work on the draft, the target or the verification.
    """
    for row in (
        row for row in results if row["runtime"] == "specdec" and row["num_draft_tokens"] not in (None, "auto")
    ):
        plain = next(
            r for r in results if (r["runtime"], r["engine"], r["batch"]) == ("specdec", "plain", row["batch"])
        )
        row["ratio_bound"] = row["tokens_per_step"] * plain["target_ms"] / (row["target_ms"] + row["draft_ms"])
        row["fraction_of_bound"] = row["ratio_to_own_plain"] / row["ratio_bound"]
        call_ms = 1000 * row["batch"] * new_tokens / row["tokens_per_second"] - row["prompt_ms"]
        busy_ms = row["draft_ms"] + row["target_ms"] + row["verification_ms"]
        row["fraction_idle"] = 1 - busy_ms * new_tokens / row["tokens_per_step"] / call_ms


def goals_of_peers(results: Sequence[Row]) -> list[Row]:
    """What a pair of these sizes is to come to; a goal is left out where nothing was run that it is about."""
    drafting = [row for row in results if "ratio_bound" in row]
    alone = [row for row in drafting if row["batch"] == 1]
    assisted = [row for row in results if row["engine"].startswith("assisted")]
    long = [row for row in alone if row["tokens_per_step"] >= 3]
    most = max(row["batch"] for row in results)
    chosen = [row for row in results if row["num_draft_tokens"] == "auto" and row["batch"] == most]
    fastest = max(alone, key=lambda row: row["tokens_per_second"])
    goals = [
        goal("launch gaps under 5 % of a step, batch 1", "fraction_idle", max, 0.05, alone),
        goal("90 % of the cost model's bound, batch 1", "fraction_of_bound", min, 0.9, alone),
    ]
    if long:
        best = max(long, key=lambda row: row["ratio_to_own_plain"])
        goals.append(
            goal(
                "2 times plain decoding with graphs, of 3 tokens a step, batch 1",
                "ratio_to_own_plain",
                min,
                2.0,
                [best],
            )
        )
    if assisted:
        ratio = fastest["tokens_per_second"] / max(row["tokens_per_second"] for row in assisted)
        goals.append(goal("3 times transformers' assisted decoding", "ratio", min, 3.0, [{"ratio": ratio, "batch": 1}]))
    if not any(row["tokens_per_step"] == 1 for row in chosen):  # K = 0 is an answer too
        goals.append(
            goal(f"1.3 times plain decoding at batch {most}, or K = 0", "ratio_to_own_plain", min, 1.3, chosen)
        )
    return goals


def peers_of(
    target: PreTrainedModel, drafts: dict[str, PreTrainedModel], cell: Cell, ks: Sequence[int]
) -> tuple[list[Engine], list[Tuned]]:
    """transformers' plain loop, its assisted one with the best K (it takes no batches), and ours, on one 4-bit target."""
    threads, tuned = torch.get_num_threads(), []
    engines: list[Engine] = [stock_plain("transformers", target, threads)]
    for name, draft in drafts.items() if cell.batch == 1 else ():
        ways = {f"K={k}": stock_assisted("transformers", target, threads, draft, k, f"assisted by {name}") for k in ks}
        best, found = tune(f"transformers assisted by {name}", ways, cell, lambda words: say(f"  {words}"))
        engines.append(best)
        tuned.append(found)
    engines.append(specdec_plain(target, threads))
    engines += [
        specdec_draft(target, threads, draft, k, f"draft {name}")
        for name, draft in drafts.items()
        for k in (*ks, "auto")
    ]
    return engines, tuned


# The other sections


def run_tests(suite: Suite) -> Row:
    """The tests of kernels and recorded steps in a process of their own; a dry run only collects them."""
    if find_spec("pytest") is None:
        raise Skipped("pytest is not installed, so the kernels' tests were not run")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/kernels",
        "tests/runtime/test_cuda_graphs.py",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    options = {
        "cwd": ROOT,
        "env": os.environ | {"PYTHONPATH": path},
        "capture_output": True,
        "text": True,
        "check": False,
    }
    try:
        done = subprocess.run([*command, *(["--collect-only"] if suite.dry else [])], timeout=TESTS_LIMIT_S, **options)
    except subprocess.TimeoutExpired:
        return failed(f"the tests did not end in {TESTS_LIMIT_S} s")
    lines = (done.stdout + done.stderr).splitlines() or ["nothing"]
    words = re.findall(
        r"(\d+) (?:tests? )?(passed|failed|errors?|skipped|xfailed|deselected|collected)", done.stdout[-300:]
    )
    report: Row = {"counts": {name: int(number) for number, name in words}}
    report["failed_tests"] = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:30]
    return report | (failed(f"pytest ended with {done.returncode}: {lines[-1]}") if done.returncode else {})


def run_correctness(suite: Suite) -> Row:
    rows = [row for op in CHECKS for row in suite.verdict(op)]
    wrong = [f"{row['op']} {row['case']}" for row in rows if not row["ok"]]
    return {"checks": rows} | (failed(f"wrong: {'; '.join(wrong)}") if wrong else {})


def failed(reason: str) -> Row:
    return {"status": "failed", "reason": reason}


CHECKS = {"w4a16": check_w4a16, "attention": check_attention, "rejection": check_rejection}
SECTIONS: dict[str, Callable[[Suite], Row]] = {
    "tests": run_tests,
    "correctness": run_correctness,
    "w4a16": torch.inference_mode()(run_w4a16),
    "attention": torch.inference_mode()(run_attention),
    "rejection": torch.inference_mode()(run_rejection),
    "lossless": run_lossless,
    "peers": run_peers,
}


# The report


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def written(value: Any, dry: bool, key: str = "") -> Any:
    """As it goes into the file: four digits of a float, None for what is no number, and for every figure of a dry run."""
    if dry and FIGURE.search(key):
        return None
    if isinstance(value, dict):
        return {name: written(item, dry, name) for name, item in value.items()}
    if isinstance(value, list):
        return [written(item, dry) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def origin(suite: Suite) -> Row:
    """Where figures come from. The sources' digest stands in for a commit where there is no git."""
    try:
        found: Row = provenance(str(suite.device))
    except OSError:  # no git
        found = {
            "commit": "",
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "date": time.strftime("%Y-%m-%d"),
        }
    if not found["commit"]:
        found |= {"commit": None, "dirty": None}
    files = [file for folder in ("kernels", "specdec", "scripts") for file in sorted((ROOT / folder).rglob("*.py"))]
    found["sources_sha256"] = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = None
    if suite.cuda:
        properties = torch.cuda.get_device_properties(suite.device)
        found |= {"device": properties.name, "compute_capability": f"{properties.major}.{properties.minor}"}
        found |= {"multiprocessors": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size}
        found |= {
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "nvidia_smi": nvidia_smi(properties),
        }
    return found


def nvidia_smi(properties: Any) -> dict[str, str] | None:
    """Driver, clocks, power, temperature; None where they cannot be read."""
    names = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    command = [
        "nvidia-smi",
        f"--query-gpu={names}",
        "--format=csv,noheader",
        f"--id=GPU-{getattr(properties, 'uuid', '')}",
    ]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, IndexError, subprocess.SubprocessError):
        return None
    return dict(zip(names.split(","), (part.strip() for part in line.split(",")), strict=False))


def run_section(name: str, suite: Suite) -> Row:
    """One section's record, whatever becomes of it."""
    say(f"section {name}")
    record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "provenance": origin(suite), "status": "ok"}
    started = time.perf_counter()
    try:
        record |= SECTIONS[name](suite)
    except (Refused, Skipped) as error:
        record |= {"status": type(error).__name__.lower(), "reason": str(error)}
    except Exception as error:  # the other sections run all the same
        traceback.print_exc()
        record |= failed(f"{type(error).__name__}: {first_line(error)}")
    record["seconds"] = time.perf_counter() - started
    return written(record, suite.dry)


COLUMNS = {
    "checks": {"op": "op", "case": "case", "max_error": "error", "bound": "bound", "stable": "stable", "changes": "changes",
               "same_bits": "same bits", "ok": "right"},
    "w4a16": {"shape": "K->N", "rows": "M", "time_us": "us", "gbps": "GB/s", "fraction_of_copy": "of copy",
              "ratio_to_cublas": "x bf16", "ratio_to_torch_int4": "x int4", "ratio_to_dequantize": "x deq.",
              "cost_in_one_row": "T(M)/T(1)"},
    "other_forms": {"form": "form", "rows": "M", "time_us": "us", "gbps": "GB/s", "fraction_of_copy": "of copy",
                    "ratio_to_cublas": "x dense"},
    "attention": {"batch": "batch", "keys": "keys", "time_us": "us", "gbps": "GB/s", "bandwidth_us": "bytes, us",
                  "ratio_to_bandwidth": "ratio", "ratio_to_sdpa": "x sdpa", "ratio_to_sdpa_gqa": "x sdpa gqa"},
    "rejection": {"batch": "batch", "draft": "draft", "time_us": "us", "torch_us": "torch, us", "ratio_to_torch": "x torch",
                  "eager_us": "eager, us", "ratio_to_torch_eager": "x torch", "launches": "launches",
                  "launches_torch": "torch's"},
    "lossless": {"batch": "batch", "drafter": "drafter", "texts": "texts", "identical": "identical", "accepted": "accepted",
                 "drafted": "drafted"},
    "peers": {"batch": "batch", "runtime": "runtime", "engine": "engine", "num_draft_tokens": "K", "tokens_per_second": "tok/s",
              "ratio_to_baseline": "x plain", "tokens_per_step": "tokens", "draft_ms": "draft", "target_ms": "target",
              "prompt_ms": "prompt", "identical_rows": "same"},
}  # fmt: skip


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def show_table(rows: Sequence[Row], columns: dict[str, str]) -> None:
    lines = [[*columns.values()], *([cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [str.ljust if isinstance(rows[0].get(name), str) else str.rjust for name in columns]
    for line in lines:
        print("  ".join(align(text, width) for align, text, width in zip(aligned, line, widths, strict=True)).rstrip())


def show(name: str, record: Row) -> None:
    print(f"\n{name}: {record['status']}{', ' + record['reason'] if 'reason' in record else ''}")
    if "counts" in record:
        print(", ".join(f"{number} {word}" for word, number in record["counts"].items()))
    if bandwidth := record.get("bandwidth"):
        print(f"a copy moves {cell(bandwidth['copy_gbps'])} GB/s, a sum reads {cell(bandwidth['read_gbps'])} GB/s")
    for key, columns in (("checks", "checks"), ("results", name), ("other_forms", "other_forms")):
        if record.get(key):
            show_table(record[key], COLUMNS[columns])
    for reason in sorted(
        {f"{k}: {v}" for row in record.get("results", ()) for k, v in row.items() if k.endswith("_absent")}
    ):
        print(reason)
    for difference in [d for row in record.get("results", ()) for d in row.get("differences", ())][:1]:
        print("first difference: {prompt}, position {position}, margin {margin}".format(**difference))
    for g in record.get("goals", ()):
        met = {True: "met", False: "MISSED", None: "not measured"}[g["met"]]
        print(
            f"{met}: {g['goal']}{'' if g['worst'] is None else ' (worst {} at {})'.format(cell(g['worst']), g['at'])}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(SECTIONS)
    parser.add_argument(
        "--section", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="NAME", help=names
    )
    parser.add_argument(
        "--output", type=Path, help="benchmarks/results/gpu_suite-<device>.json; of a dry run, a temporary file"
    )
    parser.add_argument(
        "--dry", action="store_true", help="every section on tiny shapes, without a GPU too; no figures"
    )
    args = parser.parse_args(arguments)
    if not HAS_CUDA and not args.dry:
        say(
            "torch sees no CUDA device here, and this script measures nothing else. Run it on a machine that has one, with a CUDA"
            " build of torch; or pass --dry, which runs every section on tiny shapes and keeps no figures"
        )
        return 2
    suite = Suite(torch.device("cuda", 0) if HAS_CUDA else torch.device("cpu"), args.dry)
    device = torch.cuda.get_device_name(suite.device) if suite.cuda else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    folder, ending = (Path(tempfile.gettempdir()), "-dry") if args.dry else (ROOT / "benchmarks" / "results", "")
    output = args.output or folder / f"gpu_suite-{slug}{ending}.json"
    report: Row = {"script": "gpu_suite", "device": device, "dry": args.dry, "sections": {}}
    if output.exists():  # other sections of the same device stay
        held = json.loads(output.read_text(encoding="utf-8"))
        if any(held.get(name) != report[name] for name in ("script", "device", "dry")):
            parser.error(
                f"{output} holds {'a dry run' if held.get('dry') else 'figures'} of {held.get('device')}; pass another --output"
            )
        report = held
    chosen = [name for name in SECTIONS if name in args.section]
    for name in chosen:
        report["sections"][name] = run_section(name, suite)
        suite.tidy()
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    say(f"written: {output}")
    ran = {name: report["sections"][name] for name in chosen}
    for name, record in ran.items():
        show(name, record)
    return 1 if any(record["status"] in ("failed", "refused") for record in ran.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
