"""Experiments: configs, runs, resumption, several processes, sweeps, bad input."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from transformers import AutoModelForCausalLM

from specdec.experiments import calibration
from specdec.experiments.config import (
    AuditConfig,
    DraftModel,
    ExperimentConfig,
    QuantConfig,
    SamplingConfig,
    TargetConfig,
)
from specdec.experiments.pair import Pair
from specdec.experiments.records import FORMAT, PLAIN, SPECULATIVE, Failure, Header, Key, Record, Run, read_run
from specdec.experiments.report.estimates import ratio
from specdec.experiments.report.exports import to_json, to_markdown
from specdec.experiments.report.figures import COLUMN, figures, tally
from specdec.experiments.report.page import render_page
from specdec.experiments.run import run
from specdec.experiments.workloads import Prompt, Stdlib
from specdec.runtime.loading import load_tokenizer
from specdec.training.config import TrainConfig
from specdec.training.distillation import DraftModelTraining
from specdec.training.eagle3 import Eagle3Training
from specdec.utils import embedded
from specdec_cli.experiment import build, conf_dir
from specdec_cli.main import main
from tests.helpers.heads import layer_config, random_tensors, write_speculators

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
# The values that a file of conf/ requires.
REQUIRED = {
    "target/model": ["target.path=m"],
    "drafter/model": ["drafter.path=m"],
    "drafter/suffix_and_model": ["drafter.path=m"],
    "drafter/head": ["drafter.path=m"],
    "train/draft_model": ["workload.path=a.jsonl"],
    "train/eagle3": ["workload.path=a.jsonl"],
    "workload/dataset": ["workload.path=a.jsonl"],
    "workload/spec_bench": ["workload.path=a.jsonl"],
    "experiment/spec_bench": ["target.path=m", "drafter.path=m", "workload.path=a.jsonl"],
}
PLUGINS = {"launcher/joblib": "joblib_launcher", "launcher/slurm": "submitit_launcher", "launcher/ray": "ray_launcher"}
FILES = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.glob("*/*.yaml"))


@pytest.fixture(autouse=True)
def _short_calibration(cpu_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step costs of one round: most tests need none of them."""
    monkeypatch.setattr(calibration, "COST_ROUNDS", 1)


def composed(*overrides: str, folder: Path | None = None) -> ExperimentConfig:
    with hydra.initialize_config_dir(str(folder or conf_dir()), version_base="1.3"):
        return build(hydra.compose("config", list(overrides)))


def values_of(config: ExperimentConfig) -> dict[str, Any]:
    """The plain values that hydra would give, as far as the tests need them."""
    groups = {
        "target": vars(config.target),
        "drafter": {k: value for k, value in vars(config.drafter).items() if isinstance(value, int | float | str)},
        "sampling": vars(config.sampling),
        "workload": {},
    }
    return {**groups, "num_draft_tokens": config.num_draft_tokens, "name": config.name}


def small(folder: Path, **changes: Any) -> ExperimentConfig:
    """A few prompts of the embedded pair."""
    values: dict[str, Any] = {
        "name": "small",
        "target": TargetConfig(str(embedded.TARGET), device="cpu"),
        "drafter": DraftModel(str(embedded.DRAFT)),
        "quant": QuantConfig(),
        "sampling": SamplingConfig(max_new_tokens=20),
        "workload": Stdlib(limit=4, shuffle_seed=3),
        "folder": folder,
        "num_draft_tokens": 3,
        "compile": False,
    }
    return ExperimentConfig(**values | changes)


def execute(config: ExperimentConfig) -> Run:
    return run(config, values_of(config), Console(quiet=True))


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return execute(small(tmp_path_factory.mktemp("greedy")))


