"""The report as one HTML page that needs no other file and no network."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.experiments.records import SPECULATIVE, Run
from specdec.experiments.report import plots
from specdec.experiments.report.definitions import NOTE, definitions_table
from specdec.experiments.report.estimates import MIN_UNITS, trimmed_mean
from specdec.experiments.report.figures import METRICS, TIME_PARTS, count_identical
from specdec.experiments.report.formatting import interval, number
from specdec.experiments.report.labels import RunReport, build_reports, digests, is_sampled, series_by_k
from specdec.experiments.report.narrative import (
    about,
    auto_k_summary,
    capitalize,
    caveats,
    comparison_notes,
    headline,
    skipped_and_failed,
    suggestion,
    terms,
    weights_read,
)
from specdec.experiments.report.spec_bench import leaderboard_of_reports
from specdec.experiments.report.tables import (
    MARKS,
    NumberTable,
    Quantity,
    comparison_rows,
    comparison_table,
    number_tables,
    task_metrics,
    task_rows,
)
from specdec.experiments.report.verdict import pays, verdict
from specdec.experiments.report.what_if import best_prediction, step_parts
from specdec.pages import environment

ORIGINS = {
    "accepted": "a draft token that the target accepted",
    "recovered": "drawn by the target in place of a rejected draft token",
    "bonus": "drawn by the target after a draft that was accepted entirely",
    "plain": "drawn by the target in a step without draft tokens",
}


@dataclass(frozen=True)
class Card:
    """A headline figure with its interval, and a line that explains it."""

    label: str
    value: str
    interval: str
    meaning: str
    is_bad: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart and its numbers. legend: color, swatch and label of each series."""

    svg: str
    table: NumberTable
    legend: list[tuple[str, str, str]] = field(default_factory=list)


def render_page(runs: Sequence[Run]) -> str:
    """The HTML page of one run, or of several with their comparison.

    Raises ValueError where runs can't be compared, or where jinja2 or matplotlib is missing.
    """
    template = environment(Path(__file__).parent).get_template("report.html.jinja")
    reports = build_reports(runs)
    rendered: str = template.render(
        title=reports[0].label if len(runs) == 1 else f"{len(runs)} runs compared",
        sections=[_section(report, index) for index, report in enumerate(reports, 1)],
        verdict=verdict(reports) if len(reports) > 1 else None,
        comparison=comparison_rows(reports),
        comparison_notes=comparison_notes(reports),
        comparison_table=comparison_table(reports),
        overview=_overview(reports),
        origins=ORIGINS,
        spec_bench=leaderboard_of_reports(reports),
        definitions=definitions_table(reports),
        definitions_note=NOTE,
        min_prompts=MIN_UNITS,
        marks=MARKS,
    )
    return rendered.strip() + "\n"


def _section(report: RunReport, index: int) -> dict[str, Any]:
    """What the template shows of one run."""
    run, tables = report.run, number_tables(report)
    return {
        "label": report.label,
        "about": about(report),
        "verdict": verdict([report]),
        "headline": headline(report),
        "terms": terms(report) if run.of(SPECULATIVE) else [],
        "caveats": caveats(report),
        "cards": _cards(report),
        "task_header": ["task", "prompts", *(METRICS[name].label for name in task_metrics(report))],
        "task_rows": task_rows(report),
        "tasks": tables["tasks"],
        "heat_map": _heat_map(report, tables, index),
        "has_few_prompts": any(count < MIN_UNITS for count, _ in report.figures.tasks.values()),
        "acceptance": _acceptance_charts(report, tables, index),
        "what_if": _what_if_charts(report, tables, index),
        "auto_k": auto_k_summary(report),
        "suggestion": suggestion(report),
        "costs": _costs_chart(run, tables, index),
        "weights_read": weights_read(run),
        "time": Chart(plots.time_by_part(f"time-{index}", tables["time"].alt, report.figures.time_ms), tables["time"]),
        "time_parts": list(TIME_PARTS),
        "sample": _sample(run),
        "memory": tables.get("memory"),
        "skipped_and_failed": skipped_and_failed(run),
        "provenance": _provenance(run),
        "command": run.header.provenance.get("command", ""),
        "config": [(name, str(value)) for name, value in run.header.flat().items()],
    }


