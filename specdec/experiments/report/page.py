"""What a run came to, for people and for scripts: one page of HTML that needs nothing beside it, Markdown, JSON, a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from specdec.experiments.records import SPECULATIVE, Memory, Run
from specdec.experiments.report import plots
from specdec.experiments.report.figures import (
    METRICS,
    Difference,
    Estimate,
)
from specdec.experiments.report.labels import (
    Reported,
    changes_from_first,
    choice_of,
    identical,
    is_interrupted,
    is_of_older_format,
    is_sampled,
    k_of,
    to_report,
)
from specdec.experiments.report.narrative import (
    about,
    best_of,
    capital,
    caveats,
    chosen,
    compared,
    count,
    left_out,
    plan,
    sentence,
    suggestion,
    terms,
)
from specdec.experiments.report.plots import PARTS, interval, number, with_interval

BY_TASK = ("speedup", "mean_acceptance_length", "draft_acceptance_rate", "expected_acceptance")
HANGS_ON_K = (
    "mean_acceptance_length",
    "tokens_per_step",
    "draft_acceptance_rate",
)  # a larger K has more tokens, a lower rate
HEADLINES = {
    "speedup": "speedup",
    "tokens_per_s": "tokens/s",
    "mean_acceptance_length": "accept. length",
    "draft_acceptance_rate": "accept. rate",
    "identical": "identical",
}
FEW_PROMPTS = 10  # an interval of fewer is too narrow
ORIGINS = {
    "accepted": "the drafter's guess, kept",
    "recovered": "the target's own, in place of a wrong guess",
    "bonus": "the target's own, behind a draft that was kept whole",
    "plain": "the target's own, where nothing was drafted",
}


@dataclass(frozen=True)
class Card:
    """A headline: what it is, its figure with the interval, and a line of meaning."""

    label: str
    value: str
    interval: str
    meaning: str
    is_bad: bool = False


@dataclass(frozen=True)
class Numbers:
    """A table of words and numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]

    @property
    def alt(self) -> str:
        """The same as a sentence."""
        rows = (
            f"{self.header[0]} {row[0]}: "
            + ", ".join(f"{name} {value}" for name, value in zip(self.header[1:], row[1:], strict=True))
            for row in self.rows
        )
        return f"{self.title}. {'; '.join(rows)}."


@dataclass(frozen=True)
class Chart:
    """A drawing and its numbers. legend: colour, swatch and label of each series."""

    svg: str
    numbers: Numbers
    legend: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """text, below: what is shown. value: what is sorted by."""

    text: str
    below: str = ""
    value: float | str | None = None
    mark: str = ""


