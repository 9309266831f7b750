"""The pages are run and checked: Python and shell blocks, tables against the files they come from, links."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import statistics
import subprocess
import sys
from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from typing import Any

import audit_peers
import bench_drafters
import pytest
from peers.draws import ALPHA
from peers.show import COMPARISON, comparison_rows, is_idle
from specdec_kernels import cpu

from specdec.core import interfaces, lockstep, steps
from specdec.core.stats import Choice, Stats
from specdec.drafters import heads, shared_vocabulary
from specdec.generation import routing
from specdec.quant import formats, linear
from specdec.runtime import support
from specdec.runtime.kv_cache import ragged

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")])
}
LINKING = [*PAGES, "benchmarks/README.md", "benchmarks/LOG.md", "kernels/README.md"]
README = PAGES["README.md"]
NEEDS = 'title="needs '  # what a block needs that a test has not: it is shown on the page, and the block is not run


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def page_blocks(language: str) -> list[object]:
    return [
        pytest.param(block, id=f"{page}-{number}")
        for page, text in PAGES.items()
        for number, block in enumerate(blocks(language, text))
    ]


@pytest.mark.parametrize("code", page_blocks("python"))
def test_python_blocks_run(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, since importing torch and transformers takes longer than most blocks."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(linear, "KERNELS", linear.KERNELS.copy())  # blocks add to both, for themselves alone
    monkeypatch.setattr(formats, "SCHEMES", formats.SCHEMES.copy())
    monkeypatch.setattr(cpu, "_IS_LOADED", None)  # as in a process of its own: loaded where they are on disk
    exec(compile(code, "<block>", "exec"), {"__name__": "__main__"})


def test_the_first_block_of_the_readme_runs_in_a_process_of_its_own() -> None:
    subprocess.run([sys.executable, "-c", blocks("python", README)[0]], check=True, cwd=ROOT)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_what_it_needs(page: str) -> None:
    for info in re.findall(r"^```(\S.*)$", PAGES[page], flags=re.MULTILINE):
        language, _, rest = info.partition(" ")
        assert language in ("python", "sh", "console", "text", "mermaid"), f"{page}: ```{info}"
        assert not rest or (language == "python" and rest.startswith(NEEDS)), f"{page}: ```{info}"


def test_the_readme_is_read_in_under_200_lines() -> None:
    assert len(README.splitlines()) < 200


def test_the_table_of_the_stock_loop_is_the_routing_table() -> None:
    section = README.partition("## What goes to the stock loop")[2].partition("\n## ")[0]
    rows = [line.strip("| ") for line in section.splitlines() if line.startswith("| ")]
    assert rows == ["calls", *routing.all_calls()]


def shell_lines() -> list[str]:
    lines = [
        line
        for text in PAGES.values()
        for block in blocks("sh", text)
        for line in block.splitlines()
        if line and not line.startswith("#")
    ]
    return list(dict.fromkeys(lines))


# Commands that make an environment are what .ci/run itself runs; the measuring scripts take minutes.
INSTALLS = ("git clone", "cd ", "make ", "python -m pip", "pip install")
LONG = ("python scripts/", "PYTHONPATH=.:kernels python scripts/")


@pytest.mark.parametrize("line", [line for line in shell_lines() if not line.startswith((*INSTALLS, *LONG))])
def test_shell_lines_run(line: str) -> None:
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(line, shell=True, check=True, cwd=ROOT, env=os.environ | {"PATH": binaries})


@pytest.mark.parametrize("line", [line for line in shell_lines() if "python scripts/" in line])
def test_scripts_of_the_pages_exist(line: str) -> None:
    assert (ROOT / re.search(r"python (scripts/\S+)", line)[1]).exists()  # type: ignore[index]


def test_ci_runs_the_make_commands_of_the_pages() -> None:
    made = {line.split()[1] for line in shell_lines() if line.startswith("make ")}
    assert {"demo", "test", "docs"} <= made
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for target in ("demo", "test", "docs"):
        assert f"make {target} " in script


def test_the_site_has_every_page() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8") + (ROOT / "docs" / "hooks.py").read_text(encoding="utf-8")
    for page in LINKING:
        if not page.startswith(".github/"):
            assert re.search(rf"(: |\"){re.escape(page.removeprefix('docs/'))}(\"|$)", site, re.MULTILINE), page


COMPARED = ("embedded", "200m", "200m-batch8", "1b")  # runs of bench_peers that the pages show
WITHOUT_AVX512 = ("embedded-avx2", "smollm2")
SHOWN_THREADS = 2  # of README's tables


def peers_report(run: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((RESULTS / f"bench_peers-{run}.json").read_text(encoding="utf-8"))
    assert is_idle(report), "its ratios are not to be shown"
    return report


@pytest.mark.parametrize(("page", "threads"), [("docs/performance.md", (1, 2)), ("README.md", (SHOWN_THREADS,))])
def test_the_comparison_is_that_of_the_results_files(page: str, threads: tuple[int, ...]) -> None:
    lines = PAGES[page].splitlines()
    start = lines.index(COMPARISON[0])
    assert lines[start + 1] == COMPARISON[1]
    rows = [row for run in COMPARED for row in comparison_rows(peers_report(run))]
    table = takewhile(bool, lines[start + 2 :])  # up to an empty line
    assert list(table) == [row for row in rows if int(row.split(" | ")[2]) in threads]


def test_the_comparison_without_avx512_is_that_of_its_results_files() -> None:
    rows = [row for run in WITHOUT_AVX512 for row in comparison_rows(peers_report(run))]
    section = PAGES["docs/performance.md"].partition("## On a CPU without AVX-512")[2].partition("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith(("| embedded", "| smollm2"))] == rows
    columns = [row.split(" | ") for row in rows]
    plain, speculative = ([row[at].removesuffix(" |") for row in columns] for at in (5, 8))
    said = f"plain decoding takes {min(plain)} to {max(plain)} times the rate of the fastest other engine, speculation"
    said += f" {min(speculative)} to {max(speculative)} times"
    assert said in " ".join(README.split())


def test_the_level_ratio_is_that_of_the_results_file() -> None:
    ratios = [row.split(" | ")[5] for row in comparison_rows(peers_report("embedded")) if row.split(" | ")[1] == "1"]
    page = " ".join(PAGES["docs/performance.md"].split())
    assert f"plain decoding is {min(ratios)} to {max(ratios)} times as fast as ONNX Runtime's, by threads" in page


@pytest.mark.parametrize("run", [*COMPARED, *WITHOUT_AVX512])
def test_every_text_of_specdec_is_the_stock_loops(run: str) -> None:
    results = [r for r in peers_report(run)["results"] if r["runtime"] == "specdec" and r["sampling"] == "greedy"]
    assert results
    assert all(result["identical_rows"] == result["rows"] for result in results)


def test_the_gains_are_those_of_the_results_file() -> None:
    section = README.partition("## Where the gain comes from")[2].partition("\n## ")[0]
    rows = [re.split(r" *\| *", line)[1:-1] for line in section.splitlines() if line.startswith("| ")][1:]
    results = {
        f"{r['runtime']} {r['engine']}{' K=auto' * (r['num_draft_tokens'] == 'auto')}": r
        for r in peers_report("embedded")["results"]
        if (r["batch"], r["threads"], r["sampling"]) == (1, SHOWN_THREADS, "greedy")
    }
    first, stock, plain, *speculative = [
        results[name]
        for name in (
            "transformers plain",
            "specdec 4-bit, stock loop",
            "specdec plain",
            "specdec draft model K=auto",
            "specdec prompt lookup",
        )
    ]
    gains = ["", f"{stock['ratio_to_baseline']['median']:.2f}", f"{1 / stock['ratio_to_own_plain']['median']:.2f}"]
    gains += [f"{result['ratio_to_own_plain']['median']:.2f}" for result in speculative]
    rates = [f"{result['tokens_per_second']:,.0f}" for result in (first, stock, plain, *speculative)]
    assert [row[1:] for row in rows] == [list(row) for row in zip(rates, gains, strict=True)]


DRAFTED = ("embedded", "200m", "1b", "smollm2", "smollm2-repetitive")  # runs of bench_drafters that the pages show
KEYS = ("tokens_per_step", "step_in_plain_steps")
REPETITIVE = ("edits", "json", "again")


def drafter_rows(run: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of a run of bench_drafters, by workload."""
    report = json.loads((RESULTS / f"bench_drafters-{run}.json").read_text(encoding="utf-8"))
    workloads: dict[str, list[dict[str, Any]]] = report["workloads"]
    return workloads


