"""Kernels that scripts/check_kernels.py must refuse, each for one reason; those named good and early barrier pass."""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from specdec_kernels.configuration import Configuration
from specdec_kernels.w4a16.kernel import CONFIGURATIONS as W4A16


@triton.jit
def late_barrier(x_ptr, part_ptr, counter_ptr, y_ptr):
    """Adds blocks of 128 numbers; the barrier comes after the counter instead of before it."""
    at, n = tl.program_id(0), tl.arange(0, 128)
    tl.store(part_ptr + at * 128 + n, tl.load(x_ptr + at * 128 + n))
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.debug_barrier()
        total = tl.zeros((128,), tl.float32)
        for block in range(tl.num_programs(0)):
            total += tl.load(part_ptr + block * 128 + n, cache_modifier=".cg")
        tl.store(y_ptr + n, total)
        tl.store(counter_ptr, 0)


@triton.jit
def early_barrier(x_ptr, part_ptr, counter_ptr, y_ptr):
    """The same, with the barrier in the right place."""
    at, n = tl.program_id(0), tl.arange(0, 128)
    tl.store(part_ptr + at * 128 + n, tl.load(x_ptr + at * 128 + n))
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        total = tl.zeros((128,), tl.float32)
        for block in range(tl.num_programs(0)):
            total += tl.load(part_ptr + block * 128 + n, cache_modifier=".cg")
        tl.store(y_ptr + n, total)
        tl.store(counter_ptr, 0)


def _blocks(name: str, kernel: object) -> Configuration:
    pointers = ("x_ptr", "part_ptr", "counter_ptr", "y_ptr")
    signature = dict.fromkeys(pointers, "*fp32") | {"counter_ptr": "*i32"}
    return Configuration(
        "broken", name, kernel, signature, {}, pointers, tensor_cores=False, wide_loads=False, ordered=True
    )


_GOOD = W4A16[0]


@triton.jit
def no_asm(tiles_ptr, y_ptr):
    """Reads tiles of codes and dequantizes none."""
    n = tl.arange(0, 4096)
    total = tl.zeros((4096,), tl.int32)
    for tile in range(8):
        total += tl.load(tiles_ptr + tile * 4096 + n)
    tl.store(y_ptr + n, total)


CONFIGURATIONS = [
    replace(_GOOD, name="good"),
    Configuration(
        "broken",
        "no asm",
        no_asm,
        {"tiles_ptr": "*i32", "y_ptr": "*i32"},
        {},
        ("tiles_ptr", "y_ptr"),
        weights_per_pass=32768,
        adjacent_pairs=True,
    ),
    replace(_GOOD, name="misaligned", divisible=()),
    replace(_GOOD, name="narrow block", constants=_GOOD.constants | {"BN": 32}, weights_per_pass=128 * 32),
    replace(
        _GOOD, name="too many registers", constants=_GOOD.constants | {"BM": 64, "BN": 256}, weights_per_pass=128 * 256
    ),
    replace(_GOOD, name="too much shared memory", num_stages=16),
    _blocks("early barrier", early_barrier),
    _blocks("late barrier", late_barrier),
]
