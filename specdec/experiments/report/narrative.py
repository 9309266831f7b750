"""The sentences of a report, for readers who are new to the project."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from statistics import median_low

from specdec.core.stats import chance_acceptance
from specdec.drafters.resolve import AUTO
from specdec.experiments.config import DraftHead, SuffixAndModel
from specdec.experiments.records import PLAIN, SPECULATIVE, Record, Run
from specdec.experiments.report.compare import MACHINE, VERSIONS, differing_provenance
from specdec.experiments.report.estimates import MIN_UNITS, NO_ESTIMATE, Estimate, trimmed_mean
from specdec.experiments.report.figures import METRICS, count_identical
from specdec.experiments.report.formatting import interval, number, plural, with_interval
from specdec.experiments.report.labels import (
    RunReport,
    changes_from_first,
    choice_of,
    differing_keys,
    display_name,
    has_format_1_counts,
    is_interrupted,
    is_sampled,
    k_of,
)
from specdec.experiments.report.what_if import Prediction, best_prediction, step_parts, steps_that_get_faster
from specdec.generation.dead_draft import AcceptanceWatch

SMALL_RUN = 20  # prompts; a run of fewer is said to be small
DRAFT_MODEL, DRAFT_HEAD = "a draft model", "a draft head"
SLOW_FACTOR = 3  # a call that takes more than this times the expected seconds is reported


NO_PREDICTION = Prediction(0, NO_ESTIMATE)


def headline(report: RunReport) -> str:
    """What was measured and the result, in two sentences."""
    metrics = report.figures.metrics
    records = report.run.of(SPECULATIVE)
    num_texts = plural(len(records or report.run.of(PLAIN)), "text")
    texts = f"{num_texts} of up to {report.sampling.get('max_new_tokens')} tokens"
    if not records:
        rate = with_interval(metrics["plain_tokens_per_s"])
        return f"The target model alone generated {texts} at {rate} tokens per second, without draft tokens."
    max_drafted = len(report.figures.histogram) - 1
    drafting = f" drafting up to {plural(max_drafted, 'token')} per step" if max_drafted else ""
    return (
        f"With {drafter_name(report)}{drafting}, the target model generated {texts} {_speed(report)}"
        f"{_agreement(report)}. {_acceptance(report)}"
    )


def terms(report: RunReport) -> list[tuple[str, str]]:
    """Terms of the page with their definitions."""
    k = k_of(report.run)
    if drafter_name(report) == DRAFT_MODEL:
        drafter = (
            "Draft model",
            "a small, fast model that proposes the next tokens; the target verifies them in one pass.",
        )
    else:
        what = f"what proposes the next tokens, here {drafter_name(report)}; the target verifies them in one pass."
        drafter = ("Drafter", what)
    return [
        drafter,
        ("K", f"how many tokens are drafted per step, here {'chosen step by step' if k == AUTO else k}."),
        (
            "Acceptance",
            "how many draft tokens the target accepts. A rejected one costs time, but does not change the output.",
        ),
    ]


def about(report: RunReport) -> list[str]:
    """The run in a few words: models, K, sampling, prompts, device, date."""
    parts = [f"target {display_name(report.config['target'])}"]
    if report.run.of(SPECULATIVE):
        parts.append(f"drafter {display_name(report.config['drafter'])}")
    parts += [decoding_settings(report), plural(report.figures.prompts, "prompt")]
    parts += [plural(len(report.figures.tasks), "task"), f"batch size {report.config.get('batch_size', 1)}"]
    provenance = report.run.header.provenance
    return parts + [str(provenance[name]) for name in ("device", "date") if name in provenance]


def decoding_settings(report: RunReport) -> str:
    """ "K=4, greedy"."""
    temperature = report.sampling.get("temperature", 0)
    return f"K={k_of(report.run)}, {f'sampled at temperature {temperature:g}' if temperature else 'greedy'}"


def caveats(report: RunReport) -> list[str]:
    """Limitations of the figures."""
    run, caveats = report.run, []
    if is_interrupted(run):
        caveats.append(_interruption(report))
    if has_format_1_counts(run):
        caveats.append(
            f"This run was recorded in format {run.header.version}, whose counts include steps without a draft and"
            " whose mean acceptance length is 1 + accepted / steps. All figures here are recomputed from its steps with"
            " the current definitions; reports made by earlier versions of specdec show other values."
        )
    if small := _small_run(report):
        caveats.append(small)
    if run.header.provenance.get("dirty"):
        caveats.append("The working tree had uncommitted changes, so the commit alone does not reproduce this run.")
    processes = run.header.provenance.get("processes", 1)
    if processes > 1:
        caveats.append(
            f"{processes} processes ran at the same time; where they shared a machine, they slowed each other down."
        )
    if slow := _slow_calls(run.of(SPECULATIVE)) + _slow_calls(run.of(PLAIN)):
        caveats.append(
            f"{plural(slow, 'call')} took more than {SLOW_FACTOR} times the usual time for its length. Other programs"
            " probably used the machine, so the times are not reliable."
        )
    if warning := _dead_draft(report):
        caveats.append(f"{capitalize(warning)}.")
    if run.failures:
        caveats.append(
            f"{plural(len(run.failures), 'call')} failed; failed calls are in no figure. The reasons are listed below."
        )
    return caveats


def suggestion(report: RunReport) -> str:
    """Which K is predicted to be fastest, and which others may be as fast within the errors."""
    predictions, own_k = report.figures.what_if, k_of(report.run)
    best = best_prediction(predictions)
    if best is None:
        return "Step times were not measured, so a speedup cannot be predicted."
    k, best_speedup = best.num_draft_tokens, with_interval(best.speedup, "×")
    if (best.speedup.value or 0) <= 1:
        return f"No K is predicted to be faster than plain decoding; the best, K={k}, reaches {best_speedup}."
    measured = report.figures.metrics["speedup"].value
    own = next((p for p in predictions if p.num_draft_tokens == own_k), NO_PREDICTION)
    predicted = own.speedup.value
    error = abs(predicted / measured - 1) if measured and predicted else 0.0
    if k == own_k and measured:
        sentences = [
            f"K={k}, which this run used, is predicted to be fastest: {best_speedup}."
            f" The measured speedup is {number(measured, '×')}."
        ]
    else:
        sentences = [f"K={k} is predicted to be fastest: {best_speedup}."]
        if measured and predicted:
            sentences.append(
                f"For this run's own K={own_k}, {number(predicted, '×')} is predicted and {number(measured, '×')} was"
                " measured."
            )
    others = [p for p in predictions if p is not best and p.to_best.high is not None]
    close = [f"K={p.num_draft_tokens}" for p in others if (p.to_best.high or 0) >= 1 - error]
    if close:
        sentences.append(f"Within the prediction error and the intervals, {join_words(close)} may be as fast.")
    elif others:
        sentences.append("It is faster than every other K by more than the prediction error and the intervals.")
    elif best.speedup.low is None:
        sentences.append(f"There is no interval for this: {_too_few_for_a_prediction(report)}.")
    if own_k != AUTO and predicted and measured and not is_within(measured, own.speedup):
        sentences.append(
            f"The measured speedup is outside the interval of the prediction for K={own_k}, {interval(own.speedup)}, so"
            " the step times of the calibration calls are not those of this run: do not rely on the other predictions."
        )
    if report.run.costs and (faster := steps_that_get_faster(report.run.costs)):
        sentences.append(_not_monotone(faster))
    fastest = max(report.measurements, key=lambda run: run.speedup.value or 0, default=None)
    if fastest and len(report.measurements) > 1 and fastest.speedup.value:
        which = "measured runs" if own_k != AUTO else "measured runs with a constant K"
        sentences.append(
            f"Of the {which}, K={fastest.num_draft_tokens} was fastest: {with_interval(fastest.speedup, '×')}."
        )
    if k == predictions[-1].num_draft_tokens:
        sentences.append(f"K={k} is the largest K that this run drafted; a larger one may be faster still.")
    return " ".join(sentences)


def auto_k_summary(report: RunReport) -> str:
    """How K was chosen where it is "auto", with the controller's own estimate; "" otherwise."""
    choice = choice_of(report.run)
    if choice is None:
        return ""
    total = sum(choice.steps_by_k)
    shares = sorted(((count / total, k) for k, count in enumerate(choice.steps_by_k) if count), reverse=True)
    steps = join_words([f"{k} in {share:.0%}".replace("%", "\u00a0%") for share, k in shares])
    return (
        f"K was chosen step by step: K={steps} of steps. The controller's own estimate, against plain steps between its"
        f" drafts, was {number(choice.measured_speedup, '×')}; the speedup of this run is the one at the top."
    )


