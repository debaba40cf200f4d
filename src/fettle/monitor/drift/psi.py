"""The population stability index, with bins frozen from the reference and a p-value that knows the sample sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy import special, stats

from fettle.core.errors import UsageError
from fettle.core.signature import Array
from fettle.monitor.drift._base import Comparison, DriftTest, as_values

# The levels of credit scoring: below the first stable, above the second act.
LEVELS = (0.1, 0.2)

# A bin with fewer reference rows is "rare": the chi-square approximation does not hold there.
_RARE_BELOW = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class PopulationStability(DriftTest):
    """PSI = sum over bins of (q - p)·ln(q / p), with p and q the shares of reference and window.

    Bins: every reference value that alone holds 1/bins of the rows (and five of them) gets a bin of its own; the
    other rows are cut at their quantiles, so each bin holds about 1/bins. The outer bins reach to -inf and +inf, NaN
    has a bin, and no row of the window is ever left out. All bins with fewer than five reference rows (NaN, values
    never seen, gaps between atoms) are one bin, "rare". Counts are smoothed by adding one half, so an empty bin is
    finite.

    Without drift PSI is not 0: over the B bins that are not rare it is about (1/n + 1/m)·chi2(B - 1) with n
    reference and m window rows. That gives the p-value, and its mean is subtracted to give the effect. The rare
    bin has an exact test of its own, hypergeometric: so many rare values among m of the n + m rows. The p-value is
    twice the smaller of both (Bonferroni); for a constant reference only the second remains: any new value counts.

    In the note: "moderate" from an effect of 0.1, "large" from 0.2.

    Raises UsageError for fewer than 2 bins, MonitorError for a sample that is not one column of numbers.

    Reference: E. Lewis, An Introduction to Credit Scoring (1994), for the levels; B. Yurdakul, Statistical
    Properties of Population Stability Index (2018), for the null distribution.

    >>> rng = np.random.default_rng(0)
    >>> seen = PopulationStability().compare(rng.normal(size=500), rng.normal(1.0, size=200))
    >>> round(seen.effect, 1), seen.p_value < 1e-6, seen.note
    (0.9, True, 'large')
    >>> PopulationStability().compare(np.zeros(500), np.zeros(200)).p_value
    1.0
    """

    minimum: float = 0.2
    bins: int = 10
    unit: ClassVar[str] = "PSI"

    def __post_init__(self) -> None:
        # Not super(): slots=True makes a second class, which the closure of super() does not know.
        DriftTest.__post_init__(self)
        if self.bins < 2:
            raise UsageError(f"PSI needs at least 2 bins, got {self.bins}")

    def compare(self, reference: Array, current: Array) -> Comparison:
        n, m = len(reference), len(current)
        if n == 0 or m == 0:
            return Comparison.nothing()
        before, after = as_values(reference), as_values(current)
        edges = cut(before, self.bins)
        counts = np.stack([count(before, edges), count(after, edges)])  # (2, bins)
        rare = counts[0] < _RARE_BELOW
        rare_counts = counts[:, rare].sum(axis=1)  # (2,)
        common = counts[:, ~rare]
        folded = np.concatenate([common, rare_counts[:, None]], axis=1) if rare_counts.sum() else common
        index = stability(folded[0], folded[1])
        null_mean = (1 / n + 1 / m) * (folded.shape[1] - 1)
        effect = max(0.0, index - null_mean)
        return Comparison(
            p_value=min(1.0, 2 * min(_common_p(common), _rare_p(rare_counts, n, m))),
            effect=effect,
            statistic=index,
            null_mean=null_mean,
            note="large" if effect >= LEVELS[1] else "moderate" if effect >= LEVELS[0] else "",
        )

    def detectable(self, reference_size: int, size: int, *, alpha: float, power: float) -> float:
        if reference_size < self.bins * _RARE_BELOW or size < 1:
            return math.inf
        freedom = self.bins - 1
        critical = stats.chi2.isf(alpha / 2, freedom)
        # With a true index of L·(1/n + 1/m) the statistic is about non-central chi-square with that L.
        offset = float(special.chndtrinc(critical, freedom, 1 - power))
        return offset * (1 / reference_size + 1 / size)


def cut(reference: Array, bins: int) -> Array:
    """Edges of half-open bins [edge, next edge); below the first and from the last on are bins too.

    reference: (n,) float64 with or without NaN. Returns sorted unique edges (k,), k >= 0: k + 1 bins.

    >>> cut(np.arange(20.0), 4).tolist()
    [5.0, 10.0, 15.0]
    >>> cut(np.array([0.0] * 10 + [1.0, 2.0]), 2).tolist() == [0.0, np.nextafter(0.0, 1.0)]
    True
    """
    known = reference[~np.isnan(reference)]
    values, counts = np.unique(known, return_counts=True)
    heavy: Array = values[counts >= max(_RARE_BELOW, len(reference) / bins)]
    rest = np.sort(known[~np.isin(known, heavy)])
    parts = min(max(1, round(bins * len(rest) / max(1, len(reference)))), max(1, len(rest) // _RARE_BELOW))
    quantiles = rest[[len(rest) * part // parts for part in range(1, parts)]]
    return np.unique(np.concatenate([quantiles, heavy, np.nextafter(heavy, np.inf)]))


def count(sample: Array, edges: Array) -> Array:
    """Rows of each bin, and of NaN in the last place: (len(edges) + 2,) integers that sum to len(sample).

    >>> count(np.array([-np.inf, 0.0, 1.0, np.nan, np.inf]), np.array([0.0, 1.0])).tolist()
    [1, 1, 2, 1]
    """
    missing = np.isnan(sample)
    places = np.searchsorted(edges, sample[~missing], side="right")
    return np.append(np.bincount(places, minlength=len(edges) + 1), missing.sum())


def stability(before: Array, after: Array) -> float:
    """PSI of two histograms over the same bins, one half added to every count.

    >>> round(stability(np.array([50, 50]), np.array([80, 20])), 3)
    0.406
    """
    p = (before + 0.5) / (before.sum() + 0.5 * len(before))
    q = (after + 0.5) / (after.sum() + 0.5 * len(after))
    return float(((q - p) * np.log(q / p)).sum())


def _common_p(common: Array) -> float:
    """The chi-square p-value over the bins that are not rare. common: (2, B)."""
    n, m = common.sum(axis=1)
    if common.shape[1] < 2 or m == 0:
        return 1.0
    return float(stats.chi2.sf(stability(common[0], common[1]) / (1 / n + 1 / m), common.shape[1] - 1))


def _rare_p(rare: Array, n: int, m: int) -> float:
    """The chance of as many rare values in the window, or more, given their number in both samples."""
    return float(stats.hypergeom.sf(rare[1] - 1, n + m, rare.sum(), m))
