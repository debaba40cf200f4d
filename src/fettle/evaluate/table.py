"""The comparison as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fettle.evaluate.comparison import Candidate, Comparison, Row, gain
from fettle.evaluate.wording import format_bytes, format_interval, format_ms, format_ratio, format_value

_WIDE = 104
_MIDDLE = 76


def render_table(comparison: Comparison, *, width: int = 120) -> Table:
    """One row per measured candidate, fastest first; ★ marks the best, • the front, "original" the baseline.

    width: columns of the terminal; below 104 the tail latency, the interval and the speed-up are left out, below 76
    runtime and precision too. Failed candidates stand below the table with the reason. Labels are shown as they
    are: nothing in them is taken for markup.
    """
    wide, middle = width >= _WIDE, width >= _MIDDLE
    table = Table(box=SIMPLE_HEAD, title=Text(comparison.name), caption=_caption(comparison), caption_justify="left")
    table.add_column("", width=1)
    table.add_column("candidate", overflow="fold")
    if middle:
        table.add_column("runtime")
        table.add_column("precision")
    table.add_column(_metric_name(comparison), justify="right")
    if wide:
        table.add_column("95 %", justify="right", no_wrap=True)
    table.add_column("p50", justify="right", no_wrap=True)
    if wide:
        table.add_column("p99", justify="right", no_wrap=True)
        table.add_column("speed-up", justify="right")
    table.add_column("size", justify="right", no_wrap=True)
    for candidate in sorted(comparison.measured, key=lambda candidate: candidate.p50_ms):
        table.add_row(*_cells(candidate, comparison, wide=wide, middle=middle), style=_style(candidate, comparison))
    return table


def render_rows(rows: Sequence[Row], *, a: str, b: str) -> Table:
    """Two reports side by side, from `compare_reports`; a and b are the names in the heading."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("measurement", overflow="fold")
    for name in (a, b, "difference", "ratio"):
        table.add_column(Text(name), justify="right")
    table.add_column("")
    for row in rows:
        difference = "" if row.difference is None else format_value(row.difference, row.unit)
        ratio = "" if row.ratio is None else format_ratio(row.ratio)
        values = ["—" if side is None else format_value(side.value, side.unit) for side in (row.a, row.b)]
        verdict, style = {True: ("better", "green"), False: ("worse", "red"), None: ("", "")}[row.better]
        table.add_row(Text(row.name), *values, difference, ratio, Text(verdict, style=style))
    return table


def _metric_name(comparison: Comparison) -> str:
    return comparison.baseline.metric_name


def _cells(candidate: Candidate, comparison: Comparison, *, wide: bool, middle: bool) -> list[Text]:
    cells = [comparison.mark(candidate), candidate.label]
    if middle:
        cells += [candidate.runtime, candidate.precision]
    cells.append(format_value(candidate.metric.value))
    if wide:
        cells.append(format_interval(candidate.metric))
    cells.append(format_ms(candidate.p50_ms))
    if wide:
        cells.append(format_ms(candidate.measurement("latency.p99").value))
        cells.append(format_ratio(gain(comparison.original.p50_ms, candidate.p50_ms)))
    cells.append(format_bytes(candidate.size_bytes))
    return [Text(cell) for cell in cells]


def _style(candidate: Candidate, comparison: Comparison) -> str:
    if candidate.is_same(comparison.best):
        return "bold green" if comparison.met_floor else "bold yellow"
    return "" if comparison.mark(candidate) or candidate.is_same(comparison.baseline) else "dim"


def _caption(comparison: Comparison) -> Text:
    lines = ["★ best   • on the Pareto front"]
    if any(candidate.is_same(comparison.baseline) for candidate in comparison.measured):
        lines[0] += f"   original: {comparison.baseline.label}"
    lines += [f"failed: {candidate.label}: {candidate.failure}" for candidate in comparison.failed]
    return Text("\n".join(lines))
