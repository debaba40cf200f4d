"""The report as a browser reads it: whole, self-contained, escaped; its pictures well-formed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from fettle.core.errors import MissingExtra
from fettle.core.report import Measurement
from fettle.evaluate import figures
from fettle.evaluate.comparison import Candidate, Comparison, SplitUse
from fettle.evaluate.html import render_html, write_html, write_rows_html
from fettle.evaluate.layers import LayerLine

Make = Callable[..., Candidate]
EVIL = "<script>alert('x')</script> & \"$\\frac{1}{2}$\" ]]>"


def of(candidate: Make, *others: Candidate, label: str = "int8", **fields: Any) -> Comparison:
    original = candidate("original", 0.9, 4.0, 4_000_000, precision="float")
    best = candidate(label, 0.895, 1.0, 1_000_000)
    values: dict[str, Any] = {
        "name": "digits", "met_floor": True, "sentences": ("int8 is best.", "It is 4.0× faster."), "best": best,
        "baseline": original, "candidates": (original, best, *others), "front": (best, original),
    }  # fmt: skip
    return Comparison(**{**values, **fields})


def layers_of(count: int, *, floats: int = 0, name: str = "blocks.{}.conv") -> tuple[LayerLine, ...]:
    """In order of execution; each weaker than the one before it, and the last ones given back."""
    return tuple(
        LayerLine(
            layer=name.format(place), kind="convolution", sqnr_db=40.0 - 0.25 * place, spread=3.0, share=-0.012,
            cost_ms=-0.25, precision="float" if place >= count - floats else "int8",
        )
        for place in range(count)
    )  # fmt: skip


class Reader(HTMLParser):
    """Collects text, ids and everything that would load something, and checks that tags close in order."""

    VOID = frozenset({"meta", "br", "img", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self._note(attrs)

    def _note(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.loads.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_the_report_holds_what_a_reader_asks(candidate: Make, tmp_path: Path) -> None:
    comparison = of(
        candidate,
        candidate("broken", failure="ExportError: no such operator"),
        floor=0.89,
        left_float=("fc: costs 0.012 accuracy",),
        splits=(SplitUse(name="validation", rows=1000, digest="ab" * 32, purpose="selection"),),
        hardware="two cores",
        versions=("torch 2.13.0", "fettle 0.1.0"),
    )
    path = write_html(comparison, tmp_path / "runs" / "report.html")
    text = " ".join(" ".join(read(path.read_text(encoding="utf-8")).text).split())
    for part in (
        "int8 is best.", "keeps the budget", "4.00×", "−0.0050", "0.9000 → 0.8950", "fc: costs 0.012 accuracy",
        "broken: ExportError: no such operator", "ab" * 32, "two cores", "torch 2.13.0", comparison.best.digest,
        "the original", "floor",
    ):  # fmt: skip
        assert part in text, part


def test_nothing_comes_from_elsewhere_and_nothing_runs(candidate: Make) -> None:
    text = render_html(of(candidate))
    reader = read(text)
    assert reader.loads == []
    assert not reader.seen & {"script", "link", "img", "iframe", "object", "embed"}
    assert "default-src 'none'" in text
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}


def test_everything_given_is_escaped(candidate: Make) -> None:
    comparison = of(
        candidate,
        candidate(EVIL, 0.85, 2.0, failure=None, runtime=EVIL, precision=EVIL, steps=(EVIL,)),
        candidate("broken", failure=EVIL),
        label=f"best {EVIL}",
        name=EVIL,
        sentences=(EVIL, EVIL),
        left_float=(EVIL,),
        decisions=(EVIL,),
        layers=layers_of(1, floats=1, name=EVIL.replace("{1}{2}", "{{1}}{{2}}")),
        splits=(SplitUse(name=EVIL, rows=1, digest=EVIL, purpose=EVIL),),
        hardware=EVIL,
        versions=(EVIL,),
    )
    text = render_html(comparison)
    reader = read(text)
    assert "script" not in reader.seen
    assert "<script" not in text
    assert sum(EVIL in piece for piece in reader.text) >= 10


def test_ids_are_unique_over_all_pictures(candidate: Make) -> None:
    ids = read(render_html(of(candidate))).ids
    assert ids
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("count", [0, 1, 12, 40])
def test_pictures_are_well_formed_and_take_their_colors_from_the_page(candidate: Make, count: int) -> None:
    others = [candidate(f"candidate {i}", 0.8 + 0.002 * i, 1.5 + 0.1 * i, 1_000_000 + i) for i in range(count)]
    comparison = of(candidate, *others)
    numbers = {one.label: i for i, one in enumerate(comparison.measured)}
    for draw in (figures.draw_front, figures.draw_latency, figures.draw_size):
        drawn = draw(comparison, numbers)
        ElementTree.fromstring(drawn)
        assert "#01f0a" not in drawn
        assert "var(--best)" in drawn
        assert drawn == draw(comparison, numbers)
    assert len(figures.bars_of(comparison)) <= 14
    assert {comparison.best.label, "original"} <= {one.label for one in figures.bars_of(comparison)}


def test_without_int8_nothing_is_said_of_layers_and_corrections(candidate: Make) -> None:
    text = render_html(of(candidate))
    assert "layer by layer" not in text
    assert "Corrections" not in text


def test_corrections_are_listed_in_their_own_words(candidate: Make) -> None:
    decisions = ("adaround: kept, divergence from float 0.0042 before", "smooth quant: left out, it failed: <no>")
    text = " ".join(read(render_html(of(candidate, decisions=decisions))).text)
    assert "Corrections of int8" in text
    for decision in decisions:
        assert decision in text


def test_the_account_of_a_layer_holds_every_figure(candidate: Make) -> None:
    given = LayerLine(
        layer="head.fc", kind="linear", sqnr_db=-3.25, spread=900.0, share=0.815, cost_ms=0.012, precision="float"
    )
    plain = LayerLine(layer="stem", kind="convolution", sqnr_db=31.0, spread=2.5)
    text = " ".join(" ".join(read(render_html(of(candidate, layers=(plain, given)))).text).split())
    row = "2 head.fc linear −3.2 dB 81.5 % 900× 12.0 µs float 1 stem convolution 31.0 dB — 2.50× — int8"
    assert row in text
    assert given.sentence() in text
    assert plain.sentence() not in text
    assert "are not shown" not in text


@pytest.mark.parametrize(
    ("count", "floats", "rows"), [(1, 0, 1), (5, 1, 5), (20, 0, 20), (21, 0, 20), (120, 2, 20), (120, 33, 33)]
)
def test_of_many_layers_the_weakest_and_all_given_back_are_shown(
    candidate: Make, count: int, floats: int, rows: int
) -> None:
    text = render_html(of(candidate, layers=layers_of(count, floats=floats)))
    table = text[text.index("input channel spread") :]
    table = table[: table.index("</table>")]
    assert table.count("<tr>") == rows
    assert table.count('<td class="warn">float</td>') == floats
    told = f"{count - rows} more layers are not shown"
    assert (told in text) is (count > rows)


@pytest.mark.parametrize("floats", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 5, 26, 27, 120])
def test_the_picture_of_layers_is_well_formed_and_names_what_it_can(count: int, floats: int) -> None:
    lines = layers_of(count, floats=floats)
    drawn = figures.draw_layers(lines)
    ElementTree.fromstring(drawn)
    assert "#01f0a" not in drawn
    assert ("var(--baseline)" in drawn) is (floats > 0)
    assert drawn == figures.draw_layers(lines)
    places = figures.named_places(lines)
    assert count - 1 in places  # the weakest
    assert places == sorted(set(places))
    assert len(places) == count if count <= 26 else 10 <= len(places) <= 27
    for place in places:
        assert lines[place].layer in drawn


@pytest.mark.parametrize("decibels", [-99.0, -0.0, 0.0, 15.0, 99.0])
def test_columns_of_extreme_layers_stay_in_the_picture(decibels: float) -> None:
    lines = [LayerLine(layer="x" * 300, kind="linear", sqnr_db=decibels, spread=1e30) for _ in range(3)]
    drawn = figures.draw_layers(lines)
    ElementTree.fromstring(drawn)
    assert f"…{'x' * 25}<" in drawn.replace("\n", "")


def test_when_everything_failed_there_is_still_a_report(candidate: Make) -> None:
    original = candidate("original", 0.9, 4.0)
    comparison = of(candidate, candidates=(candidate("x", failure="no"),), front=(), best=original, baseline=original)
    assert "None could be measured." in render_html(comparison)


@pytest.mark.parametrize(("accuracy", "p50", "size"), [(1.0, 1.0, 0), (0.0, 1e-4, 1), (0.5, 5e4, 10**12)])
def test_extreme_numbers_are_drawn(candidate: Make, accuracy: float, p50: float, size: int) -> None:
    assert "extreme" in " ".join(read(render_html(of(candidate, candidate("extreme", accuracy, p50, size)))).text)


def test_a_missed_floor_is_not_called_kept(candidate: Make) -> None:
    text = " ".join(read(render_html(of(candidate, met_floor=False))).text)
    assert "floor missed" in text
    assert "keeps the budget" not in text


def test_agreement_has_its_tile_where_it_was_measured(candidate: Make) -> None:
    agreement = Measurement(name="parity.agreement", value=0.9904, n=5000, low=0.98, high=0.995)
    comparison = of(candidate, best=candidate("int8", 0.895, 1.0, 1_000_000, extra=(agreement,)))
    assert "99.04 %" in " ".join(read(render_html(comparison)).text)


def test_drawing_leaves_matplotlib_as_it_was(candidate: Make) -> None:
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"text.usetex": True, "font.size": 40}):
        odd = render_html(of(candidate))
    assert dict(matplotlib.rcParams) == before
    assert odd == render_html(of(candidate))


def test_evaluation_starts_without_torch_and_matplotlib_and_never_needs_pyplot() -> None:
    code = """
import sys
from fettle.core import data
from fettle.evaluate import choose, footprint, html, intervals, latency, layers, metric, paired, pareto, parity, table
assert not {"torch", "matplotlib", "scipy"} & set(sys.modules), sys.modules.keys()
from fettle.evaluate import figures
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_without_matplotlib_it_names_the_extra_and_writes_nothing(
    candidate: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fettle.evaluate

    monkeypatch.delitem(sys.modules, "fettle.evaluate.figures")
    monkeypatch.delattr(fettle.evaluate, "figures")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"needs matplotlib: pip install 'fettle-ml\[optimize\]'"):
        write_html(of(candidate), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_the_page_of_two_reports(candidate: Make, tmp_path: Path) -> None:
    a, b = candidate("a", 0.9, 4.0, 4_000_000).report, candidate("b", 0.6, 1.0, 1_000_000).report
    path = write_rows_html(a, b, tmp_path / "compare.html", names=("digits:1", EVIL))
    reader = read(path.read_text(encoding="utf-8"))
    text = " ".join(reader.text)
    assert "script" not in reader.seen
    assert EVIL in text
    for part in ("digits:1", "better", "worse", "Worse: metric.accuracy.", "4.00×", "−0.3000", "3.00 MB"):
        assert part in text, part
