"""The figures of runs as Markdown, as plain values for JSON, and as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from specdec.experiments.records import Run
from specdec.experiments.report.definitions import definitions_json
from specdec.experiments.report.figures import METRICS
from specdec.experiments.report.formatting import interval, number, plural
from specdec.experiments.report.labels import (
    RunReport,
    build_reports,
    changes_from_first,
    choice_of,
    digests,
    has_format_1_counts,
    is_interrupted,
)
from specdec.experiments.report.narrative import (
    auto_k_summary,
    caveats,
    comparison_notes,
    decoding_settings,
    headline,
    join_words,
    skipped_and_failed,
    suggestion,
)
from specdec.experiments.report.spec_bench import leaderboard_of_reports
from specdec.experiments.report.tables import comparison_rows, number_tables
from specdec.experiments.report.verdict import verdict

SUMMARY_COLUMNS = {
    "speedup": "speedup",
    "tokens_per_s": "tokens/s",
    "mean_acceptance_length": "accept. length",
    "draft_acceptance_rate": "accept. rate",
    "identical": "identical",
}
NOT_IN_SUMMARY = ("realized_acceptance", "token_ms")


def to_markdown(runs: Sequence[Run]) -> str:
    """The figures of the page as Markdown tables, for a pull request or a job's summary."""
    reports = build_reports(runs)
    parts = []
    if len(reports) > 1:
        rows = [
            [label, *(" ".join(filter(None, (cell.text, cell.below, cell.mark))) for cell in cells)]
            for label, cells in comparison_rows(reports)
        ]
        parts += [f"# {len(reports)} runs compared", *(text for _, text in comparison_notes(reports))]
        parts += [markdown_table(["", *(report.label for report in reports)], rows)]
    verdicts = [of_all.result, of_all.advice] if len(reports) > 1 and (of_all := verdict(reports)) else []
    parts[1:1] = [" ".join(verdicts)] if verdicts else []
    for report in reports:
        parts += [f"{'#' if len(reports) == 1 else '##'} {report.label}", *_markdown_of_run(report)]
    if table := leaderboard_of_reports(reports):
        parts += [f"**{table.title}**", markdown_table(table.header, table.rows)]
    return "\n\n".join(parts) + "\n"


def to_json(runs: Sequence[Run]) -> dict[str, Any]:
    """All figures as plain values; rates are fractions.

    differences: from the first run to each further one. controller: of a run with "auto", how it chose K, with its own
    estimates of the speedup. definitions: of each figure, here and in other tools, with the values of the runs.
    """
    reports = build_reports(runs)
    overall = verdict(reports)
    return {
        "verdict": asdict(overall) if overall else None,
        "runs": [_json_of_run(report) for report in reports],
        "differences": [
            {
                "from": reports[0].label,
                "to": report.label,
                "metrics": {name: asdict(value) for name, value in changes.items()},
            }
            for report, changes in changes_from_first(reports)
        ],
        "definitions": definitions_json(reports),
    }


def summary_table(runs: Sequence[Run]) -> Table:
    """The main figures, for a terminal of 80 columns."""
    reports = build_reports(runs)
    overall = verdict(reports)
    caption = "\n".join([*([overall.result, overall.advice] if overall else []), *_summary_notes(reports)]) or None
    return _summary_of_run(reports[0], caption) if len(reports) == 1 else _summary_of_runs(reports, caption)


def _markdown_of_run(report: RunReport) -> list[str]:
    own = verdict([report])
    parts = [f"**{own.result}** {own.advice}"] if own else []
    parts += [headline(report), *(f"> {caveat}" for caveat in caveats(report))]
    metrics = [(metric, report.figures.metrics[name]) for name, metric in METRICS.items()]
    rows = [[m.label, number(e.value, m.unit), interval(e, m.unit)] for m, e in metrics if e.value is not None]
    parts.append(markdown_table(["", "value", "95 % interval"], rows))
    for table in number_tables(report).values():
        parts += [f"**{table.title}**", markdown_table(table.header, table.rows)]
    parts += [auto_k_summary(report)] if auto_k_summary(report) else []
    parts += [suggestion(report)] if report.figures.what_if else []
    parts += [f"- {line}" for line in skipped_and_failed(report.run)]
    return parts


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, the first column to the left."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(header), line(["---", *(["---:"] * (len(header) - 1))]), *map(line, rows)])


def _json_of_run(report: RunReport) -> dict[str, Any]:
    run, choice, own = report.run, choice_of(report.run), verdict([report])
    return {
        "label": report.label,
        "folder": str(run.folder),
        "interrupted": is_interrupted(run),
        "record_format": run.header.version,
        "verdict": asdict(own) if own else None,
        "caveats": caveats(report),
        "provenance": run.header.provenance | digests(run),
        "config": report.config,
        **asdict(report.figures),
        "tasks": {
            task: {"prompts": num_prompts, "metrics": {name: asdict(value) for name, value in values.items()}}
            for task, (num_prompts, values) in report.figures.tasks.items()
        },
        "costs": asdict(run.costs) if run.costs else None,
        "memory": asdict(run.memory) if run.memory else None,
        "controller": asdict(choice) if choice else None,
        "failures": [asdict(failure) for failure in run.failures],
        "skipped": [asdict(skipped) for skipped in run.skipped],
    }


def _summary_notes(reports: Sequence[RunReport]) -> list[str]:
    skipped = sum(len(report.run.skipped) for report in reports)
    failed = sum(len(report.run.failures) for report in reports)
    counts = [f"{plural(skipped, 'prompt')} skipped"] * bool(skipped) + [f"{plural(failed, 'call')} failed"] * bool(
        failed
    )
    notes = [f"{join_words(counts)}; the report gives the reasons"] if counts else []
    return notes + [
        f"{report.label}: recorded in format {report.run.header.version}; the figures are recomputed from its steps"
        " with the current definitions"
        for report in reports
        if has_format_1_counts(report.run)
    ]


def _summary_of_run(report: RunReport, caption: str | None) -> Table:
    title = f"{report.label}: {plural(report.figures.prompts, 'prompt')}, {decoding_settings(report)}"
    table = Table(title=title, caption_justify="left", caption=caption)
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, metric in METRICS.items():
        estimate = report.figures.metrics[name]
        if estimate.value is not None and name not in NOT_IN_SUMMARY:
            table.add_row(metric.label, number(estimate.value, metric.unit), interval(estimate, metric.unit))
    return table


def _summary_of_runs(reports: Sequence[RunReport], caption: str | None) -> Table:
    all_metrics = [report.figures.metrics for report in reports]
    names = [name for name in SUMMARY_COLUMNS if any(metrics[name].value is not None for metrics in all_metrics)]
    title = f"{len(reports)} runs, {plural(reports[0].figures.prompts, 'prompt')} each"
    table = Table("run", title=title, caption_justify="left", caption=caption)
    for name in names:
        table.add_column(SUMMARY_COLUMNS[name], justify="right")
    for report, metrics in zip(reports, all_metrics, strict=True):
        table.add_row(report.label, *(number(metrics[name].value, METRICS[name].unit) for name in names))
    return table
