"""Intervals against brute force: exact binomial coverage, a slow bootstrap, scipy's binomial."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fettle.core.errors import UsageError
from fettle.evaluate.intervals import bootstrap, median_interval, median_ranks, normal_quantile, wilson


def coverage(n: int, p: float) -> float:
    """How often the interval holds p, summed over all n + 1 outcomes."""
    total = 0.0
    for k in range(n + 1):
        low, high = wilson(k, n)
        if low <= p <= high:
            total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
    return total


@pytest.mark.parametrize("n", [10, 30, 100, 300])
def test_wilson_covers_close_to_its_level_on_average(n: int) -> None:
    found = [coverage(n, p) for p in np.linspace(0.01, 0.99, 99)]
    assert 0.94 < np.mean(found) < 0.97
    assert min(found) > 0.82


@given(n=st.integers(1, 5000), data=st.data())
def test_wilson_solves_its_own_equation(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert low < high
    z = normal_quantile()
    for bound in (low, high):
        if 0 < bound < 1:
            assert abs(k / n - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), abs=1e-9)


@given(k=st.integers(0, 200))
def test_wilson_is_scipys(k: int) -> None:
    expected = stats.binomtest(k, 200).proportion_ci(0.95, method="wilson")
    assert wilson(k, 200) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, 0)])
def test_wilson_refuses(k: int, n: int) -> None:
    with pytest.raises(UsageError, match="0 <= successes <= n"):
        wilson(k, n)


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, 2.0])
def test_a_level_lies_between_zero_and_one(level: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        normal_quantile(level)


def slow_bootstrap(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(200):
        picked = [int(i) for i in generator.integers(0, len(x), size=len(x))]
        values.append(sum(float(x[i]) * float(y[i]) for i in picked) / len(picked))
    values.sort()

    def quantile(share: float) -> float:
        place = share * (len(values) - 1)
        below = int(place)
        return values[below] + (place - below) * (values[below + 1] - values[below])

    return quantile(0.025), quantile(0.975)


@pytest.mark.parametrize("seed", range(5))
def test_bootstrap_is_the_slow_loop(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    x, y = rng.normal(size=40), rng.normal(size=40)
    found = bootstrap(lambda a, b: float(np.mean(a * b)), x, y, resamples=200, seed=seed)
    assert found == pytest.approx(slow_bootstrap(x, y, seed))


def test_bootstrap_of_a_mean_covers_close_to_its_level() -> None:
    rng = np.random.default_rng(3)
    held = 0
    for seed in range(200):
        interval = bootstrap(np.mean, rng.exponential(size=60), resamples=200, seed=seed)
        assert interval is not None
        held += interval[0] <= 1.0 <= interval[1]
    assert 0.85 < held / 200 < 0.99


def test_bootstrap_is_deterministic_and_touches_no_global_generator() -> None:
    before = np.random.get_state()[1].copy()
    sample = np.arange(50.0)
    assert bootstrap(np.mean, sample, seed=1) == bootstrap(np.mean, sample, seed=1)
    assert bootstrap(np.mean, sample, seed=1) != bootstrap(np.mean, sample, seed=2)
    assert (np.random.get_state()[1] == before).all()


def test_bootstrap_of_one_row_has_no_interval() -> None:
    assert bootstrap(np.mean, np.array([1.0])) is None


def test_bootstrap_survives_rare_resamples_without_a_value_and_gives_up_on_many() -> None:
    def needs_a_one(values: np.ndarray) -> float:
        if not values.any():
            raise ValueError("no positive row")
        return float(values.mean())

    often = np.array([1.0] * 10 + [0.0] * 10)
    rarely = np.array([1.0] + [0.0] * 30)
    assert bootstrap(needs_a_one, often) is not None
    assert bootstrap(needs_a_one, rarely) is None
    assert bootstrap(lambda values: math.nan, often) is None


@given(n=st.integers(1, 3000), level=st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_median_ranks_are_the_tightest_that_hold_the_level(n: int, level: float) -> None:
    ranks = median_ranks(n, level=level)

    def held(rank: int) -> float:
        return float(1 - 2 * stats.binom.cdf(rank - 1, n, 0.5))

    if ranks is None:
        assert held(1) < level
        return
    low, high = ranks
    assert low + high == n + 1
    assert held(low) >= level - 1e-9
    assert low + 1 > high - 1 or held(low + 1) < level


def test_median_interval_covers_whatever_the_distribution() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        low, high = median_interval(rng.lognormal(size=25)) or (math.inf, -math.inf)
        held += low <= 1.0 <= high
    assert held / 2000 > 0.94


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=60), st.integers(1, 60))
def test_median_interval_holds_the_sample_median(values: list[float], blocks: int) -> None:
    samples = np.array(values)
    interval = median_interval(samples, blocks=blocks)
    if min(blocks, len(values)) < 6:
        assert interval is None
    else:
        assert interval is not None
        assert interval[0] <= np.median(samples) <= interval[1]


def test_fewer_independent_blocks_widen_the_interval() -> None:
    samples = np.arange(1000.0)
    narrow, wide = median_interval(samples), median_interval(samples, blocks=20)
    assert narrow is not None
    assert wide is not None
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