def page(runs: Sequence[Run]) -> str:
    """One HTML page, without any other file or the network. Raises ValueError where runs can't be compared."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ValueError('a report page needs jinja2; pip install "specdec-lossless[experiments]"') from error
    reported = to_report(runs)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rendered = environment.get_template("report.html.jinja").render(
        title=reported[0].label if len(runs) == 1 else f"{len(runs)} runs compared",
        sections=[_section(one, index) for index, one in enumerate(reported, 1)],
        comparison=_comparison(reported),
        compared=compared(reported),
        overview=_overview(reported),
        origins=ORIGINS,
    )
    return rendered.strip() + "\n"


def markdown(runs: Sequence[Run]) -> str:
    """The same figures as tables of Markdown, for a pull request or a job's summary."""
    reported = to_report(runs)
    parts = []
    if len(reported) > 1:
        labels = [one.label for one in reported]
        rows = [
            [label, *(" ".join(filter(None, (cell.text, cell.below, cell.mark))) for cell in cells)]
            for label, cells in _comparison(reported)
        ]
        parts += [f"# {len(reported)} runs compared", *(text for _, text in compared(reported))]
        parts += [_markdown_table(["", *labels], rows)]
    for one in reported:
        parts += [
            f"{'#' if len(reported) == 1 else '##'} {one.label}",
            sentence(one),
            *(f"> {note}" for note in caveats(one)),
        ]
        metrics = [(metric, one.figures.metrics[name]) for name, metric in METRICS.items()]
        parts.append(
            _markdown_table(
                ["", "value", "95 % interval"],
                [[m.label, number(e.value, m.unit), interval(e, m.unit)] for m, e in metrics if e.value is not None],
            )
        )
        names = _task_metrics(one)
        parts.append(
            _markdown_table(
                ["task", "prompts", *(METRICS[name].label for name in names)],
                [
                    [task, str(count), *(with_interval(values[name], METRICS[name].unit) for name in names)]
                    for task, (count, values) in one.figures.tasks.items()
                ],
            )
        )
        for numbers in _numbers(one).values():
            parts += [f"**{numbers.title}**", _markdown_table(numbers.header, numbers.rows)]
        parts += [chosen(one)] if chosen(one) else []
        parts += [suggestion(one)] if one.figures.what_if else []
        parts += [f"- {line}" for line in left_out(one.run)]
    return "\n\n".join(parts) + "\n"


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """All figures as plain values; rates are fractions. differences: from the first run to each other one."""
    reported = to_report(runs)
    return {
        "runs": [
            {
                "label": one.label,
                "folder": str(one.run.folder),
                "interrupted": is_interrupted(one.run),
                "record_format": one.run.header.version,
                "caveats": caveats(one),
                "provenance": one.run.header.provenance,
                "config": one.config,
                **asdict(one.figures),
                "tasks": {
                    task: {"prompts": count, "metrics": {name: asdict(value) for name, value in values.items()}}
                    for task, (count, values) in one.figures.tasks.items()
                },
                "costs": asdict(one.run.costs) if one.run.costs else None,
                "memory": asdict(one.run.memory) if one.run.memory else None,
                "choice": asdict(choice) if (choice := choice_of(one.run)) else None,
                "failures": [asdict(failure) for failure in one.run.failures],
                "skipped": [asdict(skipped) for skipped in one.run.skipped],
            }
            for one in reported
        ],
        "differences": [
            {
                "from": reported[0].label,
                "to": one.label,
                "metrics": {name: asdict(value) for name, value in changes.items()},
            }
            for one, changes in changes_from_first(reported)
        ],
    }


def summary_table(runs: Sequence[Run]) -> Table:
    """The headlines, for a terminal of 80 columns."""
    reported = to_report(runs)
    skipped, failed = sum(len(run.skipped) for run in runs), sum(len(run.failures) for run in runs)
    left = [f"{count(skipped, 'prompt')} skipped"] * (skipped > 0) + [f"{count(failed, 'call')} failed"] * (failed > 0)
    notes = [f"{' and '.join(left)}; the report says why"] * bool(left) + [
        f"{one.label}: recorded in format {one.run.header.version}; the figures are made of its steps, by today's definitions"
        for one in reported
        if is_of_older_format(one.run)
    ]
    caption = "\n".join(notes) or None
    if len(reported) > 1:
        metrics = [one.figures.metrics for one in reported]
        names = [name for name in HEADLINES if any(values[name].value is not None for values in metrics)]
        table = Table("run", title=f"{len(reported)} runs, {reported[0].figures.prompts} prompts each", caption=caption)
        for name in names:
            table.add_column(HEADLINES[name], justify="right")
        for one, values in zip(reported, metrics, strict=True):
            table.add_row(one.label, *(number(values[name].value, METRICS[name].unit) for name in names))
        return table
    one = reported[0]
    table = Table(title=f"{one.label}: {count(one.figures.prompts, 'prompt')}, {plan(one)}", caption=caption)
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, metric in METRICS.items():
        estimate = one.figures.metrics[name]
        if estimate.value is not None and name not in ("realized_acceptance", "token_ms"):
            table.add_row(metric.label, number(estimate.value, metric.unit), interval(estimate, metric.unit))
    return table


