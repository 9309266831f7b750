"""The report: its sentences in every case, the page in a browser, exports, and the --fail-if gate."""

from __future__ import annotations

import argparse
import base64
import csv
import io
import itertools
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from rich.console import Console

from specdec.core.stats import Choice
from specdec.core.steps import RowStep
from specdec.core.timing import StepTimes
from specdec.experiments.records import FORMAT, PLAIN, SPECULATIVE, Failure, Header, Run, Skipped, read_run
from specdec.experiments.report.compare import compare_runs
from specdec.experiments.report.estimates import Estimate
from specdec.experiments.report.exports import summary_table, to_json, to_markdown
from specdec.experiments.report.figures import METRICS, figures
from specdec.experiments.report.formatting import interval
from specdec.experiments.report.labels import labels, read_runs
from specdec.experiments.report.page import render_page
from specdec.pages import STYLES
from specdec_cli import report as command
from tests.helpers.command_line import parse
from tests.helpers.synthetic_runs import PROVENANCE, STEP_S, config, synthetic_run, write_run

SAMPLED = {"sampling__temperature": 1.0}
DEMO = synthetic_run()
WITHOUT_BASELINE = synthetic_run(prompts=3, baseline=False)
SECTIONS = ("Acceptance", "By task", "Choice of K", "Time and memory", "A sample, token by token", "Provenance")


def headline(run: Run) -> str:
    return re.search(r'<p class="lead">(.*?)</p>', render_page([run]), re.DOTALL)[1]  # type: ignore[index]


def speculative(speed: float) -> Run:
    """DEMO with the speculative calls at another speed."""
    records = [
        replace(record, seconds=replace(record.seconds, total_s=record.seconds.total_s / speed))
        if record.engine == SPECULATIVE
        else record
        for record in DEMO.records
    ]
    return replace(DEMO, records=records)


def without_drafts(run: Run) -> Run:
    """K = 0 in all steps, as "auto" may choose."""
    return replace(
        run, records=[replace(record, steps=[RowStep(0, 0, 0, 1, []) for _ in record.ids]) for record in run.records]
    )


def test_a_page_is_self_contained_and_deterministic() -> None:
    text = render_page([DEMO])
    assert text == render_page([DEMO])
    assert len(text.encode()) < 600_000
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert not re.search(r'(src|href)="(?!#|data:(,|text/csv))', text)
    for title in SECTIONS:
        assert re.search(rf"<h2>{title}</h2>", text), title
    identifiers = re.findall(r' id="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(identifiers)
    assert "&lt;b&gt;&amp;amp;&lt;/b&gt;" in text  # HTML in a prompt is escaped


def test_alt_texts_of_charts_contain_their_figures() -> None:
    text = render_page([DEMO])
    alts = re.findall(r'role="img" aria-label="([^"]+)"', text)
    assert len(alts) == text.count("<svg") == 8
    first = figures(DEMO).positions[0].conditional
    assert first.value is not None
    assert first.low is not None
    column = "conditional: all preceding accepted"
    drafts = figures(DEMO).positions[0].drafts
    expected = f"Acceptance by draft position. position 1: drafts that reach it {drafts:,}, {column} "
    expected += f"{100 * first.value:.1f}\u00a0% ({100 * first.low:.1f} to "
    assert alts[0].startswith(expected)
    for title in (
        "Tokens per step",
        "Conditional acceptance by task and position. task task a: position 1 ",
        "Acceptance along the output",
        "Mean acceptance length by K",
        "Speedup by K",
    ):
        assert any(alt.startswith(title) for alt in alts), title


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (
            DEMO,
            r"With a draft model drafting up to 4 tokens per step, .* 24 texts of up to 64 tokens at 1\.8\d times",
        ),
        (DEMO, r"\(95.% interval 1\.\d\d to 1\.\d\d\), and every text is identical, token for token"),
        (
            DEMO,
            r"of the draft tokens were accepted, so each step of the target emitted 3\.\d\d tokens on average",
        ),
        (speculative(0.4), r"0\.7\d times the speed of plain decoding, which is slower \(95.%"),
        (speculative(0.54), r"at (0\.9|1\.0)\d times the speed of plain decoding, not clearly faster or slower \(95.%"),
        (WITHOUT_BASELINE, r"tokens per second; plain decoding was not run, so the speedup is unknown\."),
        (synthetic_run(prompts=1), r"1 text of .* \(no interval for 1 prompt\), and the text is identical"),
        (synthetic_run(prompts=3, **SAMPLED), r"; texts are sampled, so they are not compared one by one\."),
        (
            replace(DEMO, records=[r for r in DEMO.records if r.engine == PLAIN]),
            r"The target model alone generated 24 texts of .* tokens per second, without draft tokens\.",
        ),
        (
            replace(DEMO, records=[*DEMO.records[:-1], replace(DEMO.records[-1], ids=[1])]),
            r", but 1 of 24 texts differ\.",
        ),
        (
            replace(
                DEMO,
                header=Header(PROVENANCE, config(drafter={"_target_": "specdec.drafters.prompt_lookup.PromptLookup"})),
            ),
            r"With prompt lookup drafting",
        ),
        (
            without_drafts(DEMO),
            r"With a draft model, the target model generated .* The drafter proposed no draft token\.",
        ),
    ],
)
def test_the_headline_states_the_result(run: Run, expected: str) -> None:
    assert re.search(expected, headline(run)), headline(run)


def verdict_of(*runs: Run) -> str:
    """The two sentences at the top of the page of one run, or of several."""
    text = render_page(runs)
    found = re.search(r'<p class="verdict">(.*?)</p>', text, re.DOTALL)
    assert found is not None
    return found[1]


def speed_of(run: Run) -> str:
    one = figures(run).metrics["speedup"]
    return f"{one.value:.2f}× the speed of plain decoding ({one.low:.2f} to {one.high:.2f}, 24 prompts)"


def test_the_verdict_of_a_run_that_pays() -> None:
    least, *_, most = sorted(values["speedup"].value or 0 for _, values in figures(DEMO).tasks.values())
    first, *_, last = (100 * (position.unconditional.value or 0) for position in figures(DEMO).positions)
    expected = (
        f"Speculation pays (K=4, greedy, batch size 1): {speed_of(DEMO)}, not clearly different between tasks"
        f" ({least:.2f}× to {most:.2f}×); {first:.1f}\u00a0% of drafts are accepted at position 1,"
        f" {last:.1f}\u00a0% up to position 4. Keep K=4: no other K up to 4 is predicted to be faster."
    )
    assert verdict_of(DEMO) == expected
    assert f"**{expected.split(' Keep')[0]}** Keep K=4" in to_markdown([DEMO])
    values = to_json([DEMO])
    assert values["verdict"] == values["runs"][0]["verdict"]
    assert values["verdict"]["pays"] is True
    assert expected.split(" Keep")[0] in str(summary_table([DEMO]).caption)