def weights_read(run: Run) -> str:
    """How the target's forward in a plain step compares with reading its weights; "" where that is not known."""
    costs = run.costs
    if costs is None or costs.weights_bytes is None or not costs.weights_read_s:
        return ""
    forward_s = costs.rows * float(trimmed_mean(step_parts(costs)[1])[0])
    gbps = costs.weights_bytes / costs.weights_read_s / 1e9
    return (
        f"Reading the {costs.weights_bytes / 1e6:,.1f} MB of the target's weights alone takes"
        f" {number(1000 * costs.weights_read_s, 'ms')} on this device ({gbps:,.1f} GB/s),"
        f" {number(costs.weights_read_s / forward_s, '%')} of its forward in a plain step,"
        f" {number(1000 * forward_s, 'ms')}: no forward can be much faster than that."
    )


def comparison_notes(reports: Sequence[RunReport]) -> list[tuple[str, str]]:
    """Sentences about several runs, each with its CSS class on the page: "about" or "caveat"."""
    if len(reports) == 1:
        return []
    notes = []
    differences = (
        f"Differences are relative to {reports[0].label}, on the same prompts, with 95\u00a0% intervals; a difference"
        " is marked where its interval excludes 0."
    )
    notes.append(("about", differences))
    if any(has_format_1_counts(report.run) for report in reports):
        notes.append(
            (
                "about",
                "Runs recorded in format 1 are compared with the current definitions, recomputed from their steps.",
            )
        )
    runs = [report.run for report in reports]
    if machine := differing_provenance(runs, MACHINE):
        notes.append(
            (
                "caveat",
                f"These runs were not recorded on one machine: {_each(reports, machine)}. Compare acceptance, and"
                " speedups with care; differences of times are not marked as better or worse.",
            )
        )
    elif all(name.partition(".")[0] in ("num_draft_tokens", "drafter") for name in differing_keys(runs)) and any(
        changes["plain_tokens_per_s"].is_clear for _, changes in changes_from_first(reports)
    ):
        notes.append(
            (
                "caveat",
                "The speed of plain decoding differs between these runs, so the machine's speed did too: compare"
                " speedups, not times.",
            )
        )
    if versions := differing_provenance(runs, VERSIONS):
        notes.append(("caveat", f"These runs were not recorded with the same versions: {_each(reports, versions)}."))
    return notes


