"""scripts/bench_peers.py: what is measured, how it is summarized, and peers that are absent or fail."""

from __future__ import annotations

import copy
import json
import random
import re
import stat
import subprocess
import sys
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
from peers import machine, measure, runtimes, setup, show
from peers.engines import (
    CallResult,
    StepMeans,
    Task,
    forward_bytes,
    specdec_draft,
    specdec_plain,
    stock_assisted,
    stock_lookup,
    stock_plain,
)
from peers.measure import TaskSet, compare, run_tasks, time_prompts, tune
from peers.pairs import Pair
from peers.runtimes import NOT_SET_UP, RUNTIMES, Conditions, OpenVino
from peers.worker import PeerFailed, RemoteEngine, Worker

import specdec
from specdec.quant.linear import Int4Linear
from specdec.runtime.loading import load, load_tokenizer
from specdec.utils import embedded
from tests.helpers.families import FAMILIES, make_model

QUICK = ["--rounds", "1", "--new-tokens", "6", "--prompts", "1", "--prompt-tokens", "16", "--prompt-lengths", "8"]
QUICK += ["--num-draft-tokens", "1", "2", "--threads", "1"]


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the peers' runtimes, and with a bandwidth that is measured in no time."""
    monkeypatch.setattr(machine, "SECONDS", 0.01)
    monkeypatch.setattr(machine.Bandwidth, "memory_bytes", staticmethod(lambda: 1 << 20))
    monkeypatch.setattr(setup, "PYTHON", tmp_path / "absent" / "python")
    monkeypatch.setattr(setup, "LLAMACPP_WORKER", tmp_path / "absent" / "worker")


@pytest.fixture
def small_pair(tmp_path: Path) -> Path:
    """A pair of two layers each that compiles fast, with the embedded pair's tokenizer."""
    tokenizer = load_tokenizer(str(embedded.TARGET))
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 512}
    for seed, role in enumerate(("target", "draft")):
        make_model("llama", seed, **FAMILIES["llama"] | sizes).save_pretrained(tmp_path / "pair" / role)
        tokenizer.save_pretrained(tmp_path / "pair" / role)
    return tmp_path / "pair"


def test_a_run_ends_with_tables_a_json_and_a_plot(
    no_peers: None,
    small_pair: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runtimes, "DTYPES", ("float32",))  # fewer models to compile
    monkeypatch.setattr(measure, "TUNING_ROUNDS", 1)
    output = tmp_path / "results" / "peers.json"
    assert bench_peers.main([*QUICK, "--pair", str(small_pair), "--batch", "1", "2", "--output", str(output)]) == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["missing"][:3] == [NOT_SET_UP.format(name) for name in ("OpenVINO", "ONNX Runtime", "llama.cpp")]
    assert report["provenance"]["torch"] == torch.__version__
    assert report["workload"] == {"prompts": 1, "prompt_tokens": 16, "new_tokens": 6, "rounds": 1}
    found = {(r["batch"], r["sampling"], r["runtime"], r["engine"]) for r in report["results"]}
    own = {("specdec", name) for name in ("4-bit, stock loop", "plain", "draft model", "prompt lookup")}
    stock = {("transformers", name) for name in ("plain", "assisted", "prompt lookup")}
    for sampling in ("greedy", "sampled"):
        assert {one[2:] for one in found if one[:2] == (1, sampling)} == stock | own
        assert {one[2:] for one in found if one[:2] == (2, sampling)} == own | {("transformers", "plain")}
    assert sum(r["num_draft_tokens"] == "auto" for r in report["results"]) == 4
    for r in report["results"]:
        if r["runtime"] == "specdec" and r["sampling"] == "greedy":
            assert r["identical_rows"] == r["rows"]
        assert (r["identical_rows"] is None) == (r["sampling"] == "sampled")
        assert r["threads"] == 1
        assert min(r["target_ms"], r["forward_bytes"]) > 0
        assert r["cpu_ms_per_token"] is None or r["cpu_ms_per_token"] > 0  # differences of two short calls
        assert r["tokens_per_step"] >= 1
    tuned = {one["what"]: set(one["tokens_per_second"]) for one in report["tuned"]}
    assert tuned["transformers assisted, batch 1, greedy, 1 thread"] == {"K=1", "K=2"}
    assert {(r["runtime"], r["prompt_tokens"]) for r in report["prompt_processing"]} == {
        ("transformers", 8),
        ("specdec", 8),
    }
    assert [row["runtime"] for row in report["bounds"]] == ["transformers", "specdec"] or "no C compiler" in str(report)
    assert output.with_suffix(".png").stat().st_size > 10_000
    assert sorted(path.name for path in output.parent.iterdir()) == ["peers.json", "peers.png"]
    out, err = capsys.readouterr()
    assert re.search(r"^ +\d+ s  transformers assisted, batch 1, greedy, 1 thread: K=[12]$", err, re.MULTILINE)
    assert "OpenVINO is left out" in out
    assert "plain decoding, greedy" in out
    assert max(map(len, out.splitlines())) <= 120


