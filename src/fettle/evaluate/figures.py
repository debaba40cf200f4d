"""The pictures of the HTML report, as SVG that takes its colors from the page: one drawing for light and for dark.

matplotlib knows no CSS, so each color is drawn as a placeholder that no one else uses, and replaced in the text by
`var(--name)`. Only the object-oriented interface is used: no pyplot, no global figure.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from fettle.core.report import Measurement
from fettle.evaluate.comparison import Candidate, Comparison
from fettle.evaluate.layers import WEAK_DB, LayerLine, weakest
from fettle.evaluate.wording import format_bytes, format_ms

_INK, _MUTED, _GRID, _BEST, _FRONT, _OTHER, _BASELINE, _PAPER = (f"#01f0a{digit}" for digit in range(1, 9))
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _GRID: "--line",
    _BEST: "--best",
    _FRONT: "--front",
    _OTHER: "--other",
    _BASELINE: "--baseline",
    _PAPER: "--card",
}
_MOST_BARS = 14
_MOST_NAMES = 26
# What no reader compares: a layer that passes everything, and one that passes nothing, must not flatten the rest.
_LOWEST_DB, _HIGHEST_DB = -10.0, 60.0
# The user's own matplotlib style, LaTeX above all, must not reach the report; the salt makes equal runs equal files.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fettle",
    "font.size": 10.5,
    "font.family": "sans-serif",
    "text.usetex": False,
    "axes.unicode_minus": True,
}
_styled = matplotlib.rc_context(_STYLE)


@_styled
def draw_front(comparison: Comparison, numbers: dict[str, int]) -> str:
    """The metric against the median latency, with both intervals; the front as a line, the floor dashed.

    numbers: per label, the number of its row in the table, written beside the point.
    """
    figure, axes = _canvas(width=9.2, height=4.3)
    candidates = comparison.measured or (comparison.baseline,)
    for candidate in candidates:
        _point(axes, candidate, _color(candidate, comparison))
    _step_line(axes, comparison)
    if comparison.floor is not None:
        axes.axhline(comparison.floor, color=_MUTED, linestyle=(0, (5, 4)), linewidth=1, zorder=1)
        axes.annotate(
            "floor", (1, comparison.floor), xycoords=("axes fraction", "data"), xytext=(-4, 4),
            textcoords="offset points", ha="right", color=_MUTED, fontsize=9,
        )  # fmt: skip
    for candidate in candidates:
        if comparison.mark(candidate) or candidate.is_same(comparison.baseline) or len(candidates) <= _MOST_BARS:
            _tag(axes, candidate, numbers, above=_color(candidate, comparison) != _OTHER)
    _latency_axis(axes, [candidate.p50_ms for candidate in candidates])
    axes.set_ylabel(comparison.baseline.metric_name, parse_math=False)
    axes.set_xlabel(f"median latency, batch {candidates[0].batch} (logarithmic)")
    axes.grid(True, color=_GRID, linewidth=0.8)
    return _svg(figure, "front")


@_styled
def draw_latency(comparison: Comparison, numbers: dict[str, int]) -> str:
    """A bar per candidate to the median, a thin line on to the 99th percentile, a tick at the 95th."""
    shown = bars_of(comparison)
    figure, axes = _canvas(width=5.6, height=_bars_height(shown))
    tails = [candidate.measurement("latency.p99").value for candidate in shown]
    # One hiccup of a shared machine must not press all bars to the left edge; the line then runs out of the picture.
    right = min(max(tails), 2.5 * max(candidate.p50_ms for candidate in shown)) * 1.28 or 1.0
    for place, (candidate, p99) in enumerate(zip(shown, tails, strict=True)):
        p95, color = candidate.measurement("latency.p95").value, _color(candidate, comparison)
        axes.barh(place, candidate.p50_ms, height=0.62, color=color, zorder=2)
        axes.plot([candidate.p50_ms, p99], [place, place], color=_MUTED, linewidth=1.2, zorder=3)
        axes.plot([p95], [place], marker="|", color=_MUTED, markersize=8, zorder=3)
        end = min(max(p99, candidate.p50_ms), right * 0.78)
        _bar_text(axes, end, place, format_ms(candidate.p50_ms))
    _bar_axes(axes, shown, numbers, right=right)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_ms(value) if value else "0"))
    return _svg(figure, "latency")


@_styled
def draw_size(comparison: Comparison, numbers: dict[str, int]) -> str:
    """A bar per candidate: bytes that a deployment must carry."""
    shown = bars_of(comparison)
    figure, axes = _canvas(width=5.6, height=_bars_height(shown))
    for place, candidate in enumerate(shown):
        axes.barh(place, candidate.size_bytes, height=0.62, color=_color(candidate, comparison), zorder=2)
        _bar_text(axes, candidate.size_bytes, place, format_bytes(candidate.size_bytes))
    _bar_axes(axes, shown, numbers, right=max(candidate.size_bytes for candidate in shown) * 1.28 or 1.0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    return _svg(figure, "size")


@_styled
def draw_layers(lines: Sequence[LayerLine]) -> str:
    """A column per layer in order of execution: signal over noise in int8; those given back stand out.

    Names stand below as many as can be read: those given back and the weakest first. Columns end at 60 dB.
    """
    figure, axes = _canvas(width=9.2, height=3.6)
    heights = [min(max(line.sqnr_db, _LOWEST_DB), _HIGHEST_DB) for line in lines]
    colors = [_BASELINE if line.precision == "float" else _OTHER for line in lines]
    axes.bar(range(len(lines)), heights, width=0.72, color=colors, zorder=2)
    axes.axhline(WEAK_DB, color=_MUTED, linestyle=(0, (5, 4)), linewidth=1, zorder=3)
    axes.axhline(0, color=_GRID, linewidth=0.8, zorder=1)
    # A few columns must not fill the whole width: they would read as areas.
    room = max(0.0, (8 - len(lines)) / 2)
    axes.set_xlim(-0.7 - room, len(lines) - 0.3 + room)
    axes.set_ylim(min(0.0, *heights, 0.0), max(WEAK_DB, *heights) * 1.08)
    places = named_places(lines)
    names = [_shorten_start(lines[place].layer) for place in places]
    axes.set_xticks(places, names, rotation=40, ha="right", rotation_mode="anchor", parse_math=False)
    for place, label in zip(places, axes.get_xticklabels(), strict=True):
        label.set_color(_INK if lines[place].is_notable else _MUTED)
    axes.set_ylabel("signal over noise, dB")
    axes.grid(True, axis="y", color=_GRID, linewidth=0.8)
    return _svg(figure, "layers")


def named_places(lines: Sequence[LayerLine]) -> list[int]:
    """Which columns of `draw_layers` carry a name: all of a few, else the weakest, as far as none hides another."""
    apart = len(lines) / _MOST_NAMES
    order = {id(line): place for place, line in enumerate(lines)}
    found: list[int] = []
    for line in weakest(lines, limit=len(lines)):
        place = order[id(line)]
        if all(abs(place - other) >= apart for other in found):
            found.append(place)
    return sorted(found)


def bars_of(comparison: Comparison) -> list[Candidate]:
    """Whom the bar charts show, fastest first: all, or where they are many, those that matter and the fastest rest."""

    def rank(candidate: Candidate) -> tuple[bool, float]:
        matters = bool(comparison.mark(candidate)) or candidate.is_same(comparison.baseline)
        return (not matters, candidate.p50_ms)

    shown = sorted(comparison.measured or (comparison.baseline,), key=rank)[:_MOST_BARS]
    return sorted(shown, key=lambda candidate: candidate.p50_ms)


def _canvas(*, width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(side in ("left", "bottom"))
        axes.spines[side].set_color(_GRID)
    axes.tick_params(colors=_MUTED, length=0, labelsize=9.5)
    axes.xaxis.label.set_color(_MUTED)
    axes.yaxis.label.set_color(_MUTED)
    return figure, axes


def _color(candidate: Candidate, comparison: Comparison) -> str:
    if candidate.is_same(comparison.best):
        return _BEST
    if candidate.is_same(comparison.baseline):
        return _BASELINE
    return _FRONT if comparison.mark(candidate) else _OTHER


def _point(axes: Axes, candidate: Candidate, color: str) -> None:
    metric, latency = candidate.metric, candidate.measurement("latency.p50")
    axes.errorbar(
        latency.value,
        metric.value,
        xerr=_reach(latency),
        yerr=_reach(metric),
        color=color,
        ecolor=color,
        elinewidth=1.1,
        marker="D" if color == _BASELINE else "o",
        markersize=10 if color == _BEST else 7,
        markeredgecolor=_PAPER,
        markeredgewidth=1.2,
        zorder=2 if color == _OTHER else 4,
    )


def _reach(measurement: Measurement) -> list[list[float]] | None:
    """How far the interval reaches below and above the value, as matplotlib wants it."""
    if measurement.low is None or measurement.high is None:
        return None
    return [[max(0.0, measurement.value - measurement.low)], [max(0.0, measurement.high - measurement.value)]]


def _step_line(axes: Axes, comparison: Comparison) -> None:
    """Through the points that nothing beats on metric and latency alone; a front over size too is no line here."""
    higher = comparison.baseline.metric.direction != "lower"
    reached: list[Candidate] = []
    for candidate in sorted(comparison.front, key=lambda each: each.p50_ms):
        value = candidate.metric.value
        if not reached or (value > reached[-1].metric.value) == higher:
            reached.append(candidate)
    axes.plot(
        [candidate.p50_ms for candidate in reached],
        [candidate.metric.value for candidate in reached],
        color=_FRONT,
        linewidth=1.4,
        drawstyle="steps-post",
        zorder=1,
    )


def _tag(axes: Axes, candidate: Candidate, numbers: dict[str, int], *, above: bool) -> None:
    axes.annotate(
        str(numbers.get(candidate.label, "")),
        (candidate.p50_ms, candidate.metric.value),
        # Neighbors on and off the front would write over each other on one side.
        xytext=(7, 6 if above else -14),
        textcoords="offset points",
        color=_INK if above else _MUTED,
        fontsize=10,
        fontweight="bold",
        zorder=5,
    )


def _latency_axis(axes: Axes, values: Sequence[float]) -> None:
    axes.set_xscale("log")
    low, high = min(values) / 1.35, max(values) * 1.35
    axes.set_xlim(low, high)
    wanted = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    ticks = [digit * 10.0**power for power in range(-7, 8) for digit in wanted]
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_ms(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _short_ms(value: float) -> str:
    return f"{value * 1e3:g} µs" if value < 0.1 else f"{value:g} ms"


def _bars_height(shown: Sequence[Candidate]) -> float:
    return 0.75 + 0.34 * len(shown)


def _bar_text(axes: Axes, end: float, place: int, text: str) -> None:
    axes.annotate(
        text, (end, place), xytext=(6, 0), textcoords="offset points", va="center", color=_INK, fontsize=9.5,
        bbox={"facecolor": _PAPER, "edgecolor": "none", "pad": 1.0}, zorder=4,
    )  # fmt: skip


def _bar_axes(axes: Axes, shown: Sequence[Candidate], numbers: dict[str, int], *, right: float) -> None:
    axes.set_xlim(0, right)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    labels = [f"{numbers.get(candidate.label, 0)} · {_shorten(candidate.label)}" for candidate in shown]
    axes.set_yticks(range(len(shown)), labels, parse_math=False)
    axes.tick_params(axis="y", colors=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(True, axis="x", color=_GRID, linewidth=0.8)
    axes.spines["left"].set_visible(False)


def _shorten(label: str) -> str:
    return label if len(label) <= 28 else f"{label[:27]}…"


def _shorten_start(layer: str) -> str:
    """Of a dotted path the end tells layers apart."""
    return layer if len(layer) <= 26 else f"…{layer[-25:]}"


def _svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element that can stand beside others in one page, without any reference outside."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    for placeholder, variable in _VARIABLES.items():
        drawn = drawn.replace(placeholder, f"var({variable})")
    # Identifiers are unique in one drawing only, and the page holds several.
    drawn = re.sub(r'\bid="', f'id="{name}-', drawn)
    drawn = re.sub(r'href="#', f'href="#{name}-', drawn)
    drawn = drawn.replace("url(#", f"url(#{name}-")
    drawn = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", drawn)
    # Height and width in points would not shrink with the page; the view box keeps the shape.
    return re.sub(r'(<svg[^>]*?) height="[^"]*"|(<svg[^>]*?) width="[^"]*"', r"\1\2", drawn, count=2)