@pytest.fixture(scope="module")
def batched(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Sampled, two repetitions, in batches of which the last one is smaller."""
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=16)
    workload = Stdlib(limit=5, shuffle_seed=3)
    return execute(
        small(tmp_path_factory.mktemp("batched"), sampling=sampling, workload=workload, batch_size=3, repetitions=2)
    )


class Fixed:
    """A workload of the given prompts."""

    chat_template = None

    def __init__(self, *prompts: Prompt) -> None:
        self.all = list(prompts)

    def prompts(self) -> list[Prompt]:
        return self.all


@pytest.mark.parametrize("name", FILES)
def test_every_config_can_be_composed_and_instantiated(name: str) -> None:
    group, _, option = name.partition("/")
    if name in PLUGINS:
        pytest.importorskip(
            f"hydra_plugins.hydra_{PLUGINS[name]}", reason=f"conf/{name}.yaml needs hydra's {PLUGINS[name]}"
        )
    primary, schema = ("train", TrainConfig) if group == "train" else ("config", ExperimentConfig)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = build(hydra.compose(primary, [f"{group}={option}", *REQUIRED.get(name, [])]))
    assert isinstance(config, schema)
    part = getattr(config, group, None)
    if part is not None:
        assert type(part).__name__ in (CONF / f"{name}.yaml").read_text()


def test_configs_contain_the_fields_of_the_schema_and_nothing_else() -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose("config"), resolve=False)
    assert isinstance(config, dict)
    assert set(config) - {"_target_"} == set(ExperimentConfig.__dataclass_fields__)


def test_the_config_of_an_audit_contains_the_fields_of_its_schema_and_nothing_else() -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose("audit"), resolve=False)
    assert isinstance(config, dict)
    assert set(config) - {"_target_"} == set(AuditConfig.__dataclass_fields__)


def test_the_configs_of_a_training_contain_the_fields_of_their_schemas_and_nothing_else() -> None:
    for option, schema in (("eagle3", Eagle3Training), ("draft_model", DraftModelTraining)):
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            config: Any = OmegaConf.to_container(hydra.compose("train", [f"train={option}"]), resolve=False)
        assert set(config) - {"_target_"} == set(TrainConfig.__dataclass_fields__)
        assert set(config["train"]) - {"_target_"} == set(schema.__dataclass_fields__)


def test_an_audit_from_a_config_ends_with_a_certificate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an audit that has no time: inconclusive."""
    call = ["experiment", "--config-name", "audit", f"folder={tmp_path / 'audit'}", "budget_s=0.01"]
    assert main([*call, "max_prompts=2", "max_prompt_tokens=16", "prefill_chunks=[null]"]) == 3
    assert capsys.readouterr().out.lstrip().startswith("inconclusive")
    certificate = json.loads((tmp_path / "audit" / "certificate.json").read_text())
    assert certificate["verdict"] == "inconclusive"
    assert (tmp_path / "audit" / "certificate.html").is_file()
    assert main([*call, "max_prompts=0"]) == 2
    assert "max_prompts=0 must be 1 or more" in capsys.readouterr().err


def test_an_installed_wheel_composes_and_instantiates_the_same_configs(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = f"""
import sys
from pathlib import Path
from specdec_cli.experiment import build, conf_dir
import hydra
assert conf_dir() == Path({str(tmp_path)!r}) / "site" / "specdec" / "conf", conf_dir()
files = sorted(path.relative_to(conf_dir()).with_suffix("").as_posix() for path in conf_dir().glob("*/*.yaml"))
assert files == {FILES!r}, files
with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
    for name in files:
        group, _, option = name.partition("/")
        if name not in {sorted(PLUGINS)!r}:
            primary = "train" if group == "train" else "config"
            build(hydra.compose(primary, [f"{{group}}={{option}}", *{REQUIRED!r}.get(name, [])]))
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


def test_values_are_converted_to_the_types_of_the_schema() -> None:
    config = composed("sampling.temperature=1", "workload.limit=3", "sampling=sampled")
    assert (type(config.sampling.temperature), config.workload.limit) == (float, 3)
    assert isinstance(config.folder, Path)


def check_identities(record: Record, num_draft_tokens: int) -> None:
    """Check that counts, ids and seconds of a record agree with its steps."""
    steps = record.steps
    ends_on_draft_token = steps[-1].emitted == steps[-1].accepted
    assert (
        sum(step.accepted for step in steps) + len(steps) - ends_on_draft_token == len(record.ids) == len(record.tokens)
    )
    assert sum(step.emitted for step in steps) == len(record.ids)
    for step in steps:
        assert 0 <= step.accepted <= step.drafted <= num_draft_tokens
        assert len(step.overlap) == min(step.drafted, step.accepted + 1)
        assert all(0 <= value <= 1.000001 for value in step.overlap)
    s = record.seconds
    assert s.total_s == pytest.approx(s.prefill_s + s.draft_s + s.target_s + s.verification_s + s.other_s)
    assert min(s.prefill_s, s.draft_s, s.target_s, s.verification_s, s.other_s) >= 0
    assert 0 < s.first_token_s <= s.total_s
    if s.token_s is not None:
        assert s.first_token_s + s.token_s * (len(record.ids) - 1) == pytest.approx(s.total_s)


@pytest.mark.parametrize("name", ["greedy", "batched"])
def test_counts_and_seconds_agree_in_every_record(name: str, request: pytest.FixtureRequest) -> None:
    finished: Run = request.getfixturevalue(name)
    assert finished.records
    for record in finished.records:
        check_identities(record, 3)
        if record.engine == PLAIN:
            assert not any(step.drafted for step in record.steps)


def test_every_prompt_has_a_record_of_each_engine(greedy: Run, batched: Run) -> None:
    for finished, prompts, repetitions in ((greedy, 4, 1), (batched, 5, 2)):
        ids = [prompt.id for prompt in Stdlib(limit=prompts, shuffle_seed=3).prompts()]
        expected = {Key(i, 0, r, engine) for i in ids for r in range(repetitions) for engine in (PLAIN, SPECULATIVE)}
        assert {record.key for record in finished.records} == expected
        assert len(finished.records) == len(expected)
        assert not finished.failures
    calls: dict[int, list[Record]] = {}
    for record in batched.records:
        calls.setdefault(record.call, []).append(record)
    assert sorted(len(rows) for rows in calls.values()) == [2] * 4 + [3] * 4
    for rows in calls.values():
        assert len({(row.seconds.total_s, row.rows, row.seed, row.engine, row.repetition) for row in rows}) == 1
        assert rows[0].rows == len(rows)


def test_greedy_texts_equal_the_plain_ones_and_sampled_ones_differ_by_repetition(greedy: Run, batched: Run) -> None:
    texts = {record.key: record.ids for record in greedy.records}
    for key, ids in texts.items():
        assert ids == texts[key._replace(engine=PLAIN)]
    sampled = {record.key: record.ids for record in batched.records}
    assert any(ids != sampled[key._replace(repetition=1 - key.repetition)] for key, ids in sampled.items())
    tokenizer = load_tokenizer(str(embedded.TARGET))
    for record in (*greedy.records, *batched.records):
        assert "".join(record.tokens) == tokenizer.decode(record.ids)


def test_a_run_has_provenance_costs_memory_and_a_sample(greedy: Run) -> None:
    origin = greedy.header.provenance
    assert origin["torch"] == torch.__version__
    assert origin["processes"] == 1
    assert origin["target_files"].startswith("sha256 ")
    assert origin["drafter_files"].startswith("sha256 ")
    assert origin["drafter_files"] != origin["target_files"]
    assert origin["decoding"] == "eager"
    assert {"commit", "dirty", "command", "device", "transformers", "accelerate", "datasets", "hydra-core"} <= set(
        origin
    )
    assert greedy.costs is not None
    for part in (greedy.costs.draft_s, greedy.costs.target_s, greedy.costs.verification_s, greedy.costs.other_s):
        assert len(part) == 4
        assert {len(repetitions) for repetitions in part} == {greedy.costs.repetitions}
        assert all(value > 0 for repetitions in part[1:] for value in repetitions)
    assert set(greedy.costs.draft_s[0]) == {0}
    assert statistics.median(greedy.costs.draft_s[3]) > statistics.median(greedy.costs.draft_s[1])
    assert greedy.costs.weights_read_s is not None
    assert 0 < greedy.costs.weights_read_s < statistics.median(greedy.costs.target_s[0])
    assert greedy.memory is not None
    assert greedy.memory.unplanned is None
    assert greedy.costs.weights_bytes == pytest.approx(greedy.memory.predicted["target_weights_bytes"], rel=0.05)
    assert sum(greedy.memory.predicted.values()) == pytest.approx(greedy.memory.measured_bytes, rel=0.05)
    assert greedy.sample is not None
    sample = [record for record in greedy.of(SPECULATIVE) if record.prompt_id == greedy.sample.prompt_id]
    assert [token.text for token in greedy.sample.tokens] == sample[0].tokens
    assert [token.origin for token in greedy.sample.tokens] == [o for step in sample[0].steps for o in step.origins()]
    for token in greedy.sample.tokens:
        assert token.target[0][1] == max(probability for _, probability in token.target)
        assert sum(probability for _, probability in token.target) <= 1.001
        assert bool(token.draft) == (token.origin in ("accepted", "recovered"))


@pytest.mark.usefixtures("cpu_kernels")
def test_a_run_with_compile_records_that_it_decoded_compiled(tmp_path: Path) -> None:
    compiled = execute(small(tmp_path / "true", compile=True))
    assert compiled.header.provenance["decoding"] == "compiled"
    again = execute(small(tmp_path / "auto", compile="auto"))
    assert again.header.provenance["decoding"] == "compiled", "auto uses what the first run compiled to disk"
    texts = {record.key: record.ids for record in (*compiled.records, *again.records)}
    assert all(ids == texts[key._replace(engine=PLAIN)] for key, ids in texts.items())


def test_resuming_a_finished_run_changes_no_record(greedy: Run) -> None:
    config = small(greedy.folder, resume=True)
    again = execute(config)
    assert again.records == greedy.records
    assert (again.costs, again.sample) == (greedy.costs, greedy.sample)


def test_a_folder_with_a_run_is_resumed_only_on_request_with_the_same_config_and_format(
    greedy: Run, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="already contains a run; resume it with resume=true"):
        execute(small(greedy.folder))
    old = small(shutil.copytree(ROOT / "tests" / "data" / "run-format-1", tmp_path / "old"), resume=True)
    with pytest.raises(
        ValueError,
        match=f"has record format 1, but this version of specdec writes format {FORMAT}; finish the run with",
    ):
        execute(old)
    changed = small(greedy.folder, resume=True, num_draft_tokens=2)
    with pytest.raises(
        ValueError, match="was run with num_draft_tokens=3, but now num_draft_tokens=2; resume it with the same"
    ):
        execute(changed)


def test_a_prompt_that_fails_is_an_error_record_and_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = Pair.generate
    bad = Stdlib(limit=4, shuffle_seed=3).prompts()[1]

    def failing(self: Pair, drafter: Any, prompts: list[list[int]], seed: int, **changes: Any) -> Any:
        if not changes and prompts == [self.encode(bad.turns, [])]:
            raise RuntimeError("no such operator")
        return generate(self, drafter, prompts, seed, **changes)

    with monkeypatch.context() as patch:
        patch.setattr(Pair, "generate", failing)
        finished = execute(small(tmp_path))
    assert {(failure.prompt_id, failure.engine, failure.error) for failure in finished.failures} == {
        (bad.id, engine, "RuntimeError: no such operator") for engine in (PLAIN, SPECULATIVE)
    }
    assert len(finished.records) == 6
    assert figures(finished).prompts == 3
    again = execute(small(tmp_path, resume=True))
    assert again.failures == []
    assert len(again.records) == 8


def test_failed_prompts_set_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = Pair.generate

    def failing(self: Pair, drafter: Any, prompts: list[list[int]], seed: int, **changes: Any) -> Any:
        if not changes and seed % 2:
            raise RuntimeError("no such operator")
        return generate(self, drafter, prompts, seed, **changes)

    monkeypatch.setattr(Pair, "generate", failing)
    arguments = ["experiment", "experiment=demo", "workload.limit=6", "sampling.max_new_tokens=8", f"folder={tmp_path}"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "calls failed, the first on " in error
    assert "RuntimeError: no such operator" in error
    assert (tmp_path / "report.html").is_file()


def test_a_run_in_which_every_call_fails_has_error_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Pair, "generate", failing)
    assert main(["experiment", "experiment=demo", "workload.limit=2", f"folder={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert "step costs are incomplete: RuntimeError: out of memory" in error
    assert "4 of 4 calls failed, the first on " in error
    finished = read_run(tmp_path)
    assert (len(finished.failures), finished.records) == (4, [])


def test_only_the_main_process_reports_that_prompts_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher ends all processes at the first error, which would be before the report is written."""
    failed = Run(tmp_path, Header({}, {}), failures=[Failure("a", "t", 0, 0, PLAIN, "no")])
    monkeypatch.setattr("specdec_cli.experiment.run", lambda *_: failed)
    for is_main, code in ((True, 1), (False, 0)):
        process = SimpleNamespace(is_main_process=is_main)
        monkeypatch.setattr("specdec_cli.experiment.processes", lambda process=process: process)
        assert main(["experiment", "experiment=demo", f"folder={tmp_path}"]) == code


@pytest.mark.parametrize("content", ["", '{"kind": "head'])
def test_a_run_that_was_killed_in_its_first_line_is_resumed(tmp_path: Path, content: str) -> None:
    (tmp_path / "records-0.jsonl").write_text(content)
    finished = execute(small(tmp_path, workload=Stdlib(limit=1), resume=True))
    assert len(finished.records) == 2
    assert not finished.torn


def test_a_call_that_the_stock_loop_would_serve_is_an_error(tmp_path: Path) -> None:
    pair = Pair.load(small(tmp_path), "cpu")
    with pytest.raises(
        ValueError, match="cannot be measured: specdec leaves this call to the stock loop: use_cache=False"
    ):
        pair.generate(pair.engines[PLAIN], [[5, 6, 7]], 0, use_cache=False)


def test_resuming_an_empty_folder_begins_a_new_run_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path / "new", workload=Stdlib(limit=1), resume=True)
    assert len(run(config, values_of(config), Console(stderr=True, width=200)).records) == 2
    assert "contains no run to resume, so a new run begins" in capsys.readouterr().err


def test_prompts_that_do_not_fit_are_skipped_and_counted_or_refused(tmp_path: Path) -> None:
    long = Prompt("long", "t", ("x = 1\n" * 600,))
    short = Prompt("short", "t", ("import os\n",))
    workload = Fixed(long, short)
    finished = execute(small(tmp_path / "skip", workload=workload))
    assert {record.prompt_id for record in finished.records} == {"short"}
    (skipped,) = finished.skipped
    assert skipped.prompt_id == "long"
    assert "max_new_tokens=20 exceed the context of 1024" in skipped.reason
    again = execute(small(tmp_path / "skip", workload=workload, resume=True))
    assert len(again.skipped) == 1
    with pytest.raises(ValueError, match=r"the prompt 'long' does not fit: .*too_long=skip"):
        execute(small(tmp_path / "error", workload=workload, too_long="error"))
    assert not (tmp_path / "error").exists()
    with pytest.raises(ValueError, match="none of 1 prompts fits; for 'long'"):
        execute(small(tmp_path / "none", workload=Fixed(long)))


def test_conversations_continue_with_the_plain_answers(tmp_path: Path) -> None:
    chat = Prompt("chat", "t", ("def f(x):\n", "def g(y):\n"))
    single = Prompt("single", "t", ("class A:\n",))
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=12)
    finished = execute(small(tmp_path, workload=Fixed(chat, single), batch_size=2, sampling=sampling))
    by_key = {record.key: record for record in finished.records}
    assert set(by_key) == {
        Key(i, t, 0, e) for i, t in (("chat", 0), ("chat", 1), ("single", 0)) for e in (PLAIN, SPECULATIVE)
    }
    answer = by_key[Key("chat", 0, 0, PLAIN)]
    tokenizer = load_tokenizer(str(embedded.TARGET))
    text = chat.turns[0] + tokenizer.decode(answer.ids, skip_special_tokens=True) + "\n\n" + chat.turns[1]
    for engine in (PLAIN, SPECULATIVE):
        record = by_key[Key("chat", 1, 0, engine)]
        assert record.num_prompt_tokens == len(tokenizer(text).input_ids)
        assert record.prompt_hash == by_key[Key("chat", 1, 0, PLAIN)].prompt_hash
        assert record.rows == 1


