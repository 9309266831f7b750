"""The command line: what it prints for a person, the JSON it prints for a script, and what it imports."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from torch import Tensor

from specdec.core import verification
from specdec.core.steps import Draft, Verdict
from specdec.drafters import resolve
from specdec.utils import embedded
from specdec_cli.arguments import AUTO, COMMANDS
from specdec_cli.main import main

ROOT = Path(__file__).parents[2]
SHORT = ["--max-new-tokens", "24"]


@pytest.fixture(scope="module")
def demo() -> str:
    """What `specdec demo` prints."""
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(["demo", "--num-draft-tokens", "3", *SHORT]) == 0
    return out.getvalue()


def test_demo_prints_text_origins_table_and_verdict(demo: str) -> None:
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
        assert expected in demo
    assert "identical: yes" in demo.splitlines()


def test_demo_json_is_one_object_whose_counts_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *SHORT, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["identical"] is True
    assert report["tokens"] == 24
    drafting = sum(report["acceptance_histogram"])
    plain = round(24 - (report["mean_acceptance_length"] or 0) * drafting)  # such a step emits one id
    assert report["tokens_per_step"] == pytest.approx(24 / (drafting + plain))
    assert 0 <= plain < 24


def test_demo_reports_a_difference_and_exits_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def accept_always(draft: Draft, target_ids: Tensor) -> Verdict:
        return Verdict(draft.lengths, target_ids.gather(1, draft.lengths[:, None])[:, 0])

    monkeypatch.setattr(verification, "verify_greedy", accept_always)
    assert main(["demo", *SHORT]) == 1
    assert "identical: no" in capsys.readouterr().out.splitlines()


def test_generate_takes_folders_and_samples(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "generate",
        "--model",
        str(embedded.TARGET),
        "--drafter",
        "prompt_lookup",
        "--prompt",
        "for i in range(",
    ]
    assert main([*arguments, *SHORT, "--temperature", "0.8", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "bfloat16 on cpu" in out
    assert "identical: not compared, the text is sampled" in out


def test_generate_without_a_drafter_has_no_acceptance(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--model", str(embedded.TARGET), "--drafter", "none", "--prompt", "for i in range("]
    assert main([*arguments, "--max-new-tokens", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "mean acceptance length: nothing was drafted" in lines
    assert "tokens per step, steps without a draft included: 1.00" in lines
    assert "draft acceptance rate: nothing was drafted" in lines


def test_origins_add_up_to_the_text(demo: str) -> None:
    counts = {
        line.split()[0].strip("⟨⟩⟦⟧"): int(line.split()[1])
        for line in demo.splitlines()
        if "the draft's, accepted" in line or "the target's," in line
    }
    assert set(counts) == {"accepted", "recovered", "bonus"}
    assert 0 < sum(counts.values()) <= 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such-folder", "--prompt", "x"], "no/such-folder"),
        (["--model", str(embedded.TARGET), "--drafter", "no/such-draft", "--prompt", "x"], "no/such-draft"),
        (["--model", str(embedded.TARGET), "--prompt", "x", "--num-draft-tokens", "0"], "num_draft_tokens=0"),
        (["--model", str(embedded.TARGET), "--prompt", ""], "empty"),
    ],
)
def test_bad_input_ends_with_a_message_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *arguments, *SHORT]) == 2
    error = capsys.readouterr().err
    assert error.startswith("specdec: ")
    assert message in error
    assert "Traceback" not in error


HELP = [["--help"], ["--version"], *([name, "--help"] for name in ("demo", "generate", "quantize", "plan", "audit"))]


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from specdec_cli.main import main
try:
    main({arguments})
except SystemExit as exit:
    assert exit.code == 0
assert not {{"torch", "transformers", "numpy"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "specdec" in done.stdout


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "experiment"])
def test_each_command_prints_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"specdec {command}" in capsys.readouterr().out


def test_report_names_its_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["report", "--help"])
    assert "mean_acceptance_length" in capsys.readouterr().out


def test_an_unknown_command_is_refused_with_the_names_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["complete"])
    message = capsys.readouterr().err
    assert all(name in message for name in ("complete", *COMMANDS))


def test_auto_is_the_librarys() -> None:
    assert AUTO == resolve.AUTO


def test_the_demo_has_a_prompt_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--max-new-tokens", "2", "--json"]) == 0
    prompt = json.loads(capsys.readouterr().out)["prompt"]
    assert prompt in [one["prompt"] for one in embedded.prompts()]
