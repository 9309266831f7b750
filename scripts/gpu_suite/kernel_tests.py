"""The tests of kernels and recorded steps, in a process of their own; a dry run only collects them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

from gpu_suite.suite import ROOT, Row, Section, Suite, failed

TIMEOUT_S = 450
MAX_REPORTED = 30  # failed tests that are named
TESTS = ["tests/kernels", "tests/runtime/attention", "tests/runtime/test_cuda_graphs.py"]


def run(suite: Suite) -> Row:
    command = [sys.executable, "-m", "pytest", *TESTS, "-q", "-p", "no:cacheprovider"]
    command += ["--collect-only"] if suite.dry else []
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    options: dict[str, Any] = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": path}, "timeout": TIMEOUT_S}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    except subprocess.TimeoutExpired:
        return failed(f"the tests did not end in {TIMEOUT_S} s")
    lines = (done.stdout + done.stderr).splitlines() or ["no output"]
    counts = re.findall(
        r"(\d+) (?:tests? )?(passed|failed|errors?|skipped|xfailed|deselected|collected)", done.stdout[-300:]
    )
    report: Row = {"counts": {name: int(number) for number, name in counts}}
    report["failed_tests"] = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:MAX_REPORTED]
    return report | (failed(f"pytest ended with {done.returncode}: {lines[-1]}") if done.returncode else {})


SECTION = Section("tests", run, packages=("pytest",))