def test_turns_go_through_the_tokenizer_s_chat_template(tmp_path: Path) -> None:
    pair = Pair.load(small(tmp_path), "cpu")
    assert pair.chat_template is False
    pair.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    pair.tokenizer.chat_template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    pair.chat_template = True
    ids = pair.encode(("one", "two", "three"), ["first"])
    assert pair.tokenizer.decode(ids) == "<user>one<assistant>first<user>two<assistant>"
    workload = Stdlib(limit=1, chat_template=True)
    with pytest.raises(ValueError, match=r"workload\.chat_template=true, but the tokenizer of .* has no chat template"):
        Pair.load(small(tmp_path, workload=workload), "cpu")


@pytest.mark.parametrize("name", ["prompt_lookup", "suffix", "suffix_and_model", "head", "none"])
def test_other_drafters(tmp_path: Path, name: str) -> None:
    model = [f"drafter.path={embedded.DRAFT}"] if name == "suffix_and_model" else []
    if name == "head":
        target = AutoModelForCausalLM.from_pretrained(embedded.TARGET)
        tensors = random_tensors(layer_config(target), list(range(0, 4096, 8)), 2)
        model = [f"drafter.path={write_speculators(tmp_path / name, layer_config(target), tensors, [2, 9])}"]
    config = composed(f"drafter={name}", *model, "workload.limit=2", "sampling.max_new_tokens=12", f"folder={tmp_path}")
    finished = execute(config)
    for record in finished.records:
        check_identities(record, config.num_draft_tokens)
    engines = {record.engine for record in finished.records}
    assert engines == ({PLAIN} if name == "none" else {PLAIN, SPECULATIVE})
    assert figures(finished).prompts == 2


