"""scripts/check_kernels.py: what is shipped compiles and holds its limits, and what is broken does not pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def run(*options: str) -> tuple[int, dict]:
    command = [sys.executable, "scripts/check_kernels.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout, done.stderr
    assert "kernels, compiled ahead of time" in done.stdout
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_one_configuration_of_each_op_holds_on_every_architecture() -> None:
    code, report = run()
    assert [result for result in report["results"] if result["failures"]] == []
    assert code == 0
    assert {(r["op"], r["arch"]) for r in report["results"]} == {
        (op, arch) for op in ("w4a16", "w8a16", "rejection", "attention") for arch in (80, 86, 89, 90, 100, 120)
    }
    for result in report["results"]:
        if result["op"] == "w4a16":
            assert 1.5 < result["instructions_per_weight"] <= 3.3
        if result["op"] == "w8a16":
            assert 1.5 < result["instructions_per_weight"] <= 2.8


def test_what_is_broken_is_refused_for_what_is_broken() -> None:
    code, report = run("--all", "--op", "tests.helpers.broken_kernels", "--arch", "86")
    assert code == 1
    failures = {result["configuration"]: "; ".join(result["failures"]) for result in report["results"]}
    assert failures["good"] == failures["early barrier"] == ""
    assert "loads of 128 bits, at least" in failures["misaligned"]
    assert "may not be adjacent in K" in failures["no asm"]
    assert "instructions a weight, at most 3.3" in failures["narrow block"]
    assert "registers spill" in failures["too many registers"]
    assert "bytes of shared memory, at most 101376" in failures["too much shared memory"]
    assert "no barrier between a block's stores and its counter" in failures["late barrier"]


def test_a_folder_without_triton_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/check_kernels.py", "--triton", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"no triton under {tmp_path}; install one there: pip install --target" in done.stderr


def test_a_kernel_that_does_not_compile_is_a_failure_and_not_the_end(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(
        "from dataclasses import replace\n"
        "from specdec_kernels.w4a16.kernel import CONFIGURATIONS as C\n"
        "CONFIGURATIONS = [replace(C[0], constants=C[0].constants | {'BN': 100}), C[0]]\n"
    )
    script = ROOT / "scripts" / "check_kernels.py"
    command = [sys.executable, str(script), "--op", "wrong", "--all", "--arch", "90"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    first, second = json.loads(done.stdout.splitlines()[-1])["results"]
    assert done.returncode == 1
    assert first["failures"]
    assert second["failures"] == []
