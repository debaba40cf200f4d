"""Counters and histograms that cost a tenth of prometheus_client's, for what is counted with every request.

No locks: a family here is counted from the event loop only, and read from anywhere. What other threads count stays
with prometheus_client's own classes; both are rendered by one registry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Container, Iterator, Sequence
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class Count:
    """How often."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self, by: int = 1) -> None:
        """Count one more, or several."""
        self.value += by


class Spread:
    """How values are spread over buckets. bounds: their upper ends, inclusive, rising; one more bucket has the rest.

    >>> spread = Spread((1, 2))
    >>> for value in (0.5, 1, 3):
    ...     spread.observe(value)
    >>> spread.counts, spread.total
    ([2, 0, 1], 4.5)
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Add one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


T = TypeVar("T", Count, Spread)


class _Family(Collector, ABC, Generic[T]):
    """Tallies of one name, by the values of its labels."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str], *, registry: CollectorRegistry) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._by_values: dict[tuple[str, ...], T] = {}
        registry.register(self)

    def labels(self, *values: str) -> T:
        """The tally for these values, made where there is none."""
        found = self._by_values.get(values)
        if found is None:
            assert len(values) == len(self._labels), f"{self._name} has the labels {self._labels}, got {values}"
            found = self._by_values[values] = self._make()
        return found

    def keep(self, known: Container[tuple[str, str]]) -> None:
        """Forget the tallies of each model and version, two of the labels, that is not among these."""
        model, version = self._labels.index("model"), self._labels.index("version")
        for values in list(self._by_values):
            if (values[model], values[version]) not in known:
                del self._by_values[values]

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        yield self._rendered(list(self._by_values.items()))

    @abstractmethod
    def _make(self) -> T: ...

    @abstractmethod
    def _rendered(self, tallies: Sequence[tuple[tuple[str, ...], T]]) -> Metric: ...


class Counts(_Family[Count]):
    """A counter for each combination of labels; `_total` is put behind its name."""

    def _make(self) -> Count:
        return Count()

    def _rendered(self, tallies: Sequence[tuple[tuple[str, ...], Count]]) -> Metric:
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        for values, tally in tallies:
            family.add_metric(values, tally.value)
        return family


class Spreads(_Family[Spread]):
    """A histogram for each combination of labels."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], *, buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:  # fmt: skip
        super().__init__(name, documentation, labels, registry=registry)
        self._buckets = buckets

    def _make(self) -> Spread:
        return Spread(self._buckets)

    def _rendered(self, tallies: Sequence[tuple[tuple[str, ...], Spread]]) -> Metric:
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        for values, tally in tallies:
            below, buckets = 0, []
            for bound, count in zip((*map(float, self._buckets), "+Inf"), tally.counts, strict=True):
                below += count
                buckets.append((str(bound), below))
            family.add_metric(values, buckets, sum_value=tally.total)
        return family