def test_a_model_whose_memory_cannot_be_predicted_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError("only attention can be planned\nmore")

    monkeypatch.setattr("specdec.experiments.calibration.measure_footprint", refuse)
    finished = execute(small(tmp_path, workload=Stdlib(limit=1)))
    assert finished.memory is not None
    assert (finished.memory.predicted, finished.memory.unplanned) == ({}, "only attention can be planned")
    assert finished.memory.measured_bytes > 0
    assert "only attention can be planned" in render_page([finished])


def test_a_target_is_quantized_while_it_loads(tmp_path: Path) -> None:
    from specdec.quant.layers import is_4bit

    original = TargetConfig(str(ROOT / "tests" / "data" / "target"), device="cpu")
    quant = QuantConfig(int4=True, group_size=64, skip_modules=["model.layers.0"])
    finished = execute(small(tmp_path / "run", target=original, quant=quant, workload=Stdlib(limit=1)))
    assert finished.memory is not None
    assert finished.memory.unplanned is None
    assert sum(finished.memory.predicted.values()) == pytest.approx(finished.memory.measured_bytes, rel=0.05)
    assert is_4bit(Pair.load(small(tmp_path, target=original, quant=quant), "cpu").target)
    assert not is_4bit(Pair.load(small(tmp_path, target=original), "cpu").target)
    draft = DraftModel(str(embedded.DRAFT), int4=True, group_size=64)
    assert is_4bit(Pair.load(small(tmp_path, drafter=draft), "cpu").models[1])


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}