def _cards(one: Reported) -> list[Card]:
    metrics = one.figures.metrics
    same, paired = identical(one.run)
    plain_rate, plain_wait = metrics["plain_tokens_per_s"], metrics["plain_first_token_ms"]

    def card(name: str, meaning: str, label: str = "") -> Card:
        estimate, metric = metrics[name], METRICS[name]
        return Card(
            capital(label or metric.label),
            number(estimate.value, metric.unit),
            interval(estimate, metric.unit),
            meaning,
        )

    if not one.run.of(SPECULATIVE):
        return [card("plain_tokens_per_s", "of the target alone"), card("plain_first_token_ms", "prompt included")]
    speed = card(
        "tokens_per_s", "plain → speculative" if plain_rate.value is not None else "speculative; plain was not run"
    )
    if plain_rate.value is not None:
        speed = Card(speed.label, f"{number(plain_rate.value)} → {speed.value}", speed.interval, speed.meaning)
    cards = [
        card("speedup", "tokens per second, over plain decoding of the same prompts", "speedup"),
        speed,
        card(
            "mean_acceptance_length",
            "tokens of a step that drafts: the kept guesses and the target's own one; of all steps: "
            + number(metrics["tokens_per_step"].value),
        ),
        card("draft_acceptance_rate", "of all guesses; those behind a wrong one are lost with it"),
        card("expected_acceptance", "chance of a guess whose forerunners were kept, from both models' probabilities"),
    ]
    if paired:
        meaning = "the same as plain decoding's, token for token"
        cards.append(Card("Identical texts", f"{same:,} of {paired:,}", "", meaning, is_bad=same < paired))
    elif is_sampled(one):
        cards.append(
            Card("Identical texts", "sampled", "", "so not compared one by one; their distribution is the target's")
        )
    before = f"; plain: {number(plain_wait.value, 'ms')}" if plain_wait.value is not None else ""
    cards.append(card("first_token_ms", f"prompt included{before}"))
    return [card for card in cards if card.value != "–"]


def _task_metrics(one: Reported) -> list[str]:
    known = [name for name in BY_TASK if one.figures.metrics[name].value is not None]
    return known or ["plain_tokens_per_s"]


def _task_rows(one: Reported, names: Sequence[str]) -> list[list[Cell]]:
    """A row a task; the last is of all of them."""

    def row(task: str, count: int, values: dict[str, Estimate]) -> list[Cell]:
        cells = [Cell(task, value=task), Cell(str(count), value=count)]
        for name in names:
            unit, estimate = METRICS[name].unit, values[name]
            cells.append(Cell(number(estimate.value, unit), interval(estimate, unit), estimate.value))
        return cells

    rows = [row(task, count, values) for task, (count, values) in one.figures.tasks.items()]
    return [*rows, row("all", one.figures.prompts, one.figures.metrics)]


def _comparison(reported: Sequence[Reported]) -> list[tuple[str, list[Cell]]]:
    """Rows of label and cells, the first run's and each other one's with its difference; [] of one run."""
    if len(reported) == 1:
        return []
    differences = changes_from_first(reported)
    rows = []
    for name, metric in METRICS.items():
        first = reported[0].figures.metrics[name]
        cells = [Cell(number(first.value, metric.unit), interval(first, metric.unit))]
        for one, changes in differences:
            change = changes[name]
            below = number(change.change.value, metric.unit, change.before) if change.change.value is not None else ""
            if between := interval(change.change, metric.unit, change.before):
                below += f" ({between})"
            is_neutral = name in HANGS_ON_K and k_of(one.run) != k_of(reported[0].run)
            mark = _mark(change, None if is_neutral else metric.higher_is_better)
            cells.append(Cell(number(one.figures.metrics[name].value, metric.unit), below, mark=mark))
        if any(cell.text != "–" for cell in cells):
            rows.append((metric.label, cells))
    return rows


def _mark(change: Difference, higher_is_better: bool | None) -> str:
    if not change.is_clear or change.change.value is None:
        return ""
    if higher_is_better is None:
        return "differs"
    return "better" if (change.change.value > 0) == higher_is_better else "worse"