def test_the_verdict_names_no_task_of_few_prompts() -> None:
    assert "tasks" not in verdict_of(synthetic_run(tasks=4))  # six prompts each


def test_the_verdict_says_in_which_task_speculation_is_slower() -> None:
    good, bad = synthetic_run(prompts=10, tasks=1), nothing_pays(prompts=10, tasks=1)
    lower = synthetic_run(prompts=10, tasks=1, chances=(0.5,))
    others = [replace(r, prompt_id=f"b-{r.prompt_id}", task="chat") for r in bad.records]
    both = replace(good, records=[*good.records, *others])
    tasks = {task: values["speedup"].value for task, (_, values) in figures(both).tasks.items()}
    expected = f"most in task a ({tasks['task a']:.2f}×), but slower than plain decoding in chat ({tasks['chat']:.2f}×)"
    assert expected in verdict_of(both)
    better = replace(bad, records=[replace(r, prompt_id=f"b-{r.prompt_id}", task="chat") for r in lower.records])
    both = replace(good, records=[*good.records, *better.records])
    tasks = {task: values["speedup"].value for task, (_, values) in figures(both).tasks.items()}
    expected = f"most in task a ({tasks['task a']:.2f}×), least in chat ({tasks['chat']:.2f}×)"
    assert expected in verdict_of(both)


def test_the_verdict_of_a_run_that_is_too_small() -> None:
    run = synthetic_run(prompts=3)
    text = verdict_of(run)
    assert text.startswith(
        "It is not clear whether speculation pays (K=4, greedy, batch size 1):"
        f" {figures(run).metrics['speedup'].value:.2f}× the speed of plain decoding (3 prompts, too few for an"
        " interval)"
    )
    assert to_json([run])["verdict"]["pays"] is None


def with_draft_s(run: Run, draft_s: float) -> Run:
    """The run with a drafter that takes so many seconds for a token, in its records and in its step costs."""
    assert run.costs is not None
    records = []
    for record in run.records:
        own_s, seconds = draft_s * sum(step.drafted for step in record.steps), record.seconds
        total_s = seconds.total_s + own_s - seconds.draft_s
        records.append(replace(record, seconds=replace(seconds, draft_s=own_s, total_s=total_s)))
    by_k = [[draft_s * k] * run.costs.repetitions for k in range(len(run.costs.draft_s))]
    return replace(run, costs=replace(run.costs, draft_s=by_k), records=records)


def nothing_pays(k: int = 4, **changes: Any) -> Run:
    """A drafter that takes as long as the target and has half of its tokens accepted."""
    return with_draft_s(synthetic_run(chances=(0.5,), k=k, **changes), STEP_S)


def test_the_verdict_of_a_run_in_which_nothing_pays() -> None:
    run = nothing_pays()
    text, best = verdict_of(run), max(figures(run).what_if, key=lambda one: one.speedup.value or 0)
    assert text.startswith(f"Speculation does not pay (K=4, greedy, batch size 1): {speed_of(run)}")
    assert best.speedup.value is not None
    assert best.speedup.value < 1
    reached = f"{best.speedup.value:.2f}× ({best.speedup.low:.2f} to {best.speedup.high:.2f})"
    step = (STEP_S * 1.03 + STEP_S + 0.001) / (STEP_S + 0.001)
    assert text.endswith(
        f"Decode plainly, or take another drafter: no K is predicted to pay. The best, K=1, reaches {reached}: its step"
        f" takes {step:.2f} times as long as a plain one, so it needs a mean acceptance length of {step:.2f}, and has"
        f" {best.mean_acceptance_length.value:.2f}."
    ), text
    page = render_page([run])
    assert "best: 1" not in page
    assert re.search(r'<li class="panel card hero bad">\s*<span class="label">Speedup', page)


def test_the_verdict_of_several_settings_of_which_none_pays() -> None:
    """The comparison recommended "K=1, 0.94×", and "better" stood in teal at 0.61×."""
    runs = [nothing_pays(k, seed=k) for k in (4, 1)]
    assert verdict_of(*runs) == (
        f"No setting pays: the best, K=1, reaches {speed_of(runs[1])}. Decode plainly, or try another drafter."
    )
    four, one = (figures(run).metrics["speedup"].value or 0 for run in runs)
    assert four < one < 1
    row = re.search(r"speedup over plain decoding</th>(.*?)</tr>", render_page(runs), re.DOTALL)
    assert row is not None
    assert '<span class="mark ">△ higher, but below 1×</span>' in row[1]
    assert "better" not in row[1]


def test_the_verdict_of_several_settings_says_which_pay() -> None:
    runs = [synthetic_run(), nothing_pays(k=2, seed=2)]
    text = verdict_of(*runs)
    assert text.startswith(f"Speculation pays most with K=4: {speed_of(runs[0])}, ")
    assert text.endswith(
        f"clearly faster than the others; it does not clearly pay with K=2 ({speed_of(runs[1]).split()[0]}). Take K=4."
    )


def test_the_verdict_of_a_hopeless_drafter() -> None:
    dead = synthetic_run(chances=(0.0,), spread=0.0)
    text = verdict_of(dead)
    assert text.startswith(
        f"Speculation does not pay (K=4, greedy, batch size 1): {speed_of(dead)}, not clearly different"
    )
    assert text.endswith(
        "; 0.0\u00a0% of drafts are accepted at position 1, 0.0\u00a0% up to position 4. Decode plainly, or take"
        " another drafter: this one is accepted no more often than chance."
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda run: replace(run, costs=None), r"Measure other K to compare: step times were not measured, so none is"),
        (
            lambda run: with_draft_s(run, 0.0045),
            r"Keep K=4: K=\d is predicted to be fastest, 1.\d\d× \(.*\), but not clearly",
        ),
        (
            lambda run: slow_drafts(run, 3),
            r"Measure other K: 1.\d\d× \(.*\) was predicted for K=4, which this run contra",
        ),
        (lambda run: slow_drafts(run, 9), r"Decode plainly, or take another drafter: no K is predicted to pay"),
    ],
)
def test_the_advice(change: Callable[[Run], Run], expected: str) -> None:
    assert re.search(expected, verdict_of(change(DEMO))), verdict_of(change(DEMO))