def gain(row: dict[str, Any]) -> float:
    return float(row["ratio_to_plain"]["median"])


def gains(name: str, runs: tuple[str, ...], workloads: tuple[str, ...] = ("prompts",), sampling: str = "greedy") -> str:
    """From the least to the largest gain of a drafter over plain decoding, single rows, by run and K."""
    found = [
        gain(row)
        for run in runs
        for workload, rows in drafter_rows(run).items()
        for row in rows
        if workload in workloads and (row["drafter"], row["batch"], row["sampling"]) == (name, 1, sampling)
    ]
    return f"{min(found):.2f} to {max(found):.2f} times"


def test_who_should_use_it_is_what_was_measured() -> None:
    section = README.partition("## Who should use it")[2].partition("\n## ")[0]
    said = f"greedy {gains('draft model', ('200m',))} as fast as specdec's own plain decoding with 201 million"
    assert said in section
    assert f"by K, sampled {gains('draft model', ('200m',), sampling='sampled')};" in section
    assert f"suffix decoding needs no draft model: {gains('suffix', DRAFTED[3:], REPETITIVE)}" in section
    automatic = [
        gain(row)
        for run in DRAFTED
        for rows in drafter_rows(run).values()
        for row in rows
        if row["batch"] == 8 and row["num_draft_tokens"] == "auto"
    ]
    assert f"automatic K decodes plainly there: {statistics.median(automatic):.2f} times in the median" in section
    without_avx512 = [
        round(r["ratio_to_own_plain"]["median"], 2)
        for run in WITHOUT_AVX512
        for r in peers_report(run)["results"]
        if r["runtime"] == "specdec" and r["num_draft_tokens"] is not None
    ]
    said = f"drafting gains less: {min(without_avx512)} to {max(without_avx512)} times, by model, batch, threads"
    assert f"{said} and drafter" in section


