"""Other tools' definitions on a run's records, and Spec-Bench's table, against values worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from specdec.core.steps import RowStep
from specdec.experiments.records import PLAIN, SPECULATIVE, Header, Record, Run, Seconds
from specdec.experiments.report.definitions import COUNTS, DEFINITIONS, Value, definitions_table
from specdec.experiments.report.exports import to_json, to_markdown
from specdec.experiments.report.figures import METRICS
from specdec.experiments.report.labels import build_reports
from specdec.experiments.report.page import render_page
from specdec.experiments.report.spec_bench import MT_BENCH, leaderboard_of_reports
from tests.helpers.synthetic_runs import PROVENANCE, config, synthetic_run

# The example of docs/figures.md: K = 3, a step without a draft, and a stop inside the last draft.
EXAMPLE = [
    RowStep(3, 3, 3, 4, [0.9, 0.8, 0.7]),
    RowStep(3, 3, 1, 2, [0.6, 0.5]),
    RowStep(3, 0, 0, 1, []),
    RowStep(3, 2, 1, 2, [0.8, 0.2]),
    RowStep(3, 2, 2, 2, [1.0, 0.9]),
]
ONE_STEP = [RowStep(3, 3, 1, 2, [0.9, 0.5])]


def record(prompt: str, task: str, engine: str, steps: list[RowStep], total_s: float, rows: int = 1) -> Record:
    count = sum(step.emitted for step in steps)
    token_s = (total_s - 0.5) / (count - 1)
    return Record(
        prompt_id=prompt, task=task, turn=0, repetition=0, engine=engine, seed=0, call=0, rows=rows,
        num_prompt_tokens=3, prompt_hash=prompt, ids=list(range(count)), tokens=["x"] * count, steps=steps,
        seconds=Seconds(total_s, 0.5, token_s, 0.1, 0.1, 0.1, 0.1, total_s - 0.4),
    )  # fmt: skip


def two_prompts(**changes: int | str) -> Run:
    """11 ids in 2 s and 2 ids in 1 s; plainly in 5.5 s and in 1 s."""
    records = []
    for prompt, task, steps, total_s, plain_s in (
        ("a", "qa", EXAMPLE, 2.0, 5.5), ("b", "writing", ONE_STEP, 1.0, 1.0),
    ):  # fmt: skip
        plain = [RowStep(0, 0, 0, 1, []) for step in steps for _ in range(step.emitted)]
        records += [record(prompt, task, SPECULATIVE, steps, total_s), record(prompt, task, PLAIN, plain, plain_s)]
    return Run(Path("runs/two"), Header(PROVENANCE, config(num_draft_tokens=3) | changes), records)


def values_of(run: Run) -> dict[tuple[str, str], Value]:
    (report,) = build_reports([run])
    return {(definition.figure, definition.tool): definition.value(report) for definition in DEFINITIONS}


def test_each_tool_s_formula_gives_the_value_that_was_worked_out_by_hand() -> None:
    values = values_of(two_prompts())
    expected: dict[tuple[str, str], Value] = {
        ("mean_acceptance_length", "specdec"): (10 + 2) / 5,
        ("mean_acceptance_length", "vLLM"): 1 + (7 + 1) / 5,
        ("mean_acceptance_length", "SGLang"): (11 + 2) / 6,
        ("mean_acceptance_length", "Spec-Bench"): (4 + 2 + 1 + 2 + 2 + 2) / 6,
        ("draft_acceptance_rate", "specdec"): 8 / 13,
        ("draft_acceptance_rate", "vLLM"): 8 / 13,
        ("draft_acceptance_rate", "SGLang"): 8 / (6 * 3),
        ("acceptance_per_position", "vLLM"): [5 / 5, 2 / 5, 1 / 5],
        ("conditional_acceptance_per_position", "specdec"): [5 / 5, 2 / 5, 1 / 1],
        ("acceptance_histogram", "vLLM"): [0, 3, 1, 1],
        ("acceptance_histogram", "SGLang"): [1, 3, 1, 1],
        ("num_spec_steps", "vLLM"): 5,
        ("num_spec_steps", "SGLang"): 6,
        ("num_draft_tokens", "SGLang"): 18,
        ("num_accepted_draft_tokens", "SGLang"): 8,
        ("tokens_per_s", "specdec"): 13 / 3,
        ("tokens_per_s", "vLLM"): 13 / 3,
        ("tokens_per_s", "Spec-Bench"): (11 / 2 + 2 / 1) / 2,
        ("plain_tokens_per_s", "Spec-Bench"): (11 / 5.5 + 2 / 1) / 2,
        ("speedup", "specdec"): (13 / 3) / (13 / 6.5),
        ("speedup", "Spec-Bench"): 3.75 / 2,
        ("first_token_ms", "vLLM"): 500,
        ("token_ms", "specdec"): 3000 / 13,
        ("token_ms", "vLLM"): (1500 / 10 + 500 / 1) / 2,
    }
    for key, value in expected.items():
        assert values[key] == pytest.approx(value), key


def test_every_figure_of_a_run_is_defined_and_its_own_value_is_the_report_s() -> None:
    """A metric that is added to METRICS needs its line here."""
    own = {definition.figure: definition for definition in DEFINITIONS if definition.tool == "specdec"}
    assert own.keys() == METRICS.keys() | COUNTS.keys()
    (report,) = build_reports([synthetic_run()])
    for name in METRICS:
        assert own[name].value(report) == report.figures.metrics[name].value, name
        assert own[name].name == name


def test_a_figure_that_the_records_lack_has_no_value() -> None:
    """K that was chosen by "auto" is no configured number; no plain text, no draft."""
    assert values_of(two_prompts(num_draft_tokens="auto"))["draft_acceptance_rate", "SGLang"] is None
    alone = two_prompts()
    values = values_of(replace(alone, records=alone.of(SPECULATIVE)))
    assert values["speedup", "Spec-Bench"] is values["plain_tokens_per_s", "Spec-Bench"] is None
    values = values_of(replace(alone, records=alone.of(PLAIN)))
    without = {figure for (figure, _), value in values.items() if value is None}
    assert without == {definition.figure for definition in DEFINITIONS} - {"plain_tokens_per_s", "plain_first_token_ms"}


def test_the_page_and_json_end_with_the_definitions() -> None:
    runs = [synthetic_run(), synthetic_run(k=2)]
    table = definitions_table(build_reports(runs))
    assert table.header == ["figure", "of", "name", "formula", "K=4", "K=2"]
    page = render_page(runs)
    last = page.rpartition("<h2>")[2]
    assert last.startswith("Definitions</h2>")
    for row in table.rows:
        for cell in row[1:]:
            assert f">{cell}<" in last.replace("&#39;", "'"), cell
    content = to_json(runs)["definitions"]
    vllm = next(line for line in content if line["name"] == "spec_decode_acceptance_length")
    assert [f"{value:.2f}" for value in vllm["values"]] == next(row for row in table.rows if row[2] == vllm["name"])[4:]


def test_spec_bench_s_table_has_the_columns_of_its_leaderboard() -> None:
    table = leaderboard_of_reports(build_reports([two_prompts()]))
    assert table is not None
    assert dict(zip(table.header, table.rows[0], strict=True)) == {
        "method": "synthetic",
        "MT-bench": "1.00×",
        "translation": "–",
        "summarization": "–",
        "QA": "2.75×",
        "math": "–",
        "RAG": "–",
        "mean accepted tokens": "2.17",
        "overall": "1.88×",  # (5.5 + 2) / (2 + 2): neither the mean of the columns nor a ratio of sums
    }
    assert "<h2>Spec-Bench</h2>" in render_page([two_prompts()])
    assert "| method | MT-bench | translation |" in to_markdown([two_prompts()])
    only_mt_bench = [replace(line, task=MT_BENCH[0]) for line in two_prompts().records]
    assert leaderboard_of_reports(build_reports([replace(two_prompts(), records=only_mt_bench)])) is None
    assert "<h2>Spec-Bench</h2>" not in render_page([synthetic_run()])
