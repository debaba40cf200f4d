"""Two models on the same rows: is the difference in correctness more than chance?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fettle.core.errors import UsageError
from fettle.core.report import Measurement
from fettle.core.signature import Array
from fettle.evaluate.intervals import LEVEL, normal_quantile


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """The outcome of `compare_paired`.

    lost: rows that the first model has right and the second wrong; won: the reverse; n: all rows.
    difference: second minus first accuracy, (won - lost) / n, with its 95 percent interval [low, high].
    p_exact, p_mid: two-sided p-values of "lost and won are equally likely".
    """

    lost: int
    won: int
    n: int
    difference: float
    low: float
    high: float
    p_exact: float
    p_mid: float

    def measurements(self, data: str = "") -> tuple[Measurement, ...]:
        """For a Report: "paired.difference", "paired.p", "paired.lost", "paired.won"."""
        return (
            Measurement(
                name="paired.difference",
                value=self.difference,
                direction="higher",
                n=self.n,
                low=self.low,
                high=self.high,
                data=data,
                note="against the original on the same rows",
            ),
            Measurement(name="paired.p", value=self.p_mid, n=self.n, data=data, note="McNemar, mid-p, two-sided"),
            Measurement(name="paired.lost", value=float(self.lost), direction="lower", n=self.n, data=data),
            Measurement(name="paired.won", value=float(self.won), direction="higher", n=self.n, data=data),
        )


def compare_paired(first: Array, second: Array) -> Paired:
    """McNemar's test on which rows two models get right, exact and mid-p, and an interval of the difference.

    Idea: rows that both get right, or both wrong, say nothing of which is better. Of the m = lost + won others each
    is a fair coin under the null hypothesis. With k = min(lost, won) and X ~ Binomial(m, 1/2):

        p_exact = min(1, 2 P(X <= k))
        p_mid   = 2 P(X <= k) - P(X = k),   and 1 - P(X = k) / 2 where lost = won

    The exact test is conservative; mid-p is close to the nominal level and more powerful. The interval is Agresti
    and Min's: half a row is added to each of the four cells, then a normal interval; it never has zero width.

    first, second: (n,) booleans, True where the model is right on that row.
    Raises UsageError unless both are 1-D, of the same length and not empty.
    References: Q. McNemar, 1947, Psychometrika 12(2); M. W. Fagerland, S. Lydersen and P. Laake, 2013, BMC Medical
    Research Methodology 13:91; A. Agresti and Y. Min, 2005, Statistics in Medicine 24(5).

    >>> right = np.array([True] * 90 + [False] * 10)
    >>> compare_paired(right, np.roll(right, 2)).p_mid
    0.8125
    >>> test = compare_paired(np.array([True] + [False] * 7), np.array([False] + [True] * 7))
    >>> round(test.p_exact, 4), round(test.p_mid, 4)
    (0.0703, 0.0391)
    """
    a, b = np.asarray(first), np.asarray(second)
    if a.dtype != bool or b.dtype != bool or a.ndim != 1 or a.shape != b.shape or not len(a):
        raise UsageError(
            "a paired test needs two boolean arrays of one and the same length, got "
            f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        )
    n, lost, won = len(a), int(np.sum(a & ~b)), int(np.sum(~a & b))
    p_exact, p_mid = _mcnemar(lost, won)
    z = normal_quantile(LEVEL)
    size = n + 2
    center = (won - lost) / size
    half = z * math.sqrt((lost + won + 1) - (won - lost) ** 2 / size) / size
    return Paired(
        lost=lost,
        won=won,
        n=n,
        difference=(won - lost) / n,
        low=max(-1.0, center - half),
        high=min(1.0, center + half),
        p_exact=p_exact,
        p_mid=p_mid,
    )


def _mcnemar(lost: int, won: int) -> tuple[float, float]:
    m, k = lost + won, min(lost, won)
    if m == 0:
        return 1.0, 1.0
    # Exact integers: floats would underflow from about a thousand discordant rows on.
    ways, total = 1, 1
    for i in range(k):
        ways = ways * (m - i) // (i + 1)
        total += ways
    at, up_to = _share(ways, m), _share(total, m)
    if lost == won:
        return 1.0, 1.0 - at / 2
    return min(1.0, 2 * up_to), 2 * up_to - at


def _share(ways: int, m: int) -> float:
    """ways / 2^m, correctly rounded."""
    return float(ways / (1 << m))
