"""check_lm_eval: its tasks, and what it says where speculation gives other scores."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import check_lm_eval
import pytest


def test_the_tasks_have_one_right_answer_each(tmp_path: Path) -> None:
    tasks = check_lm_eval.write_tasks(tmp_path, problems=5, shots=2)
    assert [task["task"] for task in tasks] == ["word_problems", "sums", "orders"]
    assert tasks[0]["doc_to_text"].count("The answer is") == 2
    for task in tasks:
        rows = [
            json.loads(line) for line in Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
        ]
        assert len(rows) == 5
        for row in rows:
            assert "label" not in row or len(set(row["choices"])) == len(row["choices"]) > row["label"]
    rng = random.Random(1)
    problem = check_lm_eval.word_problem(rng)
    assert problem["solution"].endswith(f"The answer is {problem['answer']}")
    choice = check_lm_eval.sum_choice(rng)
    a, b = (int(number) for number in choice["question"].removesuffix(" =").split(" + "))
    assert choice["choices"][choice["label"]] == str(a + b)


@pytest.mark.parametrize(("score", "answer", "code"), [(0.5, "7", 0), (0.25, "7", 1), (0.5, "8", 1)])
def test_other_scores_and_other_answers_end_with_1(
    score: float, answer: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run whose evaluations are given."""
    plain: dict[str, Any] = {
        "scores": {"sums": {"acc": 0.5}},
        "answers": {"sums": [(0, "7")]},
        "generation_s": 4.0,
        "tokens_per_step": None,
    }
    other = {
        "scores": {"sums": {"acc": score}},
        "answers": {"sums": [(0, answer)]},
        "generation_s": 2.0,
        "tokens_per_step": 1.5,
    }
    runs = iter([plain, other])
    monkeypatch.setattr(check_lm_eval, "evaluate", lambda *_: next(runs))
    monkeypatch.setattr(check_lm_eval, "find_spec", lambda name: True)
    monkeypatch.setattr(sys, "argv", ["check_lm_eval.py", "--problems", "2", "--shots", "1"])
    assert check_lm_eval.main() == code
    printed = capsys.readouterr().out
    assert "2.00 times" in printed
    assert ("NO" in printed) == (answer != "7")
