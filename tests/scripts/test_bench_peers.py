"""scripts/bench_peers.py: what is measured, how it is summarized, and peers that are absent or fail."""

from __future__ import annotations

import json
import random
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench_peers
import profile_step
import pytest
import torch
import widen_pair
from common.interleaved import interleave, median_with_interval
from peers import openvino_engine, show
from peers.engines import (
    CallResult,
    StepMeans,
    Task,
    specdec_draft,
    specdec_plain,
    stock_assisted,
    stock_lookup,
    stock_plain,
)
from peers.measure import TaskSet, compare, run_tasks, tune

import specdec
from specdec.runtime.loading import load
from specdec.utils import embedded

QUICK = [
    "--rounds",
    "1",
    "--new-tokens",
    "8",
    "--prompts",
    "2",
    "--prompt-tokens",
    "16",
    "--num-draft-tokens",
    "1",
    "2",
    "--threads",
    "1",
]


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(openvino_engine, "PYTHON", tmp_path / "absent" / "python")


def test_a_run_ends_with_tables_a_json_and_a_plot(
    no_peers: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results" / "peers.json"
    assert bench_peers.main([*QUICK, "--batch", "1", "2", "--output", str(output)]) == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["missing"] == [openvino_engine.NOT_SET_UP]
    assert report["provenance"]["torch"] == torch.__version__
    assert report["workload"] == {"prompts": 2, "prompt_tokens": 16, "new_tokens": 8, "rounds": 1}
    found = {(r["batch"], r["sampling"], r["runtime"], r["engine"]) for r in report["results"]}
    for sampling in ("greedy", "sampled"):
        stock = {("transformers", name) for name in ("plain", "assisted", "prompt lookup")}
        own = {("specdec", name) for name in ("4-bit, stock loop", "plain", "draft model", "prompt lookup")}
        assert {
            pair for batch, how, *rest in found if (batch, how) == (1, sampling) for pair in [tuple(rest)]
        } == stock | own
        assert {
            pair for batch, how, *rest in found if (batch, how) == (2, sampling) for pair in [tuple(rest)]
        } == own | {("transformers", "plain")}
    assert [r["num_draft_tokens"] for r in report["results"] if r["engine"] == "draft model"] == 4 * [1, 2, "auto"]
    for r in report["results"]:
        if r["runtime"] == "specdec" and r["sampling"] == "greedy":
            assert r["identical_rows"] == r["rows"]
        assert (r["identical_rows"] is None) == (r["sampling"] == "sampled")
        assert r["target_ms"] > 0
        assert r["tokens_per_step"] >= 1
    tuned = {one["what"]: set(one["tokens_per_second"]) for one in report["tuned"]}
    assert tuned["transformers plain"] == {"bfloat16, 1 thread", "float32, 1 thread"}
    assert tuned["transformers assisted, batch 1, greedy"] == {"K=1", "K=2"}
    assert output.with_suffix(".png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "OpenVINO GenAI is left out" in out
    assert "batch 2, sampled: specdec" in out
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pair", "no/such"], "no model in"),
        (["--batch", "99"], "prompts have 64 tokens, --batch 99"),
    ],
)
def test_bad_input_ends_with_a_message(
    no_peers: None, arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_peers.main([*arguments, "--output", str(tmp_path / "peers.json")]) == 1
    assert words in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--rounds", "0"], "begin at 1"), (["--new-tokens", "6"], "may be one step at K=5")]
)
def test_counts_of_nothing_are_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench_peers.main(arguments)
    assert words in capsys.readouterr().err


def write_program(path: Path, commands: str) -> Path:
    """A shell program in place of the peers' Python."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{commands}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The path of the peers' Python."""
    monkeypatch.setattr(openvino_engine, "PYTHON", tmp_path / "bin" / "python")
    monkeypatch.setattr(openvino_engine, "EXPORTS", tmp_path / "exports")
    return tmp_path / "bin" / "python"


