"""The README is run: its Python and shell blocks, its table against the file it comes from, its links."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peers.show import best, name_of

from specdec.generation import routing

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_table_of_the_stock_loop_is_the_routing_table() -> None:
    section = README.partition("## What stays with the stock loop")[2].partition("\n## ")[0]
    rows = [line.strip("| ") for line in section.splitlines() if line.startswith("| ")]
    assert rows == ["calls", *routing.all_calls()]


def test_the_drafter_of_contributing_runs() -> None:
    (code,) = blocks("python", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    code += """
import specdec
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("specdec/assets/draft")
prompt = torch.arange(2, 9)[None]
expected = model.generate(prompt, max_new_tokens=12, do_sample=False)
assert model.generate(prompt, max_new_tokens=12, do_sample=False).equal(expected)
specdec.enable(model, Repeat(), num_draft_tokens=3)
assert model.generate(prompt, max_new_tokens=12, do_sample=False).equal(expected)
assert specdec.last_stats(model).num_draft_tokens > 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def shell_lines() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line and not line.startswith("#")]


# Commands that make an environment are what .ci/run itself runs; the measuring scripts take minutes.
INSTALLS = ("git clone", "cd ", "make ", "python -m pip", "pip install")
LONG = ("python scripts/", "PYTHONPATH=.:kernels python scripts/gpu_suite")


@pytest.mark.parametrize("line", [line for line in shell_lines() if not line.startswith((*INSTALLS, *LONG))])
def test_shell_lines_run(line: str) -> None:
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(line, shell=True, check=True, cwd=ROOT, env=os.environ | {"PATH": binaries})


def test_ci_runs_the_make_commands_of_the_readme() -> None:
    made = {line.split()[1] for line in shell_lines() if line.startswith("make ")}
    assert {"demo", "test"} <= made
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target} " in script


def test_the_table_holds_the_figures_of_the_results_files() -> None:
    row = r"^\| (embedded|200m) \| (\d+) \| ([^|]+?) \| ([\d.,]+) \| ([\d.]+) \| ([\d.]+) \| (\d+/\d+) \|$"
    rows = re.findall(row, README, flags=re.MULTILINE)
    for pair in ("embedded", "200m"):
        results = json.loads((RESULTS / f"bench_peers-{pair}.json").read_text(encoding="utf-8"))["results"]
        greedy = {(r["batch"], name_of(r)): r for r in results if r["sampling"] == "greedy"}
        shown = {(int(batch), engine): figures for name, batch, engine, *figures in rows if name == pair}
        for key, (rate, ratio, own, same) in shown.items():
            result = greedy[key]
            assert rate == f"{result['tokens_per_second']:,.0f}", (pair, key)
            assert ratio == f"{result['ratio_to_baseline']['median']:.2f}", (pair, key)
            assert own == f"{result['ratio_to_own_plain']['median']:.2f}", (pair, key)
            assert same == f"{result['identical_rows']}/{result['rows']}", (pair, key)
        peers = {key for key, result in greedy.items() if result["runtime"] != "specdec"}
        assert len(peers) == 8
        assert peers < set(shown), "a peer's row is left out"
        for batch in (1, 8):  # where we stand is told at our best
            assert best([r for r in results if r["sampling"] == "greedy" and r["batch"] == batch], "specdec") in [
                greedy[key] for key in shown
            ]


def test_every_results_file_says_how_to_repeat_it() -> None:
    page = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    for file in RESULTS.glob("*.json"):
        assert f"(results/{file.name})" in page, file.name


@pytest.mark.parametrize(
    "name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/LOG.md"]
)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_the_identical_texts_are_those_of_the_results_file() -> None:
    report = json.loads((RESULTS / "check_identity.json").read_text(encoding="utf-8"))
    same = report["identical"]
    expected = f"Of {report['prompts']} held-out prompts the embedded pair continued {same['K=2']} (K=2) and {same['K=5']} (K=5) with"
    assert f"{expected} {report['max_new_tokens']} ids" in " ".join(README.split())


def test_the_quality_is_that_of_the_results_file() -> None:
    report = json.loads((RESULTS / "audit_quality.json").read_text(encoding="utf-8"))
    worse = report["perplexity"] / report["original_perplexity"] - 1
    expected = (
        f"is {report['mean_kl']:.4f} nats (mean KL) and {100 * worse:.1f} % of perplexity away from its original on"
    )
    assert f"{expected} {report['tokens']:,} held-out tokens" in " ".join(README.split())


def test_the_ladder_of_the_kernels_is_the_files() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "check_kernels_ladder.json").read_text(encoding="utf-8"))
    page = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    rungs = re.findall(r"^\| (\d) .*?\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", page, flags=re.MULTILINE)
    assert len(rungs) == 5
    for number, *figures in rungs:
        for arch, figure in zip((80, 90, 100), figures, strict=True):
            (found,) = [
                r for r in report["results"] if r["configuration"].startswith(f"{number} ") and r["arch"] == arch
            ]
            assert found["instructions_per_weight"] == float(figure), (number, arch)


def test_every_shipped_configuration_was_checked_and_held() -> None:
    pytest.importorskip("triton")
    from specdec_kernels.attention.kernel import CONFIGURATIONS as ATTENTION
    from specdec_kernels.configuration import ARCHS
    from specdec_kernels.rejection.kernel import CONFIGURATIONS as REJECTION
    from specdec_kernels.w4a16.kernel import CONFIGURATIONS as W4A16

    report = json.loads((ROOT / "benchmarks" / "results" / "check_kernels.json").read_text(encoding="utf-8"))
    assert report["failed"] == 0
    assert {result["triton"].rpartition(".")[0] for result in report["results"]} == {"3.6", "3.9"}
    checked = {(r["op"], r["configuration"], r["arch"], r["triton"]) for r in report["results"] if not r["failures"]}
    for triton in {result["triton"] for result in report["results"]}:
        for shipped in (*W4A16, *REJECTION, *ATTENTION):
            for arch in ARCHS:
                assert (shipped.op, shipped.name, arch, triton) in checked
