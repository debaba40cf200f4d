"""The outcome of a run: what was tried, what it measured, which one is best; and two reports side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fettle.core import codec
from fettle.core.errors import UsageError
from fettle.core.report import Direction, Measurement, Report
from fettle.evaluate.layers import LayerLine

# Measurements that say how others were taken; a difference between them means nothing.
_CONDITIONS = ("latency.batch", "latency.threads")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One model that was tried, and the report of what it measured.

    digest: of its artifact, "" where it has none. steps: what was done to it, in words, in order.
    version: its number in the registry, None where it is not registered.
    report: holds "metric.*", "latency.p50", "latency.p95", "latency.p99", "latency.batch", "latency.threads" and
        "size", unless the candidate failed.
    failure: why it could not be built or measured, None where it could.
    """

    label: str
    digest: str
    runtime: str
    precision: str
    steps: tuple[str, ...]
    report: Report
    version: int | None = None
    failure: str | None = None

    @property
    def metric(self) -> Measurement:
        """The task's metric. Raises UsageError where it was not measured."""
        try:
            return self.report.metric
        except KeyError:
            raise UsageError(f"candidate '{self.label}' must have a 'metric.*' measurement, got none") from None

    @property
    def metric_name(self) -> str:
        """The metric's name without its prefix, such as "accuracy"."""
        return self.metric.name.removeprefix("metric.")

    @property
    def p50_ms(self) -> float:
        """Median latency of one batch, in milliseconds."""
        return self.measurement("latency.p50").value

    @property
    def size_bytes(self) -> int:
        """What a deployment must carry."""
        return int(self.measurement("size").value)

    @property
    def batch(self) -> int:
        """Rows per call at which the latency was taken."""
        return int(self.measurement("latency.batch").value)

    @property
    def threads(self) -> int:
        """Threads at which the latency was taken."""
        return int(self.measurement("latency.threads").value)

    def is_same(self, other: Candidate) -> bool:
        """Whether both are one artifact, though the reports may be of different splits."""
        return self.digest == other.digest if self.digest or other.digest else self.label == other.label

    def measurement(self, name: str) -> Measurement:
        """The measurement of this name. Raises UsageError where there is none."""
        if name not in self.report:
            raise UsageError(f"candidate '{self.label}' must have the measurement '{name}', got none")
        return self.report[name]

    def to_json(self) -> dict[str, Any]:
        """The plain form that `fettle optimize --json` prints."""
        metric = self.metric
        latency: dict[str, float | int] = {
            name: self.measurement(f"latency.{name}").value for name in ("p50", "p95", "p99")
        }
        return {
            "version": self.version,
            "digest": self.digest,
            "runtime": self.runtime,
            "precision": self.precision,
            "steps": list(self.steps),
            "metric": {
                "name": self.metric_name,
                "value": metric.value,
                "low": metric.low,
                "high": metric.high,
                "n": metric.n,
            },
            "latency_ms": {**latency, "batch": self.batch, "threads": self.threads},
            "size_bytes": self.size_bytes,
        }


