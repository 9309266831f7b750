"""The verdict of a report in two sentences: whether speculation pays, by how much and where; what to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specdec.drafters.resolve import AUTO
from specdec.experiments.report.compare import compare_runs
from specdec.experiments.report.estimates import NO_ESTIMATE, Estimate, trimmed_mean
from specdec.experiments.report.formatting import interval, number, plural, with_interval
from specdec.experiments.report.labels import RunReport, k_of
from specdec.experiments.report.narrative import decoding_settings, drafter_is_dead, is_within, join_words
from specdec.experiments.report.what_if import Prediction, best_prediction, step_parts


@dataclass(frozen=True)
class Verdict:
    """pays: None where it is not clear. result: with its figures. advice: what to change, or that nothing need be."""

    pays: bool | None
    result: str
    advice: str


def verdict(reports: Sequence[RunReport]) -> Verdict | None:
    """Of one run, or of several that are compared; None where no run has a speedup."""
    timed = [report for report in reports if report.figures.metrics["speedup"].value is not None]
    if not timed:
        return None
    return _of_run(timed[0]) if len(reports) == 1 else _of_several(timed)


def pays(speedup: Estimate) -> bool | None:
    """Whether a speedup is above 1; None where its interval contains 1, and where there is no interval."""
    if speedup.low is None or speedup.high is None or speedup.low <= 1 <= speedup.high:
        return None
    return speedup.low > 1


def _of_run(report: RunReport) -> Verdict:
    speedup = report.figures.metrics["speedup"]
    start = {
        True: "Speculation pays",
        False: "Speculation does not pay",
        None: "It is not clear whether speculation pays",
    }[pays(speedup)]
    batch_size = report.config.get("batch_size", 1)
    settings = f"{decoding_settings(report)}, batch size {batch_size}"
    result = f"{start} ({settings}): {_speed(speedup)}{_by_task(report)}{_by_position(report)}."
    return Verdict(pays(speedup), result, _advice(report))


def _of_several(reports: Sequence[RunReport]) -> Verdict:
    def speedup(report: RunReport) -> Estimate:
        return report.figures.metrics["speedup"]

    best = max(reports, key=lambda report: speedup(report).value or 0)
    figure = _speed(speedup(best))
    paying = [report for report in reports if pays(speedup(report))]
    others = [report for report in reports if not pays(speedup(report))]
    if (speedup(best).value or 0) <= 1 or pays(speedup(best)) is False:
        result = f"No setting pays: the best, {best.label}, reaches {figure}."
        return Verdict(False, result, "Decode plainly, or try another drafter.")
    if not paying:
        result = f"No setting clearly pays: the best, {best.label}, reaches {figure}."
        return Verdict(None, result, f"Run more prompts with {best.label}, or decode plainly.")
    as_fast = [
        report.label
        for report in reports
        if report is not best and not compare_runs(best.run, report.run)["speedup"].is_clear
    ]
    compared = f"not clearly faster than {join_words(as_fast)}" if as_fast else "clearly faster than the others"
    not_paying = [f"{report.label} ({number(speedup(report).value, '×')})" for report in others]
    where = f"; it does not clearly pay with {join_words(not_paying)}" if others else "; every setting pays"
    result = f"Speculation pays most with {best.label}: {figure}, {compared}{where}."
    return Verdict(True, result, f"Take {best.label}.")


def _speed(speedup: Estimate) -> str:
    """ "1.87× the speed of plain decoding (1.75 to 1.99, 24 prompts)"."""
    prompts = plural(speedup.prompts, "prompt")
    bounds = interval(speedup, "×") or "too few for an interval"
    order = [prompts, bounds] if speedup.low is None else [bounds, prompts]
    return f"{number(speedup.value, '×')} the speed of plain decoding ({', '.join(order)})"


def _by_task(report: RunReport) -> str:
    """The tasks with the highest and the lowest speedup, of those with an interval; "" for less than two."""
    speedups = {task: values["speedup"] for task, (_, values) in report.figures.tasks.items()}
    timed = sorted(
        (one.value, one.low, one.high, task)
        for task, one in speedups.items()
        if one.value is not None and one.low is not None and one.high is not None
    )
    if len(timed) < 2:
        return ""
    (least, _, least_high, slowest), (most, most_low, _, fastest) = timed[0], timed[-1]
    if most_low <= least_high:
        return f", not clearly different between tasks ({number(least, '×')} to {number(most, '×')})"
    if least_high < 1:
        slow = [f"{task} ({number(value, '×')})" for value, _, high, task in timed if high < 1]
        return f", most in {fastest} ({number(most, '×')}), but slower than plain decoding in {join_words(slow)}"
    return f", most in {fastest} ({number(most, '×')}), least in {slowest} ({number(least, '×')})"


def _by_position(report: RunReport) -> str:
    """How many drafts are accepted up to their first and their last position."""
    positions = report.figures.positions
    if not positions:
        return ""
    first, last = positions[0], positions[-1]
    share = f"; {number(first.unconditional.value, '%')} of drafts are accepted at position 1"
    if last is first:
        return share
    return f"{share}, {number(last.unconditional.value, '%')} up to position {last.position}"


def _advice(report: RunReport) -> str:
    predictions, own_k = report.figures.what_if, k_of(report.run)
    speedup, best = report.figures.metrics["speedup"], best_prediction(predictions)
    if drafter_is_dead(report):
        return "Decode plainly, or take another drafter: this one is accepted no more often than chance."
    if best is None:
        keep = "Decode plainly, or try another K or drafter" if pays(speedup) is False else "Measure other K to compare"
        return f"{keep}: step times were not measured, so none is predicted."
    k, figure = best.num_draft_tokens, with_interval(best.speedup, "×")
    if (best.speedup.value or 0) <= 1 or pays(best.speedup) is False:
        return f"Decode plainly, or take another drafter: no K is predicted to pay. {_break_even(report, best)}"
    own = next((prediction for prediction in predictions if prediction.num_draft_tokens == own_k), None)
    if own is not None and speedup.value is not None and not is_within(speedup.value, own.speedup):
        plain = " or decode plainly" if pays(speedup) is False else ""
        return (
            f"Measure other K{plain}: {with_interval(own.speedup, '×')} was predicted for K={own_k}, which this run"
            " contradicts, so it predicts no other K."
        )
    if own is best:
        return f"Keep K={k}: no other K up to {predictions[-1].num_draft_tokens} is predicted to be faster."
    if own_k == AUTO:
        return f"A constant K={k} is predicted to reach {figure}; keep automatic K where prompts or load vary."
    if own is not None and (own.to_best.high is None or own.to_best.high >= 1):
        return f"Keep K={own_k}: K={k} is predicted to be fastest, {figure}, but not clearly faster than K={own_k}."
    against = NO_ESTIMATE if own is None else own.speedup
    return (
        f"Take K={k}, which is predicted to be fastest: {figure}, against {number(against.value, '×')} for K={own_k}."
    )


def _break_even(report: RunReport, best: Prediction) -> str:
    """From which mean acceptance length on the best K would pay, prefill aside."""
    assert report.run.costs is not None
    k, step_s = best.num_draft_tokens, trimmed_mean(step_parts(report.run.costs).sum(axis=0))
    needed = float(np.divide(step_s[k], step_s[0]))
    reached = with_interval(best.speedup, "×")
    length = number(best.mean_acceptance_length.value)
    most = f", more than the {k + 1} that it can have" if needed > k + 1 else ""
    return (
        f"The best, K={k}, reaches {reached}: its step takes {needed:.2f} times as long as a plain one, so it needs a"
        f" mean acceptance length of {needed:.2f}{most}, and has {length}."
    )