def _each(reports: Sequence[RunReport], differing: dict[str, list[str]]) -> str:
    """ "device A100 (first run), H100 (second run); threads 1 (first run), 8 (second run)"."""
    return "; ".join(
        f"{label} " + ", ".join(f"{value} ({report.label})" for report, value in zip(reports, values, strict=True))
        for label, values in differing.items()
    )


def skipped_and_failed(run: Run) -> list[str]:
    """Skipped prompts and failed calls, by reason."""
    skipped = Counter(line.reason for line in run.skipped)
    failed = Counter((line.engine, line.error) for line in run.failures)
    return [
        *(f"{plural(count, 'prompt')} skipped: “{reason}”" for reason, count in skipped.most_common()),
        *(f"{plural(count, 'call')} failed, {engine}: “{error}”" for (engine, error), count in failed.most_common()),
    ]


def drafter_is_dead(report: RunReport) -> bool:
    """Whether the drafts of a draft model or head are accepted no more often than chance."""
    return _dead_draft(report) is not None


def drafter_name(report: RunReport) -> str:
    """ "a draft model", "prompt lookup"."""
    drafter = report.config["drafter"]
    if not isinstance(drafter, dict) or "path" not in drafter:
        return display_name(drafter)
    names = {DraftHead: DRAFT_HEAD, SuffixAndModel: f"suffix decoding and {DRAFT_MODEL}"}
    target = str(drafter.get("_target_"))
    return next((name for cls, name in names.items() if target.endswith(cls.__name__)), DRAFT_MODEL)


def is_within(value: float, estimate: Estimate) -> bool:
    """Whether a value is in an interval; True where there is none."""
    return estimate.low is None or estimate.high is None or estimate.low <= value <= estimate.high


