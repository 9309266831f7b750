"""The command line, as a person sees it and as a script reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor

from specdec.cli.main import main
from specdec.core import verification
from specdec.core.steps import Draft, Verdict
from specdec.utils import embedded

ROOT = Path(__file__).parents[2]
SHORT = ["--max-new-tokens", "24"]


def test_demo_prints_text_origins_table_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *SHORT]) == 0
    out = capsys.readouterr().out
    for expected in (
        "accepted",
        "⟨recovered⟩",
        "⟦bonus⟧",
        "tokens/s",
        "speedup: ",
        "mean acceptance length: ",
        "tokens per step, steps without a draft included: ",
        "acceptance rate: ",
    ):
        assert expected in out
    assert "identical: yes" in out.splitlines()


def test_demo_json_is_one_object_whose_counts_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *SHORT, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["identical"] is True
    assert report["tokens"] == 24
    drafting = sum(report["acceptance_histogram"])
    plain = round(24 - report["mean_acceptance_length"] * drafting)  # such a step emits one id
    assert report["tokens_per_step"] == pytest.approx(24 / (drafting + plain))
    assert 0 <= plain < 24


def test_demo_says_no_and_exits_with_1_where_the_text_differs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def accept_always(draft: Draft, target_ids: Tensor) -> Verdict:
        return Verdict(draft.lengths, target_ids.gather(1, draft.lengths[:, None])[:, 0])

    monkeypatch.setattr(verification, "verify_greedy", accept_always)
    assert main(["demo", "--max-new-tokens", "48"]) == 1
    assert "identical: no" in capsys.readouterr().out.splitlines()


def test_generate_takes_folders_and_samples(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--model", str(embedded.TARGET), "--draft", "prompt_lookup", "--prompt", "for i in range("]
    assert main([*arguments, *SHORT, "--temperature", "0.8", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "bfloat16 on cpu" in out
    assert "identical: not compared, the text is sampled" in out


def test_generate_without_a_drafter_has_no_acceptance(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--model", str(embedded.TARGET), "--draft", "none", "--prompt", "for i in range("]
    assert main([*arguments, "--max-new-tokens", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "mean acceptance length: nothing was drafted" in lines
    assert "tokens per step, steps without a draft included: 1.00" in lines
    assert "draft acceptance rate: nothing was drafted" in lines


def test_origins_add_up_to_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    main(["demo", *SHORT])
    lines = capsys.readouterr().out.splitlines()
    counts = {
        line.split()[0].strip("⟨⟩⟦⟧"): int(line.split()[1])
        for line in lines
        if "the draft's, kept" in line or "the target's," in line
    }
    assert set(counts) == {"accepted", "recovered", "bonus"}
    assert 0 < sum(counts.values()) <= 24


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no/such-folder", "--prompt", "x"], "no/such-folder"),
        (["--model", str(embedded.TARGET), "--draft", "no/such-draft", "--prompt", "x"], "no/such-draft"),
        (["--model", str(embedded.TARGET), "--prompt", "x", "--num-draft-tokens", "0"], "num_draft_tokens=0"),
        (["--model", str(embedded.TARGET), "--prompt", ""], "empty"),
    ],
)
def test_bad_input_ends_with_a_message_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *arguments, *SHORT]) == 2
    error = capsys.readouterr().err
    assert error.startswith("specdec: ")
    assert words in error
    assert "Traceback" not in error
