"""Dispatch launches what scripts/check_kernels.py compiles: Triton's launcher runs here without a driver.

Triton specializes a launch on its arguments: an int of 1 becomes a constant, addresses and ints that 16 divides are
marked. So a kernel may compile ahead of time and fail for one row of x.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent.parent


def launched(code: str) -> list[dict]:
    """Run launches in another process, without the interpreter: -> signature and divisible arguments of each."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


PRELUDE = """
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class NoDriver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
    def get_active_torch_device(self): return torch.device("cpu")

driver.set_active(NoDriver())
run = JITFunction.run

def compile_alone(self, *args, grid, warmup, **options):
    source = run(self, *args, grid=grid, warmup=True, **options).src
    divisible = [self.arg_names[place[0]] for place, found in source.attrs.items() if ["tt.divisibility", 16] in found]
    print(json.dumps({"signature": source.signature, "divisible": divisible}))

JITFunction.run = compile_alone
"""


def check(got: dict, configuration: object, unless: tuple[str, ...] = ()) -> None:
    """The launch has the configuration's signature and divisible arguments, except those in `unless`."""
    signature = {n: t for n, t in got["signature"].items() if t != "constexpr" and n not in unless}
    assert signature == {n: t for n, t in configuration.signature.items() if n not in unless}
    assert set(configuration.divisible) - set(unless) <= set(got["divisible"])


def test_the_matmul_at_any_number_of_rows() -> None:
    from specdec_kernels.w4a16.kernel import BY_NAME

    results = launched("""
from specdec_kernels.w4a16 import kernel, prepack

def weight(rows, columns, group_size=128):
    codes = torch.randint(16, (rows, columns), dtype=torch.uint8)
    return prepack(codes, torch.rand(rows, columns // group_size).bfloat16())

for rows in (1, 16, 17, 64):
    kernel.launch(torch.zeros(rows, 1024).bfloat16(), weight(256, 1024), None)
kernel.launch(torch.zeros(1, 1024).bfloat16(), weight(256, 1024), torch.zeros(256).bfloat16())
kernel.launch(torch.zeros(1, 128).bfloat16(), weight(256, 128), None)  # one tile, one split
kernel.launch(torch.zeros(1, 1024).bfloat16(), weight(1, 1024), None)  # one column
kernel.launch(torch.zeros(5, 1024).bfloat16(), weight(512, 1024).rows(256, 384), None)  # a slice
kernel.launch(torch.zeros(1, 1024).bfloat16(), weight(256, 1024, 32), None)
""")
    few, many = BY_NAME["bf16-symmetric-128-bf16-m16"], BY_NAME["bf16-symmetric-128-bf16-m32"]
    small_groups = BY_NAME["bf16-symmetric-32-bf16-m16"]
    for got, configuration in zip(results, (few, few, many, many, few, few, few, few, small_groups), strict=True):
        one_column = got is results[6]
        check(got, configuration, ("N",) if one_column else ())


def test_the_8_bit_matmul_at_any_number_of_rows() -> None:
    from specdec_kernels.w8a16.kernel import BY_NAME

    results = launched("""
from specdec_kernels.w8a16 import kernel

for rows, outputs in ((1, 1000), (16, 1), (17, 1024), (64, 4099)):
    weight = torch.zeros(outputs, 272, dtype=torch.int8)
    kernel.launch(torch.zeros(rows, 272).bfloat16(), weight, torch.ones(outputs))
""")
    few, many = BY_NAME["bf16-fp32-m16"], BY_NAME["bf16-fp32-m32"]
    for got, configuration in zip(results, (few, few, many, many), strict=True):
        check(got, configuration)
        assert set(got["divisible"]) == set(configuration.divisible)  # one variant for any N


def test_attention_of_one_position_and_of_more() -> None:
    from specdec_kernels.attention.kernel import CONFIGURATIONS

    results = launched("""
from specdec_kernels.attention import kernel

def states(batch, heads, kv_heads, width, length, dim):
    query = torch.zeros(batch, width, heads, dim).bfloat16().transpose(1, 2)
    cache = torch.zeros(2, batch, kv_heads, 512, dim).bfloat16()
    slots = torch.zeros(batch, width, dtype=torch.int32)
    return query, cache[0, :, :, :length], cache[1, :, :, :length], slots, slots + length - 1, 0.1

kernel.launch(*states(2, 8, 2, 6, 300, 128))
kernel.launch(*states(1, 1, 1, 1, 1, 128))
kernel.launch(*states(16, 8, 8, 1, 256, 128))
""")
    assert len(results) == 3
    for got in results:
        check(got, CONFIGURATIONS[0])


def test_rejection_with_and_without_a_draft() -> None:
    from specdec_kernels.rejection.kernel import configuration

    results = launched("""
from specdec_kernels.rejection import kernel

def arguments(batch, num_ids, vocab, dense):
    q = torch.zeros(batch, num_ids, vocab) if dense else None
    ids, lengths = torch.zeros(batch, num_ids, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
    return torch.zeros(batch, num_ids + 1, vocab), ids, q, lengths, torch.zeros(batch, num_ids + 1, dtype=torch.float64)

kernel.launch(*arguments(2, 5, 4096, True))
kernel.launch(*arguments(1, 1, 4096, False))
kernel.launch(*arguments(1, 0, 4096, False))
kernel.launch(*arguments(1, 16, 50257, False))
kernel.launch(*arguments(3, 1, 1, True))
""")
    wide = configuration(False, True)
    for got, shipped in zip(
        results, (configuration(True, True), wide, wide, configuration(False, False)), strict=False
    ):
        check(got, shipped)
    assert len(results) == 5  # the last one, of one id, has a constant for V, and compiles
