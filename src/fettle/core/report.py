"""What was measured: a Report is a subject and measurements, whatever measured them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fettle.core.recipe import Budget

Direction = Literal["higher", "lower", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One number with what is needed to trust it.

    name: a dotted name: "metric.accuracy", "latency.p50", "size", "parity.agreement", "drift.ks.p0".
    unit: "", "ms", "bytes", ...
    direction: which way is better.
    n: how many observations it rests on; low, high: the interval (95 percent unless `note` says otherwise).
    data: the split or the digest of the data; note: conditions, such as "batch 1, 1 thread".
    """

    name: str
    value: float
    unit: str = ""
    direction: Direction = "none"
    n: int = 0
    low: float | None = None
    high: float | None = None
    data: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Measurements of one subject.

    >>> report = Report(subject="abc", measurements=(Measurement(name="size", value=12.0, unit="bytes"),))
    >>> report["size"].value
    12.0
    >>> "latency.p50" in report
    False
    """

    subject: str
    kind: Literal["evaluation", "drift", "load"] = "evaluation"
    measurements: tuple[Measurement, ...] = ()
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Measurement:
        for measurement in self.measurements:
            if measurement.name == name:
                return measurement
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return any(measurement.name == name for measurement in self.measurements)

    @property
    def metric(self) -> Measurement:
        """The task's metric: the first measurement whose name starts with "metric."."""
        for measurement in self.measurements:
            if measurement.name.startswith("metric."):
                return measurement
        raise KeyError("metric.*")

    def check(self, budget: Budget, *, baseline: Report) -> str | None:
        """None where the metric keeps the budget against the baseline, else a sentence that says what is missing.

        >>> def of(value):
        ...     return Report(subject="s", measurements=(Measurement(name="metric.accuracy", value=value),))
        >>> of(0.90).check(Budget(max_drop=0.01), baseline=of(0.905))
        >>> of(0.88).check(Budget(max_drop=0.01), baseline=of(0.905))
        'accuracy 0.8800 is below the floor of 0.8950: the original reaches 0.9050 and may lose 0.0100'
        """
        metric, original = self.metric, baseline.metric
        floor = budget.floor(original.value)
        # A drop of exactly the budget is allowed; the slack is far below one sample in any data set.
        if metric.value >= floor - 1e-9:
            return None
        name = metric.name.removeprefix("metric.")
        reason = f"the original reaches {original.value:.4f} and may lose {budget.max_drop:.4f}"
        if budget.min_metric is not None and floor == budget.min_metric:
            reason = f"the budget asks for at least {budget.min_metric:.4f}"
        return f"{name} {metric.value:.4f} is below the floor of {floor:.4f}: {reason}"
