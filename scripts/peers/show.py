"""A comparison as tables, sentences and a plot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from peers.measure import ratios

Result = dict[str, Any]
COLOURS = {
    "transformers": "#8a8a8a", "OpenVINO": "#3b75af", "ONNX Runtime": "#4c9a5b", "llama.cpp": "#8c6bb1",
    "specdec": "#d1602f",
}  # fmt: skip
WIDTH = 100
IDLE_ENOUGH = 0.95  # of the CPU time, below which ratios would be those of other programs too
STOCK_LOOP = "4-bit, stock loop"  # transformers' own, on specdec's model: what texts are compared with


def threads_of(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def name_of(result: Result) -> str:
    k = "" if result["num_draft_tokens"] is None else f" K={result['num_draft_tokens']}"
    return f"{result['runtime']} {result['engine']}{k}"


def is_idle(report: dict[str, Any]) -> bool:
    """Whether other programs used so little of the machine that ratios mean something."""
    idle = report["provenance"]["idle_otherwise"]
    return idle is not None and idle >= IDLE_ENOUGH


def print_report(report: dict[str, Any]) -> None:
    """The best of each runtime; all rows are in the JSON."""
    console, results = Console(width=WIDTH), report["results"]
    for sampling in dict.fromkeys(r["sampling"] for r in results):
        rows = [r for r in results if r["sampling"] == sampling]
        for title, wanted in (("plain decoding", is_plain), ("with speculation", is_speculative)):
            console.print(f"\n{title}, {sampling}: tokens/s of whole calls (decoding; CPU ms a token)", highlight=False)
            console.print(best_table([r for r in rows if wanted(r)]))
    if report["bounds"]:
        console.print("\nplain decoding, one row: bytes of the weights, and the bound of reading them")
        console.print(bound_table(report["bounds"]))
    if report["prompt_processing"]:
        console.print("\nreading a prompt, one row: tokens/s by its length")
        console.print(prompt_table(report["prompt_processing"]))
    console.print()
    idle = report["provenance"]["idle_otherwise"]
    share = "an unknown share" if idle is None else f"{100 * idle:.0f} %"
    console.print(f"{share} of the CPU time was not used by other programs", highlight=False)
    if is_idle(report):
        lines = sentences(results)
    else:
        lines = [f"so no ratios: they need a machine that is at least {100 * IDLE_ENOUGH:.0f} % idle otherwise"]
    for line in [*lines, *report["missing"]]:
        console.print(line, highlight=False)


def groups(results: Sequence[Result]) -> Iterator[tuple[str, list[Result]]]:
    """Results by batch, sampling and threads, each group with its title."""
    keys = dict.fromkeys((r["batch"], r["sampling"], r["threads"]) for r in results)
    for batch, sampling, threads in keys:
        group = [r for r in results if (r["batch"], r["sampling"], r["threads"]) == (batch, sampling, threads)]
        yield f"batch {batch}, {sampling}, {threads_of(threads)}", group


def is_plain(result: Result) -> bool:
    return result["engine"] == "plain"


def is_speculative(result: Result) -> bool:
    return result["engine"] not in ("plain", STOCK_LOOP)


def best_table(results: Sequence[Result]) -> Table:
    """The fastest engine of each runtime, a row each, by batch and threads: whole calls, and decoding alone."""
    table = Table()
    table.add_column("", no_wrap=True)
    columns = list(dict.fromkeys((r["batch"], r["threads"]) for r in results))
    for batch, threads in columns:
        table.add_column(f"batch {batch}\n{threads_of(threads)}", justify="right")
    for runtime in dict.fromkeys(r["runtime"] for r in results):
        cells = []
        for column in columns:
            fastest = best([r for r in results if (r["batch"], r["threads"]) == column], runtime)
            cells.append("" if fastest is None else cell_of(fastest))
        table.add_row(runtime, *cells)
    return table


def cell_of(result: Result) -> str:
    decoding, cpu_ms = result["decode_tokens_per_second"], result["cpu_ms_per_token"]
    k = "" if result["num_draft_tokens"] is None else f"{result['engine']} {result['num_draft_tokens']}"
    second = f"({'-' if decoding is None else f'{decoding:,.0f}'}; {'-' if cpu_ms is None else f'{cpu_ms:.2f}'})"
    return f"{rate_text(result)}\n{second}" + (f"\n{k}" if k else "")


def rate_text(result: Result) -> str:
    """Tokens per second in three digits or more."""
    rate = _rate(result)
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def bound_table(bounds: Sequence[Result]) -> Table:
    """What reading the target's weights allows in plain decoding of one row, and the share that was reached."""
    table = Table()
    for column in ("engine", "threads", "MB", "GB/s", "bound, tok/s", "reached"):
        table.add_column(column, justify="left" if column == "engine" else "right", no_wrap=True)
    for r in bounds:
        table.add_row(
            f"{r['runtime']}, {r['weights']}", str(r["threads"]), f"{r['forward_bytes'] / 1e6:,.1f}",
            f"{r['gb_per_second']:.1f}", f"{r['bound_tokens_per_second']:,.0f}",
            "" if r["share"] is None else f"{100 * r['share']:.0f} %",
        )  # fmt: skip
    return table