def script(*overrides: str) -> list[str]:
    return [sys.executable, "scripts/experiment.py", *overrides, "experiment=demo", "sampling.max_new_tokens=24"]


def contents(finished: Run) -> dict[Key, Any]:
    """What must not depend on interruptions and the number of processes."""
    return {r.key: (r.ids, r.steps, r.prompt_hash, r.seed, r.call, r.rows) for r in finished.records}


def lines_of(folder: Path) -> Iterator[dict[str, Any]]:
    for path in folder.glob("records*.jsonl"):
        yield from (json.loads(line) for line in path.read_text().splitlines())


def test_a_run_that_was_killed_at_a_random_moment_and_resumed_is_the_same(tmp_path: Path) -> None:
    overrides = ["workload.limit=12", "sampling.temperature=1", "repetitions=2", "batch_size=2"]
    complete, killed = tmp_path / "complete", tmp_path / "killed"
    subprocess.run(
        [*script(*overrides), f"folder={complete}"], check=True, cwd=ROOT, env=environment(), capture_output=True
    )
    part = killed / "records-0.jsonl"
    rng = random.Random()
    for attempt in range(2):
        command = [*script(*overrides), f"folder={killed}", f"resume={'true' if attempt else 'false'}"]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        size = part.stat().st_size if part.exists() else 0
        while process.poll() is None and (not part.exists() or part.stat().st_size <= size + 3000):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert part.exists(), "the process must be killed while it runs"
    with part.open("a") as stream:
        stream.write('{"kind": "record", "prompt_id": "torn')
    command = [*script(*overrides), f"folder={killed}", "resume=true"]
    subprocess.run(command, check=True, cwd=ROOT, env=environment(), capture_output=True)
    assert contents(read_run(killed)) == contents(read_run(complete))
    keys = [
        (v["prompt_id"], v["turn"], v["repetition"], v["engine"]) for v in lines_of(killed) if v["kind"] == "record"
    ]
    assert len(keys) == len(set(keys)) == 12 * 2 * 2
    assert sorted(path.name for path in killed.glob("*.jsonl")) == ["records.jsonl"]


