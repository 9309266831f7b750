"""audit_peers on runtimes whose texts are known."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import audit_peers
import pytest
import torch
from peers.draws import ALPHA, LIKELIEST, REPEATED_TOKENS, TEMPERATURE, contexts_of, wrong_engines
from peers.engines import CallResult, Engine, StepMeans, Task, TransformersEngine, specdec_draft, stock_plain
from peers.pairs import find_pair
from peers.runtimes import Conditions, Runtime
from rich.console import Console

from specdec.audit.statistics import clopper_pearson
from specdec.core import verification
from specdec.runtime.loading import load_tokenizer
from specdec.utils import embedded


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


@dataclass
class Draws(Repeats):
    """Draws each id from a law of ten ids, of which it takes the first one more often by `shift`."""

    shift: float = 0.0

    def generate(self, task: Task) -> CallResult:
        assert task.sampled
        draws = random.Random(task.seed)
        return CallResult([[self._draw(draws) for _ in range(task.new_tokens)] for _ in task.prompts], 1.0, 1.0)

    def _draw(self, draws: random.Random) -> int:
        return 0 if draws.random() < self.shift else draws.choices(range(10), range(10, 0, -1))[0]

    def time_steps(self, task: Task) -> StepMeans:
        return StepMeans(2.0, 1.0, None, None, None, 1.0)


class Drawing(Runtime):
    name = "a runtime"

    def engines(self, conditions: Conditions) -> list[Engine]:
        return [Draws("plain", 1), Draws("right", 1, 3), Draws("other K", 1, 5), Draws("wrong", 1, 3, shift=0.2)]  # type: ignore[list-item]


def test_draws_of_another_law_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit_peers, "RUNTIMES", {"transformers": Drawing})
    output = tmp_path / "audit.json"
    arguments = ["--runtimes", "transformers", "--sampled", "--contexts", "2", "--draws", "200"]
    assert audit_peers.main([*arguments, "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert report["workload"] == {"contexts": 2, "draws": 200}
    right, wrong = report["results"]
    assert (right["engine"], wrong["engine"]) == ("right", "wrong")
    assert right["p_value"] > ALPHA >= wrong["p_value"]
    assert min(right["repetition_p_value"], wrong["repetition_p_value"]) > ALPHA
    assert 0.02 < right["smallest_shift"] < 0.3
    assert (right["draws"], right["tokens_per_step"], right["is_control"]) == (400, 2.0, False)
    assert "a runtime, 4 bits │ right, K=3" in capsys.readouterr().out


def test_contexts_have_an_open_next_id() -> None:
    pair = find_pair("embedded", Console())
    tokenizer = load_tokenizer(str(pair.target))
    prompts = [tokenizer(prompt["prompt"]).input_ids for prompt in embedded.prompts()[:12]]
    [context] = contexts_of(pair, prompts, 1)
    assert context[-REPEATED_TOKENS:] == context[:REPEATED_TOKENS]
    with torch.inference_mode():
        largest = float(pair.load_dense("float32")(torch.tensor([context])).logits[0, -1].softmax(-1).max())
    assert LIKELIEST[0] <= largest <= LIKELIEST[1]
    with pytest.raises(ValueError, match="prompts have an open next id, --contexts is 12"):
        contexts_of(pair, prompts, 12)


def test_loops_that_are_wrong_on_purpose_draw_from_another_law() -> None:
    """The mistake is made within `ready` alone; the temperature is the call's."""
    pair = find_pair("embedded", Console())
    target, draft = pair.load_dense("float32"), pair.load_draft("float32", int4=False)
    warmer, broken = [
        engine
        for some in ([stock_plain("transformers", target, 1)], [specdec_draft(target, 1, draft, 3)])
        for engine in wrong_engines(some)
    ]
    assert isinstance(warmer, TransformersEngine)
    assert warmer.options == {"temperature": TEMPERATURE}
    verify = verification.verify
    with broken.ready():
        assert verification.verify is not verify
    assert verification.verify is verify
    assert "never checks the last draft id" in broken.name


def test_batches_begin_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        audit_peers.main(["--batch", "4"])
    assert "--batch begins with 1" in capsys.readouterr().err
