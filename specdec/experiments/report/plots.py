"""Charts as inline SVG for an HTML page: text stays text, colors are the page's CSS variables.

Every chart takes a name, unique on its page, and an alt text that contains its figures.
"""

from __future__ import annotations

import html
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from specdec.experiments.report.estimates import Array, Estimate
from specdec.experiments.report.figures import TIME_PARTS, Position, Stretch
from specdec.experiments.report.formatting import number
from specdec.experiments.report.what_if import Measurement, Prediction

WIDTH = 340  # of every chart, in CSS pixels: a phone, or a third of a desktop page
MAX_TICK_LABELS = 12
LINES = (  # color, marker, the marker as a character for the legend, dashes
    ("main", "o", "●", ()),
    ("second", "s", "■", ()),
    ("third", "D", "◆", ()),
    ("main", "^", "▲", (2, 1.5)),
    ("second", "v", "▼", (2, 1.5)),
    ("third", "P", "✚", (2, 1.5)),
)
_VARIABLES = (
    *("ink", "muted", "line", "surface", "main", "second", "third", "plain"),
    *(f"part-{part}" for part in TIME_PARTS),
)
# unique colors, which _svg() replaces by var(--name)
_COLORS = {name: f"#0000{index:02x}" for index, name in enumerate(_VARIABLES, 1)}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "specdec",
    "text.parse_math": False,
    "font.size": 12,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": _COLORS["ink"],
    "axes.labelcolor": _COLORS["muted"],
    "axes.labelsize": 12,
    "axes.edgecolor": _COLORS["line"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _COLORS["line"],
    "grid.linewidth": 1,
    "xtick.color": _COLORS["muted"],
    "ytick.color": _COLORS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
    "lines.linewidth": 2,
    "lines.markersize": 6,
}


def by_position(name: str, alt: str, positions: Sequence[Position], with_expected: bool) -> str:
    """Acceptance by draft position: conditional, unconditional and, where with_expected, expected."""
    at = [position.position for position in positions]
    with _figure(200) as (figure, axes):
        _series(axes, at, [p.unconditional for p in positions], "second", marker="s")
        _series(axes, at, [p.conditional for p in positions], "main")
        if with_expected:
            _series(
                axes, at, [p.expected for p in positions], "third", marker="D", linestyle=(0, (1, 1.5)), markersize=4.5
            )
        _percent(axes)
        _whole_numbers(axes, at)
        axes.set_xlabel("position in the draft")
        return _svg(figure, name, alt)


def step_lengths(name: str, alt: str, shares: Sequence[Estimate]) -> str:
    """Share of the steps that emitted 1, 2, … tokens, with their intervals."""
    values = [share.value or 0.0 for share in shares]
    at = list(range(1, len(shares) + 1))
    with _figure(200, left=12) as (figure, axes):
        axes.bar(at, values, width=0.72, color=_COLORS["main"])
        for position, value, share in zip(at, values, shares, strict=True):
            if share.low is not None:
                axes.vlines(position, share.low, share.high, color=_COLORS["ink"], linewidth=1.2)
            if len(shares) <= MAX_TICK_LABELS:
                text, top = f"{value:.0%}".replace("%", " %"), (position, share.high or value)
                axes.annotate(text, top, (0, 3), textcoords="offset points", ha="center", va="bottom")
        axes.grid(False)
        axes.set_yticks([])
        axes.set_ylim(0, max(share.high or share.value or 0.0 for share in shares) * 1.22)
        _whole_numbers(axes, at)
        axes.set_xlabel("tokens that a step emits")
        return _svg(figure, name, alt)


def acceptance_heat_map(name: str, alt: str, positions_by_task: dict[str, list[Position]]) -> str:
    """Conditional acceptance: a row for each task, a column for each position, darker where it is higher."""
    num_positions = max(map(len, positions_by_task.values()))
    with _figure(36 + 26 * len(positions_by_task), left=96, right=6, top=4, bottom=32) as (figure, axes):
        for row, positions in enumerate(positions_by_task.values()):
            for at in positions:
                if at.conditional.value is None:
                    continue
                alpha = 0.04 + 0.5 * at.conditional.value  # so that the number stays legible
                axes.barh(row, 0.94, 0.9, at.position - 0.47, color=_COLORS["main"], alpha=alpha)
                if num_positions <= MAX_TICK_LABELS // 2:
                    text = f"{100 * at.conditional.value:.0f} %"
                    axes.text(at.position, row, text, ha="center", va="center")
        axes.set_yticks(
            range(len(positions_by_task)),
            [task if len(task) < 14 else f"{task[:12]}…" for task in positions_by_task],
        )
        axes.set_ylim(len(positions_by_task) - 0.5, -0.5)
        axes.grid(False)
        _whole_numbers(axes, list(range(1, num_positions + 1)))
        axes.set_xlabel("position in the draft")
        return _svg(figure, name, alt)


