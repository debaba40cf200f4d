"""The two-sample Kolmogorov-Smirnov test: the largest gap between two distribution functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy import stats

from fettle.core.signature import Array
from fettle.monitor.drift._base import Comparison, DriftTest, as_values

# The exact distribution where a sample is small; beyond, scipy's approximation is within two percent of it down
# to p = 1e-6 (measured at n = 5000, m = 100) and cannot overflow.
_EXACT_BELOW = 100
_EXACT_LARGEST = 10_000
_EXACT_FROM_P = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class KolmogorovSmirnov(DriftTest):
    """D = max over x of |F(x) - G(x)|, with F and G the empirical distribution functions.

    n: reference rows; m: window rows. D is in [0, 1] whatever the scale of the feature; for two normals a shift of
    the mean by s standard deviations gives D = 2·Phi(s/2) - 1, so the default minimum of 0.2 is half a standard
    deviation. Between samples of discrete values (ties) the p-value is an upper bound: the test never alarms more
    often than its level. NaN is ranked above every number, so a rise of the NaN share by r gives D >= r.

    Power: the gap at the x where the true one is D varies with a standard deviation of at most
    sqrt(1/n + 1/m)/2, and the critical value at level a is about sqrt(ln(2/a)/2 · (1/n + 1/m)). Their sum, with the
    normal quantile of the power, is the smallest D surely seen.

    Raises MonitorError for a sample that is not one column of numbers.

    Reference: F. J. Massey, The Kolmogorov-Smirnov test for goodness of fit, JASA 46 (1951); J. L. Hodges, The
    significance probability of the Smirnov two-sample test, Arkiv för Matematik 3 (1958). On softmax outputs:
    S. Rabanser, S. Günnemann, Z. Lipton, Failing Loudly, NeurIPS 2019.

    >>> rng = np.random.default_rng(0)
    >>> seen = KolmogorovSmirnov().compare(rng.normal(size=500), rng.normal(1.0, size=200))
    >>> round(seen.effect, 2), seen.p_value < 1e-6
    (0.41, True)
    >>> KolmogorovSmirnov().needed(1000, alpha=0.001, power=0.8)
    164
    """

    minimum: float = 0.2
    unit: ClassVar[str] = "D"

    def compare(self, reference: Array, current: Array) -> Comparison:
        n, m = len(reference), len(current)
        if n == 0 or m == 0:
            return Comparison.nothing()
        both = np.concatenate([as_values(reference), as_values(current)])
        # Ranks stand in for the values: the same D, and NaN, which sorts last, becomes one more value.
        _, ranks = np.unique(both, return_inverse=True, equal_nan=True)
        shares = [
            np.cumsum(np.bincount(part, minlength=ranks.max() + 1)) / len(part) for part in (ranks[:n], ranks[n:])
        ]
        distance = float(np.abs(shares[0] - shares[1]).max())
        p_value = float(stats.kstwo.sf(distance, max(1, round(n * m / (n + m)))))
        small = min(n, m) < _EXACT_BELOW and max(n, m) <= _EXACT_LARGEST
        # Near p = 1 scipy's exact sum can leave [0, 1] by rounding, and then warns; nobody needs it there.
        if small and p_value < _EXACT_FROM_P:
            p_value = float(stats.ks_2samp(ranks[:n], ranks[n:], method="exact").pvalue)
        return Comparison(
            p_value=min(1.0, max(0.0, p_value)),
            effect=distance,
            statistic=distance,
            null_mean=min(1.0, math.sqrt(math.pi / 2) * math.log(2) * math.sqrt(1 / n + 1 / m)),
        )

    def detectable(self, reference_size: int, size: int, *, alpha: float, power: float) -> float:
        if reference_size < 1 or size < 1:
            return math.inf
        spread = math.sqrt(1 / reference_size + 1 / size)
        distance = spread * (math.sqrt(math.log(2 / alpha) / 2) + float(stats.norm.ppf(power)) / 2)
        return distance if distance <= 1 else math.inf