def suggestion(run: Run) -> str:
    return re.search(r'<p class="summary">(.*?)</p>', render_page([run]), re.DOTALL)[1]  # type: ignore[index]


def slow_drafts(run: Run, factor: float) -> Run:
    assert run.costs is not None
    return replace(
        run, costs=replace(run.costs, draft_s=[[factor * seconds for seconds in by_k] for by_k in run.costs.draft_s])
    )


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (DEMO, "K=4, which this run used, is predicted to be fastest"),
        (DEMO, "K=4 is the largest K that this run drafted"),
        (
            slow_drafts(DEMO, 3),
            r"K=\d is predicted to be fastest: .* For this run&#39;s own K=4, \d.\d\d× is predicted and",
        ),
        (slow_drafts(DEMO, 3), "Within the prediction error and the intervals, .* may be as fast"),
        (slow_drafts(DEMO, 9), "No K is predicted to be faster than plain decoding; the best, K=1, reaches 0"),
        (
            synthetic_run(k=2, chances=(0.99,), spread=0.0),
            "faster than every other K by more than the prediction error",
        ),
        (synthetic_run(prompts=1), "There is no interval for this: it needs at least 8 prompts, and this run has 1"),
        (replace(DEMO, costs=None), "Step times were not measured, so a speedup cannot be predicted"),
    ],
)
def test_the_suggested_k(run: Run, expected: str) -> None:
    assert re.search(expected, suggestion(run)), suggestion(run)


def test_a_small_run_says_that_it_is_small() -> None:
    few = render_page([synthetic_run(prompts=3)])
    assert "This run is small: 3 prompts. An interval needs at least 8 prompts, so there is none" in few
    assert "95 %:" not in few
    assert " to " not in suggestion(synthetic_run(prompts=3)).replace("predicted to be", "")
    run = synthetic_run(prompts=9)
    speedup = figures(run).metrics["speedup"]
    assert speedup.value is not None
    assert speedup.low is not None
    assert speedup.high is not None
    width = 100 * (speedup.high - speedup.low) / speedup.value
    sentence = (
        f"This run is small: 9 prompts. The interval of its speedup over plain decoding is {width:.1f}\u00a0% wide;"
        " four times as many prompts would halve it."
    )
    assert sentence in render_page([run])
    assert sentence in to_markdown([run])
    assert "This run is small" not in render_page([DEMO])


def test_no_interval_has_two_equal_ends() -> None:
    """Where every draft is accepted, all resamples agree, which does not prove 100 %."""
    text = render_page([synthetic_run(chances=(1.0,), spread=0.0)])
    assert "100.0\u00a0%" in text
    for low, high in re.findall(r"([\d.]+) to ([\d.]+)\u00a0%", text):
        assert low != high
    assert interval(Estimate(0.99999, 0.99991, 0.99999), "%") == "99.99 to 100.00\u00a0%"


def test_step_times_that_do_not_rise_with_k_are_said() -> None:
    run = synthetic_run(noise=0.001)
    assert run.costs is not None
    assert "gets faster" not in suggestion(run)
    target_s = [list(by_k) for by_k in run.costs.target_s]
    target_s[3] = [0.6 * seconds for seconds in target_s[3]]
    clear = suggestion(replace(run, costs=replace(run.costs, target_s=target_s)))
    assert "The measured step gets faster with one more draft token, by more than the noise at K=3." in clear
    noisy = synthetic_run(prompts=24, k=8, noise=0.3)
    assert re.search(
        r"gets faster with one more draft token, within the noise at K=\d.* are not reliable", suggestion(noisy)
    )


def test_a_prediction_that_the_run_itself_contradicts_is_said() -> None:
    assert "do not rely on" not in suggestion(DEMO)
    run = slow_drafts(synthetic_run(noise=0.01), 3)
    expected = (
        r"The measured speedup is outside the interval of the prediction for K=4, 1\.\d\d to 1\.\d\d, so the step times"
    )
    assert re.search(expected, suggestion(run)), suggestion(run)


def test_the_automatic_choice_of_k_is_summarized_over_all_calls() -> None:
    run = synthetic_run(prompts=4, k=8)
    times = StepTimes([0.0] * 9, [1.0] * 9, [0.0] * 9)
    first = Choice([1, 0, 3, 0, 0, 0, 0, 0, 0], times, 0.8, 2.0, 1.9, 1.25)
    second = Choice([0, 0, 0, 12, 0, 0, 0, 0, 0], times, 0.4, 1.0, 1.1, None)
    run.header.config["num_draft_tokens"] = "auto"
    one, other, same, none = (record.call for record in run.of(SPECULATIVE))
    choices = {one: first, other: second, same: first, none: None}
    run.records = [
        record
        if record.engine == PLAIN
        # two of the records are rows of the same call
        else replace(record, choice=choices[record.call], call=one if record.call == same else record.call)
        for record in run.records
    ]
    line = (
        "K was chosen step by step: K=3 in 75\u00a0%, 2 in 19\u00a0% and 0 in 6\u00a0% of steps. The controller&#39;s"
        " own estimate, against plain steps between its drafts, was 1.30×; the speedup of this run is the one at the"
        " top."
    )
    assert line in render_page([run])
    assert line.replace("&#39;", "'") in to_markdown([run])
    assert render_page([run]).count("1.30×") == 1, "the estimate is in the section on K alone"
    assert "up to 8 tokens per step" in render_page([run])
    choice = to_json([run])["runs"][0]["controller"]
    assert choice["steps_by_k"] == [1, 0, 3, 12, 0, 0, 0, 0, 0]
    assert choice["acceptance"] == pytest.approx(0.5)
    without_choice = replace(run, costs=None)
    without_choice.records = [replace(record, choice=None) for record in run.records]
    assert "K was chosen step by step" not in render_page([without_choice])
    assert "which this run used" not in render_page([run]), "the run has no constant K"
    assert "measured, this run" not in render_page([run])