def along_the_output(name: str, alt: str, along: Sequence[Stretch]) -> str:
    """Expected acceptance at the positions of the generated text."""
    with _figure(200) as (figure, axes):
        middles = [(stretch.start + 1 + stretch.stop) / 2 for stretch in along]
        _series(axes, middles, [stretch.expected for stretch in along], "main")
        _percent(axes)
        axes.set_xlim(0, along[-1].stop + 1)
        axes.set_xlabel("generated token")
        return _svg(figure, name, alt)


def what_if_length(name: str, alt: str, predictions: Sequence[Prediction], measurements: Sequence[Measurement]) -> str:
    """Mean acceptance length by K: predicted, and measured where there is a run with that K."""
    with _figure(200) as (figure, axes):
        _by_k(
            axes,
            {prediction.num_draft_tokens: prediction.mean_acceptance_length for prediction in predictions},
            [(run, run.mean_acceptance_length) for run in measurements],
        )
        axes.set_ylim(1 - 0.02 * (axes.get_ylim()[1] - 1), axes.get_ylim()[1])
        return _svg(figure, name, alt)


def what_if_speedup(
    name: str, alt: str, predictions: Sequence[Prediction], measurements: Sequence[Measurement], best_k: int | None
) -> str:
    """Speedup by K, with a line at 1 for plain decoding. best_k: the K to mark, None where none pays."""
    with _figure(200) as (figure, axes):
        axes.axhline(1, color=_COLORS["plain"], linewidth=1.5)
        if best_k is not None:
            axes.axvline(best_k, color=_COLORS["muted"], linewidth=1, linestyle=(0, (2, 3)))
            axes.text(best_k, 1.02, f"best: {best_k}", transform=axes.get_xaxis_transform(), ha="center", va="bottom")
        _by_k(
            axes,
            {p.num_draft_tokens: p.speedup for p in predictions if p.speedup.value is not None},
            [(run, run.speedup) for run in measurements],
        )
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        return _svg(figure, name, alt)


def time_by_part(name: str, alt: str, time_ms: dict[str, dict[str, float]]) -> str:
    """Milliseconds per token of each part, with a bar for each engine, the plain one first."""
    longest = max(sum(parts.values()) for parts in time_ms.values())
    with _figure(54 * len(time_ms), left=0, right=0, top=0, bottom=2) as (figure, axes):
        for row, engine in enumerate(sorted(time_ms)):
            start = 0.0
            for part in TIME_PARTS:
                width, color = max(time_ms[engine][part], 0.0), _COLORS[f"part-{part}"]
                axes.barh(row, width, 0.5, start, color=color, edgecolor=_COLORS["surface"], linewidth=1)
                start += width
            axes.text(0, row - 0.32, engine, va="bottom")
            axes.text(longest, row - 0.32, number(start, "ms"), va="bottom", ha="right")
        axes.set_ylim(len(time_ms) - 0.7, -0.75)
        axes.set_xlim(0, longest)
        axes.set_axis_off()
        return _svg(figure, name, alt)


def step_by_k(name: str, alt: str, parts_ms: dict[str, Array], bound_ms: float | None) -> str:
    """Milliseconds of a step by K, stacked by part, each [K + 1]. bound_ms: where a line is drawn."""
    at = list(range(len(next(iter(parts_ms.values())))))
    with _figure(200) as (figure, axes):
        start = 0 * next(iter(parts_ms.values()))
        for part, values in parts_ms.items():
            color, edge = _COLORS[f"part-{part}"], _COLORS["surface"]
            axes.bar(at, values, width=0.72, bottom=start, color=color, edgecolor=edge, linewidth=1)
            start = start + values
        if bound_ms is not None:
            axes.axhline(bound_ms, color=_COLORS["ink"], linewidth=1.5, linestyle=(0, (1, 1.5)))
        axes.locator_params(axis="y", nbins=5)
        _whole_numbers(axes, at)
        axes.set_xlabel("K, draft tokens per step")
        return _svg(figure, name, alt)


def by_run(
    name: str, alt: str, labels: Sequence[str], estimates: Sequence[Estimate], unit: str, reference: float | None
) -> str:
    """A metric of several runs, with a row for each run. reference: the value at which a line is drawn."""
    with _figure(30 + 38 * len(labels), left=2, right=2, top=4, bottom=26) as (figure, axes):
        if reference is not None:
            axes.axvline(reference, color=_COLORS["plain"], linewidth=1.5)
        across = axes.get_yaxis_transform()  # x in axes units, y in data units
        for row, (label, estimate) in enumerate(zip(labels, estimates, strict=True)):
            axes.text(0, row - 0.2, label if len(label) < 34 else f"{label[:33]}…", transform=across, va="bottom")
            axes.text(1, row - 0.2, number(estimate.value, unit), transform=across, va="bottom", ha="right")
            if estimate.low is not None:
                axes.hlines(row, estimate.low, estimate.high, color=_COLORS["main"], linewidth=2)
            if estimate.value is not None:
                axes.plot(estimate.value, row, "o", color=_COLORS["main"])
        axes.margins(x=0.12)
        axes.set_ylim(len(labels) - 0.6, -0.8)
        axes.set_yticks([])
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.locator_params(axis="x", nbins=5)
        scale = 100 if unit == "%" else 1
        axes.xaxis.set_major_formatter(lambda value, _: f"{scale * value:g}" + {"%": " %"}.get(unit, unit))
        return _svg(figure, name, alt)


