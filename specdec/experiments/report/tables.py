"""The tables of a report, made once for the page and for Markdown."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from specdec.experiments.records import Costs, Memory
from specdec.experiments.report.compare import MACHINE, VERSIONS, Difference, differing_provenance
from specdec.experiments.report.estimates import NO_ESTIMATE, Estimate, trimmed_mean
from specdec.experiments.report.figures import METRICS, TIME_PARTS, Position
from specdec.experiments.report.formatting import interval, number, with_interval
from specdec.experiments.report.labels import RunReport, changes_from_first, is_sampled, k_of
from specdec.experiments.report.what_if import best_prediction, step_parts

TASK_METRICS = ("speedup", "mean_acceptance_length", "draft_acceptance_rate", "expected_acceptance")
TIMES = ("tokens_per_s", "first_token_ms", "token_ms")  # which depend on the machine more than on anything else
BETTER, WORSE, DIFFERS, BELOW_PLAIN = "better", "worse", "differs", "higher, but below 1×"
MARKS = {BETTER: "▲", WORSE: "▼", DIFFERS: "≠", BELOW_PLAIN: "△"}
# a larger K gives more tokens per step at a lower rate, so neither direction is better
DEPENDS_ON_K = ("mean_acceptance_length", "tokens_per_step", "draft_acceptance_rate")


@dataclass(frozen=True)
class Quantity:
    """An estimate with its unit, as number() takes it; unit "%" is for a share."""

    estimate: Estimate
    unit: str = ""

    @property
    def text(self) -> str:
        return with_interval(self.estimate, self.unit)


@dataclass(frozen=True)
class NumberTable:
    """A table of texts and quantities, with a title."""

    title: str
    header: list[str]
    cells: Sequence[Sequence[str | Quantity]]

    @property
    def rows(self) -> list[list[str]]:
        """The texts that are shown."""
        return [[cell if isinstance(cell, str) else cell.text for cell in row] for row in self.cells]

    @property
    def alt(self) -> str:
        """The table as a sentence, for the alt text of its chart."""
        rows = (
            f"{self.header[0]} {row[0]}: "
            + ", ".join(f"{name} {value}" for name, value in zip(self.header[1:], row[1:], strict=True))
            for row in self.rows
        )
        return f"{self.title}. {'; '.join(rows)}."

    @property
    def csv(self) -> str:
        """The values at full precision, shares as fractions; a column with intervals is followed by their ends."""
        columns = list(zip(*self.cells, strict=True))
        lines: list[list[object]] = [[] for _ in range(len(self.cells) + 1)]
        for name, column in zip(self.header, columns, strict=True):
            estimates = [cell.estimate if isinstance(cell, Quantity) else None for cell in column]
            parts = ["value", "low", "high"] if any(one and one.low is not None for one in estimates) else ["value"]
            lines[0] += [name, *(f"{name}, {part} end of 95 % interval" for part in parts[1:])]
            for line, cell, one in zip(lines[1:], column, estimates, strict=True):
                line += [getattr(one, part) for part in parts] if one else [cell, *[None] * (len(parts) - 1)]
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows(lines)
        return stream.getvalue()

    @property
    def csv_uri(self) -> str:
        return f"data:text/csv;charset=utf-8,{quote(self.csv)}"

    @property
    def csv_name(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower()).strip("-") + ".csv"


@dataclass(frozen=True)
class TableCell:
    """text, below: what is shown. value: the key to sort by. mark: one of MARKS or ""."""

    text: str
    below: str = ""
    value: float | str | None = None
    mark: str = ""


def number_tables(report: RunReport) -> dict[str, NumberTable]:
    """The tables of the charts and those without a chart, by name; only those for which the run has data."""
    figures, run = report.figures, report.run
    tables = {"tasks": _tasks(report)}
    if figures.positions:
        tables["positions"] = _positions(report)
        tables["lengths"] = _step_lengths(figures.step_lengths)
        tables["along"] = _along(report)
    if figures.positions and len(figures.positions_by_task) > 1:
        tables["positions by task"] = _positions_by_task(figures.positions_by_task)
    if figures.what_if:
        tables["length by K"] = _by_k(report, "Mean acceptance length by K", "mean_acceptance_length", "")
    if best_prediction(figures.what_if):
        tables["speedup by K"] = _by_k(report, "Speedup by K", "speedup", "×")
    if run.costs:
        tables["costs"] = _step_costs(run.costs)
    tables["time"] = _time(figures.time_ms)
    if run.memory:
        tables["memory"] = _memory(run.memory)
    return tables


def task_metrics(report: RunReport) -> list[str]:
    """Names of the metrics that the table by task shows."""
    names = [name for name in TASK_METRICS if report.figures.metrics[name].value is not None]
    return names or ["plain_tokens_per_s"]


def task_rows(report: RunReport) -> list[list[TableCell]]:
    """A row for each task; the last one is for all of them."""

    def row(task: str, num_prompts: int, values: dict[str, Estimate]) -> list[TableCell]:
        cells = [TableCell(task, value=task), TableCell(str(num_prompts), value=num_prompts)]
        for name in task_metrics(report):
            unit, estimate = METRICS[name].unit, values[name]
            cells.append(TableCell(number(estimate.value, unit), interval(estimate, unit), estimate.value))
        return cells

    rows = [row(task, num_prompts, values) for task, (num_prompts, values) in report.figures.tasks.items()]
    return [*rows, row("all", report.figures.prompts, report.figures.metrics)]


def comparison_rows(reports: Sequence[RunReport]) -> list[tuple[str, list[TableCell]]]:
    """A row for each metric: label, the first run's cell, further runs' with their differences; [] for one run."""
    if len(reports) == 1:
        return []
    first, further = reports[0], changes_from_first(reports)
    rows = []
    for name, metric in METRICS.items():
        estimate = first.figures.metrics[name]
        cells = [TableCell(number(estimate.value, metric.unit), interval(estimate, metric.unit))]
        for report, changes in further:
            is_neutral = name in DEPENDS_ON_K and k_of(report.run) != k_of(first.run)
            mark = _mark(changes[name], None if is_neutral else metric.higher_is_better)
            if name in TIMES and differing_provenance([first.run, report.run], MACHINE):
                mark = mark and DIFFERS
            if name == "speedup" and mark == BETTER and (changes[name].after or 0) < 1:
                mark = BELOW_PLAIN
            value = number(report.figures.metrics[name].value, metric.unit)
            cells.append(TableCell(value, _change(changes[name], metric.unit), mark=mark))
        if any(cell.text != "–" for cell in cells):
            rows.append((metric.label, cells))
    return rows + _provenance_rows(reports)


def _provenance_rows(reports: Sequence[RunReport]) -> list[tuple[str, list[TableCell]]]:
    """Machine and versions where they differ, marked where they are not the first run's."""
    differing = differing_provenance([report.run for report in reports], MACHINE | VERSIONS)
    return [
        (label, [TableCell(value, mark=DIFFERS if value != values[0] else "") for value in values])
        for label, values in differing.items()
    ]