def test_caveats_skipped_prompts_and_failures_are_reported() -> None:
    run = replace(
        DEMO,
        torn=True,
        header=Header(PROVENANCE | {"dirty": True, "processes": 2}, config(workload={"limit": 30})),
        skipped=[Skipped(f"long-{n}", "task a", 0, 0, "too long") for n in range(3)],
        failures=[Failure("bad", "task a", 0, 0, SPECULATIVE, "RuntimeError: no")],
    )
    text = render_page([run])
    for expected in (
        "interrupted after 24 prompts of at most 30 and 48 records",
        "the commit alone does not reproduce this run",
        "2 processes ran at the same time",
        "1 call failed; failed calls are in no figure",
        "3 prompts skipped: “too long”",
        "1 call failed, speculative: “RuntimeError: no”",
    ):
        assert expected in text
    slow = replace(DEMO.records[3], seconds=replace(DEMO.records[3].seconds, prefill_s=2.0, total_s=2.5))
    assert "1 call took more than 3 times the usual time for its length" in render_page(
        [replace(DEMO, records=[*DEMO.records[:3], slow, *DEMO.records[4:]])]
    )
    text = render_page([DEMO])
    assert 'class="caveat"' not in text
    assert "<h2>Skipped and failed</h2>" not in text


def test_a_draft_model_that_is_of_no_use_is_a_caveat() -> None:
    """Ids are drawn of 1,000, so chance is 0.1 %; drafters without a model are never of no use."""
    warning = "The draft model is of no use: 0.0% of"
    dead = synthetic_run(chances=(0.0,), spread=0.0)
    assert warning in render_page([dead])
    lookup = {"_target_": "specdec.drafters.prompt_lookup.PromptLookup"}
    assert "of no use" not in render_page([synthetic_run(chances=(0.0,), spread=0.0, drafter=lookup)])
    assert "of no use" not in render_page([synthetic_run(chances=(0.05,), spread=0.0)])


def test_suffix_decoding_with_a_draft_model_is_named() -> None:
    run = synthetic_run(drafter__path="models/draft", drafter___target_="specdec.experiments.config.SuffixAndModel")
    assert headline(run).startswith("With suffix decoding and a draft model drafting up to")


FORMAT_1 = Path(__file__).parents[1] / "data" / "run-format-1"


