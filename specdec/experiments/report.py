"""What a run came to, for people and for scripts: one page of HTML that needs nothing beside it, Markdown, JSON, a table."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median_low
from typing import Any

from rich.table import Table

from specdec.experiments import plots
from specdec.experiments.figures import (
    COLUMN,
    METRICS,
    Difference,
    Estimate,
    Figures,
    WhatIf,
    check_comparable,
    compare,
    figures,
    tally,
)
from specdec.experiments.plots import PARTS, Measured, interval, number, with_interval
from specdec.experiments.records import PLAIN, SPECULATIVE, Memory, Record, Run, files_of, read_run

OF_NO_ACCOUNT = ("folder", "resume", "name")  # two runs that differ in these alone are of one config
BY_TASK = ("speedup", "mean_acceptance_length", "draft_acceptance_rate", "expected_acceptance")
HANGS_ON_K = ("mean_acceptance_length", "draft_acceptance_rate")  # a larger K has more of one and less of the other
SLOW = 3  # times what is usual
FEW_PROMPTS = 10  # an interval of fewer is too narrow
ORIGINS = {
    "accepted": "the drafter's guess, kept",
    "recovered": "the target's own, in place of a wrong guess",
    "bonus": "the target's own, behind a draft that was kept whole",
    "plain": "the target's own, where nothing was drafted",
}


@dataclass(frozen=True)
class Reported:
    """A run, its figures, and what tells it from the others. measured: the runs of its config with any K, itself included."""

    label: str
    run: Run
    figures: Figures
    measured: list[Measured]

    @property
    def config(self) -> dict[str, Any]:
        return self.run.header.config

    @property
    def sampling(self) -> dict[str, Any]:
        sampling: dict[str, Any] = self.config["sampling"]
        return sampling


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


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of run folders, record files and sweeps' folders, which hold run folders, in the order of their numbers."""
    runs = []
    for path in paths:
        inner = [] if path.is_file() or files_of(path) else [folder for folder in path.glob("*") if files_of(folder)]
        runs += [read_run(folder) for folder in sorted(inner, key=_numbered) or [path]]
    return runs


def page(runs: Sequence[Run]) -> str:
    """One HTML page, without any other file or the network. Raises ValueError where runs can't be compared."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ValueError('a report page needs jinja2; pip install "specdec-lossless[experiments]"') from error
    reported = _reported(runs)
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
        compared=_compared(reported),
        overview=_overview(reported),
        origins=ORIGINS,
    )
    return rendered.strip() + "\n"


def markdown(runs: Sequence[Run]) -> str:
    """The same figures as tables of Markdown, for a pull request or a job's summary."""
    reported = _reported(runs)
    parts = []
    if len(reported) > 1:
        labels = [one.label for one in reported]
        rows = [
            [label, *(" ".join(filter(None, (cell.text, cell.below, cell.mark))) for cell in cells)]
            for label, cells in _comparison(reported)
        ]
        parts += [f"# {len(reported)} runs compared", *(text for _, text in _compared(reported))]
        parts += [_markdown_table(["", *labels], rows)]
    for one in reported:
        parts += [f"{'#' if len(reported) == 1 else '##'} {one.label}", _sentence(one), *(f"> {note}" for note in _caveats(one))]
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
        parts += [_suggestion(one)] if one.figures.what_if else []
        parts += [f"- {line}" for line in _left_out(one.run)]
    return "\n\n".join(parts) + "\n"


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """All figures as plain values; rates are fractions. differences: from the first run to each other one."""
    reported = _reported(runs)
    return {
        "runs": [
            {
                "label": one.label,
                "folder": str(one.run.folder),
                "interrupted": _is_interrupted(one.run),
                "provenance": one.run.header.provenance,
                "config": one.config,
                **asdict(one.figures),
                "tasks": {
                    task: {"prompts": count, "metrics": {name: asdict(value) for name, value in values.items()}}
                    for task, (count, values) in one.figures.tasks.items()
                },
                "costs": asdict(one.run.costs) if one.run.costs else None,
                "memory": asdict(one.run.memory) if one.run.memory else None,
                "failures": [asdict(failure) for failure in one.run.failures],
                "skipped": [asdict(skipped) for skipped in one.run.skipped],
            }
            for one in reported
        ],
        "differences": [
            {"from": reported[0].label, "to": one.label, "metrics": {name: asdict(value) for name, value in changes.items()}}
            for one, changes in _differences(reported)
        ],
    }