def _provenance(run: Run) -> list[tuple[str, str]]:
    """Names and values, without the command, which the template shows by itself."""
    values = run.header.provenance | digests(run)
    return [(name, "unknown" if value is None else str(value)) for name, value in values.items() if name != "command"]


def _cards(report: RunReport) -> list[Card]:
    metrics = report.figures.metrics
    plain_rate, plain_first_token = metrics["plain_tokens_per_s"].value, metrics["plain_first_token_ms"].value

    def card(name: str, meaning: str, label: str = "") -> Card:
        estimate, metric = metrics[name], METRICS[name]
        value, bounds = number(estimate.value, metric.unit), interval(estimate, metric.unit)
        is_bad = name == "speedup" and pays(estimate) is False
        return Card(capitalize(label or metric.label), value, bounds, meaning, is_bad)

    if not report.run.of(SPECULATIVE):
        return [
            card("plain_tokens_per_s", "of the target alone"),
            card("plain_first_token_ms", "prefill included"),
        ]
    rate = card("tokens_per_s", "plain → speculative" if plain_rate is not None else "speculative; plain was not run")
    if plain_rate is not None:
        rate = Card(rate.label, f"{number(plain_rate)} → {rate.value}", rate.interval, rate.meaning)
    plain = f"; plain: {number(plain_first_token, 'ms')}" if plain_first_token is not None else ""
    cards = [
        card("speedup", "tokens per second, relative to plain decoding of the same prompts", "speedup"),
        rate,
        card(
            "mean_acceptance_length",
            "tokens per step that drafts, the target's own included; over all steps: "
            + number(metrics["tokens_per_step"].value),
        ),
        card("draft_acceptance_rate", "of all draft tokens; those after a rejected one are discarded"),
        card(
            "expected_acceptance",
            "mean probability of acceptance where all preceding tokens are accepted",
        ),
        *_identical_card(report),
        card("first_token_ms", f"prefill included{plain}"),
    ]
    return [card for card in cards if card.value != "–"]


def _identical_card(report: RunReport) -> list[Card]:
    """Whether the texts are plain decoding's; [] where there is no plain text to compare with."""
    identical, paired = count_identical(report.run)
    if paired:
        meaning = "token for token the same as plain decoding"
        return [Card("Identical texts", f"{identical:,} of {paired:,}", "", meaning, is_bad=identical < paired)]
    if is_sampled(report):
        return [Card("Identical texts", "sampled", "", "not compared one by one; the distribution is the target's")]
    return []


def _overview(reports: Sequence[RunReport]) -> list[Chart]:
    """Charts of the main metrics, with a row for each run; [] for one run."""
    if len(reports) == 1:
        return []
    charts = _charts_by_k(reports)
    labels = [report.label for report in reports]
    for name, reference in (("speedup", 1.0), ("mean_acceptance_length", None), ("draft_acceptance_rate", None)):
        metric, estimates = METRICS[name], [report.figures.metrics[name] for report in reports]
        if any(estimate.value is not None for estimate in estimates):
            rows: list[list[str | Quantity]] = [
                [label, Quantity(estimate, metric.unit)] for label, estimate in zip(labels, estimates, strict=True)
            ]
            table = NumberTable(capitalize(metric.label), ["run", metric.label], rows)
            svg = plots.by_run(f"all-{name}", table.alt, labels, estimates, metric.unit, reference)
            charts.append(Chart(svg, table))
    return charts


def _charts_by_k(reports: Sequence[RunReport]) -> list[Chart]:
    """Speedup and mean acceptance length against K, with a line for each temperature, batch size or other setting."""
    series, charts = series_by_k(reports), []
    for name, reference in (("speedup", 1.0), ("mean_acceptance_length", None)):
        metric = METRICS[name]
        lines = {label: [(k, report.figures.metrics[name]) for k, report in line] for label, line in series.items()}
        if not any(estimate.value is not None for line in lines.values() for _, estimate in line):
            continue
        cells: list[list[str | Quantity]] = [
            [label or "measured", str(k), Quantity(estimate, metric.unit)]
            for label, line in lines.items()
            for k, estimate in line
        ]
        table = NumberTable(f"All runs: {metric.label} by K", ["settings", "K", metric.label], cells)
        points = [([k for k, _ in line], [estimate for _, estimate in line]) for line in lines.values()]
        svg = plots.lines_by_k(f"all-{name}-by-k", table.alt, points, metric.unit, reference)
        legend = [
            (color, "line" if not dashes else "dashes", f"{character} {label or 'measured'}")
            for label, (color, _, character, dashes) in zip(lines, itertools.cycle(plots.LINES), strict=False)
        ]
        charts.append(Chart(svg, table, legend if len(lines) > 1 else []))
    return charts


