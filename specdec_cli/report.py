"""`specdec report`: the figures of runs as a page, Markdown or JSON; with --fail-if a gate for CI."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from specdec.experiments.records import Run
from specdec.experiments.report.compare import Difference, compare_runs
from specdec.experiments.report.estimates import MIN_UNITS, Estimate
from specdec.experiments.report.exports import summary_table, to_json, to_markdown
from specdec.experiments.report.figures import METRICS, metrics, tally
from specdec.experiments.report.formatting import interval, number, with_interval
from specdec.experiments.report.labels import build_reports, labels, read_runs
from specdec.experiments.report.other_tools import is_of_other_tool, of_specdec, read_other_runs
from specdec.experiments.report.other_tools_page import other_json, other_markdown, other_summary, render_other_page
from specdec.experiments.report.page import render_page
from specdec_cli.options import Options


@dataclass(frozen=True)
class Condition:
    """What fails: a metric of a single run, or its change from the first of several, below or above a limit.

    bound: "low" or "high", the end of the 95 % interval that is compared; "value" where it is the value itself.
    is_relative: the limit is in per cent of the first run's value.
    """

    text: str
    metric: str
    bound: str
    is_below: bool
    limit: float
    is_relative: bool

    def error(self, reason: str) -> ValueError:
        return ValueError(f"--fail-if {self.text!r}: {reason}")

    def fails(self, estimate: Estimate, run: str) -> bool:
        """Raises ValueError where the estimate has no value or no interval. run: its label.

        Where all resamples have the same value, both ends of the interval are taken to be this value.
        """
        found = getattr(estimate, self.bound)
        if found is None and self.bound != "value" and estimate.prompts >= MIN_UNITS:
            found = estimate.value
        if found is None:
            needs = f"an interval needs at least {MIN_UNITS} prompts, and {estimate.prompts} count"
            what = (
                "no value"
                if estimate.value is None
                else f"no interval, so there is no .{self.bound} to check ({needs})"
            )
            raise self.error(f"{METRICS[self.metric].label} has {what} in the run {run!r}")
        return bool(found < self.limit if self.is_below else found > self.limit)


@dataclass(frozen=True)
class Check:
    """The result of a condition. before, change: from the first run to this one; None for a single run.

    after: the run's own value. summary: one line for a person.
    """

    condition: str
    run: str
    before: float | None
    after: Estimate
    change: Estimate | None
    fails: bool
    summary: str


def run(options: Options) -> int:
    """Report runs; 1 where a condition of --fail-if is met. Where runs cannot be compared, nothing is written."""
    conditions = [_condition(text) for text in options.fail_if]
    paths = [Path(path) for path in options.runs]
    if any(is_of_other_tool(path) for path in paths):
        return _report_other_tools(paths, options)
    runs = read_runs(paths)
    checks = _checks(runs, conditions)
    if options.json:
        content = to_json(runs) | {"checks": [asdict(check) for check in checks]}
        text = json.dumps(content, ensure_ascii=False) + "\n"
    elif options.markdown:
        text = to_markdown(runs) + "".join(f"- {check.summary}\n" for check in checks)
    else:
        text = render_page(runs)
    output = Path(options.output) if options.output else None
    if output is None and not (options.json or options.markdown):
        output = Path(options.runs[0]) / "report.html"
        output = output if output.parent.is_dir() else runs[0].folder / "report.html"
    if output is None:
        sys.stdout.write(text)
    else:
        write(output, text)
        Console().print(summary_table(runs))
        print(f"written: {output}")
    if output is not None or options.json:
        for check in checks:
            print(check.summary, file=sys.stderr if output is None else sys.stdout)
    return 1 if any(check.fails for check in checks) else 0


def _report_other_tools(paths: Sequence[Path], options: Options) -> int:
    """Report runs of other tools, with runs of specdec as further columns."""
    if options.fail_if:
        raise ValueError("--fail-if compares runs prompt by prompt, and files of other tools hold totals; leave it out")
    own = [path for path in paths if not is_of_other_tool(path)]
    others = read_other_runs([path for path in paths if is_of_other_tool(path)])
    runs = [*others, *(of_specdec(report) for report in (build_reports(read_runs(own)) if own else []))]
    if options.json:
        text = json.dumps(other_json(runs), ensure_ascii=False) + "\n"
    else:
        text = other_markdown(runs) if options.markdown else render_other_page(runs)
    if options.output is None and (options.json or options.markdown):
        sys.stdout.write(text)
        return 0
    output = Path(options.output or (paths[0] if paths[0].is_dir() else paths[0].parent) / "report.html")
    write(output, text)
    Console().print(other_summary(runs))
    print(f"written: {output}")
    return 0


def _condition(text: str) -> Condition:
    found = re.fullmatch(r"\s*(\w+)(?:\.(low|high))?\s*([<>])\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*(%?)\s*", text)
    if found is None:
        raise ValueError(
            f"--fail-if {text!r} is not NAME<NUMBER or NAME>NUMBER, as in 'mean_acceptance_length<-5%', or"
            " NAME.low<NUMBER for the end of the interval, as in 'speedup.low<1.0'"
        )
    name, bound, sign, limit, per_cent = found.groups()
    if name not in METRICS:
        raise ValueError(f"--fail-if {text!r}: there is no metric {name!r}; known are {', '.join(METRICS)}")
    return Condition(text.strip(), name, bound or "value", sign == "<", float(limit), bool(per_cent))


def _checks(runs: Sequence[Run], conditions: Sequence[Condition]) -> list[Check]:
    """Of a single run its own figures are checked, of several the changes from the first."""
    if not conditions:
        return []
    names, all_metrics = labels(runs), [metrics(np.array(list(tally(run).values()))) for run in runs]
    if len(runs) == 1:
        return [_check_of_value(condition, names[0], all_metrics[0]) for condition in conditions]
    further = [
        (name, compare_runs(runs[0], run), its)
        for name, run, its in zip(names[1:], runs[1:], all_metrics[1:], strict=True)
    ]
    return [
        _check_of_change(condition, names[0], name, differences[condition.metric], its[condition.metric])
        for condition in conditions
        for name, differences, its in further
    ]


def _check_of_value(condition: Condition, run: str, of_run: dict[str, Estimate]) -> Check:
    if condition.is_relative:
        raise condition.error("per cent are of a change: name two runs, the one to compare with first")
    estimate, unit = of_run[condition.metric], METRICS[condition.metric].unit
    fails = condition.fails(estimate, run)
    summary = f"{condition.text} [{run}]: {with_interval(estimate, unit)}: {'fails' if fails else 'holds'}"
    return Check(condition.text, run, None, estimate, None, fails, summary)


def _check_of_change(condition: Condition, first: str, run: str, difference: Difference, after: Estimate) -> Check:
    metric = METRICS[condition.metric]
    if difference.before is None or difference.after is None:
        which = first if difference.before is None else run
        raise condition.error(f"{metric.label} has no value in the run {which!r}")
    change = difference.relative if condition.is_relative else difference.change
    if change.value is None:
        raise condition.error(f"{metric.label} was 0, of which there are no per cent; leave % out")
    fails = condition.fails(change, run)
    unit, scale = ("", 1.0) if condition.is_relative else (metric.unit, difference.before)
    moved, between = number(change.value, unit, scale), interval(change, unit, scale)
    between = "\u00a0%" * condition.is_relative + (f" ({between})" if between else "")
    values = f"{number(difference.before, metric.unit)} → {number(difference.after, metric.unit)}"
    summary = f"{condition.text} [{run}]: {values}, change {moved}{between}: {'fails' if fails else 'holds'}"
    return Check(condition.text, run, difference.before, after, change, fails, summary)


def write(path: Path, text: str) -> None:
    """Write a file; where that fails, what was there stays."""
    if not path.parent.is_dir():
        raise ValueError(
            f"{path.parent} is no folder, so {path.name} cannot be written there; create it, or name another -o"
        )
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
