"""scripts/gpu_suite.py without a GPU: its dry run, its refusals, and that it sees what is wrong."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_suite.py"
SECTIONS = ["tests", "correctness", "w4a16", "attention", "rejection", "lossless", "peers"]
TIMED = SECTIONS[2:5]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(
        command, env=environment | {"PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_suite", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_suite"] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


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
            known = (
                "max_error",
                "bound",
                "tokens_per_step",
            )  # what was compared, goals, what was accepted: nothing was timed
            assert path[-1] in known, path
        if path[-1].endswith(("_us", "gbps")) or path[-1].startswith(("ratio", "fraction", "cost", "spread")):
            assert value is None, path
    table = done.stdout[done.stdout.index("w4a16: ok") :]
    assert "not measured: T(16) / T(1) <= 1.10" in table
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_without_a_gpu_it_says_so() -> None:
    done = run("--section", "w4a16")
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert "--dry" in done.stderr


def test_an_unknown_section_is_told_the_known_ones(suite: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        suite.main(["--dry", "--section", "w4a17"])
    message = capsys.readouterr().err
    assert all(name in message for name in ("w4a17", *SECTIONS))


class Off:
    """One element is wrong by half of itself."""

    def __init__(self, op: Callable[..., Tensor]) -> None:
        self.op = op
        self.first: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, x: Tensor, weight: Any) -> Tensor:
        y = self.op(x, weight).clone()
        y[-1, y[-1].abs().argmax()] *= 1.5
        return y


class Stale(Off):
    """What was right at the first launch comes again."""

    def __call__(self, x: Tensor, weight: Any) -> Tensor:
        return self.first.setdefault((*x.shape, weight.out_features), self.op(x, weight))


class Unwritten(Off):
    """The last column is left as it was found."""

    def __call__(self, x: Tensor, weight: Any) -> Tensor:
        y = torch.empty(len(x), weight.out_features, dtype=x.dtype, device=x.device)
        y[:, :-1] = self.op(x, weight)[:, :-1]
        return y


class OtherBits(Off):
    """A row alone is rounded in another way."""

    def __call__(self, x: Tensor, weight: Any) -> Tensor:
        y = self.op(x, weight)
        return y * (1 + torch.finfo(y.dtype).eps) if len(x) == 1 else y


class Raises(Off):
    def __call__(self, x: Tensor, weight: Any) -> Tensor:
        raise RuntimeError("it does not compile\nfor a reason")


BROKEN = [(Off, "bounded"), (Stale, "changes"), (Unwritten, "bounded"), (OtherBits, "same_bits"), (Raises, "ok")]


@pytest.mark.parametrize(("broken", "sign"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_what_is_wrong_is_seen_and_not_timed(
    suite: ModuleType, broken: type[Off], sign: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(suite, "w4a16", broken(suite.w4a16))
    monkeypatch.setattr(suite, "CHECKS", {"w4a16": suite.check_w4a16})
    output = tmp_path / "dry.json"
    assert suite.main(["--dry", "--section", "w4a16", "correctness", "--output", str(output)]) == 1
    sections = json.loads(output.read_text(encoding="utf-8"))["sections"]
    assert sections["correctness"]["status"] == "failed"
    assert not all(row[sign] for row in sections["correctness"]["checks"])
    assert sections["w4a16"]["status"] == "refused"
    assert "w4a16 gives wrong results" in sections["w4a16"]["reason"]
    assert "results" not in sections["w4a16"]
    assert "correctness: failed" in capsys.readouterr().out


def test_an_error_that_moves_is_seen_though_it_is_small(suite: ModuleType) -> None:
    tiny = suite.Suite(torch.device("cpu"), dry=True)
    for errors, stable in (([5e-4, 4e-4], True), ([5e-4, 5e-6], False)):
        left = iter(errors)
        row = suite.checked(
            tiny, "op", "case", lambda: (torch.rand(9).double(),), lambda x, left=left: x * (1 + next(left)), lambda x: x,
            lambda got, x: True, suite.relative_error, 1e-3,
        )  # fmt: skip
        assert row["bounded"]
        assert row["stable"] is row["ok"] is stable


def test_sections_merge_and_another_devices_figures_stay(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "report.json"

    def skipped(_: Any) -> None:
        raise suite.Skipped("not here")

    def fails(_: Any) -> None:
        raise RuntimeError("an illegal access\nand its story")

    call = ["--dry", "--output", str(output), "--section"]
    for name, section in (("w4a16", dict), ("tests", skipped), ("rejection", fails)):
        monkeypatch.setitem(suite.SECTIONS, name, section if section is not dict else lambda _: {})
    assert suite.main([*call, "w4a16", "tests"]) == 0
    assert suite.main([*call, "rejection"]) == 1
    report = json.loads(output.read_text(encoding="utf-8"))
    assert {name: record["status"] for name, record in report["sections"].items()} == {
        "tests": "skipped", "w4a16": "ok", "rejection": "failed",
    }  # fmt: skip
    assert report["sections"]["rejection"]["reason"] == "RuntimeError: an illegal access"
    output.write_text(json.dumps(report | {"dry": False, "device": "Some GPU"}), encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        suite.main([*call, "w4a16"])


def test_without_git_the_sources_tell_what_ran(suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    origin = suite.origin(suite.Suite(torch.device("cpu"), dry=True))
    assert origin["commit"] is None
    assert len(origin["sources_sha256"]) == 64


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
def test_on_cuda_a_graph_is_timed_where_one_is_taken(
    suite: ModuleType, refuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCuda(refuses)
    monkeypatch.setattr(suite.torch, "cuda", fake)
    calls: list[int] = []

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("no room\nfor it")

    ours = [lambda: calls.append(1), lambda: calls.append(2)]
    times = suite.Timer(True, rounds=3, min_calls=8).measure({"ours": ours, "other": [out_of_memory]})
    assert times["ours"].graph is not refuses
    assert times["ours"].us == pytest.approx(2000 / 8)  # four turns of two calls
    assert calls[:12] == [1, 2] * 6  # compile, estimate, capture
    assert fake.replays == (0 if refuses else 4)
    assert math.isnan(times["other"].us)
    assert times["other"].reason == "no room"
    with pytest.raises(torch.OutOfMemoryError):
        suite.Timer(True, rounds=3, min_calls=8).measure({"ours": [out_of_memory]})