def test_a_run_that_fails_leaves_what_it_has_measured(
    no_peers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise PeerFailed("it is gone")

    monkeypatch.setattr(bench_peers, "time_prompts", fail)
    monkeypatch.setattr(runtimes, "DTYPES", ("float32",))
    monkeypatch.setattr(measure, "TUNING_ROUNDS", 1)
    (output := tmp_path / "peers.json").write_text("an older run", encoding="utf-8")
    arguments = [*QUICK, "--batch", "2", "--runtimes", "transformers", "--output", str(output)]
    assert bench_peers.main(arguments) == 1
    assert "it is gone" in capsys.readouterr().err
    assert output.read_text(encoding="utf-8") == "an older run"
    report = json.loads((tmp_path / "peers.part.json").read_text(encoding="utf-8"))
    assert [(r["engine"], r["sampling"]) for r in report["results"]] == [("plain", "greedy"), ("plain", "sampled")]


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
    monkeypatch.setattr(setup, "PYTHON", tmp_path / "bin" / "python")
    monkeypatch.setattr(setup, "BUILD", tmp_path / "exports")
    return tmp_path / "bin" / "python"


@pytest.mark.parametrize(
    ("commands", "message"),
    [
        ('echo "no such runtime" >&2; exit 3', "ended with 3:\nno such runtime"),
        ('read line; echo \'{"error": "it broke"}\'', "OpenVINO failed: it broke"),
    ],
)
def test_a_peer_that_fails_fails_the_run(tmp_path: Path, commands: str, message: str) -> None:
    worker = Worker("OpenVINO", [str(write_program(tmp_path / "worker", commands))], tmp_path / "log")
    with pytest.raises(PeerFailed, match=message):
        worker.request(op="load")
    worker.close()


FAKE_WORKER = """
import sys
sys.path.insert(0, {folder!r})
from serve import serve

def load(message):
    print("loading", message["target"])  # goes to the log
    return message, 1000

def generate(loaded, message):
    new = message["new_tokens"]
    if message["sampled"]:
        raise ValueError("greedy alone")
    ids = [[message["k"]] * new for _ in message["prompts"]]
    steps = 1 + (new - 1) // 2
    answer = {{"ids": ids, "seconds": 0.1 * new, "cpu_seconds": 0.2 * new, "steps": steps, "accepted": new - steps}}
    return answer | {{"draft_s": None, "target_s": 0.05 * steps}}

serve(load, generate)
"""


def test_engines_in_another_process_answer_as_those_in_this_one(tmp_path: Path) -> None:
    program = tmp_path / "worker.py"
    program.write_text(FAKE_WORKER.format(folder=str(setup.HERE)), encoding="utf-8")
    worker = Worker("peer", [sys.executable, str(program)], tmp_path / "log")
    try:
        engine = RemoteEngine(worker, "draft model", "4 bits", Path("target"), 2, num_draft_tokens=3)
        assert (engine.runtime, engine.forward_bytes) == ("peer", 1000)
        task = Task([[1, 2], [3, 4]], 5)
        assert engine.generate(task) == CallResult([[3] * 5] * 2, pytest.approx(0.5), pytest.approx(1.0))
        steps = engine.time_steps(task)  # 3 steps with the prompt's, 2 without
        assert steps.target_ms == pytest.approx(50)
        assert steps.other_ms == pytest.approx(150)
        assert steps.prompt_ms == pytest.approx(100)
        assert steps.draft_ms is None
        with pytest.raises(PeerFailed, match="peer failed: ValueError: greedy alone"):
            engine.generate(Task([[1]], 2, sampled=True))
        assert engine.generate(task).ids == [[3] * 5] * 2  # it goes on after an error
    finally:
        worker.close()
    assert "loading target" in (tmp_path / "log").read_text(encoding="utf-8")


def test_main_ends_with_the_message_of_a_failed_peer(
    peer: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_program(peer, "case $1 in -c) echo '{}';; *) echo gone >&2; exit 4;; esac")
    monkeypatch.setattr(OpenVino, "command", (peer,))
    monkeypatch.setattr(OpenVino, "engines", lambda self, conditions: self.worker.request(op="load"))
    assert bench_peers.main(["--runtimes", "openvino", "--output", str(tmp_path / "peers.json")]) == 1
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
    folder = setup.export_openvino(model, print)
    assert setup.export_openvino(model, print) == folder
    (model / "config.json").write_text('{"other": 1}', encoding="utf-8")
    assert setup.export_openvino(model, print) != folder
    assert (tmp_path / "exported").read_text(encoding="utf-8") == "x\nx\n"
    write_program(peer.with_name("optimum-cli"), "echo cannot >&2; exit 1")
    (model / "config.json").write_text('{"other": 2}', encoding="utf-8")
    with pytest.raises(PeerFailed, match="cannot"):
        setup.export_openvino(model, print)
    assert len(list((tmp_path / "exports").iterdir())) == 2


def test_onnx_models_are_joined_and_end_with_no_id_of_a_text(tmp_path: Path) -> None:
    for name, pad in (("target", 1), ("draft", 0)):
        folder = tmp_path / name
        folder.mkdir()
        model = {"eos_token_id": 0, "pad_token_id": pad, "vocab_size": 50, "decoder": {"filename": "model.onnx"}}
        (folder / "genai_config.json").write_text(json.dumps({"model": model}), encoding="utf-8")
        for file in ("model.onnx", "model.onnx.data"):
            (folder / file).write_text(name, encoding="utf-8")
        setup.ignore_ends_of_text(folder)
    joined = setup.join_onnx(tmp_path / "target", tmp_path / "draft")
    config = json.loads((joined / "genai_config.json").read_text(encoding="utf-8"))
    assert config["model"]["eos_token_id"] == 1
    assert config["model"]["draft"]["filename"] == "draft/model.onnx"
    assert [(joined / name).read_text(encoding="utf-8") for name in ("model.onnx", "draft/model.onnx")] == [
        "target",
        "draft",
    ]
    draft = json.loads((tmp_path / "draft" / "genai_config.json").read_text(encoding="utf-8"))
    assert draft["model"]["eos_token_id"] == 49
    assert setup.join_onnx(tmp_path / "target", tmp_path / "draft") == joined


def test_a_setup_that_fails_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = tmp_path / "peers"

    def run(command: Sequence[str], **_: Any) -> None:
        environment.mkdir(exist_ok=True)
        if "install" in command:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(setup, "ENVIRONMENT", environment)
    monkeypatch.setattr(setup.subprocess, "run", run)
    assert bench_peers.main(["--setup-peers"]) == 1
    assert "nothing of it is left" in " ".join(capsys.readouterr().err.split())
    assert not environment.exists()


def test_a_missing_build_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.shutil, "which", lambda tool: None if tool == "ninja" else f"/bin/{tool}")
    with pytest.raises(PeerFailed, match="needs ninja; install"):
        setup.build_llamacpp(print)


@dataclass
class Fake:
    """Repeats one id, with given seconds for each call."""

    runtime: str
    name: str
    seconds: list[float]
    num_draft_tokens: int | None = None
    token_id: int = 7
    surplus: int = 0
    threads: int = 1
    weights: str = "4 bits"
    forward_bytes: int | None = 1_000_000
    seeds: list[int] = field(default_factory=list)

    @contextmanager
    def ready(self) -> Iterator[None]:
        yield

    def warm_up(self, task: Task) -> None:
        pass

    def generate(self, task: Task) -> CallResult:
        ids = [[self.token_id] * (task.new_tokens + self.surplus) for _ in task.prompts]
        if task.new_tokens == 1:
            return CallResult(ids, 0.1, 0.2)
        self.seeds.append(task.seed)
        spent = self.seconds[(len(self.seeds) - 1) % len(self.seconds)]
        return CallResult(ids, spent, 2 * spent)

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
    assert results[1]["decode_tokens_per_second"] == 36 / 0.8  # 2 calls of 2 rows: 36 ids in 1 s less 0.2 s
    assert results[1]["cpu_ms_per_token"] == pytest.approx(1000 * (2.0 - 0.4) / 36, abs=1e-4)


def test_decoding_that_took_no_time_is_a_dash() -> None:
    """Where the call of one token took longer than the whole one, as on a busy machine."""
    (result,) = compare([Fake("a", "plain", [0.1])], TASK_SET, 1, lambda words: None)
    assert (result["decode_tokens_per_second"], result["cpu_ms_per_token"]) == (None, None)
    assert show.cell_of(result) == "200\n(-; -)"


def test_ratios_are_between_engines_with_the_same_threads() -> None:
    engines = [
        Fake(runtime, "plain", [seconds], threads=threads)
        for threads, a, b in ((1, 1.0, 0.5), (2, 0.4, 0.1))
        for runtime, seconds in (("a", a), ("b", b))
    ]
    results = compare(engines, TASK_SET, 1, lambda words: None)
    assert [r["ratio_to_baseline"]["median"] for r in results] == [1.0, 2.0, 1.0, 4.0]


def test_texts_of_other_weights_are_not_compared() -> None:
    plain, draft = Fake("a", "plain", [1.0]), Fake("a", "draft", [1.0], token_id=8, weights="8 bits")
    results = compare([plain, draft], TASK_SET, 1, lambda words: None)
    assert [r["compared_to"] for r in results] == ["a plain", "a draft"]


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


def test_prompts_are_timed_by_length() -> None:
    rows = time_prompts([Fake("a", "plain", [1.0])], {4: [1, 2, 3, 4], 2: [1, 2]}, 2, lambda words: None)
    assert [(r["prompt_tokens"], r["tokens_per_second"]) for r in rows] == [(4, 40.0), (2, 20.0)]
    assert rows[0]["tokens_per_second_rounds"] == [40.0, 40.0]


def make_report(idle: float | None) -> dict[str, Any]:
    task_set = TaskSet(1, False, [[1]], 10)
    engines = [
        Fake("t", "plain", [1.0]),
        Fake("o", "plain", [0.2], threads=1),
        Fake("o", "draft", [0.1], 2),
        Fake("specdec", "plain", [0.4]),
        Fake("specdec", "draft model", [0.2], 3),
    ]
    results = compare(engines, task_set, 1, lambda words: None)
    timed = time_prompts(engines[:2], {2048: list(range(2048))}, 1, lambda words: None)
    return {
        "provenance": {"idle_otherwise": idle},
        "results": results,
        "missing": ["x is left out"],
        "bounds": machine.bounds(results, lambda size, threads: 0.1),
        "prompt_processing": timed,
    }


def test_sentences_compare_with_the_fastest_of_the_others() -> None:
    assert show.sentences(make_report(1.0)["results"]) == [
        "batch 1, greedy, 1 thread, plain: specdec plain (25.0 tok/s) is 0.50 times o plain (50.0)",
        "batch 1, greedy, 1 thread, speculative: specdec draft model K=3 (50.0 tok/s) is 0.50 times o draft K=2 (100)",
    ]


@pytest.mark.parametrize(("idle", "shown"), [(0.951, True), (0.949, False), (None, False)])
def test_ratios_are_shown_of_an_idle_machine_alone(
    idle: float | None, shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    show.print_report(make_report(idle))
    out = capsys.readouterr().out
    assert (" times " in out) == shown
    assert ("so no ratios" in out) != shown
    assert "x is left out" in out
    assert "20,480" in out  # prompts
    assert max(map(len, out.splitlines())) <= 100


def test_the_bound_is_bandwidth_over_bytes() -> None:
    rows = machine.bounds(make_report(1.0)["results"], lambda size, threads: 0.1 * threads)
    assert [row["runtime"] for row in rows] == ["t", "o", "specdec"]  # plain decoding alone
    assert rows[0]["bound_tokens_per_second"] == 100.0  # 0.1 GB/s of 1 MB
    assert rows[0]["share"] == 0.1  # 9 ids in 0.9 s


def test_bandwidth_is_measured_once_for_a_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "BUILD", tmp_path)
    monkeypatch.setattr(machine, "SECONDS", 0.01)
    try:
        bandwidth = machine.Bandwidth()
    except RuntimeError:
        pytest.skip("no C compiler")
    first = bandwidth.gb_per_second(1 << 20, 1)
    assert first > 0
    assert bandwidth.gb_per_second(1 << 20, 1) == first
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine.Bandwidth().program.exists()
    monkeypatch.setattr(machine, "BUILD", tmp_path / "other")
    with pytest.raises(RuntimeError, match="no C compiler"):
        machine.Bandwidth()


def test_idle_time_is_what_others_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")

    def stat_of(process: int, parent: int, ticks: int) -> None:
        fields = ["S", str(parent), *["0"] * 9, str(ticks), "1", "2", "3"]
        write(f"{process}/stat", f"{process} (a (name)) {' '.join(fields)} 20")

    monkeypatch.setattr(machine, "PROC", tmp_path)
    monkeypatch.setattr(machine.os, "getpid", lambda: 10)
    write("stat", "cpu 100 0 100 800 0 0 0 0 0 0\ncpu0 0")
    stat_of(10, 1, 50)
    stat_of(11, 10, 20)
    stat_of(99, 1, 1000)  # another program
    before = machine.CpuTimes.now()
    assert before == machine.CpuTimes(total=1000, busy=200, own=56 + 26)
    write("stat", "cpu 160 0 110 920 5 0 0 5 0 0\ncpu0 0")
    stat_of(11, 10, 80)
    after = machine.CpuTimes.now()
    assert after is not None
    assert before.idle_otherwise(after) == pytest.approx(1 - 15 / 200)  # 75 busy, 60 of them our own
    (tmp_path / "stat").unlink()
    assert machine.CpuTimes.now() is None


def test_forward_bytes_count_each_weight_once() -> None:
    tied = load(str(widen_pair.ORIGINAL), "float32", "cpu")
    buffers = sum(buffer.nbytes for buffer in tied.buffers())
    whole = 4 * sum(parameter.numel() for parameter in tied.parameters()) + buffers  # the head is named once
    assert forward_bytes(tied) == whole
    untied = copy.deepcopy(tied)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    assert forward_bytes(untied) == whole  # the head's, without the embedding
    int4 = load(str(embedded.TARGET), "float32", "cpu")
    codes = sum(module.weight.nbytes for module in int4.modules() if isinstance(module, Int4Linear))
    before = forward_bytes(int4)
    assert before > codes + int4.lm_head.weight.nbytes
    int4(input_ids=torch.tensor([[5, 6, 7]]))  # each layer chooses its kernel, which has scales of its own
    layers = [module for module in int4.modules() if isinstance(module, Int4Linear)]
    assert forward_bytes(int4) - before == sum(
        layer.kernel_scale.nbytes - layer.weight_scale.nbytes for layer in layers
    )


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


def test_no_figure_is_taken_of_a_forward_that_runs_eagerly(pair: tuple[Any, Any]) -> None:
    target, _ = pair
    engine, task = specdec_plain(target, 1), Task([list(range(50, 70))], 4)
    with engine.ready():
        target.model.norm.train()  # the compiled forward is of a model in eval mode
        try:
            with pytest.raises(UserWarning, match="the target runs eagerly: model"):
                engine.generate(task)
        finally:
            target.model.norm.eval()
        assert len(engine.generate(task).ids[0]) == 4


def test_sampled_calls_follow_their_seed(pair: tuple[Any, Any]) -> None:
    engine = stock_plain("s", pair[0], 1)
    with engine.ready():
        first, again, other = (
            engine.generate(Task([[50, 51, 52]], 12, sampled=True, seed=seed)).ids for seed in (1, 1, 2)
        )
    assert first == again != other


@pytest.mark.parametrize("name", ["openvino", "onnxruntime", "llamacpp"])
def test_a_peer_writes_the_requested_number_of_ids(name: str) -> None:
    if not RUNTIMES[name].is_set_up():
        pytest.skip("not set up (bench_peers.py --setup-peers)")
    models = Pair("embedded", widen_pair.ORIGINAL, embedded.DRAFT, embedded.TARGET)
    runtime = RUNTIMES[name](models, 64, print)
    try:
        for batch in (1, 2):
            task_set = TaskSet(batch, False, [list(range(50, 70))] * batch, 16)
            engines = runtime.engines(Conditions(task_set, 1, [2], lambda _, engines: next(iter(engines.values()))))
            assert engines[0].name == "plain"
            for engine in engines:
                assert [len(row) for row in engine.generate(task_set.tasks()[0]).ids] == [16] * batch
                assert 4_000_000 < engine.forward_bytes < 6_000_000
                emitted = engine.time_steps(task_set.tasks()[0]).tokens_per_step
                assert emitted is None or emitted >= 1
        with pytest.raises(PeerFailed):
            runtime.worker.request(op="generate", name="no such pipeline")
    finally:
        runtime.close()


@pytest.mark.usefixtures("cpu_kernels")
def test_the_profile_names_modules_and_operators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "profile.json"
    arguments = [
        "--prompts",
        "1",
        "--prompt-tokens",
        "16",
        "--new-tokens",
        "12",
        "--threads",
        "1",
        "--dtype",
        "float32",
        "--output",
        str(output),
    ]
    assert profile_step.main(arguments) == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["modules"]["target: Int4Linear"]["calls_per_step"] == 77  # 11 of 12 layers
    assert report["modules"]["target: LlamaForCausalLM"]["calls_per_step"] == 1
    names = {"specdec::int4_linear", "aten::_weight_int4pack_mm_for_cpu"} & set(report["operators"])
    assert [report["operators"][name]["calls_per_step"] for name in names] == [77]  # by whether kernels were built
    parts = sum(report["step"][name] for name in profile_step.STEP_PARTS_MS)
    assert parts > 1
    for name, row in report["modules"].items():  # measured times differ on a busy machine
        row["ms_per_step"] = 1.0 if name == "target: Int4Linear" else 0.001
    capsys.readouterr()
    profile_step.show(report)
    rows = capsys.readouterr().out
    assert "target: Int4Linear" in rows
    assert "target: LlamaForCausalLM" not in rows  # less than is worth a row


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