def summary_table(runs: Sequence[Run]) -> Table:
    """The headlines, for a terminal of 80 columns."""
    reported = _reported(runs)
    if len(reported) > 1:
        names = ("speedup", "tokens_per_s", "mean_acceptance_length", "draft_acceptance_rate", "identical")
        table = Table("run", title=f"{len(reported)} runs, {reported[0].figures.prompts} prompts each")
        for column in ("speedup", "tokens/s", "accept. length", "accept. rate", "identical"):
            table.add_column(column, justify="right")
        for one in reported:
            table.add_row(one.label, *(number(one.figures.metrics[name].value, METRICS[name].unit) for name in names))
        return table
    one = reported[0]
    table = Table(title=f"{one.label}: {_count(one.figures.prompts, 'prompt')}, {_plan(one)}")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, metric in METRICS.items():
        estimate = one.figures.metrics[name]
        if estimate.value is not None and name not in ("realized_acceptance", "token_ms"):
            table.add_row(metric.label, number(estimate.value, metric.unit), interval(estimate, metric.unit))
    return table


def _reported(runs: Sequence[Run]) -> list[Reported]:
    for other in runs[1:]:
        check_comparable(runs[0], other)
    made = [figures(run) for run in runs]

    def measured(run: Run) -> list[Measured]:
        return [
            Measured(_k(other), its.metrics["mean_acceptance_length"], its.metrics["speedup"], other is run)
            for other, its in zip(runs, made, strict=True)
            if other.of(SPECULATIVE) and not _differing([run, other]) - {"num_draft_tokens"}
        ]

    return [Reported(label, run, its, measured(run)) for label, run, its in zip(labels(runs), runs, made, strict=True)]


def labels(runs: Sequence[Run]) -> list[str]:
    """What each run differs from the others in, or its name."""
    names = [str(run.header.config.get("name", run.folder.name)) for run in runs]
    differing = _differing(runs)
    whole = {group for group in ("target", "drafter", "workload") if differing & {f"{group}._target_", f"{group}.path"}}
    told = []
    for run in runs:
        values = _flat(run.header.config)
        parts = [f"{group} {_called(run.header.config[group])}" for group in sorted(whole)]
        for name in sorted(differing):
            if name.partition(".")[0] not in whole and name in values:
                value = values[name]
                parts.append(f"K={value}" if name == "num_draft_tokens" else f"{name.rpartition('.')[2]}={value}")
        told.append(", ".join(parts))
    if len(set(told)) == len(runs) and all(told):
        return told
    return (
        names if len(set(names)) == len(runs) else [f"{name} ({run.folder.name})" for name, run in zip(names, runs, strict=True)]
    )


def _differing(runs: Sequence[Run]) -> set[str]:
    """Names of what the runs' configs differ in."""
    flat = [_flat(run.header.config) for run in runs]
    names = {name for values in flat for name in values if name.partition(".")[0] not in OF_NO_ACCOUNT}
    return {name for name in names if any(values.get(name) != flat[0].get(name) for values in flat)}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _numbered(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdecimal() else 0, folder.name)


def _called(group: Any) -> str:
    """A model by its hub id or the end of its path, another object by its class: "prompt lookup"."""
    if not isinstance(group, dict):
        return str(group)
    if path := group.get("path"):
        return "/".join(Path(str(path)).parts[-2:])
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", str(group.get("_target_", "")).rpartition(".")[2]).lower()


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _k(run: Run) -> int:
    return int(run.header.config["num_draft_tokens"])


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _is_interrupted(run: Run) -> bool:
    return run.torn or any(run.folder.glob("records-*.jsonl"))


def _plan(one: Reported) -> str:
    temperature = one.sampling.get("temperature", 0)
    return f"K={_k(one.run)}, {f'sampled at temperature {temperature:g}' if temperature else 'greedy'}"


def _is_sampled(one: Reported) -> bool:
    return bool(one.sampling.get("temperature"))


def _drafts_with(one: Reported) -> str:
    drafter = one.config["drafter"]
    if isinstance(drafter, dict) and "path" in drafter:
        return "a draft model"
    return _called(drafter)