def test_a_run_in_format_1_is_reported_with_the_current_definitions_and_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its reports stated 2.67: 1 + 10 accepted ids / 6 steps, two without a draft, one that ends on a draft id."""
    note = "This run was recorded in format 1, whose counts include steps without a draft"
    (old,) = read_runs([FORMAT_1])
    assert figures(old).metrics["mean_acceptance_length"].value == 13 / 4
    assert figures(old).metrics["tokens_per_step"].value == 15 / 6
    assert note in render_page([old])
    assert f"> {note}" in to_markdown([old])
    values = to_json([old])["runs"][0]
    assert (values["record_format"], values["metrics"]["mean_acceptance_length"]["value"]) == (1, 13 / 4)
    assert [caveat.startswith(note) for caveat in values["caveats"]] == [True, False]  # the other: the run is small
    assert command.run(parsed(str(FORMAT_1), "-o", str(tmp_path / "page.html"))) == 0
    assert "recorded in format 1; the figures are recomputed from its steps" in " ".join(
        capsys.readouterr().out.split()
    )

    new = read_run(write_run(replace(old, header=replace(old.header, version=FORMAT)), tmp_path / "new"))
    assert note not in render_page([new])
    assert "recorded in format" not in str(summary_table([new]).caption)
    assert all(
        change.change.value == 0 for change in compare_runs(old, new).values() if change.change.value is not None
    )
    both = to_markdown([old, new])
    assert "Runs recorded in format 1 are compared with the current definitions" in both
    assert both.count(note) == 1
    paths = [str(FORMAT_1), str(tmp_path / "new")]
    assert (
        command.run(
            parsed(*paths, "--markdown", "--fail-if", "mean_acceptance_length<0", "--fail-if", "tokens_per_step<0")
        )
        == 0
    )


def test_the_provenance_has_hashes_of_prompts_and_config() -> None:
    def found(run: Run) -> tuple[str, str]:
        origin = to_json([run])["runs"][0]["provenance"]
        return origin["prompts_sha256"], origin["config_sha256"]

    run = synthetic_run(prompts=2)
    prompts, settings = found(run)
    assert prompts in render_page([run])
    assert found(synthetic_run(prompts=2, name="other", folder="elsewhere", seed=5)) == (prompts, settings)
    assert found(synthetic_run(prompts=3))[0] != prompts
    assert found(synthetic_run(prompts=2, k=3)) == (prompts, found(synthetic_run(prompts=2, k=3))[1])
    assert found(synthetic_run(prompts=2, k=3))[1] != settings
    unknown = replace(run, header=replace(run.header, provenance=PROVENANCE | {"commit": None}))
    assert "<dt>commit</dt><dd>unknown</dd>" in render_page([unknown])


def test_measured_memory_is_compared_with_its_prediction() -> None:
    text = render_page([DEMO])
    assert re.search(r"measured relative to predicted</th>\s*<td>\+3\.6\u00a0%", text)
    assert "target KV cache" in text


def test_the_time_of_a_step_is_compared_with_reading_the_weights() -> None:
    assert "Reading the" not in render_page([DEMO])
    assert DEMO.costs is not None
    known = replace(DEMO, costs=replace(DEMO.costs, weights_bytes=50_000_000, weights_read_s=0.0025))
    text = render_page([known])
    assert (
        "Reading the 50.0 MB of the target&#39;s weights alone takes 2.50\u00a0ms on this device (20.0 GB/s),"
        " 25.0\u00a0% of its forward in a plain step, 10.0\u00a0ms: no forward can be much faster than that."
    ) in text
    assert "reading the target&#39;s weights" in text


def test_labels_are_the_settings_that_differ() -> None:
    lookup = {"_target_": "specdec.drafters.prompt_lookup.PromptLookup", "max_ngram": 3}
    runs = [synthetic_run(prompts=2, k=k) for k in (1, 2)]
    assert labels(runs) == ["K=1", "K=2"]
    assert labels([runs[0], synthetic_run(prompts=2, k=1, drafter=lookup)]) == [
        "drafter models/draft", "drafter prompt lookup",
    ]  # fmt: skip
    assert labels([runs[0], synthetic_run(prompts=2, k=1, sampling__temperature=0.5)]) == [
        "T=0.0", "T=0.5",
    ]  # fmt: skip
    named = [synthetic_run(prompts=2, name=name, folder=f"runs/{name}") for name in ("before", "after")]
    assert labels(named) == ["before", "after"]
    same = [synthetic_run(prompts=2, folder=f"runs/{name}") for name in ("before", "after")]
    assert labels(same) == ["synthetic (before)", "synthetic (after)"]
    assert labels(runs[:1]) == ["synthetic"]


def test_runs_with_other_k_are_points_next_to_the_predictions() -> None:
    runs = [synthetic_run(prompts=9, k=k, seed=k) for k in (4, 2)]
    text = render_page(runs)
    measured = figures(runs[1]).metrics["mean_acceptance_length"].value
    assert measured is not None
    alt = re.search(r'aria-label="(Mean acceptance length by K[^"]+)"', text)[1]  # type: ignore[index]
    assert re.search(rf"K 2: predicted [\d.]+ \([^)]+\), measured {measured:.2f}", alt), alt
    assert "measured, other runs" in text
    assert re.search(r"Of the measured runs, K=4 was fastest: 1\.\d\d× \(", text)
    assert "measured, other runs" not in render_page([runs[0], synthetic_run(prompts=9, k=2, batch_size=2)])


def test_the_comparison_marks_clear_differences() -> None:
    runs = [synthetic_run(speed=1.0), synthetic_run(speed=0.5, seed=1)]
    text = render_page(runs)
    assert "2 runs compared" in text
    assert '<span class="mark worse">▼ worse</span>' in text
    assert "compare speedups, not times" in text
    assert text.count('<details class="run"') == 2
    assert text.count('<details class="run" open>') == 1
    assert 'class="mark' not in render_page([DEMO, DEMO])
    assert 'class="verdict"' not in render_page([WITHOUT_BASELINE, WITHOUT_BASELINE])
    of_k = to_markdown([synthetic_run(k=2), synthetic_run(k=4)])
    assert re.search(r"mean acceptance length \| .* differs \|", of_k)  # a larger K, not a better drafter


def tables_of(text: str) -> dict[str, list[dict[str, str]]]:
    """The rows of each CSV file that a page offers, by its name."""
    links = re.findall(r'<a class="csv" download="([^"]+)" href="data:text/csv;charset=utf-8,([^"]+)"', text)
    return {name: list(csv.DictReader(io.StringIO(unquote(data)))) for name, data in links}


def test_every_table_is_a_csv_file_with_the_values_at_full_precision() -> None:
    tables, found = tables_of(render_page([DEMO])), figures(DEMO)
    assert list(tables) == [
        "acceptance-by-draft-position.csv", "tokens-per-step.csv", "acceptance-along-the-output.csv", "by-task.csv",
        "conditional-acceptance-by-task-and-position.csv", "mean-acceptance-length-by-k.csv", "speedup-by-k.csv",
        "time-per-token-ms.csv", "time-of-a-step-ms.csv", "peak-memory.csv",
    ]  # fmt: skip
    first = tables["acceptance-by-draft-position.csv"][0]
    conditional, name = found.positions[0].conditional, "conditional: all preceding accepted"
    assert [float(first[column]) for column in (name, f"{name}, low end of 95 % interval")] == [
        conditional.value, conditional.low,
    ]  # fmt: skip
    *_, overall = tables["by-task.csv"]
    assert overall["task"] == "all"
    assert float(overall["speedup over plain decoding, high end of 95 % interval"]) == found.metrics["speedup"].high
    shares = [float(row["share"]) for row in tables["tokens-per-step.csv"]]
    assert sum(shares) == pytest.approx(1)
    compared = tables_of(render_page([DEMO, replace(speculative(0.5), folder=Path("slow"))]))["metrics-of-all-runs.csv"]
    assert float(list(compared[0].values())[1]) == found.metrics["speedup"].value


def test_several_runs_are_lines_against_k() -> None:
    runs = [
        synthetic_run(prompts=8, k=k, seed=k, sampling__temperature=temperature)
        for temperature in (0.0, 1.0)
        for k in (4, 1)
    ]
    text = render_page(runs)
    rows = tables_of(text)["all-runs-speedup-over-plain-decoding-by-k.csv"]
    assert [(row["settings"], row["K"]) for row in rows] == [
        ("T=0.0", "1"),
        ("T=0.0", "4"),
        ("T=1.0", "1"),
        ("T=1.0", "4"),
    ]
    assert float(rows[1]["speedup over plain decoding"]) == figures(runs[0]).metrics["speedup"].value
    assert "● T=0.0" in text
    assert "■ T=1.0" in text
    of_temperature = render_page([runs[0], runs[2]])
    assert "by-k.csv" not in of_temperature.partition('<details class="run"')[0]


# Machado, Oliveira and Fernandes (2009), severity 1, in linear RGB
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(color: str, vision: Any) -> Any:
    """CIE L*a*b* of a color as it is seen."""
    rgb = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = XYZ @ np.clip(np.array(vision) @ linear, 0, 1) / XYZ.sum(axis=1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_colors_of_one_chart_differ_for_colorblind_readers(vision: str) -> None:
    """Two just noticeable differences are 4.6; lines also differ by their markers."""
    style = (STYLES / "style.css").read_text(encoding="utf-8")
    schemes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    ]
    assert len(schemes) == 2
    for scheme in schemes:
        parts = [name for name in scheme if name.startswith("part-")]
        assert len(parts) == 5
        for group in (["main", "second", "third", "plain"], parts):
            for one, other in itertools.combinations(group, 2):
                difference = np.linalg.norm(lab(scheme[one], VISION[vision]) - lab(scheme[other], VISION[vision]))
                assert difference > 15, (one, other, difference)


def test_the_heat_map_needs_several_tasks() -> None:
    assert "by task and position" in render_page([DEMO])
    assert "by task and position" not in render_page([synthetic_run(tasks=1)])


def test_markdown_and_json_contain_the_figures() -> None:
    runs = [synthetic_run(prompts=9, k=k, seed=k) for k in (4, 2)]
    text, values = to_markdown(runs), to_json(runs)
    json.dumps(values, allow_nan=False)
    length = figures(runs[0]).metrics["mean_acceptance_length"]
    assert f"| mean acceptance length | {length.value:.2f} | {length.low:.2f} to {length.high:.2f} |" in text
    assert "| task a | 3 |" in text
    assert "K=4, which this run used" in text
    first = values["runs"][0]
    assert first["metrics"]["mean_acceptance_length"] == {
        "value": length.value, "low": length.low, "high": length.high, "prompts": 9,
    }  # fmt: skip
    assert first["tasks"]["task a"]["prompts"] == 3
    assert first["positions"][3]["position"] == 4
    assert values["differences"][0]["metrics"]["mean_acceptance_length"]["before"] == length.value


def test_markdown_and_json_need_neither_matplotlib_nor_jinja2(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "jinja2"):
        monkeypatch.setitem(sys.modules, name, None)
    to_markdown([DEMO])
    to_json([DEMO])


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_a_missing_package_is_an_error_that_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf'{name}; pip install "specdec-lossless\[experiments\]"'):
        render_page([DEMO])


@pytest.mark.parametrize("runs", [[DEMO], [DEMO, speculative(0.5)], [WITHOUT_BASELINE]])
def test_the_summary_fits_80_columns(runs: list[Run]) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(runs))
    text = console.export_text()
    assert "…" not in text
    assert "3." in text


def test_the_summary_counts_skipped_prompts_and_failures() -> None:
    run = replace(
        DEMO, skipped=[Skipped("long", "t", 0, 0, "too long")], failures=[Failure("a", "t", 0, 0, PLAIN, "no")] * 2
    )
    counts = "1 prompt skipped and 2 calls failed; the report gives the reasons"
    assert str(summary_table([run]).caption).splitlines()[-1] == counts
    assert counts not in str(summary_table([DEMO]).caption)


# The command


def parsed(*arguments: str) -> argparse.Namespace:
    return parse(["report", *arguments])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, one with a worse drafter, and a sweep."""
    base = tmp_path_factory.mktemp("runs")
    write_run(synthetic_run(prompts=10), base / "good")
    write_run(synthetic_run(prompts=10, chances=(0.7, 0.5)), base / "bad")
    write_run(synthetic_run(prompts=5), base / "fewer")
    write_run(synthetic_run(prompts=3), base / "small")
    write_run(synthetic_run(prompts=10, baseline=False), base / "no-baseline")
    for number in (10, 9):
        write_run(synthetic_run(prompts=2, k=number), base / "sweep" / str(number))
    (base / "sweep" / "multirun.yaml").touch()
    return base


