"""Runs of vLLM, SGLang and Spec-Bench: what is read of their files, what is left out, and the refusals."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest

from specdec.experiments.report.other_tools import FIGURES, OtherRun, is_of_other_tool, read_other_runs
from specdec.experiments.report.other_tools_page import left_out, other_json, other_markdown, render_other_page
from specdec_cli import report as command
from tests.helpers.synthetic_runs import synthetic_run, write_run

DATA = Path(__file__).parents[1] / "data" / "other_tools"
FILES = sorted([*DATA.glob("*.json"), *DATA.glob("*.jsonl")])


def read(*names: str) -> list[OtherRun]:
    return read_other_runs([DATA / name for name in names])


def options(*runs: Path, **given: Any) -> argparse.Namespace:
    values = {"runs": list(map(str, runs)), "fail_if": [], "json": False, "markdown": False, "output": None}
    return argparse.Namespace(**values | given)


def test_vllm_s_totals_are_read_with_the_speedup_over_its_plain_run() -> None:
    run, plain = read("vllm.json", "vllm-plain.json")
    assert run.figures == {
        "speedup": 480 / 300,
        "tokens_per_s": 480,
        "mean_acceptance_length": 2.65,
        "draft_acceptance_rate": pytest.approx(0.55),  # per cent in the file
        "num_spec_steps": 3600,
        "num_draft_tokens": 10800,
        "num_accepted_draft_tokens": 5940,
        "acceptance_per_position": [0.8, 0.52, 0.33],
        "first_token_ms": 41.5,
        "token_ms": 7.9,
        "num_emitted_tokens": 9600,
    }
    assert (run.settings["concurrency"], run.settings["prompt tokens"]) == ("4", "8,000")
    assert plain.is_plain
    assert "it does not speculate" in plain.missing["mean_acceptance_length"]


def test_a_speedup_needs_one_plain_run_of_the_same_requests(tmp_path: Path) -> None:
    (alone,) = read("vllm.json")
    assert alone.missing["speedup"].startswith("a file holds one run")
    other = json.loads((DATA / "vllm-plain.json").read_text()) | {"total_input_tokens": 9000}
    (tmp_path / "other.json").write_text(json.dumps(other))
    run, _ = read_other_runs([DATA / "vllm.json", tmp_path / "other.json"])
    assert "speedup" not in run.figures
    (tmp_path / "again.json").write_text((DATA / "vllm-plain.json").read_text())
    run, *_ = read_other_runs([DATA / "vllm.json", DATA / "vllm-plain.json", tmp_path / "again.json"])
    assert run.missing["speedup"].startswith("2 runs without speculation")


def test_each_line_of_sglang_s_output_is_a_run() -> None:
    run, plain = read("sglang.jsonl")
    assert (run.label, plain.label) == ("sglang, line 1", "sglang, line 2")
    assert run.figures == {
        "speedup": 2, "tokens_per_s": 160, "mean_acceptance_length": 3.1, "first_token_ms": 30, "token_ms": 6.1,
        "num_emitted_tokens": 8000,
    }  # fmt: skip
    assert run.missing["draft_acceptance_rate"] == "SGLang's benchmarks record the mean acceptance length alone"
    (batch,) = read("sglang-one-batch.jsonl")
    assert batch.figures["tokens_per_s"] == 4 * 256 / 3.2
    assert (batch.figures["mean_acceptance_length"], batch.figures["first_token_ms"]) == (2.4, 200)


def test_spec_bench_s_answers_give_its_figures_and_its_table() -> None:
    run, plain = runs = read("spec-bench-sps.jsonl", "spec-bench-vanilla.jsonl")
    assert run.figures == {
        "speedup": pytest.approx((40 + 20) / (20 + 20)),  # of the two questions that both answered
        "tokens_per_s": pytest.approx((12 / 0.3 + 6 / 0.3) / 2),
        "mean_acceptance_length": 18 / 8,
        "token_ms": pytest.approx(600 / 18),
        "num_emitted_tokens": 18,
    }
    assert run.settings["failed requests"] == "1, left out"
    assert plain.figures["mean_acceptance_length"] == 1
    row = next(line for line in other_markdown(runs).splitlines() if line.startswith("| spec-bench-sps | 2.00×"))
    assert row == "| spec-bench-sps | 2.00× | 1.00× | – | – | – | – | 2.25 | 1.50× |"


def test_every_figure_has_a_value_or_a_reason_and_the_page_shows_them() -> None:
    runs = read_other_runs(FILES)
    page, markdown = render_other_page(runs), other_markdown(runs)
    for run in runs:
        assert run.figures.keys() | run.missing.keys() == FIGURES.keys()
        assert not run.figures.keys() & run.missing.keys()
        assert run.label in page
    lines = left_out(runs)
    assert len(lines) == len(set(lines))
    for line in lines:
        assert line in page.replace("&#39;", "'")
        assert f"- {line}" in markdown
    assert "<h2>Definitions</h2>" in page
    assert not re.search(r'(src|href)="(?!#|data:,)', page)
    content = json.loads(json.dumps(other_json(runs), allow_nan=False))
    assert [run["figures"] for run in content["runs"]] == [run.figures for run in runs]


def test_the_command_reports_files_of_other_tools_beside_a_run_of_specdec(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write_run(synthetic_run(prompts=3), tmp_path / "own")
    assert not is_of_other_tool(own)
    assert not is_of_other_tool(own / "records.jsonl")
    page = tmp_path / "page.html"
    assert command.run(options(DATA / "vllm.json", own, output=str(page))) == 0
    assert f"written: {page}" in capsys.readouterr().out
    assert "2 runs of vLLM, specdec" in page.read_text(encoding="utf-8")
    assert command.run(options(own, DATA / "vllm.json", json=True)) == 0
    vllm, specdec = json.loads(capsys.readouterr().out)["runs"]
    assert specdec["label"] == "synthetic"
    assert specdec["figures"]["num_draft_tokens"] > 0
    assert vllm["figures"]["num_draft_tokens"] == 10800
    with pytest.raises(ValueError, match="--fail-if compares runs prompt by prompt"):
        command.run(options(DATA / "vllm.json", fail_if=["speedup<1"]))
    (tmp_path / "vllm.json").write_text((DATA / "vllm.json").read_text())
    assert command.run(options(tmp_path / "vllm.json")) == 0
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"score": 1}', r"is not a run that is known: .* has the fields score"),
        ('{"question_id": 1, "category": "qa", "choices": []}', "looks like a file of Spec-Bench's answers, but list"),
        (
            '{"question_id": 1, "category": "qa", "choices": [{"turns": []}]}',
            "Spec-Bench's answers, but the field 'accept_lengths' is missing",
        ),
        ('{"question_id": 1}\n{"question_id": oops}', r"line 2 is not JSON"),
        ('{"question_id": 1}\n[1]', r"line 2 is not a JSON object"),
        ((DATA / "spec-bench-vanilla.jsonl").read_text() * 2, "line 4: the question 81 occurs twice"),
        (
            '{"batch_size": 1, "input_len": 1, "output_len": 1, "latency": 0}',
            "bench_one_batch_server, but division by zero",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_that_says_why(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "other.jsonl"
    file.write_text(text)
    assert is_of_other_tool(file)
    with pytest.raises(ValueError, match=message):
        read_other_runs([file])
