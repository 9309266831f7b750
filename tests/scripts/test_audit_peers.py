"""audit_peers on runtimes whose texts are known."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import audit_peers
import pytest
from peers.engines import CallResult, Engine, Task
from peers.runtimes import Conditions, Runtime

from specdec.audit.statistics import clopper_pearson


@dataclass
class Repeats:
    """Writes the last id of a prompt again and again; in a batch larger than 1, another one from id `wrong_from` on."""

    name: str
    batch: int
    num_draft_tokens: int | None = None
    wrong_from: int = 100
    runtime: str = "a runtime"
    weights: str = "4 bits"
    threads: int = 1
    forward_bytes: int | None = None

    def ready(self) -> Any:
        return nullcontext()

    def warm_up(self, task: Task) -> None:
        pass

    def generate(self, task: Task) -> CallResult:
        wrong = self.wrong_from if self.batch > 1 else task.new_tokens
        ids = [[row[-1] + (i >= wrong) for i in range(task.new_tokens)] for row in task.prompts]
        return CallResult(ids, 1.0, 1.0)


class Repeating(Runtime):
    name = "a runtime"

    def engines(self, conditions: Conditions) -> list[Engine]:
        batch = conditions.task_set.batch
        plain = conditions.choose("plain", {"": Repeats("plain", batch)})
        return [plain, Repeats("draft model", batch, conditions.ks[0], wrong_from=3)]  # type: ignore[list-item]


class Absent(Repeating):
    name = "another runtime"

    @classmethod
    def is_set_up(cls) -> bool:
        return False


def test_texts_are_compared_with_plain_ones_of_single_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit_peers, "RUNTIMES", {"transformers": Repeating, "specdec": Absent})
    output = tmp_path / "audit.json"
    arguments = ["--runtimes", "transformers", "specdec", "--prompts", "8", "--prompt-tokens", "8"]
    assert audit_peers.main([*arguments, "--new-tokens", "5", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    found = [(r["engine"], r["batch"], r["identical"], r["median_first_difference"]) for r in report["results"]]
    assert found == [
        ("plain", 1, 8, None),
        ("draft model", 1, 8, None),
        ("plain", 4, 8, None),
        ("draft model", 4, 0, 3),
    ]
    assert report["results"][3]["interval"] == pytest.approx(clopper_pearson(0, 8), abs=1e-4)
    printed = capsys.readouterr()
    assert "0 of 8 (0% to 37%)" in printed.out
    assert "another runtime is left out" in printed.err


def test_batches_begin_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        audit_peers.main(["--batch", "4"])
    assert "--batch begins with 1" in capsys.readouterr().err
