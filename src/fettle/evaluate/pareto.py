"""The Pareto front: the candidates that no other one beats on everything at once."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fettle.core.errors import UsageError
from fettle.core.signature import Array
from fettle.evaluate.comparison import Candidate


def pareto_mask(costs: Array) -> Array:
    """Which points are not dominated.

    Point a dominates b where a <= b in every cost and a < b in at least one. Equal points do not dominate each
    other: all of them stay.

    costs: (n, k), every one to be made small. Returns (n,) bool, all False only for n = 0.
    Raises UsageError for NaN, which would be neither better nor worse than anything. Time O(n² k), memory O(n k).

    >>> pareto_mask(np.array([[1.0, 3.0], [2.0, 2.0], [3.0, 3.0]])).tolist()
    [True, True, False]
    """
    points = np.asarray(costs, dtype=np.float64)
    if points.ndim != 2 or np.isnan(points).any():
        raise UsageError(f"a Pareto front needs costs of shape (points, objectives) without NaN, got {points.shape}")
    mask = np.ones(len(points), dtype=bool)
    for index, point in enumerate(points):
        no_worse = np.all(points <= point, axis=1)
        mask[index] = not np.any(no_worse & np.any(points < point, axis=1))
    return mask


def front_of(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """The candidates on the front over (metric, median latency, size), fastest first. Failed ones are not on it."""
    usable = [candidate for candidate in candidates if candidate.failure is None]
    if not usable:
        return ()
    costs = np.array([[loss(candidate), candidate.p50_ms, candidate.size_bytes] for candidate in usable])
    on_front = [candidate for candidate, kept in zip(usable, pareto_mask(costs), strict=True) if kept]
    return tuple(sorted(on_front, key=lambda candidate: (candidate.p50_ms, candidate.size_bytes, candidate.label)))


def loss(candidate: Candidate) -> float:
    """The metric as a cost: its negative where higher is better."""
    metric = candidate.metric
    return metric.value if metric.direction == "lower" else -metric.value
