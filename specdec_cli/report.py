"""`specdec report`: the figures of runs as a page, Markdown or JSON; with --fail-if a gate for CI."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from specdec.experiments.records import Run
from specdec.experiments.report.compare import compare_runs
from specdec.experiments.report.estimates import Estimate
from specdec.experiments.report.exports import summary_table, to_json, to_markdown
from specdec.experiments.report.figures import METRICS
from specdec.experiments.report.formatting import interval, number
from specdec.experiments.report.labels import build_reports, labels, read_runs
from specdec.experiments.report.other_tools import is_of_other_tool, of_specdec, read_other_runs
from specdec.experiments.report.other_tools_page import other_json, other_markdown, other_summary, render_other_page
from specdec.experiments.report.page import render_page


@dataclass(frozen=True)
class Condition:
    """A change of a metric that fails: below or above a limit, absolute or in per cent of the first run's value."""

    text: str
    metric: str
    is_below: bool
    limit: float
    is_relative: bool


@dataclass(frozen=True)
class Check:
    """The result of a condition, from the first run to another one. summary: one line for a person."""

    condition: str
    run: str
    before: float
    after: float
    change: Estimate
    fails: bool
    summary: str


def run(options: argparse.Namespace) -> int:
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


def _report_other_tools(paths: Sequence[Path], options: argparse.Namespace) -> int:
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
    found = re.fullmatch(r"\s*(\w+)\s*([<>])\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*(%?)\s*", text)
    if found is None:
        raise ValueError(f"--fail-if {text!r} is not NAME<NUMBER or NAME>NUMBER, as in 'mean_acceptance_length<-5%'")
    name, sign, limit, per_cent = found.groups()
    if name not in METRICS:
        raise ValueError(f"--fail-if {text!r}: there is no metric {name!r}; known are {', '.join(METRICS)}")
    return Condition(text.strip(), name, sign == "<", float(limit), bool(per_cent))


def _checks(runs: Sequence[Run], conditions: Sequence[Condition]) -> list[Check]:
    if conditions and len(runs) < 2:
        raise ValueError("--fail-if compares runs: name two, the one to compare with first")
    names = labels(runs)
    changes = (
        [(name, compare_runs(runs[0], other)) for name, other in zip(names[1:], runs[1:], strict=True)]
        if conditions
        else []
    )
    checks = []
    for condition in conditions:
        metric = METRICS[condition.metric]
        for name, differences in changes:
            difference = differences[condition.metric]
            if difference.before is None or difference.after is None:
                which = names[0] if difference.before is None else name
                raise ValueError(f"--fail-if {condition.text!r}: {metric.label} has no value in the run {which!r}")
            change = difference.relative if condition.is_relative else difference.change
            if change.value is None:
                raise ValueError(
                    f"--fail-if {condition.text!r}: {metric.label} was 0, of which there are no per cent; leave % out"
                )
            fails = change.value < condition.limit if condition.is_below else change.value > condition.limit
            unit, scale = ("", 1.0) if condition.is_relative else (metric.unit, difference.before)
            moved, between = number(change.value, unit, scale), interval(change, unit, scale)
            summary = (
                f"{number(difference.before, metric.unit)} → {number(difference.after, metric.unit)}, change {moved}"
            )
            summary += "\u00a0%" * condition.is_relative + (f" ({between})" if between else "")
            summary = f"{condition.text} [{name}]: {summary}: {'fails' if fails else 'holds'}"
            checks.append(Check(condition.text, name, difference.before, difference.after, change, fails, summary))
    return checks


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
