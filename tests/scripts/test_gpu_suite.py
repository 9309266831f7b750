"""scripts/gpu_suite without a GPU: its dry run, what it refuses, and that it detects broken kernels."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gpu_suite import correctness, main, w4a16
from gpu_suite.checking import check_case, max_relative_error
from gpu_suite.report import origin
from gpu_suite.suite import Section, Skipped, Suite
from gpu_suite.timing import CallTimer

ROOT = Path(__file__).parents[2]
SCRIPT = "scripts/gpu_suite"
SECTIONS = ["tests", "correctness", "w4a16", "w8a16", "attention", "rejection", "lossless", "peers"]
TIMED = SECTIONS[2:6]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(
        command, env=environment | {"PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True, check=False
    )


def items(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every leaf of a JSON with the keys that lead to it."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from items(item, (*path, str(key)))
    else:
        yield path, value


def test_a_dry_run_runs_every_section_and_keeps_no_figure(tmp_path: Path) -> None:
    done = run("--dry", "--output", str(tmp_path / "dry.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "dry.json").read_text(encoding="utf-8"))
    assert report["dry"] is True
    assert list(report["sections"]) == SECTIONS
    for name, section in report["sections"].items():
        assert section["status"] == "ok", name
        assert section["time"]
        assert len(section["provenance"]["sources_sha256"]) == 64
        assert section["provenance"]["torch"] == torch.__version__
        assert f"{name}: ok" in done.stdout
    checks = report["sections"]["correctness"]["checks"]
    assert {row["op"] for row in checks} == set(TIMED)
    assert all(row["ok"] for row in checks)
    for name in TIMED:
        row = report["sections"][name]["results"][0]
        assert row["time_us"] is None
        assert row["bytes"] > 0
        assert any(key.startswith("ratio_to_") for key in row)
    assert not any(name.endswith("_absent") for path, _ in items(report["sections"]["w4a16"]) for name in path)
    assert report["sections"]["tests"]["counts"]["collected"] > 100
    for row in report["sections"]["lossless"]["results"]:
        assert row["identical"] == row["texts"] > 0
    peers = report["sections"]["peers"]["results"]
    assert {(row["runtime"], row["batch"]) for row in peers} == {
        (lib, batch) for lib in ("transformers", "specdec") for batch in (1, 2)
    }
    assert any(row["engine"].startswith("assisted") for row in peers)
    for row in peers:
        assert row["identical_rows"] == row["rows"]
        assert row["tokens_per_second"] is row["target_ms"] is None
    for path, value in items(report["sections"]):
        if isinstance(value, float):
            assert path[-1] in ("max_error", "bound", "tokens_per_step"), path  # none of them is a time
        if path[-1].endswith(("_us", "gbps")) or path[-1].startswith(("ratio", "fraction", "cost", "spread")):
            assert value is None, path
    table = done.stdout[done.stdout.index("w4a16: ok") :]
    assert "not measured: T(16) / T(1) <= 1.10" in table
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_without_a_gpu_it_ends_with_a_message() -> None:
    done = run("--section", "w4a16")
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert "--dry" in done.stderr


def test_an_unknown_section_is_refused_with_the_names_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.main(["--dry", "--section", "w4a17"])
    message = capsys.readouterr().err
    assert all(name in message for name in ("w4a17", *SECTIONS))


class Off:
    """One element is off by half of its value."""

    def __init__(self, op: Callable[..., Tensor]) -> None:
        self.op = op
        self.first: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, x: Tensor, weight: Any) -> Tensor:
        y = self.op(x, weight).clone()
        y[-1, y[-1].abs().argmax()] *= 1.5
        return y


class Stale(Off):
    """Later launches return the result of the first."""

    def __call__(self, x: Tensor, weight: Any) -> Tensor:
        return self.first.setdefault((*x.shape, weight.out_features), self.op(x, weight))


class Unwritten(Off):
    """The last column is not written."""

    def __call__(self, x: Tensor, weight: Any) -> Tensor:
        y = torch.empty(len(x), weight.out_features, dtype=x.dtype, device=x.device)
        y[:, :-1] = self.op(x, weight)[:, :-1]
        return y


class OtherBits(Off):
    """A single row is rounded differently."""

    def __call__(self, x: Tensor, weight: Any) -> Tensor:
        y = self.op(x, weight)
        return y * (1 + torch.finfo(y.dtype).eps) if len(x) == 1 else y


class Raises(Off):
    def __call__(self, x: Tensor, weight: Any) -> Tensor:
        raise RuntimeError("it does not compile\nfor some reason")


BROKEN = [(Off, "bounded"), (Stale, "changes"), (Unwritten, "bounded"), (OtherBits, "same_bits"), (Raises, "ok")]


@pytest.mark.parametrize(("broken", "sign"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_kernel_is_detected_and_not_timed(
    broken: type[Off], sign: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(w4a16, "multiply", broken(w4a16.multiply))
    monkeypatch.setattr(correctness, "KERNEL_SECTIONS", (w4a16.SECTION,))
    output = tmp_path / "dry.json"
    assert main.main(["--dry", "--section", "w4a16", "correctness", "--output", str(output)]) == 1
    sections = json.loads(output.read_text(encoding="utf-8"))["sections"]
    assert sections["correctness"]["status"] == "failed"
    assert not all(row[sign] for row in sections["correctness"]["checks"])
    assert sections["w4a16"]["status"] == "refused"
    assert "w4a16 gives wrong results" in sections["w4a16"]["reason"]
    assert "results" not in sections["w4a16"]
    assert "correctness: failed" in capsys.readouterr().out


def test_a_small_error_that_varies_is_detected() -> None:
    suite = Suite(torch.device("cpu"), dry=True)
    for errors, stable in (([5e-4, 4e-4], True), ([5e-4, 5e-6], False)):
        remaining = iter(errors)
        row = check_case(
            suite, "op", "case", lambda: (torch.rand(9).double(),), lambda x, rest=remaining: x * (1 + next(rest)),
            lambda x: x, lambda result, x: True, max_relative_error, 1e-3,
        )  # fmt: skip
        assert row["bounded"]
        assert row["stable"] is row["ok"] is stable


def test_sections_merge_and_another_devices_figures_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "report.json"

    def skipped(_: Any) -> None:
        raise Skipped("not here")

    def fails(_: Any) -> None:
        raise RuntimeError("an illegal access\nand its details")

    call = ["--dry", "--output", str(output), "--section"]
    for name, section_run in (("w4a16", lambda _: {}), ("tests", skipped), ("rejection", fails)):
        monkeypatch.setitem(main.SECTIONS, name, Section(name, section_run))
    assert main.main([*call, "w4a16", "tests"]) == 0
    assert main.main([*call, "rejection"]) == 1
    report = json.loads(output.read_text(encoding="utf-8"))
    assert {name: record["status"] for name, record in report["sections"].items()} == {
        "tests": "skipped", "w4a16": "ok", "rejection": "failed",
    }  # fmt: skip
    assert report["sections"]["rejection"]["reason"] == "RuntimeError: an illegal access"
    output.write_text(json.dumps(report | {"dry": False, "device": "Some GPU"}), encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        main.main([*call, "w4a16"])


def test_a_section_without_its_package_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(main.SECTIONS, "tests", Section("tests", lambda _: {}, packages=("no_such_package",)))
    output = tmp_path / "report.json"
    assert main.main(["--dry", "--section", "tests", "--output", str(output)]) == 0
    record = json.loads(output.read_text(encoding="utf-8"))["sections"]["tests"]
    assert record["status"] == "skipped"
    assert "no_such_package is not installed" in record["reason"]


def test_without_git_a_digest_of_the_sources_identifies_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = origin(Suite(torch.device("cpu"), dry=True))
    assert found["commit"] is None
    assert len(found["sources_sha256"]) == 64


class FakeCuda:
    """The calls of torch.cuda that timing makes; 2 ms pass between two events."""

    def __init__(self, refuses: bool) -> None:
        self.refuses, self.replays = refuses, 0
        self.OutOfMemoryError = torch.OutOfMemoryError

    def CUDAGraph(self) -> FakeCuda:
        return self

    def Event(self, enable_timing: bool) -> FakeCuda:
        return self

    @contextmanager
    def graph(self, graph: FakeCuda) -> Iterator[None]:
        yield
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")

    def replay(self) -> None:
        self.replays += 1

    def elapsed_time(self, end: FakeCuda) -> float:
        return 2.0

    def nothing(self, *args: Any) -> None:
        pass

    record = synchronize = _sleep = nothing


@pytest.mark.parametrize("refuses", [False, True])
def test_on_cuda_a_graph_is_timed_where_capture_succeeds(refuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(refuses)
    monkeypatch.setattr(torch, "cuda", fake)
    calls: list[int] = []

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("out of memory\non device 0")

    first = [lambda: calls.append(1), lambda: calls.append(2)]
    times = CallTimer(True, rounds=3, min_calls=8).measure({"first": first, "other": [out_of_memory]})
    assert times["first"].graph is not refuses
    assert times["first"].us == pytest.approx(2000 / 8)  # four cycles of two calls
    assert calls[:12] == [1, 2] * 6  # compile, estimate, capture
    assert fake.replays == (0 if refuses else 4)
    assert math.isnan(times["other"].us)
    assert times["other"].reason == "out of memory"
    with pytest.raises(torch.OutOfMemoryError):
        CallTimer(True, rounds=3, min_calls=8).measure({"first": [out_of_memory]})
