"""The plain form that --json prints, key by key, and two reports side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.errors import UsageError
from fettle.core.report import Direction, Measurement, Report
from fettle.evaluate.comparison import Candidate, Comparison, compare_reports, gain

Make = Callable[..., Candidate]


def test_the_plain_form_of_a_candidate(candidate: Make) -> None:
    made = candidate("a", 0.9, 2.0, 4096, version=3)
    metric = made.report.metric
    assert made.to_json() == {
        "version": 3,
        "digest": made.digest,
        "runtime": "onnxruntime",
        "precision": "int8",
        "steps": ["a", "b"],
        "metric": {"name": "accuracy", "value": 0.9, "low": metric.low, "high": metric.high, "n": 1000},
        "latency_ms": {"p50": 2.0, "p95": 3.0, "p99": 4.0, "batch": 1, "threads": 2},
        "size_bytes": 4096,
    }
    assert candidate("b").to_json()["version"] is None


def test_the_plain_form_of_a_comparison(candidate: Make) -> None:
    fast, original = candidate("fast", p50=0.5), candidate("original")
    comparison = Comparison(
        name="digits",
        met_floor=True,
        sentences=("fine.",),
        best=fast,
        baseline=original,
        candidates=(original, fast, candidate("broken", failure="ExportError: no")),
        front=(fast,),
        report="runs/1/report.html",
    )
    plain = comparison.to_json()
    assert list(plain) == [
        "name",
        "met_floor",
        "best",
        "baseline",
        "candidates",
        "front",
        "decisions",
        "layers",
        "report",
    ]
    assert plain["candidates"] == [original.to_json(), fast.to_json()]
    assert plain["front"] == [plain["best"]] == [fast.to_json()]
    assert plain["baseline"] == original.to_json()
    assert (plain["name"], plain["met_floor"], plain["report"]) == ("digits", True, "runs/1/report.html")
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert [one.label for one in comparison.failed] == ["broken"]


@pytest.mark.parametrize("name", ["metric.accuracy", "latency.p50", "latency.threads", "size"])
def test_a_candidate_without_a_measurement_says_which(candidate: Make, name: str) -> None:
    made = candidate("a")
    rest = tuple(measurement for measurement in made.report.measurements if measurement.name != name)
    lacking = Candidate(
        label="a", digest="", runtime="r", precision="p", steps=(), report=Report(subject="a", measurements=rest)
    )
    with pytest.raises(UsageError, match=r"candidate 'a' must have .*(metric\.\*|latency|size)"):
        lacking.to_json()


def test_marks_and_sameness(candidate: Make) -> None:
    best, other, rest = candidate("best"), candidate("other"), candidate("rest")
    final = candidate("named otherwise", 0.8, digest=best.digest)
    comparison = Comparison(
        name="x", met_floor=True, sentences=(), best=final, baseline=candidate("far away", p50=9.0),
        candidates=(best, other, rest), front=(best, other),
    )  # fmt: skip
    assert [comparison.mark(one) for one in comparison.candidates] == ["★", "•", ""]
    assert comparison.original.p50_ms == 9.0
    assert candidate("a", digest="").is_same(candidate("a", digest=""))
    assert not candidate("a", digest="").is_same(candidate("b", digest=""))


@given(st.floats(0, 1e9), st.floats(0, 1e9))
def test_gain_is_never_an_error(before: float, after: float) -> None:
    found = gain(before, after)
    assert found >= 0
    if after == 0:
        assert found == (1.0 if before == 0 else math.inf)


def report(**values: tuple[float, Direction]) -> Report:
    return Report(
        subject="s",
        measurements=tuple(Measurement(name=name, value=v, direction=d) for name, (v, d) in values.items()),
    )


@pytest.mark.parametrize(
    ("a", "b", "direction", "difference", "ratio", "better"),
    [
        (4.0, 1.0, "lower", -3.0, 4.0, True),
        (1.0, 4.0, "lower", 3.0, 0.25, False),
        (0.5, 1.0, "higher", 0.5, 2.0, True),
        (1.0, 0.5, "higher", -0.5, 0.5, False),
        (1.0, 1.0, "higher", 0.0, 1.0, None),
        (1.0, 2.0, "none", 1.0, None, None),
        (0.0, 2.0, "lower", 2.0, None, False),
        (-1.0, 2.0, "higher", 3.0, None, True),
    ],
)
def test_a_row(a: float, b: float, direction: Any, difference: float, ratio: Any, better: Any) -> None:
    (row,) = compare_reports(report(x=(a, direction)), report(x=(b, direction)))
    assert (row.difference, row.ratio, row.better) == (difference, ratio, better)


def test_overlapping_intervals_tell_nothing() -> None:
    def of(value: float) -> Report:
        return Report(
            subject="s",
            measurements=(
                Measurement(name="metric.x", value=value, direction="higher", low=value - 0.1, high=value + 0.1),
            ),
        )

    assert compare_reports(of(0.5), of(0.6))[0].better is None
    assert compare_reports(of(0.5), of(0.8))[0].better is True
    assert compare_reports(of(0.8), of(0.5))[0].better is False


def test_measurements_that_only_one_report_has_are_kept() -> None:
    rows = compare_reports(report(x=(1, "none"), y=(2, "none")), report(z=(3, "none"), x=(1, "none")))
    assert [(row.name, row.a is None, row.b is None) for row in rows] == [
        ("x", False, False),
        ("y", False, True),
        ("z", True, False),
    ]
    assert rows[1].to_json() == {
        "name": "y", "unit": "", "a": {"value": 2, "low": None, "high": None, "n": 0}, "b": None,
        "difference": None, "ratio": None, "better": None,
    }  # fmt: skip