def _sentence(one: Reported) -> str:
    """What was measured and what came of it, for someone who has never seen the project."""
    metrics = one.figures.metrics
    records = one.run.of(SPECULATIVE)
    texts = f"{_count(len(records or one.run.of(PLAIN)), 'text')} of up to {one.sampling.get('max_new_tokens')} tokens"
    if not records:
        rate = with_interval(metrics["plain_tokens_per_s"])
        return f"The target model alone wrote {texts} at {rate} tokens a second; nothing was drafted, so nothing was accepted."
    speed = metrics["speedup"]
    between = f"95 % interval {interval(speed)}" if speed.low is not None else "one prompt gives no interval"
    if speed.value is None:
        rate = with_interval(metrics["tokens_per_s"])
        came = f"at {rate} tokens a second; plain decoding was not run beside it, so a speedup is not known"
    elif speed.low is not None and speed.high is not None and speed.low <= 1 <= speed.high:
        came = f"neither clearly faster nor slower than on its own: {speed.value:.2f} times as fast ({between})"
    else:
        came = f"{speed.value:.2f} times as fast as on its own{', which is slower' if speed.value < 1 else ''} ({between})"
    same, paired = _identical(one.run)
    if paired:
        agreed = "every text is" if same == paired > 1 else "the text is" if same == paired else ""
        verdict = f", and {agreed} the same, token for token" if agreed else f", but {paired - same} of {paired} texts differ"
    else:
        verdict = "; texts are sampled, so they are not compared one by one" if _is_sampled(one) else ""
    kept, length = metrics["draft_acceptance_rate"].value, metrics["mean_acceptance_length"].value
    outcome = (
        f" {number(kept, '%')} of the guesses were kept, so a step of the target gave {number(length)} tokens"
        " where it gives 1 on its own."
        if kept is not None
        else " It never had a guess to offer."
    )
    ahead = _count(_k(one.run), "token")
    return f"With {_drafts_with(one)} guessing up to {ahead} ahead, the target model wrote {texts} {came}{verdict}.{outcome}"


def _terms(one: Reported) -> list[tuple[str, str]]:
    is_model = _drafts_with(one) == "a draft model"
    return [
        ("Draft model", "a small, fast model that guesses the next tokens; the target checks all of them in one pass.")
        if is_model
        else ("Drafter", f"what guesses the next tokens, here {_drafts_with(one)}; the target checks all of them in one pass."),
        ("K", f"how many tokens are guessed a step, here {_k(one.run)}."),
        ("Acceptance", "how many guesses the target keeps. A wrong one costs time, it never changes what the target says."),
    ]


def _cards(one: Reported) -> list[Card]:
    metrics = one.figures.metrics
    same, paired = _identical(one.run)
    plain_rate, plain_wait = metrics["plain_tokens_per_s"], metrics["plain_first_token_ms"]

    def card(name: str, meaning: str, label: str = "") -> Card:
        estimate, metric = metrics[name], METRICS[name]
        return Card(
            _capital(label or metric.label), number(estimate.value, metric.unit), interval(estimate, metric.unit), meaning
        )

    if not one.run.of(SPECULATIVE):
        return [card("plain_tokens_per_s", "of the target alone"), card("plain_first_token_ms", "prompt included")]
    speed = card("tokens_per_s", "plain → speculative" if plain_rate.value is not None else "speculative; plain was not run")
    if plain_rate.value is not None:
        speed = Card(speed.label, f"{number(plain_rate.value)} → {speed.value}", speed.interval, speed.meaning)
    cards = [
        card("speedup", "tokens per second, over plain decoding of the same prompts", "speedup"),
        speed,
        card("mean_acceptance_length", "tokens a step of the target: its own one, and the kept guesses"),
        card("draft_acceptance_rate", "of all guesses; those behind a wrong one are lost with it"),
        card("expected_acceptance", "chance of a guess whose forerunners were kept, from both models' probabilities"),
    ]
    if paired:
        meaning = "the same as plain decoding's, token for token"
        cards.append(Card("Identical texts", f"{same:,} of {paired:,}", "", meaning, is_bad=same < paired))
    elif _is_sampled(one):
        cards.append(Card("Identical texts", "sampled", "", "so not compared one by one; their distribution is the target's"))
    before = f"; plain: {number(plain_wait.value, 'ms')}" if plain_wait.value is not None else ""
    cards.append(card("first_token_ms", f"prompt included{before}"))
    return [card for card in cards if card.value != "–"]


def _identical(run: Run) -> tuple[int, int]:
    """Texts that are plain decoding's, of those that are compared: greedy ones with a plain one beside them."""
    sums = sum(tally(run).values())
    return int(sums[COLUMN["identical"]]), int(sums[COLUMN["paired"]])  # type: ignore[index]


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