def _acceptance_charts(report: RunReport, tables: dict[str, NumberTable], index: int) -> list[Chart]:
    figures = report.figures
    if not figures.positions:
        return []
    positions, lengths, along = (tables[name] for name in ("positions", "lengths", "along"))
    with_expected = is_sampled(report)  # in a greedy run the expected acceptance is the conditional one
    series = [("main", "line"), *([("third", "dashes")] if with_expected else []), ("second", "line")]
    legend = [(color, swatch, label) for (color, swatch), label in zip(series, positions.header[2:], strict=True)]
    svg = plots.by_position(f"positions-{index}", positions.alt, figures.positions, with_expected)
    return [
        Chart(svg, positions, legend),
        Chart(
            plots.step_lengths(f"lengths-{index}", lengths.alt, [share for _, share in figures.step_lengths]), lengths
        ),
        Chart(plots.along_the_output(f"along-{index}", along.alt, figures.along), along),
    ]


def _heat_map(report: RunReport, tables: dict[str, NumberTable], index: int) -> Chart | None:
    """Of acceptance by task and position; None for a single task."""
    table = tables.get("positions by task")
    if table is None:
        return None
    return Chart(plots.acceptance_heat_map(f"heat-map-{index}", table.alt, report.figures.positions_by_task), table)


def _what_if_charts(report: RunReport, tables: dict[str, NumberTable], index: int) -> list[Chart]:
    predictions, measurements = report.figures.what_if, report.measurements
    if not predictions:
        return []
    legend = [("main", "line", "predicted from this run's texts")]
    if any(run.is_own for run in measurements):
        legend.append(("second", "square", "measured, this run"))
    if not all(run.is_own for run in measurements):
        legend.append(("second", "hollow", "measured, other runs"))
    table = tables["length by K"]
    charts = [Chart(plots.what_if_length(f"length-{index}", table.alt, predictions, measurements), table, legend)]
    if best := best_prediction(predictions):
        table = tables["speedup by K"]
        best_k = best.num_draft_tokens if (best.speedup.value or 0) > 1 else None
        svg = plots.what_if_speedup(f"speedup-{index}", table.alt, predictions, measurements, best_k)
        charts.append(Chart(svg, table, [*legend, ("plain", "line", "plain decoding")]))
    return charts


def _costs_chart(run: Run, tables: dict[str, NumberTable], index: int) -> Chart | None:
    """Time of a step by part against the time to read the target's weights; None where it was not measured."""
    if run.costs is None:
        return None
    draft, target, rest = (1000 * run.costs.rows * trimmed_mean(part) for part in step_parts(run.costs))
    read_s, table = run.costs.weights_read_s, tables["costs"]
    parts = {"target": target, "draft": draft, "verification": rest}
    svg = plots.step_by_k(f"costs-{index}", table.alt, parts, None if read_s is None else 1000 * read_s)
    names = {"target": "target forward", "draft": "draft", "verification": "rest"}
    legend = [(f"part-{part}", "box", names[part]) for part in parts]
    return Chart(
        svg, table, legend + ([("ink", "dashes", "reading the target's weights")] if read_s is not None else [])
    )


def _sample(run: Run) -> dict[str, Any] | None:
    """The sample's tokens, each with both models' most likely tokens as JSON, and how many tokens have each origin."""
    if run.sample is None:
        return None
    counts = Counter(token.origin for token in run.sample.tokens)
    return {
        "prompt_id": run.sample.prompt_id,
        "prompt": run.sample.prompt,
        "tokens": [
            {
                "lines": token.text.split("\n"),
                "origin": token.origin,
                "odds": json.dumps([token.text, token.target, token.draft], ensure_ascii=False),
            }
            for token in run.sample.tokens
        ],
        "counts": [(origin, counts[origin], meaning) for origin, meaning in ORIGINS.items() if counts[origin]],
    }