def test_two_processes_write_the_records_of_one(tmp_path: Path) -> None:
    overrides = ["workload.limit=7", "sampling.temperature=1", "repetitions=2", "batch_size=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run([*script(*overrides), f"folder={one}"], check=True, cwd=ROOT, env=environment(), capture_output=True)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]
    launch += ["--main_process_port", "0"]
    # the folder's name contains the time, which both processes must have from the main one
    command = [*launch, *script(*overrides)[1:], f"folder={two}/${{run_stamp:}}"]
    subprocess.run(command, check=True, cwd=ROOT, env=environment(), capture_output=True)
    (folder,) = two.iterdir()
    finished = read_run(folder)
    assert finished.header.provenance["processes"] == 2
    assert contents(finished) == contents(read_run(one))
    assert {path.name for path in folder.iterdir()} == {".hydra", "records.jsonl", "report.html"}


def test_a_sweep_with_joblib_has_one_report(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    # the folder's name contains the time, which workers must have from the main process
    overrides = ("workload.limit=2", "num_draft_tokens=1,2", f"folder={tmp_path}/${{run_stamp:}}")
    command = script("-m", "launcher=joblib", *overrides)
    finished = subprocess.run(command, check=True, cwd=ROOT, env=environment(), capture_output=True, text=True)
    (folder,) = tmp_path.iterdir()
    runs = [read_run(folder / str(number)) for number in (0, 1)]
    assert [r.header.config["num_draft_tokens"] for r in runs] == [1, 2]
    assert all(len(r.records) == 4 for r in runs)
    report = folder / "report.html"
    assert report.is_file()
    assert f"report: {report}" in finished.stdout


@pytest.mark.full  # test_speedup.py compares predictions with simulated texts in every run
def test_expected_and_realized_acceptance_agree_and_predictions_match_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled with K=8, about 2,400 steps; then the same prompts with smaller K."""
    monkeypatch.setattr("specdec.experiments.run.calibrate", lambda *_: None)  # no times are needed
    common: dict[str, Any] = {
        "workload": Stdlib(limit=80, shuffle_seed=1),
        "sampling": SamplingConfig(temperature=1.0, max_new_tokens=96),
        "batch_size": 20,
        "baseline": False,
    }
    source = execute(small(tmp_path / "8", num_draft_tokens=8, **common))
    assert sum(len(record.steps) for record in source.records) > 2000
    found = figures(source)
    tallies = list(tally(source).values())
    accepted, tried = COLUMN["num_accepted_draft_tokens"], COLUMN["num_tried_draft_tokens"]
    gap = [[row[COLUMN["overlap"]] - row[accepted], row[tried]] for row in tallies]
    difference = ratio(*(torch.tensor(gap).T.numpy()))
    assert difference.low is not None
    assert difference.high is not None
    assert difference.low <= 0 <= difference.high
    assert difference.high - difference.low < 0.05
    for k in (2, 4):
        measured = (
            figures(execute(small(tmp_path / str(k), num_draft_tokens=k, **common)))
            .metrics["mean_acceptance_length"]
            .value
        )
        predicted = next(point for point in found.what_if if point.num_draft_tokens == k).mean_acceptance_length.value
        assert predicted == pytest.approx(measured, rel=0.05)
    own = found.what_if[-1].mean_acceptance_length.value
    assert own == pytest.approx(found.metrics["mean_acceptance_length"].value, rel=0.02)


def test_a_run_with_automatic_k(tmp_path: Path) -> None:
    config = composed("num_draft_tokens=auto")
    assert (config.num_draft_tokens, config.max_draft_tokens) == ("auto", 8)
    assert (composed("num_draft_tokens=2").num_draft_tokens, config.batch_size) == (2, 1)
    finished = execute(
        small(tmp_path / "run", num_draft_tokens="auto", workload=Stdlib(limit=5, shuffle_seed=3), batch_size=2)
    )
    assert not finished.failures
    texts = {record.key: record.ids for record in finished.records}
    for record in finished.of(SPECULATIVE):
        check_identities(record, 8)
        assert record.choice is not None
        assert sum(record.choice.steps_by_k) >= len(record.steps)
        assert record.ids == texts[record.key._replace(engine=PLAIN)]
    for record in finished.of(PLAIN):
        assert record.choice is None
        assert not any(step.drafted for step in record.steps)
    fixed = execute(
        small(tmp_path / "fixed", num_draft_tokens=2, workload=Stdlib(limit=5, shuffle_seed=3), batch_size=2)
    )
    for runs in ([finished], [finished, fixed], [fixed, finished]):
        for text in (render_page(runs), to_markdown(runs)):
            assert "K was chosen step by step: K=" in text
        assert "K=auto" in render_page(runs)
    assert to_json([fixed])["runs"][0]["controller"] is None
    assert to_json([finished])["runs"][0]["controller"]["measured_speedup"] > 0


BAD: dict[str, tuple[list[str], str]] = {
    "unknown key": (["moonshine=1"], "Could not override 'moonshine'"),
    "unknown group": (["drafter=oracle"], "Could not find 'drafter/oracle'"),
    "unknown field": (["workload.limits=3"], "Could not override 'workload.limits'"),
    "a word for a number": (["sampling.temperature=hot"], "could not be converted to Float"),
    "negative temperature": (["sampling.temperature=-1"], "sampling.temperature=-1.0 must be 0 (greedy) or more"),
    "no drafts": (["num_draft_tokens=0"], "num_draft_tokens=0 must be 1 or more"),
    "a word for K": (["num_draft_tokens=many"], "num_draft_tokens='many' must be an integer, 1 or more, or auto"),
    "no token": (["sampling.max_new_tokens=0"], "sampling.max_new_tokens=0 must be 1 or more"),
    "too_long": (["too_long=cut"], "too_long='cut' must be skip or error"),
    "dtype": (["target.dtype=int3"], "target.dtype='int3' must be auto"),
    "missing path": (["target=model"], "target.path has no value; give it one on the command line: target.path=…"),
    "missing model": (["target=model", "target.path=no/such-model"], "no model could be loaded from 'no/such-model'"),
    "missing draft": (["drafter=model", "drafter.path=no/such-draft"], "no model could be loaded from 'no/such-draft'"),
    "missing file": (["workload=dataset", "workload.path=none.jsonl"], "'none.jsonl' is not a file"),
    "malformed line": (["workload=dataset", "workload.path={tmp}/bad.jsonl"], "bad.jsonl, line 2 is not valid JSON"),
    "empty workload": (
        ["workload=dataset", "workload.path={tmp}/empty.jsonl"],
        "contains no prompt, so there is nothing to run",
    ),
    "broken override": (["a=b=c{"], "'a=b=c{' is no override: mismatched input"),
    "nothing to run": (["drafter=none", "baseline=false"], "drafter=none runs the baseline alone"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_a_message_and_exit_code_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": oops\n')
    (tmp_path / "empty.jsonl").write_text("")
    overrides, message = BAD[name]
    folder = tmp_path / "run"
    assert main(["experiment", *(o.replace("{tmp}", str(tmp_path)) for o in overrides), f"folder={folder}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "specdec: " in error
    assert "Traceback" not in error
    assert not list(folder.glob("*.jsonl"))


def test_records_of_an_unknown_format_are_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "records.jsonl").write_text('{"kind": "header", "version": 99}\n')
    assert main(["experiment", "experiment=demo", "resume=true", f"folder={tmp_path}"]) == 2
    assert "has record format 99" in capsys.readouterr().err


def test_a_launcher_that_is_not_installed_is_an_error_that_names_its_extra(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for option, plugin, extra in (("slurm", "submitit", "slurm"), ("ray", "ray", "ray")):
        try:
            __import__(f"hydra_plugins.hydra_{plugin}_launcher")
        except ImportError:
            assert main(["experiment", "-m", f"launcher={option}", f"folder={tmp_path}"]) == 2
            assert f'pip install "specdec-lossless[{extra}]"' in capsys.readouterr().err


@pytest.mark.parametrize("module", ["hydra", "accelerate", "datasets"])
def test_a_missing_package_is_an_error_that_names_the_extra(module: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; from specdec_cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    call = ["experiment", "workload=dataset", "workload.path=README.txt", f"folder={tmp_path}"]
    finished = subprocess.run(
        [sys.executable, "-c", code, *call], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2
    assert 'pip install "specdec-lossless[experiments]"' in finished.stderr
