"""Tables as a terminal shows them, at three widths."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console, RenderableType

from fettle.core.report import Measurement, Report
from fettle.evaluate.comparison import Candidate, Comparison, compare_reports
from fettle.evaluate.table import render_rows, render_table

Make = Callable[..., Candidate]


def shown(table: RenderableType, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(table)
    return out.getvalue()


@pytest.fixture
def comparison(candidate: Make) -> Comparison:
    original = candidate("original", 0.9, 4.0, 4_000_000, precision="float")
    best = candidate("[b]q[/b]", 0.895, 1.0, 1_000_000)
    failed = candidate("broken", failure="ExportError: [red]no[/red] such operator")
    return Comparison(
        name="digits", met_floor=True, sentences=(), best=best, baseline=original,
        candidates=(original, best, failed), front=(best, original),
    )  # fmt: skip


@pytest.mark.parametrize("width", [60, 90, 120])
def test_every_width_shows_what_matters_and_fits(comparison: Comparison, width: int) -> None:
    text = shown(render_table(comparison, width=width), width)
    assert max(map(len, text.splitlines())) <= width
    flat = "".join(text.split())
    for part in ("digits", "[b]q[/b]", "original", "0.8950", "1.00ms", "1.00MB", "★", "broken"):
        assert part in flat
    assert "ExportError:[red]no[/red]suchoperator" in flat
    assert ("onnxruntime" in text) is (width >= 76)
    assert ("speed-up" in text) is (width >= 104)


def test_the_fastest_stands_first(comparison: Comparison) -> None:
    text = shown(render_table(comparison), 120)
    assert text.index("[b]q[/b]") < text.index("4.00 MB")
    assert "4.00×" in text


@pytest.mark.parametrize("met", [True, False])
def test_the_best_stands_out(comparison: Comparison, met: bool, candidate: Make) -> None:
    changed = Comparison(
        name="x", met_floor=met, sentences=(), best=comparison.best, baseline=comparison.baseline,
        candidates=comparison.candidates, front=(),
    )  # fmt: skip
    assert render_table(changed).rows[0].style == ("bold green" if met else "bold yellow")


def test_two_reports_side_by_side() -> None:
    def of(value: float, *more: Measurement) -> Report:
        p50 = Measurement(name="latency.p50", value=value, unit="ms", direction="lower")
        return Report(subject="s", measurements=(p50, *more))

    rows = compare_reports(of(4.0), of(1.0, Measurement(name="size", value=100, unit="bytes", direction="lower")))
    text = shown(render_rows(rows, a="digits:1", b="digits:[2]"), 100)
    for part in ("digits:1", "digits:[2]", "4.00 ms", "1.00 ms", "-3.00 ms", "4.00×", "better", "—", "100 B"):
        assert part in text