def test_what_pays_is_what_was_measured() -> None:
    lines = []
    for run in DRAFTED:
        for workload, rows in drafter_rows(run).items():
            for best in bench_drafters.fastest(rows):
                call = best["batch"], best["sampling"]
                alike = [row for row in rows if (row["batch"], row["sampling"]) == call]
                auto = max((row for row in alike if row["num_draft_tokens"] == "auto"), key=gain)
                k = best["num_draft_tokens"]
                name = "plain decoding" if k is None else f"{best['drafter']}, K={k}"
                lines.append(
                    f"| {run.partition('-')[0]} | {workload} | {call[0]} | {call[1]} | {name} | {gain(best):.2f} |"
                    f" {best['tokens_per_step']:.2f} | {best['step_in_plain_steps']:.2f} | {auto['drafter']} |"
                    f" {gain(auto):.2f} |"
                )
    section = PAGES["docs/performance.md"].partition("## Which drafter pays")[2].partition("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("| ")][1:] == lines
    automatic = [
        row["ratio_to_best"]["median"]
        for run in DRAFTED
        for rows in drafter_rows(run).values()
        for row in rows
        if row["num_draft_tokens"] == "auto"
    ]
    said = (
        f"{statistics.median(automatic):.2f} times in the median, at least 0.97 times in"
        f" {sum(value >= 0.97 for value in automatic)} of {len(automatic)} cases, and {min(automatic):.2f} to"
        f" {max(automatic):.2f} times over all"
    )
    text = " ".join(section.split())
    assert said in text
    small, widened = [
        row["step_in_plain_steps"]
        for run in ("embedded", "200m")
        for row in drafter_rows(run)["prompts"]
        if (row["drafter"], row["num_draft_tokens"], row["batch"], row["sampling"]) == ("draft model", 3, 1, "greedy")
    ]
    assert f"a step with K=3 takes {small:.1f} plain ones" in text
    assert f"on the widened pair it takes {widened:.1f}, so that {4 / widened:.2f} times would be reached" in text


def test_what_the_embedded_head_reaches_is_what_was_measured() -> None:
    report = json.loads((RESULTS / "bench_drafters-embedded-eagle3.json").read_text(encoding="utf-8"))
    head, draft = (
        [
            row
            for row in report["workloads"]["prompts"]
            if (row["drafter"], row["num_draft_tokens"], row["batch"]) == (name, 3, 1)
        ]
        for name in ("EAGLE-3 head", "draft model")
    )
    tokens, steps = ([[row[name] for row in rows] for rows in (head, draft)] for name in KEYS)
    said = (
        f"gives, in 4 bits, {tokens[0][0]:.2f} tokens a step, sampled {tokens[0][1]:.2f}, where the draft model of the"
        f" pair gives {tokens[1][0]:.2f} and {tokens[1][1]:.2f}"
    )
    text = " ".join(PAGES["docs/drafters.md"].split())
    assert said in text
    assert f"a step with the head takes {steps[0][0]:.1f} plain steps, with the draft model {steps[1][0]:.1f}," in text


def test_what_training_brings_a_real_model_is_what_was_measured() -> None:
    page = PAGES["docs/training.md"]
    lines = []
    for name, file in (("EAGLE-3 head", "head"), ("draft model", "draft")):
        curve = json.loads((RESULTS / f"train_drafter-smollm2-{file}.json").read_text(encoding="utf-8"))
        for number, epoch in enumerate(curve["epochs"], 1):
            rates = epoch["acceptance"]
            length = 1 + sum(math.prod(rates[: count + 1]) for count in range(len(rates)))
            accepted = " | ".join(f"{rate:.1%}" for rate in rates)
            lines.append(f"| {name} | {number} | {epoch['loss']:.2f} | {accepted} | {length:.2f} |")
    for name, drafter in (
        ("EAGLE-3 head", "EAGLE-3 head"),
        ("draft model of 4 layers", "further draft"),
        ("prompt lookup", "prompt lookup"),
        ("suffix decoding", "suffix"),
    ):
        [row] = [
            row
            for row in drafter_rows("smollm2-trained")["prompts"]
            if (row["drafter"], row["num_draft_tokens"], row["batch"], row["sampling"]) == (drafter, 3, 1, "greedy")
        ]
        lines.append(f"| {name} | {row['tokens_per_step']:.2f} | {row['step_in_plain_steps']:.2f} | {gain(row):.2f} |")
    by_task = json.loads((RESULTS / "acceptance_by_task-smollm2.json").read_text(encoding="utf-8"))["drafters"]
    for task in by_task["EAGLE-3 head"]:
        values = " | ".join(f"{tasks[task]['tokens_per_step']:.2f}" for tasks in by_task.values())
        lines.append(f"| {task.replace('_', ' ')} | {values} |")
    found = page.splitlines()
    assert [line for line in lines if line not in found] == []
    head = next(row for row in drafter_rows("smollm2-trained")["prompts"] if row["drafter"] == "EAGLE-3 head")
    said = f"gives {head['tokens_per_step']:.2f} tokens a step at K=3 and does not pay on a CPU: {gain(head):.2f} times"
    assert said in README
    text = " ".join(page.split())
    assert f"a step with the head costs {head['step_in_plain_steps']:.2f} plain ones" in text
    assert f"where they bring {head['tokens_per_step'] - 1:.2f}" in text


def test_what_a_draft_model_of_another_tokenizer_reaches_is_what_was_measured() -> None:
    report = json.loads((RESULTS / "bench_drafters-embedded-other-tokenizer.json").read_text(encoding="utf-8"))
    tokens = [
        f"{row['tokens_per_step']:.2f}"
        for name in ("further draft", "draft model")
        for row in report["workloads"]["prompts"]
        if (row["drafter"], row["batch"]) == (name, 1)
    ]
    said = (
        f"drafts {report['draft_coverage']:.1%} of its ids; with K=3 and single rows it gives {tokens[0]} tokens a"
        f" step, sampled {tokens[1]}, where the pair's own draft model gives {tokens[2]} and {tokens[3]}"
    ).replace("%", " %")
    assert said in " ".join(PAGES["docs/drafters.md"].split())


def test_the_4_bit_layer_is_that_of_the_results_file() -> None:
    report = json.loads((RESULTS / "bench_int4.json").read_text(encoding="utf-8"))
    wanted = (4096, 4096, "4 bits, inputs in 8")
    layers = {r["rows"]: r for r in report["results"] if (r["in"], r["out"], r["layer"]) == wanted}
    one, four = layers[1], layers[4]
    bytes_per_weight = one["gb_per_second"] * one["us"] * 1e3 / 4096**2
    said = f"takes {one['ratio_to_bfloat16']:.1f} times less than a bfloat16 one for a single row"
    said += f" and {bytes_per_weight:.2f} bytes a weight; four rows take {four['cost_in_one_row']:.2f} times as long"
    assert said in " ".join(PAGES["docs/formats.md"].split())


def test_layers_without_avx512_are_those_of_the_results_files() -> None:
    rows = []
    for threads, name in ((1, "bench_int4-avx2"), (2, "bench_int4-avx2-2threads")):
        report = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        assert report["threads"] == threads
        us = {(r["layer"], r["rows"]): r["us"] for r in report["results"] if (r["in"], r["out"]) == (4096, 4096)}
        layers = ("4 bits, inputs in 8", "llama.cpp, Q4_0", "8 bits, inputs in 8", "llama.cpp, Q8_0")
        for count in (1, 4, 8, 16):
            cells = [str(threads), str(count), *(f"{us[layer, count]:,.0f}" for layer in layers)]
            rows.append(f"| {' | '.join(cells)} |")
    section = PAGES["docs/performance.md"].partition("## On a CPU without AVX-512")[2].partition("\n## ")[0]
    assert "\n".join(rows) in section


def test_the_attention_is_that_of_the_results_file() -> None:
    report = json.loads((RESULTS / "bench_attention.json").read_text(encoding="utf-8"))
    by_key = {(r["slots"], r["attention"], r["queries"]): r for r in report["results"]}
    rows = []
    for slots in sorted({key[0] for key in by_key}):
        own = [f"{by_key[slots, 'specdec', queries]['us']:,.0f}" for queries in (1, 2, 4, 8)]
        theirs = [f"{by_key[slots, 'PyTorch', queries]['us']:,.0f}" for queries in (1, 4)]
        rates = [f"{by_key[slots, 'specdec', 4][name]:.0f}" for name in ("gb_per_second", "read_gb_per_second")]
        rows.append(f"| {' | '.join([f'{slots:,}', *own, *theirs, *rates])} |")
    page = PAGES["docs/performance.md"]
    section = page.partition("## Attention over long texts")[2].partition("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("| ")][1:] == rows
    for name in ("threads", "heads", "kv_heads", "dim"):
        assert f"{report[name]} " in section, name
    unused = [
        by_key[slots, "specdec, half unused", queries]["us"] / by_key[slots, "specdec", queries]["us"]
        for slots, name, queries in by_key
        if name == "specdec"
    ]
    assert f"{min(unused):.2f} to {max(unused):.2f} times" in section


def test_every_results_file_says_how_to_repeat_it() -> None:
    page = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    for file in RESULTS.glob("*.json"):
        assert f"(results/{file.name})" in page, file.name


@pytest.mark.parametrize("name", LINKING)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_the_glossary_names_attributes_that_exist() -> None:
    rows = [line.split(" | ") for line in PAGES["docs/glossary.md"].splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    stats = {field.name for field in fields(Stats)}
    modules = (heads, interfaces, lockstep, ragged, shared_vocabulary, steps, support)
    for term, _, attributes in rows:
        for name in re.findall(r"`([A-Za-z_]\w*(?:\.\w+)?)`", attributes):
            owner, _, attribute = name.partition(".")
            classes = {"Choice": Choice} | {cls: vars(module)[cls] for module in modules for cls in vars(module)}
            found = classes.get(owner)
            if attribute:
                assert attribute in {field.name for field in fields(found or Stats)}, f"{term}: {name}"
            else:
                assert found is not None or name in stats or name == "None", f"{term}: {name}"


def test_messages_of_the_troubleshooting_page_exist() -> None:
    """Every piece of a quoted message, apart from what stands for a value (…), is text of the code."""
    texts = []
    for path in [*(ROOT / "specdec").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts += [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    whole = "\n".join(texts)
    rows = [line for line in PAGES["docs/troubleshooting.md"].splitlines() if line.startswith(("| `", "| …"))]
    quoted = [re.match(r"\| `([^`]+)`", line) for line in rows]
    assert len(quoted) >= 8
    for match in filter(None, quoted):
        for piece in match[1].split("…"):
            assert piece.strip(" :") in whole, match[1]


def test_the_identical_texts_are_those_of_the_results_file() -> None:
    report = json.loads((RESULTS / "check_identity.json").read_text(encoding="utf-8"))
    same = report["identical"]
    counts = f"{same['K=2']} (K=2) and {same['K=5']} (K=5)"
    expected = f"Of {report['prompts']} held-out prompts the embedded pair continued {counts}"
    assert f"{expected} with {report['max_new_tokens']} ids" in " ".join(PAGES["docs/concepts.md"].split())


def test_the_quality_is_that_of_the_results_file() -> None:
    report = json.loads((RESULTS / "audit_quality.json").read_text(encoding="utf-8"))
    worse = report["perplexity"] / report["original_perplexity"] - 1
    expected = (
        f"is {report['mean_kl']:.4f} nats (mean KL) and {100 * worse:.1f} % of perplexity away from its original on"
    )
    assert f"{expected} {report['tokens']:,} held-out tokens" in " ".join(PAGES["docs/formats.md"].split())


def test_the_quality_of_smollm2_is_that_of_its_results_files() -> None:
    names = ("audit_quality-smollm2", "audit_quality-smollm2-inputs16")
    int8, inputs16 = (json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in names)
    page = " ".join(PAGES["docs/internals/four-bit.md"].split())
    assert (
        f"on {int8['tokens']:,} tokens of README.md from {inputs16['mean_kl']:.3f} nats to {int8['mean_kl']:.3f}"
        in page
    )
    before, after, original = inputs16["perplexity"], int8["perplexity"], int8["original_perplexity"]
    assert f"perplexity from {before:.1f} to {after:.1f} ({original:.1f} in bfloat16" in page


def test_the_certificates_are_those_of_their_files() -> None:
    rows = [line for line in PAGES["docs/audit.md"].splitlines() if "](../benchmarks/results/audit_lossless-" in line]
    certificates = {}
    for row in rows:
        (name,) = re.findall(r"results/audit_lossless-(\S+)\.json\)", row)
        found = certificates[name] = json.loads((RESULTS / f"audit_lossless-{name}.json").read_text(encoding="utf-8"))
        compared = [entry for entry in found["greedy"] if entry.get("server") != "reference"]
        identical, texts = (sum(entry[key] for entry in compared) for key in ("identical", "texts"))
        ids = found["sampled"]["groups"][0]["num_ids"]
        assert f"| {found['verdict']} | {identical:,} of {texts:,} | {ids:,} |" in row
        assert [control["name"] for control in found["controls"] if control["found"] is None] == (
            ["draft_temperature"] if name == "smollm2" else []
        )
        assert not any(control["found"] is False for control in found["controls"])
    assert set(certificates) >= {
        "embedded",
        "long",
        "smollm2",
        "transformers",
        "llamacpp-server",
        "transformers-server",
    }
    page = " ".join(PAGES["docs/audit.md"].split())
    impossible = re.search(r"(\d+) of (\d+) ids in such calls have probability 0", page)
    assert impossible is not None
    of_transformers = certificates["transformers"]
    [drawn] = [call["num_ids"] for call in of_transformers["sampled"]["calls"] if "state" in call["what"]]
    assert impossible.groups() == (str(of_transformers["impossible"]), str(drawn))
    shares = {
        (row["server"], row["load"]): f"{row['identical']} of {row['texts']}"
        for row in certificates["llamacpp-server"]["greedy"]
    }
    assert f"its own texts differ under load: {shares['reference', 8]}" in page
    assert f"alone, {shares['candidate', 1]} texts with drafts are those without" in page
    assert certificates["embedded"]["badge"] in README


def test_tokens_a_step_of_drafters_are_those_of_the_results_file() -> None:
    workloads = drafter_rows("embedded")
    for name, label in {
        "draft model": "the draft model",
        "prompt lookup": "prompt lookup",
        "suffix": "suffix decoding",
        "suffix + draft model": "both",
    }.items():
        found = [
            f"{row['tokens_per_step']:.2f}"
            for workload in ("prompts", "again")
            for sampling in ("greedy", "sampled")
            for row in workloads[workload]
            if (row["drafter"], row["num_draft_tokens"], row["batch"], row["sampling"]) == (name, 6, 1, sampling)
        ]
        assert f"| {label} | {' | '.join(found)} |" in PAGES["docs/drafters.md"]


def test_the_texts_of_other_engines_are_those_of_the_results_file() -> None:
    report = json.loads((RESULTS / "audit_peers-embedded.json").read_text(encoding="utf-8"))
    header, *rows = [f"| {' | '.join(row)} |" for row in audit_peers.table_rows(report)]
    section = PAGES["docs/audit.md"].partition("## Other engines")[2].partition("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("| ")] == [header, *rows]


def test_the_draws_of_other_engines_are_those_of_the_results_file() -> None:
    report = json.loads((RESULTS / "audit_peers-sampled.json").read_text(encoding="utf-8"))
    header, *rows = [f"| {' | '.join(row)} |" for row in audit_peers.draw_rows(report)]
    section = PAGES["docs/audit.md"].partition("## Sampled ids of other engines")[2].partition("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("| ")] == [header, *rows]
    workload = report["workload"]
    assert f"{workload['draws']} behind each of {workload['contexts']} contexts" in section
    assert [result["p_value"] <= ALPHA for result in report["results"]] == [
        result["is_control"] for result in report["results"]
    ]
    assert min(result["repetition_p_value"] for result in report["results"]) > ALPHA
    assert report["results"][-1]["is_control"]


def test_the_scores_of_lm_evaluation_harness_are_those_of_the_results_file() -> None:
    report = json.loads((RESULTS / "check_lm_eval-smollm2.json").read_text(encoding="utf-8"))
    assert report["plain"] == report["speculative"]
    assert all(report["same_answers"].values())
    scores = [f"{value:g}" for values in report["plain"].values() for value in values.values()]
    seconds = report["generation_s"]
    page = " ".join(PAGES["docs/audit.md"].split())
    said = f"scores of {', '.join(scores[:-1])} and {scores[-1]} either way; generating took {seconds['plain']:.1f} s"
    assert f"{said} by plain decoding and {seconds['speculative']:.1f} s with specdec" in page
    assert f"with {report['tokens_per_step']:.2f} tokens a step" in page


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
    from specdec_kernels.w8a16.kernel import CONFIGURATIONS as W8A16

    report = json.loads((ROOT / "benchmarks" / "results" / "check_kernels.json").read_text(encoding="utf-8"))
    assert report["failed"] == 0
    assert {result["triton"].rpartition(".")[0] for result in report["results"]} == {"3.6", "3.9"}
    checked = {(r["op"], r["configuration"], r["arch"], r["triton"]) for r in report["results"] if not r["failures"]}
    for triton in {result["triton"] for result in report["results"]}:
        for shipped in (*W4A16, *W8A16, *REJECTION, *ATTENTION):
            for arch in ARCHS:
                assert (shipped.op, shipped.name, arch, triton) in checked


def test_the_pinned_linters_are_those_of_the_constraints() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert re.findall(r"rev: v([\d.]+)", hooks) == re.findall(r"^ruff==([\d.]+)", constraints, flags=re.MULTILINE)