def prompt_table(timed: Sequence[Result]) -> Table:
    """Tokens per second of reading a prompt, by its length and threads."""
    table = Table()
    table.add_column("", no_wrap=True)
    columns = sorted({(r["threads"], r["prompt_tokens"]) for r in timed})
    for threads, length in columns:
        table.add_column(f"{length:,}\n{threads_of(threads)}", justify="right")
    rates = {(r["runtime"], r["threads"], r["prompt_tokens"]): r["tokens_per_second"] for r in timed}
    for runtime in dict.fromkeys(r["runtime"] for r in timed):
        cells = [rates.get((runtime, *column)) for column in columns]
        table.add_row(runtime, *("" if rate is None else f"{rate:,.0f}" for rate in cells))
    return table


def best(results: Sequence[Result], runtime: str) -> Result | None:
    return max((r for r in results if r["runtime"] == runtime), key=lambda r: r["tokens_per_second"], default=None)


def sentences(results: Sequence[Result]) -> list[str]:
    """For each group, specdec's fastest engine against the fastest of the others, plain and with speculation.

    Ratios are medians of those within a round, whichever is faster.
    """
    lines = []
    kinds: list[tuple[str, Callable[[Result], bool]]] = [("plain", is_plain), ("speculative", is_speculative)]
    for title, group in groups(results):
        for kind, wanted in kinds:
            rows = [r for r in group if wanted(r)]
            ours = best(rows, "specdec")
            other = max((r for r in rows if r["runtime"] != "specdec"), key=_rate, default=None)
            if ours is not None and other is not None:
                ratio = ratios(ours["tokens_per_second_rounds"], other["tokens_per_second_rounds"])["median"]
                lines.append(
                    f"{title}, {kind}: {name_of(ours)} ({rate_text(ours)} tok/s) is {ratio:.2f} times"
                    f" {name_of(other)} ({rate_text(other)})"
                )
    return lines


COMPARISON = (
    "| pair | batch | threads | specdec plain | fastest other | ratio | specdec speculative | fastest other | ratio |",
    "|---|---:|---:|---:|---|---:|---|---|---:|",
)  # the head of a table of comparison_rows


def comparison_rows(report: dict[str, Any]) -> list[str]:
    """A row of Markdown for each batch and number of threads, greedy, as the pages have it: tokens/s of whole calls."""
    rows = []
    for batch, threads in dict.fromkeys((r["batch"], r["threads"]) for r in report["results"]):
        cells = [report["pair"], str(batch), str(threads)]
        for wanted in (is_plain, is_speculative):
            group = [
                r for r in report["results"]
                if wanted(r) and (r["batch"], r["threads"], r["sampling"]) == (batch, threads, "greedy")
            ]  # fmt: skip
            ours = best(group, "specdec")
            other = max((r for r in group if r["runtime"] != "specdec"), key=_rate)
            assert ours is not None
            ratio = ratios(ours["tokens_per_second_rounds"], other["tokens_per_second_rounds"])["median"]
            method = "" if wanted is is_plain else f" ({name_of(ours).removeprefix('specdec ')})"
            cells += [f"{rate_text(ours)}{method}", f"{rate_text(other)}, {name_of(other)}", f"{ratio:.2f}"]
        rows.append(f"| {' | '.join(cells)} |".replace(" plain |", " |"))
    return rows


def _rate(result: Result) -> float:
    return float(result["tokens_per_second"])


def plot(results: Sequence[Result], title: str, path: Path) -> None:
    """Bars with the range of the rounds, a panel for each group."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(groups(results))
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    tallest = max(len(group) for _, group in panels)
    figure, axes = plt.subplots(
        rows, columns, figsize=(6.2 * columns, rows * (0.32 * tallest + 1.1)), squeeze=False, layout="constrained"
    )
    for axis, (panel, group) in zip(axes.flat, panels, strict=False):
        places = range(len(group))
        rates = [r["tokens_per_second"] for r in group]
        lows = [r["tokens_per_second"] - min(r["tokens_per_second_rounds"]) for r in group]
        highs = [max(r["tokens_per_second_rounds"]) - r["tokens_per_second"] for r in group]
        colours = [COLOURS.get(r["runtime"], "#8a8a8a") for r in group]
        error_bars = {"elinewidth": 1, "ecolor": "#333333"}
        axis.barh(places, rates, xerr=[lows, highs], color=colours, height=0.72, error_kw=error_bars)
        for place, rate, high in zip(places, rates, highs, strict=True):
            axis.annotate(
                f"{rate:,.0f}", (rate + high, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
            )
        axis.set_yticks(list(places), [name_of(r) for r in group], fontsize=9)
        axis.invert_yaxis()
        axis.set_title(panel, loc="left", fontsize=11)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", labelsize=9)
        axis.set_xlabel("tokens per second", fontsize=9)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)