@pytest.mark.parametrize(
    ("commands", "message"),
    [
        ('echo "no such runtime" >&2; exit 3', "ended with 3:\nno such runtime"),
        ('read line; echo \'{"error": "it broke"}\'', "OpenVINO failed: it broke"),
    ],
)
def test_a_peer_that_fails_fails_the_run(peer: Path, commands: str, message: str) -> None:
    write_program(peer, commands)
    worker = openvino_engine.Worker()
    with pytest.raises(openvino_engine.PeerFailed, match=message):
        worker.request(op="load")
    worker.close()


def test_main_ends_with_the_message_of_a_failed_peer(
    peer: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_program(peer, "case $1 in -c) echo '{}';; *) echo gone >&2; exit 4;; esac")
    monkeypatch.setattr(bench_peers.Bench, "choose_settings", lambda self: self.worker.request(op="load"))
    assert bench_peers.main(["--output", str(tmp_path / "peers.json")]) == 1
    assert "ended with 4" in capsys.readouterr().err
    assert not (tmp_path / "peers.json").exists()


def test_a_model_is_exported_once_for_what_is_in_its_folder(peer: Path, tmp_path: Path) -> None:
    write_program(peer, "")
    write_program(
        peer.with_name("optimum-cli"), f'for last; do :; done; mkdir "$last" || exit 1; echo x >> {tmp_path}/exported'
    )
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}", encoding="utf-8")
    folder = openvino_engine.export(model, print)
    assert openvino_engine.export(model, print) == folder
    (model / "config.json").write_text('{"other": 1}', encoding="utf-8")
    assert openvino_engine.export(model, print) != folder
    assert (tmp_path / "exported").read_text(encoding="utf-8") == "x\nx\n"
    write_program(peer.with_name("optimum-cli"), "echo cannot >&2; exit 1")
    (model / "config.json").write_text('{"other": 2}', encoding="utf-8")
    with pytest.raises(openvino_engine.PeerFailed, match="cannot"):
        openvino_engine.export(model, print)
    assert len(list((tmp_path / "exports").iterdir())) == 2


def test_a_setup_that_fails_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = tmp_path / "peers"

    def run(command: Sequence[str], **_: Any) -> None:
        environment.mkdir(exist_ok=True)
        if "install" in command:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(openvino_engine, "ENVIRONMENT", environment)
    monkeypatch.setattr(openvino_engine.subprocess, "run", run)
    assert bench_peers.main(["--setup-peers"]) == 1
    assert "nothing of it is left" in " ".join(capsys.readouterr().err.split())
    assert not environment.exists()


@dataclass
class Fake:
    """Repeats one id, with given seconds for each call."""

    runtime: str
    name: str
    seconds: list[float]
    num_draft_tokens: int | None = None
    token_id: int = 7
    surplus: int = 0
    seeds: list[int] = field(default_factory=list)

    @contextmanager
    def ready(self) -> Iterator[None]:
        yield

    def warm_up(self, task: Task) -> None:
        pass

    def generate(self, task: Task) -> CallResult:
        self.seeds.append(task.seed)
        spent = self.seconds[(len(self.seeds) - 1) % len(self.seconds)]
        return CallResult([[self.token_id] * (task.new_tokens + self.surplus) for _ in task.prompts], spent)

    def time_steps(self, task: Task) -> StepMeans:
        return StepMeans(2.0, 10.0, 1.0, 2.0, None, 0.5)


TASK_SET = TaskSet(batch=2, sampled=False, prompts=[[1, 2], [3, 4], [5, 6], [7, 8]], new_tokens=10)