def _change(difference: Difference, unit: str) -> str:
    change, before = difference.change, difference.before
    text = number(change.value, unit, before) if change.value is not None else ""
    bounds = interval(change, unit, before)
    return text + (f" ({bounds})" if bounds else "")


def _mark(difference: Difference, higher_is_better: bool | None) -> str:
    if not difference.is_clear or difference.change.value is None:
        return ""
    if higher_is_better is None:
        return DIFFERS
    return BETTER if (difference.change.value > 0) == higher_is_better else WORSE


def _positions(report: RunReport) -> NumberTable:
    columns = {"conditional: all preceding accepted": "conditional"}
    if is_sampled(report):
        columns["expected: mean of sum(min(p, q))"] = "expected"
    columns["unconditional: of all drafts"] = "unconditional"
    cells: list[list[str | Quantity]] = [
        [str(at.position), f"{at.drafts:,}", *(Quantity(getattr(at, name), "%") for name in columns.values())]
        for at in report.figures.positions
    ]
    return NumberTable("Acceptance by draft position", ["position", "drafts that reach it", *columns], cells)


def _step_lengths(step_lengths: Sequence[tuple[int, Estimate]]) -> NumberTable:
    cells: list[list[str | Quantity]] = [
        [str(tokens), f"{steps:,}", Quantity(share, "%")] for tokens, (steps, share) in enumerate(step_lengths, 1)
    ]
    return NumberTable("Tokens per step", ["tokens", "steps", "share"], cells)


def _along(report: RunReport) -> NumberTable:
    cells: list[list[str | Quantity]] = [
        [
            f"{at.start + 1} to {at.stop}" if at.stop - at.start > 1 else str(at.stop),
            Quantity(at.expected, "%"),
        ]
        for at in report.figures.along
    ]
    return NumberTable("Acceptance along the output", ["generated tokens", "expected acceptance"], cells)