def _differences(reported: Sequence[Reported]) -> list[tuple[Reported, dict[str, Difference]]]:
    return [(one, compare(reported[0].run, one.run)) for one in reported[1:]]


def _comparison(reported: Sequence[Reported]) -> list[tuple[str, list[Cell]]]:
    """Rows of label and cells, the first run's and each other one's with its difference; [] of one run."""
    if len(reported) == 1:
        return []
    differences = _differences(reported)
    rows = []
    for name, metric in METRICS.items():
        first = reported[0].figures.metrics[name]
        cells = [Cell(number(first.value, metric.unit), interval(first, metric.unit))]
        for one, changes in differences:
            change = changes[name]
            below = number(change.change.value, metric.unit, change.before) if change.change.value is not None else ""
            if between := interval(change.change, metric.unit, change.before):
                below += f" ({between})"
            is_neutral = name in HANGS_ON_K and _k(one.run) != _k(reported[0].run)
            mark = _mark(change, None if is_neutral else metric.higher_is_better)
            cells.append(Cell(number(one.figures.metrics[name].value, metric.unit), below, mark=mark))
        if any(cell.text != "–" for cell in cells):
            rows.append((metric.label, cells))
    return rows


def _compared(reported: Sequence[Reported]) -> list[tuple[str, str]]:
    """What the comparison comes to, and what to mind: each with the weight that it has on the page."""
    if len(reported) == 1:
        return []
    said = []
    fastest = max(reported, key=lambda one: one.figures.metrics["speedup"].value or 0)
    if speed := fastest.figures.metrics["speedup"].value:
        rivals = [one.label for one in reported if one is not fastest and not compare(fastest.run, one.run)["speedup"].is_clear]
        tie = f", not clearly ahead of {_listed(rivals)}" if rivals else ", clearly ahead of the others"
        said.append(("lead", f"Fastest over plain decoding is {fastest.label}, {number(speed, '×')}{tie}."))
    told = (
        f"Differences are to {reported[0].label}, on the same prompts, with 95 % intervals; a mark stands where one leaves 0 out."
    )
    said.append(("about", told))
    if any(changes["plain_tokens_per_s"].is_clear for _, changes in _differences(reported)):
        told = "Plain decoding ran at other speeds in some of these runs, so the machine did too: compare speedups, not times."
        said.append(("caveat", told))
    return said


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
            numbers = Numbers(_capital(metric.label), ["run", metric.label], rows)
            charts.append(Chart(plots.by_run(f"all-{name}", numbers.alt, names, estimates, metric.unit, even), numbers))
    return charts


def _section(one: Reported, index: int) -> dict[str, Any]:
    """All that the template lays out of one run."""
    run, numbers = one.run, _numbers(one)
    names = _task_metrics(one)
    return {
        "label": one.label,
        "about": _about(one),
        "sentence": _sentence(one),
        "terms": _terms(one) if run.of(SPECULATIVE) else [],
        "caveats": _caveats(one),
        "cards": _cards(one),
        "task_header": ["task", "prompts", *(METRICS[name].label for name in names)],
        "task_rows": _task_rows(one, names),
        "has_few_prompts": any(1 < count < FEW_PROMPTS for count, _ in one.figures.tasks.values()),
        "acceptance": _acceptance_charts(one, numbers, index),
        "what_if": _what_if_charts(one, numbers, index),
        "suggestion": _suggestion(one),
        "costs": numbers.get("costs"),
        "time": Chart(plots.time_by_part(f"time-{index}", numbers["time"].alt, one.figures.time_ms), numbers["time"]),
        "parts": list(PARTS),
        "sample": _sample(run),
        "memory": numbers.get("memory"),
        "left_out": _left_out(run),
        "provenance": [(name, str(value)) for name, value in run.header.provenance.items() if name != "command"],
        "command": run.header.provenance.get("command", ""),
        "config": [(name, str(value)) for name, value in _flat(one.config).items()],
    }


def _acceptance_charts(one: Reported, numbers: dict[str, Numbers], index: int) -> list[Chart]:
    told = one.figures
    if not told.positions:
        return []
    table = numbers["positions"]
    is_sampled = _is_sampled(one)  # else a guess is right or wrong, and expected is what was counted
    series = [("main", "line"), *([("third", "dashes")] if is_sampled else []), ("second", "line")]
    legend = [(colour, swatch, label) for (colour, swatch), label in zip(series, table.header[1:], strict=True)]
    return [
        Chart(plots.by_position(f"positions-{index}", table.alt, told.positions, is_sampled), table, legend),
        Chart(plots.accepted_lengths(f"lengths-{index}", numbers["lengths"].alt, told.histogram), numbers["lengths"]),
        Chart(plots.along_the_output(f"along-{index}", numbers["along"].alt, told.along), numbers["along"]),
    ]