def test_the_page_is_written_to_the_run_s_folder(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(parsed(str(folders / "good"))) == 0
    page = folders / "good" / "report.html"
    out = capsys.readouterr().out
    assert f"written: {page}" in out
    assert "mean acceptance length" in out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(path.name for path in page.parent.iterdir()) == ["records.jsonl", "report.html"]


def test_a_sweep_folder_gives_its_runs_in_order(folders: Path) -> None:
    runs = read_runs([folders / "sweep"])
    assert [run.header.config["num_draft_tokens"] for run in runs] == [9, 10]
    assert command.run(parsed(str(folders / "sweep"))) == 0
    assert "2 runs compared" in (folders / "sweep" / "report.html").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="contains no records"):
        read_runs([folders / "nowhere"])


def test_markdown_and_json_go_to_stdout_or_a_file(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.run(parsed(str(folders / "good"), "--markdown")) == 0
    assert capsys.readouterr().out.startswith("# synthetic\n")
    assert command.run(parsed(str(folders / "good"), "--json")) == 0
    assert json.loads(capsys.readouterr().out)["checks"] == []
    assert command.run(parsed(str(folders / "good"), "--json", "-o", str(tmp_path / "figures.json"))) == 0
    assert json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["runs"]
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_nothing_is_written_where_runs_cannot_be_compared_or_the_file_cannot_be_written(
    folders: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="cannot be compared: they have 10 and 5"):
        command.run(parsed(str(folders / "good"), str(folders / "fewer"), "-o", str(tmp_path / "page.html")))
    with pytest.raises(ValueError, match="cannot be compared"):
        summary_table(read_runs([folders / "good", folders / "fewer"]))
    with pytest.raises(ValueError, match="is no folder"):
        command.run(parsed(str(folders / "good"), "-o", str(tmp_path / "missing" / "page.html")))
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        command.run(parsed(str(folders / "good"), "-o", str(tmp_path / "taken")))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("runs", "condition", "code"),
    [
        (("good", "bad"), "mean_acceptance_length<-5%", 1),
        (("good", "bad"), "mean_acceptance_length < -60%", 0),
        (("bad", "good"), "mean_acceptance_length<-5%", 0),
        (("bad", "good"), "mean_acceptance_length>5%", 1),
        (("good", "bad"), "draft_acceptance_rate<-0.02", 1),
        (("good", "bad"), "draft_acceptance_rate<-.9", 0),
        (("good", "bad"), "token_ms>+0.1", 1),
        (("good", "bad"), "token_ms>50", 0),
    ],
)
def test_the_exit_code_of_fail_if(
    runs: tuple[str, str], condition: str, code: int, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(folders / name) for name in runs]
    assert command.run(parsed(*paths, "--markdown", "--fail-if", condition, "--fail-if", "tokens_per_s>900%")) == code
    *_, first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        rf"- {re.escape(condition)} \[.*\]: .* → .*, change .* \(.* to .*\): {'fails' if code else 'holds'}", first
    ), first
    assert second.endswith(": holds")


def test_the_checks_are_in_json_and_on_stderr(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(folders / name) for name in ("good", "bad")]
    assert command.run(parsed(*paths, "--json", "--fail-if", "mean_acceptance_length<-5%")) == 1
    out, err = capsys.readouterr()
    check = json.loads(out)["checks"][0]
    assert check["fails"] is True
    assert check["change"]["high"] < 0
    assert err == check["summary"] + "\n"


@pytest.mark.parametrize(
    ("runs", "condition", "expected"),
    [
        (("good",), "speedup<-5%", "per cent are of a change: name two runs"),
        (
            ("small",),
            "speedup.low<1.0",
            r"has no interval, so there is no \.low to check \(an interval needs at least 8",
        ),
        (("good", "bad"), "speedup.median<1", "is not NAME<NUMBER"),
        (("good", "bad"), "speed<-5%", "no metric 'speed'; known are speedup, tokens_per_s"),
        (("good", "bad"), "speedup=-5%", "is not NAME<NUMBER"),
        (("good", "bad"), "speedup<fast", "is not NAME<NUMBER"),
        (("good", "no-baseline"), "speedup<-5%", "has no value in the run"),
        (("no-baseline", "good"), "speedup<-5%", "has no value in the run"),
    ],
)
def test_a_condition_that_cannot_be_evaluated_is_an_error(
    runs: tuple[str, ...], condition: str, expected: str, folders: Path
) -> None:
    with pytest.raises(ValueError, match=expected):
        command.run(parsed(*(str(folders / name) for name in runs), "--markdown", "--fail-if", condition))


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ("speedup.low<1.0", 0),
        ("speedup.low<1.8", 1),  # the value is above it, the interval is not
        ("speedup<1.8", 0),
        ("speedup.high>1.8", 1),
        ("identical.low<1", 0),  # all texts are identical, in all resamples
        ("token_ms.high>50", 0),
    ],
)
def test_fail_if_of_a_single_run(condition: str, code: int, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speedup = figures(read_run(folders / "good")).metrics["speedup"]
    assert speedup.low is not None
    assert speedup.value is not None
    assert 1 < speedup.low < 1.8 < speedup.value
    assert command.run(parsed(str(folders / "good"), "--markdown", "--fail-if", condition)) == code
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"- {condition} [synthetic]: ")
    assert last.endswith("fails" if code else "holds")


