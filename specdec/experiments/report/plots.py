"""Charts as SVG that stands inside an HTML page: its text is text, its colours are the page's CSS variables.

Every chart takes a name that no other one on the page has, and the alt text that says its figures.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from specdec.experiments.report.figures import Estimate, Position, Stretch, WhatIf

WIDTH = 340  # of every chart, in CSS pixels: what a phone and a third of a desktop page have
MOST_LABELS = 12  # side by side
PARTS = {
    "prefill": "prompt (prefill)",
    "draft": "draft",
    "target": "target forward",
    "verification": "verification and sampling",
    "other": "everything else",
}
_VARIABLES = (
    "ink",
    "muted",
    "line",
    "surface",
    "main",
    "second",
    "third",
    "plain",
    *(f"part-{part}" for part in PARTS),
)
_COLOURS = {
    name: f"#0000{index:02x}" for index, name in enumerate(_VARIABLES, 1)
}  # stand for var(--name) until the end
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "specdec",
    "text.parse_math": False,
    "font.size": 12,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": _COLOURS["ink"],
    "axes.labelcolor": _COLOURS["muted"],
    "axes.labelsize": 12,
    "axes.edgecolor": _COLOURS["line"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _COLOURS["line"],
    "grid.linewidth": 1,
    "xtick.color": _COLOURS["muted"],
    "ytick.color": _COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
    "lines.linewidth": 2,
    "lines.markersize": 6,
}


@dataclass(frozen=True)
class Measured:
    """A run to set beside what was predicted of its K."""

    num_draft_tokens: int
    mean_acceptance_length: Estimate
    speedup: Estimate
    is_own: bool


def number(value: float | None, unit: str = "", changed: float | None = None) -> str:
    """As it is written everywhere: three digits or so, rates in per cent. changed: what the value is a change of."""
    if value is None:
        return "–"
    is_change = changed is not None
    if unit == "%":
        return f"{_fixed(100 * value, 1, is_change)}\u00a0{'points' if is_change else '%'}"
    text = _fixed(value, _digits(value if changed is None else changed), is_change)
    return text + ("×" if unit == "×" else f"\u00a0{unit}" if unit else "")


def interval(estimate: Estimate, unit: str = "", changed: float | None = None) -> str:
    """Its 95 % interval in the value's digits, "" where there is none."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return ""
    scale, digits = (100, 1) if unit == "%" else (1, _digits(estimate.value if changed is None else changed))
    ends = " to ".join(_fixed(scale * end, digits, changed is not None) for end in (estimate.low, estimate.high))
    return ends + ("\u00a0%" if unit == "%" and changed is None else "")


def with_interval(estimate: Estimate, unit: str = "") -> str:
    between = interval(estimate, unit)
    return number(estimate.value, unit) + (f" ({between})" if between else "")


def _digits(value: float) -> int:
    return 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0


def _fixed(value: float, digits: int, signed: bool) -> str:
    value = round(value, digits) + 0.0  # no -0
    return f"{value:{'+' if signed and value else ''},.{digits}f}".replace("-", "−")


def by_position(name: str, alt: str, positions: Sequence[Position], with_expected: bool) -> str:
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


def accepted_lengths(name: str, alt: str, histogram: Sequence[int]) -> str:
    """How many of the steps that drafted kept 0 … K draft ids."""
    shares = [count / sum(histogram) for count in histogram]
    at = list(range(len(histogram)))
    with _figure(200, left=12) as (figure, axes):
        bars = axes.bar(at, shares, width=0.72, color=_COLOURS["main"])
        if len(histogram) <= MOST_LABELS:
            axes.bar_label(
                bars, [f"{share:.0%}".replace("%", " %") for share in shares], padding=3, color=_COLOURS["ink"]
            )
        axes.grid(False)
        axes.set_yticks([])
        axes.set_ylim(0, max(shares) * 1.15)
        _whole_numbers(axes, at)
        axes.set_xlabel("tokens kept of a draft")
        return _svg(figure, name, alt)


def along_the_output(name: str, alt: str, along: Sequence[Stretch]) -> str:
    with _figure(200) as (figure, axes):
        middles = [(stretch.start + 1 + stretch.stop) / 2 for stretch in along]
        _series(axes, middles, [stretch.expected for stretch in along], "main")
        _percent(axes)
        axes.set_xlim(0, along[-1].stop + 1)
        axes.set_xlabel("generated token")
        return _svg(figure, name, alt)


def what_if_length(name: str, alt: str, guesses: Sequence[WhatIf], measured: Sequence[Measured]) -> str:
    """Mean acceptance length by K: predicted, and measured where there is a run of it."""
    with _figure(200) as (figure, axes):
        _by_k(
            axes,
            {guess.num_draft_tokens: guess.mean_acceptance_length for guess in guesses},
            [(run, run.mean_acceptance_length) for run in measured],
        )
        axes.set_ylim(1 - 0.02 * (axes.get_ylim()[1] - 1), axes.get_ylim()[1])
        return _svg(figure, name, alt)


