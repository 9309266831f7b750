"""Runs of other tools as a page, Markdown, JSON and a table for a terminal: what they hold, what they lack and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from specdec.experiments.report.definitions import SGLANG, SPEC_BENCH, SPECDEC, VLLM, definitions_table, value_text
from specdec.experiments.report.exports import SUMMARY_COLUMNS, markdown_table
from specdec.experiments.report.formatting import plural
from specdec.experiments.report.other_tools import FIGURES, OtherRun
from specdec.experiments.report.spec_bench import leaderboard
from specdec.experiments.report.tables import NumberTable
from specdec.pages import environment

NOTES = {  # what a tool's values are of
    VLLM: "vLLM's counts are those of its server between the start and the end of the benchmark, whoever asked.",
    SGLANG: (
        "SGLang's mean acceptance length is its server's since it was started, earlier requests included. Tokens per"
        " second of bench_one_batch_server are batch size × output length / latency."
    ),
    SPEC_BENCH: (
        "Spec-Bench's values are computed from its answers, with its formulas, and time per token as seconds / tokens."
        " It counts the tokens of its baseline again from the texts; here both runs have new_tokens."
    ),
    SPECDEC: "specdec's columns are of its own records; their report has intervals.",
}
NOTE = (
    "Values are those that the files hold. Files of totals have no interval, and do not tell whether prompts,"
    " machine and settings of two columns are the same. A speedup is over the one run of the same tool and requests"
    " without speculation: one without acceptance figures, or for Spec-Bench one whose steps all emit one token."
)


def render_other_page(runs: Sequence[OtherRun]) -> str:
    """The HTML page. Raises ValueError where jinja2 is missing."""
    template = environment(Path(__file__).parent).get_template("other_tools.html.jinja")
    rendered: str = template.render(
        title=_title(runs),
        tables=_tables(runs),
        notes=_notes(runs),
        left_out=left_out(runs),
        definitions=definitions_table([]),
        definitions_note="The report of a run of specdec has the value of each formula on its records.",
    )
    return rendered.strip() + "\n"


def other_markdown(runs: Sequence[OtherRun]) -> str:
    """The page as Markdown, without the definitions."""
    parts = [f"# {_title(runs)}"]
    for table in _tables(runs):
        parts += [f"**{table.title}**", markdown_table(table.header, table.rows)]
    parts += ["**Left out**", "\n".join(f"- {line}" for line in left_out(runs)), *_notes(runs)]
    return "\n\n".join(parts) + "\n"


def other_json(runs: Sequence[OtherRun]) -> dict[str, Any]:
    """All values; rates are fractions."""
    names = ("tool", "label", "settings", "figures", "missing")
    return {"runs": [{name: getattr(run, name) for name in names} for run in runs]}


def other_summary(runs: Sequence[OtherRun]) -> Table:
    """The main figures, a row for each run, for a terminal."""
    names = [name for name in SUMMARY_COLUMNS if any(name in run.figures for run in runs)]
    table = Table("run", "of", title=_title(runs))
    for name in names:
        table.add_column(SUMMARY_COLUMNS[name], justify="right")
    for run in runs:
        table.add_row(run.label, run.tool, *(_text(run, name) for name in names))
    return table


def left_out(runs: Sequence[OtherRun]) -> list[str]:
    """A sentence for each reason: whose runs lack which figures."""
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for run in runs:
        for figure, reason in run.missing.items():
            groups.setdefault((run.tool, reason), {}).setdefault(run.label, []).append(FIGURES[figure])
    lines = []
    for (tool, reason), by_run in groups.items():
        everywhere = len(by_run) == sum(run.tool == tool for run in runs)
        of = tool if everywhere else f"{tool} ({'; '.join(by_run)})"
        figures = dict.fromkeys(figure for figures in by_run.values() for figure in figures)
        lines.append(f"{of}: {', '.join(figures)}: {reason}.")
    return lines


def _title(runs: Sequence[OtherRun]) -> str:
    return f"{plural(len(runs), 'run')} of {', '.join(dict.fromkeys(run.tool for run in runs))}"


def _notes(runs: Sequence[OtherRun]) -> list[str]:
    return [NOTE, *(text for tool, text in NOTES.items() if any(run.tool == tool for run in runs))]


def _tables(runs: Sequence[OtherRun]) -> list[NumberTable]:
    speculative = [(run.label, run.answers, run.plain_answers) for run in runs if run.answers and not run.is_plain]
    table = leaderboard(speculative)
    return [_figures_table(runs), *([table] if table else [])]


def _figures_table(runs: Sequence[OtherRun]) -> NumberTable:
    rows = [["tool", *(run.tool for run in runs)]]
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        rows.append([name, *(run.settings.get(name, "–") for run in runs)])
    for name, label in FIGURES.items():
        if any(name in run.figures for run in runs):
            rows.append([label, *(_text(run, name) for run in runs)])
    return NumberTable("Figures", ["", *(run.label for run in runs)], rows)


def _text(run: OtherRun, name: str) -> str:
    value = run.figures.get(name)
    return (
        f"{value:,.0f}" if name == "num_emitted_tokens" and isinstance(value, int | float) else value_text(name, value)
    )
