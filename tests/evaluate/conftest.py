"""Candidates made of plain numbers, as a run would have measured them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from fettle.core.report import Direction, Measurement, Report
from fettle.evaluate.comparison import Candidate
from fettle.evaluate.intervals import wilson


def _candidate(
    label: str,
    accuracy: float = 0.9,
    p50: float = 1.0,
    size: float = 1000,
    *,
    direction: Direction = "higher",
    extra: tuple[Measurement, ...] = (),
    **fields: Any,
) -> Candidate:
    digest = hashlib.sha256(label.encode()).hexdigest()
    low, high = wilson(round(min(1, accuracy) * 1000), 1000)
    measurements = (
        Measurement(
            name="metric.accuracy", value=accuracy, direction=direction, n=1000, low=low, high=high, data="validation"
        ),
        *(
            Measurement(name=f"latency.{name}", value=p50 * factor, unit="ms", direction="lower", n=50)
            for name, factor in (("p50", 1.0), ("p95", 1.5), ("p99", 2.0))
        ),
        Measurement(name="latency.batch", value=1.0, unit="rows"),
        Measurement(name="latency.threads", value=2.0, unit="threads"),
        Measurement(name="size", value=size, unit="bytes", direction="lower"),
        *extra,
    )
    failed = fields.get("failure") is not None
    values: dict[str, Any] = {"digest": digest, "runtime": "onnxruntime", "precision": "int8", "steps": ("a", "b")}
    report = Report(subject=digest, measurements=() if failed else measurements)
    return Candidate(label=label, report=report, **{**values, **fields})


@pytest.fixture
def candidate() -> Callable[..., Candidate]:
    """A factory: candidate(label, accuracy, p50, size, **fields of Candidate)."""
    return _candidate