def _overview(reported: Sequence[Reported]) -> list[Chart]:
    """Metrics of several runs, one run below the other."""
    if len(reported) == 1:
        return []
    charts = []
    names = [one.label for one in reported]
    for name, even in (("speedup", 1.0), ("mean_acceptance_length", None), ("draft_acceptance_rate", None)):
        metric, estimates = METRICS[name], [one.figures.metrics[name] for one in reported]
        if any(estimate.value is not None for estimate in estimates):
            rows = [[label, with_interval(e, metric.unit)] for label, e in zip(names, estimates, strict=True)]
            numbers = Numbers(capital(metric.label), ["run", metric.label], rows)
            charts.append(Chart(plots.by_run(f"all-{name}", numbers.alt, names, estimates, metric.unit, even), numbers))
    return charts


def _section(one: Reported, index: int) -> dict[str, Any]:
    """All that the template lays out of one run."""
    run, numbers = one.run, _numbers(one)
    names = _task_metrics(one)
    return {
        "label": one.label,
        "about": about(one),
        "sentence": sentence(one),
        "terms": terms(one) if run.of(SPECULATIVE) else [],
        "caveats": caveats(one),
        "cards": _cards(one),
        "task_header": ["task", "prompts", *(METRICS[name].label for name in names)],
        "task_rows": _task_rows(one, names),
        "has_few_prompts": any(1 < count < FEW_PROMPTS for count, _ in one.figures.tasks.values()),
        "acceptance": _acceptance_charts(one, numbers, index),
        "what_if": _what_if_charts(one, numbers, index),
        "chosen": chosen(one),
        "suggestion": suggestion(one),
        "costs": numbers.get("costs"),
        "time": Chart(plots.time_by_part(f"time-{index}", numbers["time"].alt, one.figures.time_ms), numbers["time"]),
        "parts": list(PARTS),
        "sample": _sample(run),
        "memory": numbers.get("memory"),
        "left_out": left_out(run),
        "provenance": [(name, str(value)) for name, value in run.header.provenance.items() if name != "command"],
        "command": run.header.provenance.get("command", ""),
        "config": [(name, str(value)) for name, value in one.run.header.flat().items()],
    }


def _acceptance_charts(one: Reported, numbers: dict[str, Numbers], index: int) -> list[Chart]:
    told = one.figures
    if not told.positions:
        return []
    table = numbers["positions"]
    sampled = is_sampled(one)  # else a guess is right or wrong, and expected is what was counted
    series = [("main", "line"), *([("third", "dashes")] if sampled else []), ("second", "line")]
    legend = [(colour, swatch, label) for (colour, swatch), label in zip(series, table.header[1:], strict=True)]
    return [
        Chart(plots.by_position(f"positions-{index}", table.alt, told.positions, sampled), table, legend),
        Chart(plots.accepted_lengths(f"lengths-{index}", numbers["lengths"].alt, told.histogram), numbers["lengths"]),
        Chart(plots.along_the_output(f"along-{index}", numbers["along"].alt, told.along), numbers["along"]),
    ]


def _what_if_charts(one: Reported, numbers: dict[str, Numbers], index: int) -> list[Chart]:
    told = one.figures
    if not told.what_if:
        return []
    legend = [("main", "line", "predicted from this run's texts")]
    if any(run.is_own for run in one.measured):
        legend.append(("second", "square", "measured, this run"))
    if not all(run.is_own for run in one.measured):
        legend.append(("second", "hollow", "measured, other runs"))
    table = numbers["length by K"]
    charts = [Chart(plots.what_if_length(f"length-{index}", table.alt, told.what_if, one.measured), table, legend)]
    if best := best_of(told.what_if):
        table = numbers["speedup by K"]
        svg = plots.what_if_speedup(f"speedup-{index}", table.alt, told.what_if, one.measured, best.num_draft_tokens)
        charts.append(Chart(svg, table, [*legend, ("plain", "line", "plain decoding")]))
    return charts