def _what_if_charts(one: Reported, numbers: dict[str, Numbers], index: int) -> list[Chart]:
    told = one.figures
    if not told.what_if:
        return []
    legend = [("main", "line", "predicted from this run's texts"), ("second", "square", "measured, this run")]
    if len(one.measured) > 1:
        legend.append(("second", "hollow", "measured, other runs"))
    table = numbers["length by K"]
    charts = [Chart(plots.what_if_length(f"length-{index}", table.alt, told.what_if, one.measured), table, legend)]
    if best := _best(told.what_if):
        table = numbers["speedup by K"]
        svg = plots.what_if_speedup(f"speedup-{index}", table.alt, told.what_if, one.measured, best.num_draft_tokens)
        charts.append(Chart(svg, table, [*legend, ("plain", "line", "plain decoding")]))
    return charts


def _about(one: Reported) -> list[str]:
    """The run in a few words: models, K, sampling, prompts, machine."""
    parts = [f"target {_called(one.config['target'])}"]
    if one.run.of(SPECULATIVE):
        parts.append(f"drafter {_called(one.config['drafter'])}")
    parts += [_plan(one), _count(one.figures.prompts, "prompt"), _count(len(one.figures.tasks), "task")]
    parts.append(f"batch {one.config.get('batch_size', 1)}")
    return parts + [str(one.run.header.provenance[name]) for name in ("device", "date") if name in one.run.header.provenance]


def _caveats(one: Reported) -> list[str]:
    """What a reader must know before trusting the figures."""
    run, caveats = one.run, []
    if _is_interrupted(run):
        expected = one.config["workload"].get("limit") if isinstance(one.config["workload"], dict) else None
        of = f" of at most {expected}" if isinstance(expected, int) else ""
        caveats.append(
            f"This run was interrupted: {_count(one.figures.prompts, 'prompt')}{of} and {_count(len(run.records), 'record')} are"
            " here. Go on with resume=true and the same folder."
        )
    if one.figures.prompts == 1:
        caveats.append("One prompt gives no interval: nothing here says how another prompt would fare.")
    if run.header.provenance.get("dirty"):
        caveats.append(
            "The working tree had changes that its commit does not hold, so the commit alone does not repeat this run."
        )
    processes = run.header.provenance.get("processes", 1)
    if processes > 1:
        caveats.append(f"{processes} processes ran at once: where they shared a machine, each slowed the others' times.")
    if slow := _slow_calls(run.of(SPECULATIVE)) + _slow_calls(run.of(PLAIN)):
        caveats.append(
            f"{_count(slow, 'call')} took more than {SLOW} times what calls of that length take here: the machine was busy with"
            " something else, so do not lean on the times."
        )
    if run.failures:
        caveats.append(f"{_count(len(run.failures), 'call')} failed, in no figure here; the reasons stand below.")
    return caveats


def _slow_calls(records: Sequence[Record]) -> int:
    """Calls that took far longer than the medians of the run make of their prompt's and their text's length."""
    calls = {(record.turn, record.repetition, record.call): record for record in records if record.num_emitted_tokens}.values()
    if not calls:
        return 0
    parts = [(r.num_prompt_tokens, r.seconds.prefill_s, r.num_spec_steps, r.seconds.total_s - r.seconds.prefill_s) for r in calls]
    prompt_s = median_low(seconds / length for length, seconds, _, _ in parts)
    step_s = median_low(seconds / steps for _, _, steps, seconds in parts)
    return sum(before + behind > SLOW * (length * prompt_s + steps * step_s) for length, before, steps, behind in parts)


def _best(guesses: Sequence[WhatIf]) -> WhatIf | None:
    return max((guess for guess in guesses if guess.speedup.value), key=lambda guess: guess.speedup.value or 0, default=None)


