"""The comparison as one self-contained report.html that can be read in a minute and mailed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from fettle.core.files import write_atomic
from fettle.core.plugins import missing_extra
from fettle.core.report import Report
from fettle.evaluate.comparison import Candidate, Comparison, Row, compare_reports, gain
from fettle.evaluate.layers import WEAK_DB, LayerLine, notable, weakest
from fettle.evaluate.page import (
    Cell,
    render_facts,
    render_grid,
    render_header,
    render_list,
    render_page,
    render_section,
    render_tiles,
)
from fettle.evaluate.wording import format_bytes, format_interval, format_ms, format_ratio, format_value

_KEY = (
    '<p class="key"><span><i style="background:var(--best)"></i>best</span>'
    '<span><i style="background:var(--front)"></i>on the Pareto front</span>'
    '<span><i style="background:var(--baseline)"></i>original</span>'
    '<span><i style="background:var(--other)"></i>other</span></p>'
)

_LAYER_KEY = (
    '<p class="key"><span><i style="background:var(--other)"></i>int8</span>'
    '<span><i style="background:var(--baseline)"></i>given back to float</span>'
    "<span>dashed: below it a layer is weak</span></p>"
)
_MOST_LAYERS = 20


def write_html(comparison: Comparison, path: Path) -> Path:
    """Write the report whole or not at all; return its path.

    No script and nothing from the network: pictures are inline SVG, in the page's own colors, light or dark.
    Raises MissingExtra where matplotlib is not installed.
    """
    write_atomic(path, render_html(comparison).encode())
    return path


def write_rows_html(a: Report, b: Report, path: Path, *, names: tuple[str, str]) -> Path:
    """Write the page of two reports side by side, for `fettle compare A B`; needs no matplotlib."""
    write_atomic(path, render_rows_html(compare_reports(a, b), names=names).encode())
    return path


def render_html(comparison: Comparison) -> str:
    """The text of report.html."""
    ordered = sorted(comparison.measured, key=lambda candidate: candidate.p50_ms)
    numbers = {candidate.label: number for number, candidate in enumerate(ordered, start=1)}
    badge, style = ("keeps the budget", "good") if comparison.met_floor else ("floor missed", "warn")
    parts = [
        render_header(f"fettle · {comparison.name}", comparison.sentences, badge=badge, style=style),
        render_tiles(_tiles(comparison)),
        _pictures(comparison, numbers),
        render_section(
            "Candidates",
            render_grid(_head(comparison), [_line(candidate, comparison, numbers) for candidate in ordered]),
            note=_candidates_note(comparison),
        ),
        _corrections(comparison),
        _layers(comparison.layers),
        _left_out(comparison),
        render_section("What these numbers hold for", render_facts(_facts(comparison))),
    ]
    return render_page(f"{comparison.name}: fettle report", "\n".join(parts))


def render_rows_html(rows: Sequence[Row], *, names: tuple[str, str]) -> str:
    """The text of the page for two reports."""
    a, b = names
    wins = [row.name for row in rows if row.better is True]
    losses = [row.name for row in rows if row.better is False]
    sentence = f"{b} against {a}: better in {len(wins)} of {len(rows)} measurements, worse in {len(losses)}."
    told = [f"Better: {', '.join(wins)}." if wins else "", f"Worse: {', '.join(losses)}." if losses else ""]
    head = [
        Cell("measurement"),
        *(Cell(name, number=True) for name in (a, b, "difference", "ratio")),
        Cell(""),
    ]
    note = "Where both have a 95 % interval and the two overlap, neither is called better."
    body = [
        render_header("fettle · compare", [sentence, *filter(None, told)]),
        render_tiles(_row_tiles(rows)),
        render_section("Measurements", render_grid(head, [_row_cells(row) for row in rows]), note=note),
    ]
    return render_page(f"{a} and {b}: fettle compare", "\n".join(body))


def _tiles(comparison: Comparison) -> list[tuple[str, str, str]]:
    best, baseline = comparison.best, comparison.baseline
    change = best.metric.value - baseline.metric.value
    data = f" on {best.metric.data}" if best.metric.data else ""
    return [
        (
            "Speed-up",
            format_ratio(gain(baseline.p50_ms, best.p50_ms)),
            f"{format_ms(baseline.p50_ms)} → {format_ms(best.p50_ms)} (median)",
        ),
        (
            "Size ratio",
            format_ratio(gain(baseline.size_bytes, best.size_bytes)),
            f"{format_bytes(baseline.size_bytes)} → {format_bytes(best.size_bytes)}",
        ),
        (
            f"Change of {best.metric_name}",
            _signed(change),
            f"{baseline.metric.value:.4f} → {best.metric.value:.4f}{data}",
        ),
        *_agreement_tile(best),
    ]


def _signed(change: float) -> str:
    return f"{change:+.4f}".replace("-", "\N{MINUS SIGN}")


def _row_tiles(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """What a reader asks first of two versions: the metric, the median latency, the size."""
    tiles = []
    for row in rows:
        if row.a is None or row.b is None or row.difference is None:
            continue
        detail = f"{format_value(row.a.value, row.unit)} → {format_value(row.b.value, row.unit)}"
        if row.name.startswith("metric."):
            tiles.append((f"Change of {row.name.removeprefix('metric.')}", _signed(row.difference), detail))
        elif row.name in ("latency.p50", "size"):
            heading = "Speed-up" if row.name == "latency.p50" else "Size ratio"
            tiles.append((heading, format_ratio(gain(row.a.value, row.b.value)), detail))
    return tiles


def _agreement_tile(best: Candidate) -> list[tuple[str, str, str]]:
    if "parity.agreement" not in best.report:
        return []
    agreement = best.report["parity.agreement"]
    return [("Same answers", f"{100 * agreement.value:.2f} %", f"as the original, of {agreement.n} rows")]


def _figures() -> ModuleType:
    """Imported late: the rest of evaluation, and the page of two versions, must work without matplotlib."""
    try:
        from fettle.evaluate import figures
    except ModuleNotFoundError as problem:
        raise missing_extra("the HTML report", problem) from None
    return figures


def _pictures(comparison: Comparison, numbers: dict[str, int]) -> str:
    figures = _figures()
    name = comparison.baseline.metric_name
    front = render_section(
        f"{name} against latency",
        figures.draw_front(comparison, numbers) + _KEY,
        note="Bars show 95 % intervals. Numbers are the rows of the table below. Up and to the left is better.",
    )
    latency = render_section(
        "Latency", figures.draw_latency(comparison, numbers), note="Median; the line runs to p99, its tick is p95."
    )
    size = render_section("Size", figures.draw_size(comparison, numbers), note="What a deployment must carry.")
    return f'{front}<div class="pair">{latency}{size}</div>'


def _candidates_note(comparison: Comparison) -> str:
    shown = comparison.measured
    if not shown:
        return "None could be measured."
    first = shown[0]
    data = f" on the {first.metric.data} split" if first.metric.data else ""
    return (
        f"Measured{data}, {first.metric.n} rows; latency at batch {first.batch} on {first.threads} "
        f"thread{'s' if first.threads != 1 else ''}. ★ best, • on the front."
    )


def _head(comparison: Comparison) -> list[Cell]:
    return [
        Cell("#", number=True),
        Cell(""),
        Cell("candidate"),
        Cell("runtime"),
        Cell("precision"),
        Cell(comparison.baseline.metric_name, number=True),
        Cell("p50", number=True),
        Cell("p95", number=True),
        Cell("p99", number=True),
        Cell("speed-up", number=True),
        Cell("size", number=True),
    ]


def _line(candidate: Candidate, comparison: Comparison, numbers: dict[str, int]) -> list[Cell]:
    style = "best" if candidate.is_same(comparison.best) else ""
    steps = " → ".join(candidate.steps)
    if candidate.is_same(comparison.baseline):
        steps = "the original"
    p95, p99 = (candidate.measurement(f"latency.{name}").value for name in ("p95", "p99"))
    return [
        Cell(str(numbers[candidate.label]), number=True),
        Cell(comparison.mark(candidate), style=style),
        Cell(candidate.label, below=steps, style=style),
        Cell(candidate.runtime),
        Cell(candidate.precision),
        Cell(format_value(candidate.metric.value), below=format_interval(candidate.metric), number=True),
        Cell(format_ms(candidate.p50_ms), number=True),
        Cell(format_ms(p95), number=True),
        Cell(format_ms(p99), number=True),
        Cell(format_ratio(gain(comparison.original.p50_ms, candidate.p50_ms)), number=True),
        Cell(format_bytes(candidate.size_bytes), number=True),
    ]


def _corrections(comparison: Comparison) -> str:
    if not comparison.decisions:
        return ""
    note = "Each was tried on validation rows, and kept only where the answers came nearer to the float model's."
    return render_section("Corrections of int8", render_list(comparison.decisions), note=note)


def _layers(lines: Sequence[LayerLine]) -> str:
    """The account of int8, layer by layer: sentences, a picture of all, a table of those that matter."""
    if not lines:
        return ""
    told = [line.sentence() for line in notable(lines)]
    sentences = render_list(told) if told else "<p>No layer is weak, and none reads channels of very unlike size.</p>"
    shown = weakest(lines, limit=_MOST_LAYERS)
    places = {line.layer: place for place, line in enumerate(lines, start=1)}
    head = [
        Cell("#", number=True),
        Cell("layer"),
        Cell("kind"),
        Cell("SQNR", number=True),
        Cell("share of divergence", number=True),
        Cell("input channel spread", number=True),
        Cell("cost of giving back", number=True),
        Cell("precision"),
    ]
    grid = render_grid(head, [_layer_cells(line, places[line.layer]) for line in shown])
    rest = ""
    if len(lines) > len(shown):
        hidden = f"{len(lines) - len(shown)} more layers are not shown: none is weaker than the last."
        rest = f'<p class="note">{hidden}</p>'
    return render_section(
        "Where int8 loses accuracy, layer by layer",
        sentences + _figures().draw_layers(lines) + _LAYER_KEY + grid + rest,
        note="SQNR: signal to noise of the layer's output in int8, all before it in int8 too; "
        f"below {WEAK_DB:.0f} dB it is weak. Share: of the divergence from float, what goes away when this layer alone "
        "is float. Spread: the largest input channel over the median one. # is the order of execution.",
    )


def _layer_cells(line: LayerLine, place: int) -> list[Cell]:
    style = "warn" if line.precision == "float" else ""
    return [
        Cell(str(place), number=True),
        Cell(line.layer, style=style),
        Cell(line.kind),
        Cell(f"{line.sqnr_db:.1f} dB".replace("-", "\N{MINUS SIGN}"), number=True),
        Cell("—" if line.share is None else f"{100 * line.share:.1f} %".replace("-", "\N{MINUS SIGN}"), number=True),
        Cell(format_ratio(line.spread), number=True),
        Cell("—" if line.cost_ms is None else format_value(line.cost_ms, "ms"), number=True),
        Cell(line.precision, style=style),
    ]


def _left_out(comparison: Comparison) -> str:
    parts = []
    if comparison.left_float:
        note = "Layers that stay in floating point, and why, and whatever else the steps had to say."
        parts.append(render_section("Notes of the steps", render_list(comparison.left_float), note=note))
    if comparison.failed:
        reasons = [f"{candidate.label}: {candidate.failure}" for candidate in comparison.failed]
        parts.append(render_section("Could not be built or measured", render_list(reasons)))
    return "\n".join(parts)


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    best, baseline = comparison.best, comparison.baseline
    facts = [
        (f"split {split.name}", f"{split.rows} rows, {split.purpose}, sha-256 {split.digest}")
        for split in comparison.splits
    ]
    if comparison.hardware:
        facts.append(("hardware", comparison.hardware))
    facts.append(("threads", str(best.threads)))
    if comparison.versions:
        facts.append(("versions", ", ".join(comparison.versions)))
    number = f" (version {best.version})" if best.version is not None else ""
    facts.append(("best", f"{best.label}{number}, sha-256 {best.digest}"))
    facts.append(("original", f"{baseline.label}, sha-256 {baseline.digest}"))
    return facts


def _row_cells(row: Row) -> list[Cell]:
    word, style = {True: ("better", "good"), False: ("worse", "bad"), None: ("", "")}[row.better]
    values = [
        Cell("—", number=True)
        if side is None
        else Cell(format_value(side.value, side.unit), below=format_interval(side), number=True)
        for side in (row.a, row.b)
    ]
    return [
        Cell(row.name),
        *values,
        Cell("" if row.difference is None else format_value(row.difference, row.unit), number=True),
        Cell("" if row.ratio is None else format_ratio(row.ratio), number=True),
        Cell(word, style=style),
    ]