def gain(before: float, after: float) -> float:
    """How many times smaller it became; infinite where nothing is left.

    >>> gain(400, 100), gain(0, 0), gain(1, 0)
    (4.0, 1.0, inf)
    """
    if after == 0:
        return 1.0 if before == 0 else math.inf
    return before / after


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitUse:
    """One split and what it was used for, such as "selection" or "final report"."""

    name: str
    rows: int
    digest: str
    purpose: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All that a run found.

    met_floor: whether the best keeps the budget. sentences: the verdict, the most important first.
    best, baseline: with their final reports, on the test split where there is one.
    candidates: all that were tried, failed ones too, measured on the validation split; front: the Pareto front.
    floor: the smallest metric allowed on the validation split, None where unknown.
    left_float: what could not be quantized and why, and what else the steps noted.
    decisions: which corrections were tried, and kept or not.
    layers: what int8 costs, layer by layer. splits, hardware, versions: what the numbers hold for.
    report: path of report.html.
    """

    name: str
    met_floor: bool
    sentences: tuple[str, ...]
    best: Candidate
    baseline: Candidate
    candidates: tuple[Candidate, ...]
    front: tuple[Candidate, ...]
    floor: float | None = None
    left_float: tuple[str, ...] = ()
    decisions: tuple[str, ...] = ()
    layers: tuple[LayerLine, ...] = ()
    splits: tuple[SplitUse, ...] = ()
    hardware: str = ""
    versions: tuple[str, ...] = ()
    report: str = ""

    def mark(self, candidate: Candidate) -> str:
        """ "★" for the best, "•" for another one on the front, "" for the rest."""
        if candidate.is_same(self.best):
            return "★"
        return "•" if any(candidate.is_same(other) for other in self.front) else ""

    @property
    def original(self) -> Candidate:
        """The baseline as it was measured among the candidates, in the same interleaved rounds; else the baseline."""
        return next((candidate for candidate in self.measured if candidate.is_same(self.baseline)), self.baseline)

    @property
    def measured(self) -> tuple[Candidate, ...]:
        """The candidates that did not fail."""
        return tuple(candidate for candidate in self.candidates if candidate.failure is None)

    @property
    def failed(self) -> tuple[Candidate, ...]:
        """The candidates that did."""
        return tuple(candidate for candidate in self.candidates if candidate.failure is not None)

    def to_json(self) -> dict[str, Any]:
        """The plain form that `fettle optimize --json` prints; failed candidates are left out."""
        return {
            "name": self.name,
            "met_floor": self.met_floor,
            "best": self.best.to_json(),
            "baseline": self.baseline.to_json(),
            "candidates": [candidate.to_json() for candidate in self.measured],
            "front": [candidate.to_json() for candidate in self.front],
            "decisions": list(self.decisions),
            "layers": [codec.to_json(line) for line in self.layers],
            "report": self.report,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement in two reports.

    a, b: None where that report lacks it. difference: b - a; ratio: a / b for "lower is better" (a speed-up or a
    saving, above 1 where b wins), else b / a; None where it has no meaning.
    better: whether b is better than a; None for equal values, a measurement without a direction, or overlapping
    intervals, which do not tell.
    """

    name: str
    unit: str
    direction: Direction
    a: Measurement | None
    b: Measurement | None
    difference: float | None
    ratio: float | None
    better: bool | None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `fettle compare A B --json`."""
        return {
            "name": self.name,
            "unit": self.unit,
            "a": _bounds(self.a),
            "b": _bounds(self.b),
            "difference": self.difference,
            "ratio": self.ratio,
            "better": self.better,
        }


def compare_reports(a: Report, b: Report) -> tuple[Row, ...]:
    """Every measurement of two reports side by side, in a's order, then what only b has; conditions are left out.

    >>> def of(value):
    ...     size = Measurement(name="size", value=value, unit="bytes", direction="lower")
    ...     return Report(subject="s", measurements=(size,))
    >>> row = compare_reports(of(400.0), of(100.0))[0]
    >>> row.difference, row.ratio, row.better
    (-300.0, 4.0, True)
    """
    names = dict.fromkeys(measurement.name for report in (a, b) for measurement in report.measurements)
    return tuple(_row(name, _found(a, name), _found(b, name)) for name in names if name not in _CONDITIONS)


def _found(report: Report, name: str) -> Measurement | None:
    return next((measurement for measurement in report.measurements if measurement.name == name), None)


def _row(name: str, a: Measurement | None, b: Measurement | None) -> Row:
    known = a or b
    assert known is not None
    shared: dict[str, Any] = {"name": name, "unit": known.unit, "direction": known.direction, "a": a, "b": b}
    if a is None or b is None:
        return Row(**shared, difference=None, ratio=None, better=None)
    upper, lower = (a.value, b.value) if known.direction == "lower" else (b.value, a.value)
    return Row(
        **shared,
        difference=b.value - a.value,
        ratio=upper / lower if known.direction != "none" and upper > 0 and lower > 0 else None,
        better=_better(a, b),
    )


def _better(a: Measurement, b: Measurement) -> bool | None:
    if a.direction == "none" or a.value == b.value:
        return None
    if (
        a.low is not None
        and a.high is not None
        and b.low is not None
        and b.high is not None
        and a.low <= b.high
        and b.low <= a.high
    ):
        return None
    return (b.value > a.value) == (a.direction == "higher")


def _bounds(measurement: Measurement | None) -> dict[str, Any] | None:
    if measurement is None:
        return None
    return {"value": measurement.value, "low": measurement.low, "high": measurement.high, "n": measurement.n}