def lines_by_k(
    name: str, alt: str, lines: Sequence[tuple[list[int], list[Estimate]]], unit: str, reference: float | None
) -> str:
    """A metric against K, with a line for each of `lines`, in the order of LINES. reference: where a line is drawn."""
    with _figure(230) as (figure, axes):
        if reference is not None:
            axes.axhline(reference, color=_COLORS["plain"], linewidth=1.5)
        for (at, estimates), (color, marker, _, dashes) in zip(lines, itertools.cycle(LINES), strict=False):
            _series(axes, at, estimates, color, marker=marker, linestyle=(0, dashes))
        _whole_numbers(axes, sorted({k for at, _ in lines for k in at}))
        axes.locator_params(axis="y", nbins=5)
        scale = 100 if unit == "%" else 1
        axes.yaxis.set_major_formatter(lambda value, _: f"{scale * value:g}" + {"%": " %"}.get(unit, unit))
        axes.set_xlabel("K, draft tokens per step")
        return _svg(figure, name, alt)


@contextmanager
def _figure(height: int, left: int = 50, right: int = 10, top: int = 20, bottom: int = 44) -> Iterator[tuple[Any, Any]]:
    """A figure of WIDTH x height with one pair of axes; height and margins in pixels."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('a report page needs matplotlib; pip install "specdec-lossless[experiments]"') from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        figure.subplots_adjust(left / WIDTH, bottom / height, 1 - right / WIDTH, 1 - top / height)
        yield figure, figure.subplots()


def _series(
    axes: Any, at: Sequence[float], estimates: Sequence[Estimate], color: str, marker: str = "o", **line: Any
) -> None:
    """A line through the values with a band of their intervals, or a bar for a single value. None leaves a gap."""
    nan = float("nan")
    values = [nan if e.value is None else e.value for e in estimates]
    low, high = (
        [nan if end is None else end for end in ends]
        for ends in zip(*((e.low, e.high) for e in estimates), strict=True)
    )
    line = {"color": _COLORS[color], "marker": marker, "markeredgewidth": 0} | line
    axes.plot(at, values, **line)
    if len(at) > 1:
        axes.fill_between(at, low, high, color=_COLORS[color], alpha=0.16, linewidth=0)
    else:
        axes.vlines(at, low, high, color=_COLORS[color], linewidth=1.5)


def _by_k(axes: Any, predicted: dict[int, Estimate], measured: Sequence[tuple[Measurement, Estimate]]) -> None:
    """A line of predictions, and a marker with its interval for each measured run: this run's is filled and on top."""
    _series(axes, list(predicted), list(predicted.values()), "main", marker="o", markersize=4)
    for run, value in sorted(measured, key=lambda pair: pair[0].is_own):
        if value.low is not None:
            axes.vlines(run.num_draft_tokens, value.low, value.high, color=_COLORS["second"], linewidth=1.5)
        if value.value is not None:
            edge = _COLORS["second"]
            axes.plot(
                run.num_draft_tokens,
                value.value,
                "s",
                color=edge if run.is_own else _COLORS["surface"],
                markeredgecolor=edge,
            )
    _whole_numbers(axes, sorted({*predicted, *(run.num_draft_tokens for run, _ in measured)}))
    axes.locator_params(axis="y", nbins=5)
    axes.set_xlabel("K, draft tokens per step")


def _percent(axes: Any) -> None:
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def _whole_numbers(axes: Any, at: Sequence[int]) -> None:
    axes.set_xticks(at[:: -(-len(at) // MAX_TICK_LABELS)])
    axes.set_xlim(at[0] - 0.5, at[-1] + 0.5)


def _svg(figure: Any, name: str, alt: str) -> str:
    """The figure's SVG element, with CSS variables for colors, ids made unique by name, and two decimals."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for variable, color in _COLORS.items():
        svg = svg.replace(color, f"var(--{variable})")
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<defs>\s*</defs>|font-family: [^;\"]*;? ?",
        "",
        svg,
        flags=re.DOTALL,
    )
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", svg)
    svg = re.sub(r'(?:xlink:)?(href="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(r"(\.\d\d)\d+", r"\1", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    width, height = (int(72 * size) for size in figure.get_size_inches())
    opening = f'<svg class="chart" role="img" aria-label="{html.escape(alt)}" viewBox="0 0 {width} {height}">'
    return opening + svg[svg.index(">") + 1 :]
