"""Reports and notes, before they become rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.errors import UsageError
from fettle.core.report import Measurement, Report
from fettle.registry import records

finite = st.floats(allow_nan=False, allow_infinity=False)
measurements = st.builds(
    Measurement,
    name=st.text(st.characters(exclude_categories=["Cs"])),
    value=finite | st.integers(-(2**53), 2**53),
    unit=st.sampled_from(["", "ms", "bytes"]),
    direction=st.sampled_from(["higher", "lower", "none"]),
    n=st.integers(0, 2**40),
    low=st.none() | finite,
    note=st.text(st.characters(exclude_categories=["Cs"])),
)


@given(report=st.builds(Report, subject=st.text("abc"), measurements=st.lists(measurements, max_size=4).map(tuple)))
def test_a_report_reads_back_as_it_was(report: Report) -> None:
    (text,) = records.report_texts([report])
    assert records._report(text, where="test") == report


@pytest.mark.parametrize(
    "value", [np.float64(1.5), np.float32(1.5), np.int64(3), float("nan"), float("inf"), "1", None]
)
def test_a_report_that_would_not(value: Any) -> None:
    report = Report(subject="s", measurements=(Measurement(name="latency.p50", value=value),))
    with pytest.raises(UsageError, match=r"finite Python numbers.*latency\.p50 = "):
        records.report_texts([report])


@pytest.mark.parametrize("bound", [float("nan"), float("inf"), np.float64(1.0)])
def test_bounds_count_too(bound: float) -> None:
    report = Report(subject="s", measurements=(Measurement(name="latency.p50", value=1.0, low=bound),))
    with pytest.raises(UsageError, match="finite Python numbers"):
        records.report_texts([report])


@pytest.mark.parametrize("text", ["x" * 2000, "ünïcode 💥", "two\nlines", "tab\t"])
def test_notes(text: str) -> None:
    assert records.Note.of(text, text) == records.Note(text, text)