def what_if_speedup(name: str, alt: str, guesses: Sequence[WhatIf], measured: Sequence[Measured], best: int) -> str:
    """The same of the speedup over plain decoding, which is a line at 1. best: the K to mark."""
    with _figure(200) as (figure, axes):
        axes.axhline(1, color=_COLOURS["plain"], linewidth=1.5)
        axes.axvline(best, color=_COLOURS["muted"], linewidth=1, linestyle=(0, (2, 3)))
        axes.text(best, 1.02, f"best: {best}", transform=axes.get_xaxis_transform(), ha="center", va="bottom")
        _by_k(
            axes,
            {guess.num_draft_tokens: guess.speedup for guess in guesses if guess.speedup.value is not None},
            [(run, run.speedup) for run in measured],
        )
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        return _svg(figure, name, alt)


def time_by_part(name: str, alt: str, time_ms: dict[str, dict[str, float]]) -> str:
    """Milliseconds a token of each part, an engine a bar; the plain one first."""
    longest = max(sum(parts.values()) for parts in time_ms.values())
    with _figure(54 * len(time_ms), left=0, right=0, top=0, bottom=2) as (figure, axes):
        for row, engine in enumerate(sorted(time_ms)):
            start = 0.0
            for part in PARTS:
                width, colour = max(time_ms[engine][part], 0.0), _COLOURS[f"part-{part}"]
                axes.barh(row, width, 0.5, start, color=colour, edgecolor=_COLOURS["surface"], linewidth=1)
                start += width
            axes.text(0, row - 0.32, engine, va="bottom")
            axes.text(longest, row - 0.32, number(start, "ms"), va="bottom", ha="right")
        axes.set_ylim(len(time_ms) - 0.7, -0.75)
        axes.set_xlim(0, longest)
        axes.set_axis_off()
        return _svg(figure, name, alt)


def by_run(
    name: str, alt: str, labels: Sequence[str], estimates: Sequence[Estimate], unit: str, even: float | None
) -> str:
    """A metric of several runs, one below the other. even: where a line is drawn across."""
    with _figure(30 + 38 * len(labels), left=2, right=2, top=4, bottom=26) as (figure, axes):
        if even is not None:
            axes.axvline(even, color=_COLOURS["plain"], linewidth=1.5)
        upright = axes.get_yaxis_transform()
        for row, (label, estimate) in enumerate(zip(labels, estimates, strict=True)):
            axes.text(0, row - 0.2, label if len(label) < 34 else f"{label[:33]}…", transform=upright, va="bottom")
            axes.text(1, row - 0.2, number(estimate.value, unit), transform=upright, va="bottom", ha="right")
            if estimate.low is not None:
                axes.hlines(row, estimate.low, estimate.high, color=_COLOURS["main"], linewidth=2)
            if estimate.value is not None:
                axes.plot(estimate.value, row, "o", color=_COLOURS["main"])
        axes.margins(x=0.12)
        axes.set_ylim(len(labels) - 0.6, -0.8)
        axes.set_yticks([])
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.locator_params(axis="x", nbins=5)
        scale = 100 if unit == "%" else 1
        axes.xaxis.set_major_formatter(lambda value, _: f"{scale * value:g}" + {"%": " %"}.get(unit, unit))
        return _svg(figure, name, alt)


@contextmanager
def _figure(height: int, left: int = 50, right: int = 10, top: int = 20, bottom: int = 44) -> Iterator[tuple[Any, Any]]:
    """A figure of WIDTH x height with one pair of axes; margins in pixels."""
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
    axes: Any, at: Sequence[float], estimates: Sequence[Estimate], colour: str, marker: str = "o", **line: Any
) -> None:
    """A line through values with a band of their intervals; a single value has a bar in its place. None is a gap."""
    nan = float("nan")
    values = [nan if e.value is None else e.value for e in estimates]
    low, high = (
        [nan if end is None else end for end in ends]
        for ends in zip(*((e.low, e.high) for e in estimates), strict=True)
    )
    line = {"color": _COLOURS[colour], "marker": marker or ("o" if len(at) == 1 else ""), "markeredgewidth": 0} | line
    axes.plot(at, values, **line)
    if len(at) > 1:
        axes.fill_between(at, low, high, color=_COLOURS[colour], alpha=0.16, linewidth=0)
    else:
        axes.vlines(at, low, high, color=_COLOURS[colour], linewidth=1.5)


def _by_k(axes: Any, predicted: dict[int, Estimate], measured: Sequence[tuple[Measured, Estimate]]) -> None:
    """A line of what was predicted, and a mark for each run with its interval: this run's filled, on top."""
    _series(axes, list(predicted), list(predicted.values()), "main", marker="o", markersize=4)
    for run, value in sorted(measured, key=lambda pair: pair[0].is_own):
        if value.low is not None:
            axes.vlines(run.num_draft_tokens, value.low, value.high, color=_COLOURS["second"], linewidth=1.5)
        if value.value is not None:
            edge = _COLOURS["second"]
            axes.plot(
                run.num_draft_tokens,
                value.value,
                "s",
                color=edge if run.is_own else _COLOURS["surface"],
                markeredgecolor=edge,
            )
    _whole_numbers(axes, sorted({*predicted, *(run.num_draft_tokens for run, _ in measured)}))
    axes.locator_params(axis="y", nbins=5)
    axes.set_xlabel("K, draft tokens a step")


def _percent(axes: Any) -> None:
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def _whole_numbers(axes: Any, at: Sequence[int]) -> None:
    axes.set_xticks(at[:: -(-len(at) // MOST_LABELS)])
    axes.set_xlim(at[0] - 0.5, at[-1] + 0.5)


def _svg(figure: Any, name: str, alt: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for variable, colour in _COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
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
