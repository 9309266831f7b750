"""bench_int4 on a small layer, with and without llama.cpp's products."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bench_int4
import pytest
from peers import machine, setup


class FakeWorker:
    """llama.cpp, whose products take 1 ms a row."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []

    def request(self, **message: Any) -> dict[str, Any]:
        self.requests.append(message)
        return {"seconds": 1e-3 * message["rows"], "bytes": message["in"] * message["out"] * 18 // 32}


def results_of(monkeypatch: pytest.MonkeyPatch, output: Path) -> list[dict[str, Any]]:
    monkeypatch.setattr(machine, "SECONDS", 0.01)
    monkeypatch.setattr(machine.Bandwidth, "memory_bytes", staticmethod(lambda: 1 << 20))
    arguments = ["--shapes", "128x64", "--rows", "1", "3", "--rounds", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["bench_int4.py", *arguments])
    bench_int4.main()
    results: list[dict[str, Any]] = json.loads(output.read_text())["results"]
    return results


@pytest.mark.usefixtures("cpu_kernels")
def test_layers_are_timed_at_each_number_of_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "PYTHON", tmp_path / "absent")
    results = results_of(monkeypatch, tmp_path / "int4.json")
    layers = ["4 bits, inputs in 8", "4 bits, inputs in 16", "8 bits, inputs in 8", "bfloat16"]
    assert [(r["layer"], r["rows"]) for r in results] == [(name, rows) for name in layers for rows in (1, 3)]
    assert all(r["cost_in_one_row"] == 1 for r in results if r["rows"] == 1)
    assert all(r["us"] > 0 for r in results)
    captured = capsys.readouterr()
    assert "llama.cpp is left out" in captured.err
    assert "4 bits, inputs in 8" in captured.out


@pytest.mark.usefixtures("cpu_kernels")
def test_products_of_llamacpp_stand_beside_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = FakeWorker()

    @contextmanager
    def fake() -> Iterator[FakeWorker]:
        yield worker

    monkeypatch.setattr(bench_int4, "llamacpp", fake)
    results = results_of(monkeypatch, tmp_path / "int4.json")
    own = {r["rows"]: r for r in results if r["layer"] == "llama.cpp, Q4_0"}
    assert {rows: r["us"] for rows, r in own.items()} == {1: 1000, 3: 3000}
    assert own[3]["cost_in_one_row"] == 3
    assert own[1]["gb_per_second"] == round(128 * 64 * 18 / 32 / 1e6, 2)
    assert {request["type"] for request in worker.requests} == set(bench_int4.LLAMACPP_TYPES)
    assert all(request["op"] == "linear" for request in worker.requests)
