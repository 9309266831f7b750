"""A comparison as tables, sentences and a plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

Result = dict[str, Any]
COLOURS = {"transformers": "#8a8a8a", "OpenVINO": "#3b75af", "specdec": "#d1602f"}


def name_of(result: Result) -> str:
    k = "" if result["num_draft_tokens"] is None else f" K={result['num_draft_tokens']}"
    return f"{result['runtime']} {result['engine']}{k}"


def groups(results: Sequence[Result]) -> Iterator[tuple[str, list[Result]]]:
    """Results by batch and sampling, in their order, each group with its title."""
    for (batch, sampling), group in groupby(results, key=lambda r: (r["batch"], r["sampling"])):
        yield f"batch {batch}, {sampling}", list(group)


def speed_table(title: str, group: Sequence[Result]) -> Table:
    """Tokens per second of each engine: the median of interleaved rounds, and their range."""
    table = Table(title=f"{title}: tokens per second, median of interleaved rounds", title_justify="left")
    for column in ("engine", "tok/s", "least – most", "× baseline", "× own plain", "same text"):
        table.add_column(column, justify="left" if column == "engine" else "right", no_wrap=True)
    for r in group:
        rounds = r["tokens_per_second_rounds"]
        table.add_row(
            name_of(r), f"{r['tokens_per_second']:,.0f}", f"{min(rounds):,.0f} – {max(rounds):,.0f}",
            f"{r['ratio_to_baseline']['median']:.2f}", f"{r['ratio_to_own_plain']['median']:.2f}",
            "" if r["identical_rows"] is None else f"{r['identical_rows']}/{r['rows']}",
        )  # fmt: skip
    return table


def steps_table(title: str, group: Sequence[Result]) -> Table:
    """The parts of a step, and what a call takes besides its steps."""
    table = Table(
        title=f"{title}: one step (a forward of the target) in ms; what a call takes besides", title_justify="left"
    )
    for column in ("engine", "tokens", "draft", "target", "verifying", "rest", "together", "prompt"):
        table.add_column(column, justify="left" if column == "engine" else "right", no_wrap=True)
    for r in group:
        parts = [r["draft_ms"], r["target_ms"], r["verification_ms"], r["other_ms"]]
        written = ["in rest" if part is None else f"{part:.2f}" for part in parts]
        together = f"{sum(part or 0 for part in parts):.2f}"
        table.add_row(name_of(r), f"{r['tokens_per_step']:.2f}", *written, together, f"{r['prompt_ms']:.0f}")
    return table


def best(results: Sequence[Result], runtime: str) -> Result | None:
    return max((r for r in results if r["runtime"] == runtime), key=lambda r: r["tokens_per_second"], default=None)


def sentences(results: Sequence[Result]) -> list[str]:
    """For each group, specdec's fastest engine against each other runtime's fastest, whichever is faster."""
    lines = []
    for title, group in groups(results):
        fastest = best(group, "specdec")
        runtimes = dict.fromkeys(r["runtime"] for r in group if r["runtime"] != "specdec")
        others = [other for runtime in runtimes if (other := best(group, runtime)) is not None]
        if fastest is not None and others:
            rate = fastest["tokens_per_second"]
            comparisons = [
                f"{rate / o['tokens_per_second']:.2f} times {name_of(o)} ({o['tokens_per_second']:,.0f})"
                for o in others
            ]
            lines.append(f"{title}: {name_of(fastest)} ({rate:,.0f} tok/s) is {', '.join(comparisons)}")
    return lines


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