def test_rates_ratios_and_identical_rows() -> None:
    # two calls a pass: warm-up, then rounds of 2 and 4 s a call
    baseline = Fake("a", "plain", [1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    faster = Fake("b", "plain", [0.5])
    other = Fake("b", "draft", [0.25], num_draft_tokens=3, token_id=8)
    results = compare([baseline, faster, other], TASK_SET, 2, lambda words: None)
    assert [r["tokens_per_second_rounds"] for r in results] == [[10.0, 5.0], [40.0, 40.0], [80.0, 80.0]]
    assert results[0]["tokens_per_second"] == 7.5
    assert results[1]["ratio_to_baseline"] == {"median": 6.0, "low": 4.0, "high": 8.0}
    assert results[2]["ratio_to_own_plain"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert [r["identical_rows"] for r in results] == [4, 4, 0]
    assert [r["compared_to"] for r in results] == ["a plain", "b plain", "b plain"]
    assert results[2]["verification_ms"] is None
    assert results[2]["target_ms"] == 2.0
    assert len(set(faster.seeds)) == len(faster.seeds)  # other draws in each call


def test_engines_run_in_turns() -> None:
    order: list[str] = []
    engines = [Fake("a", name, [1.0]) for name in "xyz"]
    compare(engines, TASK_SET, 2, order.append)
    assert [words.split()[4].rstrip(",") for words in order] == ["x", "y", "z", "x", "y", "z", "z", "y", "x"]


def test_tuning_takes_the_fastest_of_the_calls_behind_the_first() -> None:
    slow_start, slow = Fake("a", "plain", [99.0, 1.0, 1.5]), Fake("a", "plain", [2.0])
    best, tuned = tune("a", {"one": slow_start, "two": slow}, TaskSet(1, False, [[1]], 20), lambda words: None)
    assert best is slow_start
    assert tuned.best == "one"
    assert tuned.tokens_per_second == {"one": 10.0, "two": 5.0}


def test_another_number_of_ids_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="a plain wrote"):
        run_tasks(Fake("a", "plain", [1.0], surplus=1), TASK_SET.tasks())


def test_a_task_set_splits_prompts_into_batches() -> None:
    assert [task.prompts for task in TASK_SET.tasks()] == [TASK_SET.prompts[:2], TASK_SET.prompts[2:]]
    assert TASK_SET.short().new_tokens == 8
    assert len(TASK_SET.short().prompts) == 2


def test_sentences_report_faster_and_slower_peers() -> None:
    results = compare(
        [Fake("t", "plain", [1.0]), Fake("o", "draft", [0.2], 2), Fake("specdec", "plain", [0.4])], TASK_SET, 1, print
    )
    assert show.sentences(results) == [
        "batch 2, greedy: specdec plain (50 tok/s) is 2.50 times t plain (20), 0.50 times o draft K=2 (100)"
    ]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return load(str(embedded.TARGET), "float32", "cpu"), load(str(embedded.DRAFT), "float32", "cpu")


def test_engines_write_the_same_and_leave_models_as_they_were(pair: tuple[Any, Any]) -> None:
    target, draft = pair
    target_class, before = type(target), [json.dumps(model.generation_config.to_dict(), default=str) for model in pair]
    task = Task([list(range(50, 70))], 24)
    engines = [
        stock_plain("s", target, 1), stock_assisted("s", target, 1, draft, 3), stock_lookup("s", target, 1, 3),
        specdec_plain(target, 1), specdec_draft(target, 1, draft, 3),
    ]  # fmt: skip
    texts, threads = [], torch.get_num_threads()
    for engine in engines:
        with engine.ready():
            assert torch.get_num_threads() == 1
            texts.append(engine.generate(task).ids)
            steps = engine.time_steps(task)
            if engine.runtime == "specdec":
                assert steps.tokens_per_step == 24 / specdec.last_stats(target).num_steps
        drafts = engine.name in ("assisted", "draft model")
        assert steps.tokens_per_step > 1 if drafts else steps.tokens_per_step >= 1
        if engine.runtime == "s":  # specdec also counts the time of proposing nothing
            assert (steps.draft_ms > 0) == drafts
        assert min(steps.target_ms, steps.other_ms, steps.prompt_ms) > 0
        assert (steps.verification_ms is None) == (engine.runtime == "s")
    assert all(text == texts[0] for text in texts)
    assert len(texts[0][0]) == 24
    assert torch.get_num_threads() == threads
    assert type(target) is target_class
    assert [json.dumps(model.generation_config.to_dict(), default=str) for model in pair] == before


def test_sampled_calls_follow_their_seed(pair: tuple[Any, Any]) -> None:
    engine = stock_plain("s", pair[0], 1)
    with engine.ready():
        first, again, other = (
            engine.generate(Task([[50, 51, 52]], 12, sampled=True, seed=seed)).ids for seed in (1, 1, 2)
        )
    assert first == again != other


@pytest.mark.skipif(
    not openvino_engine.is_set_up(), reason="OpenVINO GenAI is not set up (bench_peers.py --setup-peers)"
)
def test_openvino_writes_the_requested_number_of_ids() -> None:
    worker = openvino_engine.Worker()
    try:
        target, draft = (openvino_engine.export(folder, print) for folder in (widen_pair.ORIGINAL, embedded.DRAFT))
        task = Task([list(range(50, 70)), list(range(60, 80))], 16)
        for engine in (
            openvino_engine.OpenVino(worker, target, 1),
            openvino_engine.OpenVino(worker, target, 1, draft, 2),
        ):
            assert [len(row) for row in engine.generate(task).ids] == [16, 16]
            steps = engine.time_steps(task)
            assert steps.target_ms > 0
            assert (steps.tokens_per_step > 1) == (engine.name == "draft model")
        with pytest.raises(openvino_engine.PeerFailed, match="KeyError"):
            worker.request(op="generate", name="no such pipeline")
    finally:
        worker.close()


def test_the_profile_names_modules_and_operators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "profile.json"
    arguments = [
        "--prompts",
        "1",
        "--prompt-tokens",
        "16",
        "--new-tokens",
        "24",
        "--threads",
        "1",
        "--output",
        str(output),
    ]
    assert profile_step.main(arguments) == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["modules"]["target: Int4Linear"]["calls_per_step"] == 77  # 11 of 12 layers
    assert report["modules"]["target: LlamaForCausalLM"]["calls_per_step"] == 1
    assert report["operators"]["aten::_weight_int4pack_mm_for_cpu"]["calls_per_step"] == 77
    parts = sum(report["step"][name] for name in profile_step.STEP_PARTS_MS)
    assert parts > 1
    assert "target: Int4Linear" in capsys.readouterr().out


def test_candidates_alternate_and_warm_up_rounds_are_dropped() -> None:
    calls: list[tuple[str, int]] = []

    def record(name: str) -> Callable[[int], int]:
        return lambda index: calls.append((name, index)) or index  # type: ignore[func-returns-value]

    results = interleave({"a": record("a"), "b": record("b")}, 2, warm_up=1)
    assert results == {"a": [0, 1], "b": [0, 1]}
    assert calls == [("b", -1), ("a", -1), ("a", 0), ("b", 0), ("b", 1), ("a", 1)]


def test_a_random_order_calls_each_candidate_once_a_round() -> None:
    orders: list[str] = []
    interleave({name: lambda _, name=name: orders.append(name) for name in "abc"}, 20, rng=random.Random(0))
    rounds = ["".join(orders[at : at + 3]) for at in range(0, 60, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1


def test_the_interval_of_a_median_is_over_blocks() -> None:
    assert median_with_interval([[1.0, 1.0], [1.0]]) == (1.0, [1.0, 1.0])
    median, (low, high) = median_with_interval([[1.0, 1.1, 1.2], [3.0, 3.1, 3.2]])
    assert (median, low, high) == (pytest.approx(2.1), pytest.approx(1.1), pytest.approx(3.1))