def join_words(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def capitalize(text: str) -> str:
    """With a capital first letter, the rest as it is."""
    return text[:1].upper() + text[1:]


def _speed(report: RunReport) -> str:
    speedup = report.figures.metrics["speedup"]
    if speedup.value is None:
        rate = with_interval(report.figures.metrics["tokens_per_s"])
        return f"at {rate} tokens per second; plain decoding was not run, so the speedup is unknown"
    too_few = f"no interval for {plural(speedup.prompts, 'prompt')}"
    bounds = f"95\u00a0% interval {interval(speedup)}" if speedup.low is not None else too_few
    if speedup.low is not None and speedup.high is not None and speedup.low <= 1 <= speedup.high:
        return f"at {speedup.value:.2f} times the speed of plain decoding, not clearly faster or slower ({bounds})"
    slower = ", which is slower" if speedup.value < 1 else ""
    return f"at {speedup.value:.2f} times the speed of plain decoding{slower} ({bounds})"


def _small_run(report: RunReport) -> str:
    """That a run has few prompts, and what that means for its intervals; "" where it has enough."""
    prompts = report.figures.prompts
    if prompts >= SMALL_RUN:
        return ""
    small = f"This run is small: {plural(prompts, 'prompt')}."
    if prompts < MIN_UNITS:
        return (
            f"{small} An interval needs at least {MIN_UNITS} prompts, so there is none, and how the figures vary"
            " between prompts is unknown."
        )
    main = next(
        name for name in ("speedup", "tokens_per_s", "plain_tokens_per_s") if report.figures.metrics[name].value
    )
    estimate = report.figures.metrics[main]
    if estimate.low is None or estimate.high is None or not estimate.value:
        return small
    width = (estimate.high - estimate.low) / estimate.value
    name = METRICS[main].label
    return (
        f"{small} The interval of its {name} is {number(width, '%')} wide; four times as many prompts would halve it."
    )


def _too_few_for_a_prediction(report: RunReport) -> str:
    """What a predicted speedup has too few of for an interval."""
    repetitions = report.run.costs.repetitions if report.run.costs else 0
    if report.figures.prompts < MIN_UNITS:
        return f"it needs at least {MIN_UNITS} prompts, and this run has {report.figures.prompts}"
    return f"it needs at least {MIN_UNITS} repetitions of the step times, and this run has {repetitions}"


def _not_monotone(faster: Sequence[tuple[int, bool]]) -> str:
    """That steps get faster from a K to the next. faster: see steps_that_get_faster()."""
    noise = [f"K={k}" for k, is_clear in faster if not is_clear]
    clear = [f"K={k}" for k, is_clear in faster if is_clear]
    parts = [
        f"within the noise at {join_words(noise)}, so these step times are not reliable" if noise else "",
        f"by more than the noise at {join_words(clear)}" if clear else "",
    ]
    return f"The measured step gets faster with one more draft token, {join_words([part for part in parts if part])}."


def _agreement(report: RunReport) -> str:
    """Whether the texts are identical to plain decoding's."""
    identical, paired = count_identical(report.run)
    if not paired:
        return "; texts are sampled, so they are not compared one by one" if is_sampled(report) else ""
    if identical < paired:
        return f", but {paired - identical} of {paired} texts differ"
    return f", and {'every text' if paired > 1 else 'the text'} is identical, token for token"


def _acceptance(report: RunReport) -> str:
    metrics = report.figures.metrics
    rate = metrics["draft_acceptance_rate"].value
    if rate is None:
        return "The drafter proposed no draft token."
    return (
        f"{number(rate, '%')} of the draft tokens were accepted, so each step of the target emitted"
        f" {number(metrics['tokens_per_step'].value)} tokens on average, where plain decoding emits 1."
    )


def _interruption(report: RunReport) -> str:
    workload = report.config["workload"]
    limit = workload.get("limit") if isinstance(workload, dict) else None
    of_limit = f" of at most {limit}" if isinstance(limit, int) else ""
    return (
        f"This run was interrupted after {plural(report.figures.prompts, 'prompt')}{of_limit} and"
        f" {plural(len(report.run.records), 'record')}. Continue it with resume=true and the same folder."
    )


def _dead_draft(report: RunReport) -> str | None:
    """Why the draft model seems to be of no use, None where it does not and for drafters without a model."""
    if drafter_name(report) not in (DRAFT_MODEL, DRAFT_HEAD):
        return None
    records = report.run.of(SPECULATIVE)
    watch, calls = AcceptanceWatch(), itertools.groupby(records, lambda r: (r.turn, r.repetition, r.call))
    for rows in (list(rows) for _, rows in calls):
        overlap = [value for row in rows for step in row.steps for value in step.overlap]
        if message := watch.count(overlap, chance_acceptance([row.ids for row in rows])):
            return message
    return None


def _slow_calls(records: Sequence[Record]) -> int:
    """Calls that took far longer than the run's median seconds per prompt token and per step predict."""
    calls = {(record.turn, record.repetition, record.call): record for record in records if record.ids}.values()
    if not calls:
        return 0
    parts = [
        (r.num_prompt_tokens, r.seconds.prefill_s, len(r.steps), r.seconds.total_s - r.seconds.prefill_s) for r in calls
    ]
    prompt_token_s = median_low(prefill_s / length for length, prefill_s, _, _ in parts)
    step_s = median_low(decode_s / steps for _, _, steps, decode_s in parts)
    return sum(
        prefill_s + decode_s > SLOW_FACTOR * (length * prompt_token_s + steps * step_s)
        for length, prefill_s, steps, decode_s in parts
    )
