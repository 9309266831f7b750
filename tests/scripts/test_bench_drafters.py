"""scripts/bench_drafters.py: every workload, what it reports, and that "again" is drafted from the first answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import bench_drafters
import pytest

from specdec.drafters.hybrid import SuffixHybrid
from specdec.drafters.model import ModelDrafter
from specdec.drafters.suffix import SuffixDecoding
from specdec.utils import embedded

QUICK = ["--count", "3", "--new-tokens", "12", "--rounds", "1", "--batch", "3", "--num-draft-tokens", "4"]


@pytest.fixture(autouse=True)
def _eager(cpu_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_drafters, "COMPILED", False)


def test_a_run_ends_with_tables_and_a_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "drafters.json"
    arguments = [*QUICK, "--threads", "1", "--dtype", "float32", "--max-prompt-tokens", "40", "--workload", "again"]
    arguments += ["--draft", str(embedded.DRAFT), "--draft", str(embedded.EAGLE3)]
    assert bench_drafters.main([*arguments, "--output", str(output)]) == 0
    report = json.loads(output.read_text(encoding="utf-8"))
    assert list(report["workloads"]) == ["again"]
    assert report["provenance"]["torch"]
    assert report["draft_coverage"] == 1.0  # of the same tokenizer
    for rows in report["workloads"].values():
        names = ["plain", "draft model", "suffix + draft model", "prompt lookup", "suffix", "further draft"]
        names.append("EAGLE-3 head")
        by_token = "draft model, by token"
        assert [row["drafter"] for row in rows if row["sampling"] == "greedy"] == names
        assert [row["drafter"] for row in rows if row["sampling"] == "sampled"] == [*names[:2], by_token, *names[2:]]
        for row in rows:
            assert row["tokens_per_second"] > 0
            assert row["rows"] == 3
            assert row["identical_rows"] == (3 if row["sampling"] == "greedy" else None)
        assert rows[0]["acceptance"] is None
        assert rows[1]["acceptance"] > 0  # of the draft model
        assert rows[5]["tokens_per_step"] == rows[1]["tokens_per_step"]  # the same one
        assert rows[0]["tokens_per_step"] == 1.0
        assert rows[0]["ratio_to_plain"]["median"] == 1.0
    of_both, of_lookup, of_suffix = (row["tokens_per_step"] for row in report["workloads"]["again"][2:5])
    assert min(of_both, of_suffix) >= 2 > of_lookup  # of greedy answers
    out = capsys.readouterr().out
    assert "embedded, again" in out
    assert max(map(len, out.splitlines()[:-1])) <= 120


def test_the_fastest_drafter_of_each_kind_of_call_is_named() -> None:
    def row(batch: int, drafter: str, k: int | str | None, ratio: float) -> dict[str, Any]:
        return {
            "batch": batch, "sampling": "greedy", "drafter": drafter, "num_draft_tokens": k, "tokens_per_step": 2.4,
            "ratio_to_plain": {"median": ratio}, "step_in_plain_steps": 2.0,
        }  # fmt: skip

    rows = [row(1, "plain", None, 1.0), row(1, "suffix", 3, 1.2), row(1, "suffix", "auto", 1.3)]
    rows += [row(8, "plain", None, 1.0), row(8, "suffix", 3, 0.9)]
    first, second = bench_drafters.fastest(rows)
    assert (first, second) == (rows[1], rows[3])
    assert bench_drafters.describe(first) == (
        "batch 1, greedy: suffix K=3 is fastest, 1.20 times plain; 2.40 tokens a step that takes 2.00 plain ones, so"
        " 2.00 times if all K were proposed and accepted"
    )
    assert bench_drafters.describe(second) == "batch 8, greedy: plain decoding is fastest"


def test_automatic_k_is_compared_with_the_fastest_constant_k_of_its_drafter() -> None:
    plain, other = bench_drafters.Candidate("plain", "none", None), bench_drafters.Candidate("suffix", "suffix", 6)
    two, three, auto = (bench_drafters.Candidate("draft model", "", k) for k in (2, 3, "auto"))
    rates = {plain: [1.0, 3.0], other: [9.0, 9.0], two: [2.0, 2.0], three: [3.0, 5.0], auto: [4.0, 4.0]}
    assert bench_drafters.fastest_constant(auto, rates) is three
    assert bench_drafters.fastest_constant(three, rates) is None
    rates[plain] = [5.0, 5.0]
    assert bench_drafters.fastest_constant(auto, rates) is plain


def test_a_drafter_forgets_earlier_answers_between_rounds() -> None:
    suffix = SuffixDecoding(max_ids=50)
    suffix.finished_texts.add([1, 2, 3])
    assert bench_drafters.without_answers(suffix) is suffix
    assert (suffix.finished_texts.num_ids, suffix.finished_texts.max_ids) == (0, 50)
    hybrid = SuffixHybrid(cast("ModelDrafter", None), SuffixDecoding())
    hybrid.suffix.finished_texts.add([1])
    assert bench_drafters.without_answers(hybrid) is hybrid
    assert hybrid.suffix.finished_texts.num_ids == 0
    assert bench_drafters.without_answers("none") == "none"


def test_workloads_are_so_many_different_prompts() -> None:
    for name in bench_drafters.WORKLOADS:
        texts = bench_drafters.texts_of(name, None, 4)
        assert len(set(texts)) == 4
        assert texts == bench_drafters.texts_of(name, None, 4)
    assert all("again" in text for text in bench_drafters.texts_of("edits", None, 4))


def test_what_cannot_be_loaded_is_an_error_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_drafters.main(["--pair", "none"]) == 1
    assert "bench_drafters: --pair none: no model in" in " ".join(capsys.readouterr().err.split())
