"""The command line: help, refusals, unexpected errors, and what it imports."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from specdec.drafters import resolve
from specdec.experiments.report import figures
from specdec.utils import embedded
from specdec_cli import generate as command
from specdec_cli import options
from specdec_cli.app import app
from specdec_cli.main import main
from tests.helpers.command_line import parse

ROOT = Path(__file__).parents[2]
TARGET = str(embedded.TARGET)
GROUP: Any = get_command(app)
COMMANDS = sorted(GROUP.commands)
AUDITS = sorted(GROUP.commands["audit"].commands)
HYDRA = ("experiment", "train-drafter")
PAGES = [[name] for name in COMMANDS if name not in HYDRA] + [["audit", name] for name in AUDITS]


def test_the_commands_are_those_of_the_documentation() -> None:
    assert set(COMMANDS) == {
        "generate", "chat", "demo", "bench", "experiment", "train-drafter", "report", "audit", "quantize", "plan",
        "env",
    }  # fmt: skip


@pytest.mark.parametrize("page", [[], *PAGES], ids=" ".join)
def test_each_command_has_help_with_an_example(page: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*page, "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert " ".join(["Usage: specdec", *page]) in out
    if page and page != ["audit"]:
        assert f"Example: specdec {' '.join(page)}" in out


def test_help_imports_no_torch() -> None:
    code = f"""
import sys
from specdec_cli.main import main
for page in {[[], *PAGES, *([name] for name in HYDRA)]}:
    assert main([*page, "--help"]) == 0
assert main(["--version"]) == 0
assert not {{"torch", "transformers", "numpy"}} & sys.modules.keys(), sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "specdec " in done.stdout


def test_hydra_prints_its_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "--help"]) == 0
    assert "== Configuration groups ==" in capsys.readouterr().out


def test_report_names_its_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(figures.METRICS) == options.METRICS
    assert main(["report", "--help"]) == 0
    assert "mean_acceptance_length" in capsys.readouterr().out


def test_auto_is_the_librarys() -> None:
    assert options.AUTO == resolve.AUTO


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command line is refused."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    [line] = captured.err.splitlines()
    assert captured.out == ""
    assert line.startswith("specdec: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["complete"], f"No such command 'complete'; commands are {', '.join(GROUP.list_commands(None))}"),
        (["audit", "losless"], "No such command 'losless'"),
        (["generate"], "Missing argument 'MODEL'; `specdec generate --help`"),
        (["generate", TARGET, "x", "--temprature", "1"], "No such option: --temprature"),
        (["generate", TARGET, "x", "--temperature", "-1"], "Invalid value for '--temperature'"),
        (["generate", TARGET, "x", "--temperature", "nan"], "Invalid value for '--temperature'"),
        (["generate", TARGET, "x", "--temperature", "1", "--top-p", "1.5"], "Invalid value for '--top-p'"),
        (["generate", TARGET, "x", "--top-p", "0.9"], "--top-p 0.9 has no effect on greedy decoding"),
        (["generate", TARGET, "x", "--num-draft-tokens", "0"], "'0' is neither a number from 1 on nor auto"),
        (["generate", TARGET, "x", "--num-draft-tokens", "many"], "'many' is neither a number from 1 on nor auto"),
        (["generate", TARGET, "x", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["generate", TARGET, "x", "--quantize", "int3"], "Invalid value for '--quantize'"),
        (["generate", TARGET, "x", "--device", "gpu"], "--device 'gpu' is no device; use cpu, cuda"),
        (["generate", TARGET, ""], "the prompt is empty"),
        (["generate", TARGET, "x", "--file", "y"], "PROMPT and --file are both given"),
        (["generate", TARGET, "--file", "no/file"], "no/file"),
        (["generate", "no/such-folder", "x"], "no/such-folder"),
        (["generate", TARGET, "x", "--system", "y"], "has no chat template; write the instruction into the prompt"),
        (["generate", TARGET, "x", "--drafter", "no/such-draft"], "no/such-draft"),
        (["chat", TARGET], "has no chat template; use `specdec generate`"),
        (["bench", TARGET, "--batch", "0"], "--batch 0 must be whole numbers, 1 or more"),
        (["bench", TARGET, "--drafter", "none"], "--drafter none drafts nothing"),
        (["bench", TARGET, "--batch", "1,x"], "'1,x' is no list such as 1,3"),
        (["bench", TARGET, "--batch", "300", "--max-new-tokens", "1"], "--batch 300 needs as many prompts"),
        (["demo", "--prompt", " "], "--prompt is empty"),
        (["report", "x", "--json", "--markdown"], "--markdown and --json exclude each other"),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(arguments, capsys)


@pytest.mark.skipif(torch.version.cuda is not None or torch.version.hip is not None, reason="of a build without CUDA")
@pytest.mark.parametrize(
    "arguments", [["generate", "no/folder", "x"], ["bench", "no/folder"], ["audit", "head", "a", "b"]]
)
def test_a_device_is_checked_before_anything_is_loaded(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal([*arguments, "--device", "cuda"], capsys)
    assert "--device cuda: this PyTorch" in line
    assert "is built without CUDA; install a build with it" in line


def test_no_prompt_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert "no prompt is given; write it behind MODEL" in refusal(["generate", TARGET], capsys)


@pytest.mark.parametrize("shows_traceback", [False, True])
def test_an_unexpected_error_asks_for_a_report(
    shows_traceback: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(options: Any) -> int:
        raise KeyError("missing\nkey")

    monkeypatch.setattr(command, "run", fail)
    assert main(["generate", TARGET, "x", *["--debug"] * shows_traceback]) == 70
    error = capsys.readouterr().err
    assert re.search(r"specdec: unexpected KeyError: .*missing.*key.* \(test_cli.py, line \d+\)\nThis is a bug", error)
    assert "`specdec env`" in error
    assert ("Traceback" in error) == shows_traceback


def test_too_little_memory_is_no_bug(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: Any) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(command, "run", fail)
    assert "--quantize int4" in refusal(["generate", TARGET, "x"], capsys)


def test_ctrl_c_and_a_reader_that_ends_are_no_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(options: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupt)
    assert main(["generate", TARGET, "x"]) == 130
    assert capsys.readouterr().err == ""
    line = f"{sys.executable} -m specdec_cli.main --help | true"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, check=False)
    assert done.stderr == b""


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(options: Any) -> int:
        warnings.warn("something\nto know", stacklevel=1)
        return 0

    monkeypatch.setattr(command, "run", warn)
    assert main(["generate", TARGET, "x"]) == 0
    assert capsys.readouterr().err == "specdec: warning: something to know\n"


def test_lists_and_defaults_reach_the_command() -> None:
    given = parse(["bench", "folder", "--batch", "1, 8", "--num-draft-tokens", "2,auto"])
    assert (given.batch, given.num_draft_tokens, given.drafter) == ((1, 8), (2, "auto"), "prompt_lookup")
    assert parse(["bench", "folder"]).num_draft_tokens == (2, 4, "auto")
    assert parse(["audit", "lossless", "folder"]).prefill_chunk == (None, 16)
    assert parse(["report", "a", "b", "--fail-if", "x<1"]).fail_if == ["x<1"]
