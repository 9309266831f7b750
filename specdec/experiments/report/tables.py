"""The tables of a report, made once for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdec.experiments.records import Costs, Memory
from specdec.experiments.report.compare import MACHINE, VERSIONS, Difference, differing_provenance
from specdec.experiments.report.estimates import NO_ESTIMATE, Estimate, trimmed_mean
from specdec.experiments.report.figures import METRICS, TIME_PARTS
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
class NumberTable:
    """A table of texts, with a title."""

    title: str
    header: list[str]
    rows: list[list[str]]

    @property
    def alt(self) -> str:
        """The table as a sentence, for the alt text of its chart."""
        rows = (
            f"{self.header[0]} {row[0]}: "
            + ", ".join(f"{name} {value}" for name, value in zip(self.header[1:], row[1:], strict=True))
            for row in self.rows
        )
        return f"{self.title}. {'; '.join(rows)}."


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
    tables = {}
    if figures.positions:
        tables["positions"] = _positions(report)
        tables["lengths"] = _accepted_lengths(figures.histogram)
        tables["along"] = _along(report)
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
    rows = [
        [str(at.position), *(with_interval(getattr(at, name), "%") for name in columns.values())]
        for at in report.figures.positions
    ]
    return NumberTable("Acceptance by draft position", ["position", *columns], rows)


def _accepted_lengths(histogram: Sequence[int]) -> NumberTable:
    steps = sum(histogram)
    rows = [[str(length), f"{count:,}", number(count / steps, "%")] for length, count in enumerate(histogram)]
    return NumberTable("Accepted tokens per draft", ["accepted", "steps", "share"], rows)


def _along(report: RunReport) -> NumberTable:
    rows = [
        [f"{at.start + 1} to {at.stop}" if at.stop - at.start > 1 else str(at.stop), with_interval(at.expected, "%")]
        for at in report.figures.along
    ]
    return NumberTable("Acceptance along the output", ["generated tokens", "expected acceptance"], rows)


def _by_k(report: RunReport, title: str, name: str, unit: str) -> NumberTable:
    """The prediction for each K, and the measurement where there is a run with that K."""
    predicted = {prediction.num_draft_tokens: getattr(prediction, name) for prediction in report.figures.what_if}
    rows = []
    for k in sorted({*predicted, *(run.num_draft_tokens for run in report.measurements)}):
        measured = [with_interval(getattr(run, name), unit) for run in report.measurements if run.num_draft_tokens == k]
        rows.append([str(k), with_interval(predicted.get(k, NO_ESTIMATE), unit), ", ".join(measured) or "–"])
    return NumberTable(title, ["K", "predicted", "measured"], rows)


def _step_costs(costs: Costs) -> NumberTable:
    parts = step_parts(costs)
    step_s = parts.sum(axis=0)
    columns = [*trimmed_mean(parts), trimmed_mean(step_s)]
    columns += [step_s.min(axis=0), step_s.max(axis=0)] if costs.repetitions > 1 else []
    header = ["K", "draft", "target", "rest", "step", "least", "most"][: len(columns) + 1]
    rows = [
        [str(k), *(number(1000 * costs.rows * seconds) for seconds in row)]
        for k, row in enumerate(zip(*columns, strict=True))
    ]
    return NumberTable("Time of a step, ms", header, rows)


def _time(time_ms: dict[str, dict[str, float]]) -> NumberTable:
    engines = sorted(time_ms)
    rows = [[label, *(number(time_ms[engine][part]) for engine in engines)] for part, label in TIME_PARTS.items()]
    rows.append(["total", *(number(sum(time_ms[engine].values())) for engine in engines)])
    return NumberTable("Time per token, ms", ["part", *engines], rows)


def _memory(memory: Memory) -> NumberTable:
    names = [part.removesuffix("_bytes").replace("_", " ").replace("kv", "KV cache") for part in memory.predicted]
    rows = [[name, _mib(size)] for name, size in zip(names, memory.predicted.values(), strict=True)]
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