def _suggestion(one: Reported) -> str:
    """Which K the figures suggest, and whether that is within noise."""
    guesses, own = one.figures.what_if, _k(one.run)
    best = _best(guesses)
    if best is None:
        return "Step times were not measured, so a speedup cannot be predicted."
    k, speed = best.num_draft_tokens, with_interval(best.speedup, "×")
    if (best.speedup.value or 0) <= 1:
        return f"No K pays here: the best, K={k}, is predicted to reach {speed} of plain decoding's speed."
    measured = one.figures.metrics["speedup"].value
    predicted = next((guess.speedup.value for guess in guesses if guess.num_draft_tokens == own), None)
    off = abs(predicted / measured - 1) if measured and predicted else 0.0
    if k == own and measured:
        said = [f"K={k}, which this run used, is predicted to be fastest: {speed}. Measured was {number(measured, '×')}."]
    else:
        said = [f"K={k} is predicted to be fastest: {speed}."]
        if measured and predicted:
            told = f"For this run's own K={own} it is {number(predicted, '×')}, where {number(measured, '×')} was measured."
            said.append(told)
    rest = [guess for guess in guesses if guess is not best and guess.to_best.high is not None]
    near = [f"K={guess.num_draft_tokens}" for guess in rest if guess.to_best.high >= 1 - off]  # type: ignore[operator]
    if near:
        said.append(f"Within that error and the intervals, {_listed(near)} may do as well.")
    elif rest:
        said.append("It is ahead of every other K by more than that error and the intervals.")
    elif best.speedup.low is None:
        said.append("One prompt cannot tell how sure that is.")
    fastest = max(one.measured, key=lambda run: run.speedup.value or 0)
    if len(one.measured) > 1 and fastest.speedup.value:
        told = f"Of the runs here, K={fastest.num_draft_tokens} was fastest: {with_interval(fastest.speedup, '×')}."
        said.append(told)
    if k == guesses[-1].num_draft_tokens:
        said.append(f"K={k} is the largest that this run drafted: a larger one may be better still.")
    return " ".join(said)


def _numbers(one: Reported) -> dict[str, Numbers]:
    """The tables behind the charts, and those without one; only what the run has."""
    told, run = one.figures, one.run
    tables = {}
    if told.positions:
        columns = {"kept, where all before it were": "conditional", "kept, of all steps": "unconditional"}
        if _is_sampled(one):
            columns = {
                "kept, where all before it were": "conditional",
                "expected there": "expected",
                "kept, of all steps": "unconditional",
            }
        tables["positions"] = Numbers(
            "Acceptance by draft position",
            ["position", *columns],
            [[str(at.position), *(with_interval(getattr(at, name), "%") for name in columns.values())] for at in told.positions],
        )
        steps = sum(told.histogram)
        tables["lengths"] = Numbers(
            "Accepted tokens a step",
            ["accepted", "steps", "share"],
            [[str(length), f"{count:,}", number(count / steps, "%")] for length, count in enumerate(told.histogram)],
        )
        tables["along"] = Numbers(
            "Acceptance along the output",
            ["generated tokens", "expected acceptance"],
            [
                [f"{at.start + 1} to {at.stop}" if at.stop - at.start > 1 else str(at.stop), with_interval(at.expected, "%")]
                for at in told.along
            ],
        )
    if told.what_if:
        tables["length by K"] = _by_k(one, "Mean acceptance length by K", "mean_acceptance_length", "")
    if _best(told.what_if):
        tables["speedup by K"] = _by_k(one, "Speedup by K", "speedup", "×")
    if run.costs:
        parts = zip(run.costs.draft_s, run.costs.target_s, run.costs.verification_s, run.costs.other_s, strict=True)
        tables["costs"] = Numbers(
            "Time of a step, ms",
            ["K", "draft", "target", "rest", "step"],
            [
                [
                    str(k),
                    *(number(1000 * seconds) for seconds in (draft, target, verify + other, draft + target + verify + other)),
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
    if total:
        rows.append(["measured against predicted", f"{100 * (memory.measured_bytes / total - 1):+.1f}\u00a0%".replace("-", "−")])
    return Numbers("Memory at the peak", ["part", "size"], rows)


def _mib(size: int) -> str:
    return f"{size / 2**30:,.2f}\u00a0GiB" if size >= 2**30 else f"{size / 2**20:,.1f}\u00a0MiB"


def _left_out(run: Run) -> list[str]:
    """Skipped prompts and failed calls, by reason."""
    skipped = Counter(line.reason for line in run.skipped)
    failed = Counter((line.engine, line.error) for line in run.failures)
    return [
        *(f"{_count(count, 'prompt')} skipped: “{reason}”" for reason, count in skipped.most_common()),
        *(f"{_count(count, 'call')} failed, {engine}: “{error}”" for (engine, error), count in failed.most_common()),
    ]


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