def test_fail_if_of_the_interval_of_a_change(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """mean_acceptance_length falls by about a third: a limit between the two ends separates them."""
    paths = [str(folders / name) for name in ("good", "bad")]
    change = compare_runs(*map(read_run, map(Path, paths)))["mean_acceptance_length"].relative
    assert change.low is not None
    assert change.high is not None
    middle = (change.low + change.high) / 2
    for bound, code in (("low", 1), ("high", 0)):
        assert (
            command.run(parsed(*paths, "--json", "--fail-if", f"mean_acceptance_length.{bound}<{middle:.2f}%")) == code
        )
        check = json.loads(capsys.readouterr().out)["checks"][0]
        assert check["change"][bound] == getattr(change, bound)
        assert check["fails"] is bool(code)


def on_machine(run: Run, **changes: Any) -> Run:
    return replace(run, header=replace(run.header, provenance=PROVENANCE | changes))


def test_a_comparison_of_two_machines_marks_machine_and_versions() -> None:
    """The second machine is twice as fast; that is no merit of the run."""
    first = synthetic_run(name="laptop", folder="runs/laptop")
    second = synthetic_run(name="server", folder="runs/server", speed=2.0, seed=1)
    second = on_machine(second, device="NVIDIA H200", threads=8, torch="2.13.0", triton="3.6.0")
    text = render_page([first, second])
    assert (
        "These runs were not recorded on one machine: device x86_64, AVX512 (laptop), NVIDIA H200 (server); threads 1"
        " (laptop), 8 (server). Compare acceptance"
    ) in text
    assert "These runs were not recorded with the same versions: torch 2.12.0 (laptop), 2.13.0 (server)." in text
    row = {
        label: re.search(rf'<th scope="row">{label}</th>(.*?)</tr>', text, re.DOTALL) for label in ("device", "torch")
    }
    assert all(found is not None and "≠ differs" in found[1] for found in row.values())
    times = re.search(r'<th scope="row">tokens per second</th>(.*?)</tr>', text, re.DOTALL)
    assert times is not None
    assert "≠ differs" in times[1]
    assert "better" not in times[1]
    assert "| device | x86_64, AVX512 | NVIDIA H200 differs |" in to_markdown([first, second])
    same = render_page([first, on_machine(second)])
    assert "compare speedups, not times" in same
    of_batches = [first, synthetic_run(speed=2.0, seed=1, batch_size=4)]
    assert "compare speedups, not times" not in render_page(of_batches), "plain decoding of another batch size differs"
    assert "not recorded on one machine" not in same
    assert "not recorded with the same versions" not in same
    assert re.search(r'<th scope="row">tokens per second</th>.*?▲ better', same, re.DOTALL)


def test_a_relative_condition_on_0_is_an_error(tmp_path: Path) -> None:
    records = [r if r.engine == SPECULATIVE else replace(r, ids=[0]) for r in synthetic_run(prompts=3).records]
    different = write_run(replace(synthetic_run(prompts=3), records=records), tmp_path / "different")
    same = write_run(synthetic_run(prompts=3), tmp_path / "same")
    with pytest.raises(ValueError, match="was 0, of which there are no per cent; leave % out"):
        command.run(parsed(str(different), str(same), "--markdown", "--fail-if", "identical<-5%"))
    assert command.run(parsed(str(different), str(same), "--markdown", "--fail-if", "identical<0")) == 0
    assert command.run(parsed(str(same), str(different), "--markdown", "--fail-if", "identical<0")) == 1


def test_help_and_docs_name_every_metric(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    out = capsys.readouterr().out
    page = (Path(__file__).parents[2] / "docs" / "figures.md").read_text(encoding="utf-8")
    for name in METRICS:
        assert name in out
        assert f"`{name}`" in page


# The page in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
CONTRAST = """
const parse = text => text.match(/[\\d.]+/g).map(Number);
const background = node => {
  for (; node; node = node.parentElement) {
    const color = parse(getComputedStyle(node).backgroundColor);
    if (color.length < 4 || color[3] > 0) return color;
  }
  return [255, 255, 255];
};
const linear = part => part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4;
const light = color => {
  const [r, g, b] = color.slice(0, 3).map(part => linear(part / 255));
  return .2126 * r + .7152 * g + .0722 * b;
};
return [...document.querySelectorAll(arguments[0])].map(node => {
  const style = getComputedStyle(node);
  const color = parse(node.closest("svg") ? style.fill : style.color);
  const [a, b] = [light(color), light(background(node))].sort((x, y) => y - x);
  return [(a + .05) / (b + .05), node.textContent.trim().slice(0, 40)];
});
"""
OVERLAPS = """
const found = [];
for (const svg of document.querySelectorAll("svg")) {
  const boxes = [...svg.querySelectorAll("text")].map(text => [text.getBoundingClientRect(), text.textContent]);
  boxes.forEach(([a, first], index) => boxes.slice(index + 1).forEach(([b, second]) => {
    const [x, y] = [a.left < b.right - 1 && b.left < a.right - 1, a.top + 2 < b.bottom - 2 && b.top + 2 < a.bottom - 2];
    if (x && y) found.push([first, second]);
  }));
}
return found;
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="page tests need selenium: pip install selenium")
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("page tests need chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """URIs of pages: one run, one of a single prompt with long drafts, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    runs_by_name = {
        "one": [synthetic_run(prompts=30, tasks=11, **SAMPLED)],
        "long": [synthetic_run(prompts=1, k=16, chances=(0.6,))],
        "several": [synthetic_run(prompts=8, k=k, seed=k) for k in (1, 2, 4, 3)],
    }
    for name, runs in runs_by_name.items():
        (folder / f"{name}.html").write_text(render_page(runs), encoding="utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in runs_by_name}


def open_page(driver: Any, uri: str, width: int = 1280, scheme: str = "light") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    driver.get(uri)


@pytest.mark.parametrize("name", ["one", "long", "several"])
def test_the_page_opens_without_errors_or_requests(name: str, driver: Any, pages: dict[str, str]) -> None:
    open_page(driver, pages[name])
    assert driver.get_log("browser") == []
    assert driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
    driver.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
    boxes = driver.execute_script(
        "return [...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect())"
        ".map(box => [box.width, box.height])"
    )
    assert boxes
    assert all(width > 200 and height > 60 for width, height in boxes)
    assert driver.execute_script(OVERLAPS) == []


@pytest.mark.parametrize("name", ["one", "long", "several"])
def test_a_phone_scrolls_vertically_only(name: str, driver: Any, pages: dict[str, str]) -> None:
    open_page(driver, pages[name], width=390)
    driver.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    smallest = driver.execute_script(
        "return Math.min("
        "...[...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height))"
    )
    assert smallest >= 10
    assert driver.execute_script(OVERLAPS) == []


def test_both_color_schemes_have_enough_contrast(driver: Any, pages: dict[str, str]) -> None:
    backgrounds = []
    for scheme in ("light", "dark"):
        open_page(driver, pages["several"], scheme=scheme)
        backgrounds.append(driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
        contrasts = driver.execute_script(
            CONTRAST,
            "p, dt, dd, h1, h2, h3, .card span, th, td, small, .mark, .legend li, .sample span, svg text, summary",
        )
        assert len(contrasts) > 200
        assert min(contrasts)[0] >= 4.5, (scheme, min(contrasts))
    assert backgrounds[0] != backgrounds[1]


def tasks_in_order(driver: Any, column: int) -> list[str]:
    script = (
        "return [...document.querySelector('.tasks').tBodies[0].rows].map(row => row.cells[arguments[0]].dataset.value)"
    )
    return list(driver.execute_script(script, column))


def sort_by_click(driver: Any, button: Any) -> None:
    button.click()


def sort_by_key(driver: Any, button: Any) -> None:
    driver.execute_script("arguments[0].focus()", button)
    driver.switch_to.active_element.send_keys("\ue007")  # Enter


@pytest.mark.parametrize("press", [sort_by_click, sort_by_key])
def test_tasks_are_sorted_by_click_and_by_keyboard(
    press: Callable[..., None], driver: Any, pages: dict[str, str]
) -> None:
    open_page(driver, pages["one"])
    headers = driver.find_elements("css selector", ".tasks thead th")
    buttons = driver.find_elements("css selector", ".tasks thead button")
    assert tasks_in_order(driver, 0) == sorted(tasks_in_order(driver, 0))
    for reverse, direction in ((True, "descending"), (False, "ascending")):
        press(driver, buttons[3])
        values = [float(value) for value in tasks_in_order(driver, 3)]
        assert values == sorted(values, reverse=reverse)
        assert len(set(values)) > 5
        assert [header.get_attribute("aria-sort") for header in headers] == [None, None, None, direction, None, None]
    press(driver, buttons[0])
    assert tasks_in_order(driver, 0) == sorted(tasks_in_order(driver, 0))
    last = driver.execute_script(
        "return document.querySelector('.tasks').rows[document.querySelector('.tasks').rows.length - 1]"
    )
    assert last.text.startswith("all")


def test_a_token_shows_both_distributions_to_pointer_and_keyboard(driver: Any, pages: dict[str, str]) -> None:
    action_chains = pytest.importorskip("selenium.webdriver").ActionChains
    open_page(driver, pages["one"])
    tokens, odds = driver.find_elements("css selector", ".sample [data-odds]"), driver.find_element("id", "odds")
    assert not odds.is_displayed()
    action_chains(driver).move_to_element(tokens[2]).perform()
    assert odds.is_displayed()
    assert [line for line in odds.text.splitlines() if line in ("target", "draft")] == ["target", "draft"]
    assert "recovered" in odds.text
    assert "wrong" in odds.text
    assert "70.0 %" in odds.text
    widths = driver.execute_script("return [...arguments[0].querySelectorAll('b')].map(bar => bar.offsetWidth)", odds)
    assert widths[0] > widths[1] > 0
    action_chains(driver).move_to_element(driver.find_element("tag name", "h1")).perform()
    assert not odds.is_displayed()

    assert [token.get_attribute("tabindex") for token in tokens].count("0") == 1  # one stop, then arrows
    driver.execute_script("arguments[0].focus()", tokens[0])
    assert odds.is_displayed()
    before = odds.text
    tokens[0].send_keys("\ue014")  # right
    assert driver.switch_to.active_element == tokens[1]
    assert odds.text != before
    tokens[1].send_keys("\ue010")  # end
    assert driver.switch_to.active_element == tokens[-1]
    tokens[-1].send_keys("\ue00c")  # escape
    assert not odds.is_displayed()
    driver.execute_script("arguments[0].focus()", tokens[7])
    assert "draft: no draft token here" in odds.text  # a bonus token


def test_a_table_is_downloaded_as_csv(driver: Any, pages: dict[str, str], tmp_path: Path) -> None:
    behavior = {"behavior": "allow", "downloadPath": str(tmp_path), "eventsEnabled": False}
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", behavior)
    open_page(driver, pages["one"])
    link = driver.find_element("css selector", 'a.csv[download="by-task.csv"]')
    driver.execute_script("arguments[0].scrollIntoView(); arguments[0].focus()", link)
    link.send_keys("\ue007")  # Enter
    file = tmp_path / "by-task.csv"
    for _ in range(100):
        if file.exists() and file.stat().st_size:
            break
        time.sleep(0.05)
    rows = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"))))
    assert [row["task"] for row in rows] == [*tasks_in_order(driver, 0), "all"]


def test_it_prints_in_light_colors_with_all_details_open(driver: Any, pages: dict[str, str]) -> None:
    open_page(driver, pages["several"], scheme="dark")
    before = driver.execute_script("return document.querySelectorAll('details[open]').length")
    printed = driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    pdf = base64.b64decode(printed["data"])
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 50_000
    assert driver.execute_script("return document.querySelectorAll('details[open]').length") == before
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    )
    driver.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert driver.execute_script("return document.querySelectorAll('details:not([open])').length") == 0
    assert driver.execute_script(CONTRAST, "p, td, th, .card span, svg text") != []
    assert min(driver.execute_script(CONTRAST, "p, td, th, .card .value, svg text"))[0] >= 4.5
    break_inside = driver.execute_script("return getComputedStyle(document.querySelector('figure')).breakInside")
    assert break_inside == "avoid"
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
