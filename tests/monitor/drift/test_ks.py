"""Kolmogorov-Smirnov against a loop over distribution functions, and against every dirty column."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fettle.core.errors import MonitorError, UsageError
from fettle.monitor.drift.ks import KolmogorovSmirnov

VALUES = st.floats(-3, 3).map(lambda value: round(value, 1)) | st.sampled_from([math.nan, math.inf, -math.inf])
SAMPLES = st.lists(VALUES, min_size=1, max_size=30)


def largest_gap(reference: list[float], current: list[float]) -> float:
    """At every value, count who is at or below it; NaN is above everything."""

    def share(sample: list[float], limit: float) -> float:
        return sum(not math.isnan(value) and value <= limit for value in sample) / len(sample)

    limits = [value for value in [*reference, *current] if not math.isnan(value)]
    return max((abs(share(reference, limit) - share(current, limit)) for limit in limits), default=0.0)


@given(reference=SAMPLES, current=SAMPLES)
def test_effect_is_the_largest_gap(reference, current):
    seen = KolmogorovSmirnov().compare(np.array(reference), np.array(current))
    assert seen.effect == pytest.approx(largest_gap(reference, current), abs=1e-12)
    assert seen.statistic == seen.effect


@given(reference=SAMPLES, current=SAMPLES)
def test_both_sides_are_alike(reference, current):
    one = KolmogorovSmirnov().compare(np.array(reference), np.array(current))
    other = KolmogorovSmirnov().compare(np.array(current), np.array(reference))
    assert one.effect == pytest.approx(other.effect)
    assert one.p_value == pytest.approx(other.p_value)


@given(sample=SAMPLES)
def test_a_sample_does_not_differ_from_itself(sample):
    seen = KolmogorovSmirnov().compare(np.array(sample), np.array(sample))
    assert (seen.effect, seen.p_value) == (0.0, pytest.approx(1.0))


@pytest.mark.parametrize(("n", "m"), [(5, 3), (8, 8), (12, 7)])
def test_p_value_against_every_arrangement(n, m):
    """Without ties all orders of n + m values are equally likely: count those with as large a gap."""
    gaps = []
    for chosen in combinations(range(n + m), m):
        current = set(chosen)
        gap = below = above = 0.0
        for value in range(n + m):
            below += (value not in current) / n
            above += (value in current) / m
            gap = max(gap, abs(below - above))
        gaps.append(gap)
    for chosen in (range(m), range(n, n + m), range(0, 2 * m, 2)):
        current = np.array(sorted(chosen), dtype=float)
        reference = np.array([value for value in range(n + m) if value not in set(chosen)], dtype=float)
        seen = KolmogorovSmirnov().compare(reference, current)
        expected = sum(gap >= seen.effect - 1e-9 for gap in gaps) / len(gaps)
        assert seen.p_value == pytest.approx(expected, abs=0.1 if expected > 0.3 else 1e-9)


def test_p_value_is_smooth_where_the_method_changes(rng):
    """At 100 rows the exact distribution gives way to the approximation."""
    reference = np.arange(5000) / 5000
    small, large = ((np.arange(m) + 0.5) / m * 0.8 + 0.2 for m in (99, 100))
    before, after = (KolmogorovSmirnov().compare(reference, current).p_value for current in (small, large))
    assert after == pytest.approx(before, rel=0.15)


def test_no_pair_of_small_sizes_is_warned_about(rng):
    """Scipy's exact distribution gives up with a warning for some sizes and gaps."""
    for _ in range(300):
        n, m = int(10 ** rng.uniform(0, 4)), int(rng.integers(1, 100))
        seen = KolmogorovSmirnov().compare(np.arange(n), np.linspace(n * rng.random(), n, m))
        assert 0 <= seen.p_value <= 1


@pytest.mark.parametrize("size", [20_000, 150_000])
def test_large_samples_are_neither_slow_nor_warned_about(rng, size):
    seen = KolmogorovSmirnov().compare(rng.normal(size=size), rng.normal(0.02, size=size))
    assert 0 <= seen.p_value <= 1
    assert seen.effect < 0.05


def test_ties_never_alarm_more_often(rng):
    """Reference and window are coin flips: p must be at least what a test for shares says, and mostly larger."""
    p = [KolmogorovSmirnov().compare(rng.integers(0, 2, 300), rng.integers(0, 2, 80)).p_value for _ in range(300)]
    assert np.mean(np.array(p) <= 0.05) <= 0.05


def test_a_rise_of_missing_values_is_an_effect_of_that_size(rng):
    reference, current = rng.normal(size=1000), rng.normal(size=1000)
    current[:300] = np.nan
    assert KolmogorovSmirnov().compare(reference, current).effect >= 0.3


def test_null_mean_is_what_is_seen_without_drift(rng):
    seen = [KolmogorovSmirnov().compare(rng.normal(size=400), rng.normal(size=200)) for _ in range(200)]
    assert np.mean([each.effect for each in seen]) == pytest.approx(seen[0].null_mean, rel=0.08)


@pytest.mark.parametrize(("alpha", "power"), [(0.05, 0.8), (0.001, 0.8), (0.001, 0.95)])
def test_the_needed_window_keeps_its_promise(rng, alpha, power):
    """A mixture that moves exactly D = 0.2 of the rows is rejected at least as often as promised."""
    needed = KolmogorovSmirnov().needed(1000, alpha=alpha, power=power)
    rejected = 0
    for _ in range(300):
        moved = rng.random(needed) < 0.2
        current = np.where(moved, 5.0, 0.0) + rng.normal(size=needed)
        reference = rng.normal(size=1000)
        # Between the two normals the gap of the distribution functions is 0.2.
        rejected += KolmogorovSmirnov().compare(reference, current).p_value <= alpha
    assert rejected / 300 >= power - 3 * math.sqrt(power * (1 - power) / 300)


def test_detectable_is_the_critical_value_and_a_margin():
    found = KolmogorovSmirnov().detectable(500, 500, alpha=0.05, power=0.5)
    assert found == pytest.approx(1.358 * math.sqrt(2 / 500), abs=1e-4)
    more = KolmogorovSmirnov().detectable(500, 500, alpha=0.05, power=0.8)
    assert more == pytest.approx(found + stats.norm.ppf(0.8) / 2 * math.sqrt(2 / 500))


@pytest.mark.parametrize(("n", "m"), [(0, 100), (100, 0), (1, 1)])
def test_nothing_is_detectable_in_nothing(n, m):
    assert KolmogorovSmirnov().detectable(n, m, alpha=0.001, power=0.8) == math.inf


def test_a_reference_may_be_too_small_for_any_window():
    assert KolmogorovSmirnov().needed(20, alpha=0.001, power=0.8) is None
    assert KolmogorovSmirnov().needed(20, alpha=0.999, power=0.01) == 1


@pytest.mark.parametrize("minimum", [0.0, -0.1, math.nan, math.inf])
def test_a_minimum_that_means_nothing_is_refused(minimum):
    with pytest.raises(UsageError, match="minimum effect must be finite and above 0"):
        KolmogorovSmirnov(minimum=minimum)


@pytest.mark.parametrize("sample", [np.zeros((3, 2)), np.array(["a", "b"]), np.array([1j]), np.array([None, 1.0])])
def test_what_is_no_column_of_numbers_is_refused(sample):
    with pytest.raises(MonitorError, match="one column of numbers"):
        KolmogorovSmirnov().compare(np.zeros(5), sample)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "float32"])
def test_any_number_type(dtype):
    sample = np.arange(50).astype(dtype)
    assert KolmogorovSmirnov().compare(sample, sample).effect == 0.0