def _positions_by_task(positions_by_task: dict[str, list[Position]]) -> NumberTable:
    """Conditional acceptance: one row for each task, one column for each position."""
    num_positions = max(map(len, positions_by_task.values()))
    cells: list[list[str | Quantity]] = [
        [
            task,
            *(Quantity(at.conditional, "%") for at in positions),
            *[Quantity(NO_ESTIMATE, "%")] * (num_positions - len(positions)),
        ]
        for task, positions in positions_by_task.items()
    ]
    header = ["task", *(f"position {position}" for position in range(1, num_positions + 1))]
    return NumberTable("Conditional acceptance by task and position", header, cells)


def _tasks(report: RunReport) -> NumberTable:
    names = task_metrics(report)
    rows = [*report.figures.tasks.items(), ("all", (report.figures.prompts, report.figures.metrics))]
    cells: list[list[str | Quantity]] = [
        [task, str(num_prompts), *(Quantity(values[name], METRICS[name].unit) for name in names)]
        for task, (num_prompts, values) in rows
    ]
    return NumberTable("By task", ["task", "prompts", *(METRICS[name].label for name in names)], cells)


def comparison_table(reports: Sequence[RunReport]) -> NumberTable:
    """The metrics of all runs, as comparison_rows() has them, without the differences."""
    cells: list[list[str | Quantity]] = [
        [metric.label, *(Quantity(report.figures.metrics[name], metric.unit) for report in reports)]
        for name, metric in METRICS.items()
        if any(report.figures.metrics[name].value is not None for report in reports)
    ]
    return NumberTable("Metrics of all runs", ["metric", *(report.label for report in reports)], cells)


def _by_k(report: RunReport, title: str, name: str, unit: str) -> NumberTable:
    """The prediction for each K, and the measurement where there is a run with that K."""
    predicted = {prediction.num_draft_tokens: getattr(prediction, name) for prediction in report.figures.what_if}
    cells: list[list[str | Quantity]] = []
    for k in sorted({*predicted, *(run.num_draft_tokens for run in report.measurements)}):
        measured = [Quantity(getattr(run, name), unit) for run in report.measurements if run.num_draft_tokens == k]
        several = ", ".join(one.text for one in measured) or "–"
        cells.append(
            [str(k), Quantity(predicted.get(k, NO_ESTIMATE), unit), measured[0] if len(measured) == 1 else several]
        )
    return NumberTable(title, ["K", "predicted", "measured"], cells)


def _step_costs(costs: Costs) -> NumberTable:
    parts = step_parts(costs)
    step_s = parts.sum(axis=0)
    columns = [*trimmed_mean(parts), trimmed_mean(step_s)]
    columns += [step_s.min(axis=0), step_s.max(axis=0)] if costs.repetitions > 1 else []
    header = ["K", "draft", "target", "rest", "step", "least", "most"][: len(columns) + 1]
    rows: list[list[str | Quantity]] = [
        [str(k), *(Quantity(Estimate(1000 * costs.rows * float(seconds))) for seconds in row)]
        for k, row in enumerate(zip(*columns, strict=True))
    ]
    return NumberTable("Time of a step, ms", header, rows)


def _time(time_ms: dict[str, dict[str, float]]) -> NumberTable:
    engines = sorted(time_ms)
    cells: list[list[str | Quantity]] = [
        [label, *(Quantity(Estimate(time_ms[engine][part])) for engine in engines)]
        for part, label in TIME_PARTS.items()
    ]
    cells.append(["total", *(Quantity(Estimate(sum(time_ms[engine].values()))) for engine in engines)])
    return NumberTable("Time per token, ms", ["part", *engines], cells)


def _memory(memory: Memory) -> NumberTable:
    names = [part.removesuffix("_bytes").replace("_", " ").replace("kv", "KV cache") for part in memory.predicted]
    rows: list[list[str | Quantity]] = [
        [name, _mib(size)] for name, size in zip(names, memory.predicted.values(), strict=True)
    ]
    total = sum(memory.predicted.values())
    rows += [["predicted", _mib(total)]] if total else []
    rows.append(["measured", _mib(memory.measured_bytes)])
    if memory.unplanned is not None:
        rows.append(["not predicted", memory.unplanned])
    if total:
        error = f"{100 * (memory.measured_bytes / total - 1):+.1f}\u00a0%".replace("-", "−")
        rows.append(["measured relative to predicted", error])
    return NumberTable("Peak memory", ["part", "size"], rows)


def _mib(size: int) -> str:
    return f"{size / 2**30:,.2f}\u00a0GiB" if size >= 2**30 else f"{size / 2**20:,.1f}\u00a0MiB"