def _numbers(one: Reported) -> dict[str, Numbers]:
    """The tables behind the charts, and those without one; only what the run has."""
    told, run = one.figures, one.run
    tables = {}
    if told.positions:
        columns = {
            "conditional: kept, where all before it were": "conditional",
            "unconditional: kept, of all drafts": "unconditional",
        }
        if is_sampled(one):
            columns = {
                "conditional: kept, where all before it were": "conditional",
                "expected there: mean of sum(min(p, q))": "expected",
                "unconditional: kept, of all drafts": "unconditional",
            }
        tables["positions"] = Numbers(
            "Acceptance by draft position",
            ["position", *columns],
            [
                [str(at.position), *(with_interval(getattr(at, name), "%") for name in columns.values())]
                for at in told.positions
            ],
        )
        steps = sum(told.histogram)
        tables["lengths"] = Numbers(
            "Accepted tokens per draft",
            ["accepted", "steps", "share"],
            [[str(length), f"{count:,}", number(count / steps, "%")] for length, count in enumerate(told.histogram)],
        )
        tables["along"] = Numbers(
            "Acceptance along the output",
            ["generated tokens", "expected acceptance"],
            [
                [
                    f"{at.start + 1} to {at.stop}" if at.stop - at.start > 1 else str(at.stop),
                    with_interval(at.expected, "%"),
                ]
                for at in told.along
            ],
        )
    if told.what_if:
        tables["length by K"] = _by_k(one, "Mean acceptance length by K", "mean_acceptance_length", "")
    if best_of(told.what_if):
        tables["speedup by K"] = _by_k(one, "Speedup by K", "speedup", "×")
    if run.costs:
        parts = zip(run.costs.draft_s, run.costs.target_s, run.costs.verification_s, run.costs.other_s, strict=True)
        tables["costs"] = Numbers(
            "Time of a step, ms",
            ["K", "draft", "target", "rest", "step"],
            [
                [
                    str(k),
                    *(
                        number(1000 * seconds)
                        for seconds in (draft, target, verify + other, draft + target + verify + other)
                    ),
                ]
                for k, (draft, target, verify, other) in enumerate(parts)
            ],
        )
    engines = sorted(told.time_ms)
    rows = [[label, *(number(told.time_ms[engine][part]) for engine in engines)] for part, label in PARTS.items()]
    rows.append(["total", *(number(sum(told.time_ms[engine].values())) for engine in engines)])
    tables["time"] = Numbers("Time a token, ms", ["part", *engines], rows)
    if run.memory:
        tables["memory"] = _memory(run.memory)
    return tables


def _by_k(one: Reported, title: str, name: str, unit: str) -> Numbers:
    """What was predicted of each K, and measured where there is a run of it."""
    predicted = {guess.num_draft_tokens: getattr(guess, name) for guess in one.figures.what_if}
    rows = []
    for k in sorted({*predicted, *(run.num_draft_tokens for run in one.measured)}):
        found = [with_interval(getattr(run, name), unit) for run in one.measured if run.num_draft_tokens == k]
        rows.append([str(k), with_interval(predicted.get(k, Estimate(None)), unit), ", ".join(found) or "–"])
    return Numbers(title, ["K", "predicted", "measured"], rows)


def _memory(memory: Memory) -> Numbers:
    names = [part.removesuffix("_bytes").replace("_", " ").replace("kv", "KV cache") for part in memory.predicted]
    rows = [[name, _mib(size)] for name, size in zip(names, memory.predicted.values(), strict=True)]
    total = sum(memory.predicted.values())
    rows += [["predicted", _mib(total)]] if total else []
    rows.append(["measured", _mib(memory.measured_bytes)])
    if memory.unplanned is not None:
        rows.append(["not predicted", memory.unplanned])
    if total:
        rows.append(
            ["measured against predicted", f"{100 * (memory.measured_bytes / total - 1):+.1f}\u00a0%".replace("-", "−")]
        )
    return Numbers("Memory at the peak", ["part", "size"], rows)


def _mib(size: int) -> str:
    return f"{size / 2**30:,.2f}\u00a0GiB" if size >= 2**30 else f"{size / 2**20:,.1f}\u00a0MiB"


def _sample(run: Run) -> dict[str, Any] | None:
    """The sample's tokens, each with what the page shows when it is pointed at, and how many are of each origin."""
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


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(header), line(["---", *(["---:"] * (len(header) - 1))]), *map(line, rows)])
