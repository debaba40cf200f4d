"""Confidence intervals: of a proportion (Wilson), of any statistic (bootstrap), of a median (order statistics)."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from fettle.core.errors import UsageError
from fettle.core.signature import Array

LEVEL = 0.95


def normal_quantile(level: float = LEVEL) -> float:
    """z such that a standard normal lies in [-z, z] with probability `level`.

    >>> round(normal_quantile(0.95), 4)
    1.96
    """
    if not 0 < level < 1:
        raise UsageError(f"a confidence level must lie between 0 and 1, got {level}")
    return NormalDist().inv_cdf(0.5 + level / 2)


def wilson(successes: int, n: int, *, level: float = LEVEL) -> tuple[float, float]:
    """Score interval of a proportion p after `successes` out of `n` independent trials.

    Idea: keep every p that the normal approximation *at that p* does not reject, |p̂ - p| <= z sqrt(p (1 - p) / n).
    Solving for p, with z the normal quantile and p̂ = successes / n:

        center = (p̂ + z² / 2n) / (1 + z² / n)
        half   = z sqrt(p̂ (1 - p̂) / n + z² / 4n²) / (1 + z² / n)

    Unlike p̂ ± z·SE it stays within [0, 1], has positive width at p̂ = 0 and 1, and its coverage averages close to
    the level for n as small as 10 (Brown, Cai and DasGupta, 2001, Statistical Science 16(2)).

    Returns (low, high). Raises UsageError unless 0 <= successes <= n and n >= 1.
    Reference: E. B. Wilson, 1927, Journal of the American Statistical Association 22(158), 209-212.

    >>> [round(bound, 4) for bound in wilson(90, 100)]
    [0.8256, 0.9448]
    """
    if not 0 <= successes <= n or n < 1:
        raise UsageError(f"a proportion needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z = normal_quantile(level)
    share, shrink = successes / n, 1 + z * z / n
    center = (share + z * z / (2 * n)) / shrink
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / shrink
    # At the ends the formula gives exactly 0 and 1, and rounding must not leave a hair between.
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == n else min(1.0, center + half)
    return low, high


def bootstrap(
    statistic: Callable[..., float], *arrays: Array, resamples: int = 1000, seed: int = 0, level: float = LEVEL
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of `statistic(*arrays)`, rows drawn together and with replacement.

    Idea: the data stand in for the population. Draw n of the n rows with replacement, compute the statistic, repeat
    B times; the interval runs from the (1 - level)/2 to the (1 + level)/2 quantile of the B values. It assumes
    independent rows and is a little short for n below about 30.

    arrays: each of shape (n, ...); a row is the same index in all of them.
    Returns (low, high), or None where no interval can be had: fewer than two rows, or the statistic raises or is
    not finite on more than a tenth of the resamples. The generator is local: the same seed, the same interval.
    Reference: B. Efron and R. J. Tibshirani, 1993, An Introduction to the Bootstrap, chapter 13.

    >>> low, high = bootstrap(np.mean, np.arange(100.0))
    >>> bool(low < 49.5 < high)
    True
    """
    n = len(arrays[0])
    if n < 2:
        return None
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        rows = generator.integers(0, n, size=n)
        try:
            value = float(statistic(*(array[rows] for array in arrays)))
        except (ValueError, ArithmeticError, IndexError):
            # A resample may lack a class that the statistic needs; the whole sample did not.
            continue
        if math.isfinite(value):
            values.append(value)
    if len(values) < 0.9 * resamples:
        return None
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def median_ranks(n: int, *, level: float = LEVEL) -> tuple[int, int] | None:
    """Ranks (1-based) of the two order statistics that enclose the population median with at least this confidence.

    Idea: each observation lies below the median with probability 1/2 whatever the distribution, so the number that
    do is binomial, and P(X_(r) <= median <= X_(n+1-r)) = 1 - 2 P(Binomial(n, 1/2) <= r - 1). The largest r that
    keeps this at or above `level` is taken. No r does for n below 6 at 95 percent: then None.

    Reference: H. A. David and H. N. Nagaraja, 2003, Order Statistics, 3rd ed., section 7.1.

    >>> median_ranks(10)
    (2, 9)
    >>> median_ranks(5) is None
    True
    """
    tail = (1 - level) / 2
    # In logarithms, so that 2^-n does not vanish for large n.
    log_term, below, rank = -n * math.log(2.0), 0.0, 0
    while rank < (n + 1) // 2:
        below += math.exp(log_term)
        if below > tail:
            break
        rank += 1
        log_term += math.log((n - rank + 1) / rank)
    return (rank, n + 1 - rank) if rank else None


def median_interval(samples: Array, *, blocks: int | None = None, level: float = LEVEL) -> tuple[float, float] | None:
    """Interval of the median from the samples' own order statistics, free of any assumed distribution.

    samples: (n,), any order.
    blocks: how many of them are independent, where samples come in runs that resemble each other (timings taken
        back to back); the ranks for that many are stretched over all n. None: all are.
    Returns (low, high), or None where there are too few. See `median_ranks`.

    >>> median_interval(np.array([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]))
    (1.0, 6.0)
    """
    n = len(samples)
    independent = n if blocks is None else min(blocks, n)
    ranks = median_ranks(independent, level=level)
    if ranks is None:
        return None
    ordered = np.sort(samples)
    stretch = (n - 1) / (independent - 1)
    low, high = math.floor((ranks[0] - 1) * stretch), math.ceil((ranks[1] - 1) * stretch)
    return float(ordered[low]), float(ordered[high])
