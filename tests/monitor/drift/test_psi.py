"""PSI against the sum by hand, its bins against the columns that break others, its p-value against simulation."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.errors import MonitorError, UsageError
from fettle.monitor.drift.psi import PopulationStability, count, cut, stability

VALUES = st.integers(-5, 5).map(float) | st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf])
SAMPLES = st.lists(VALUES, max_size=80).map(np.array)


def psi_by_hand(before: list[int], after: list[int]) -> float:
    total = 0.0
    for reference, window in zip(before, after, strict=True):
        p = (reference + 0.5) / (sum(before) + 0.5 * len(before))
        q = (window + 0.5) / (sum(after) + 0.5 * len(after))
        total += (q - p) * math.log(q / p)
    return total


@given(counts=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), min_size=1, max_size=12))
def test_stability_is_the_sum_by_hand(counts):
    before, after = map(list, zip(*counts, strict=True))
    assert stability(np.array(before), np.array(after)) == pytest.approx(psi_by_hand(before, after))


def test_compare_is_the_sum_by_hand_over_deciles(rng):
    reference, current = rng.normal(size=1000), rng.normal(0.5, size=300)
    limits = [-math.inf, *sorted(reference)[100:1000:100], math.inf]

    def histogram(sample) -> list[int]:
        return [sum(low <= value < high for value in sample) for low, high in pairwise(limits)]

    seen = PopulationStability().compare(reference, current)
    assert seen.statistic == pytest.approx(psi_by_hand(histogram(reference), histogram(current)))
    assert seen.null_mean == pytest.approx(9 * (1 / 1000 + 1 / 300))
    assert seen.effect == pytest.approx(seen.statistic - seen.null_mean)


@given(reference=SAMPLES, current=SAMPLES)
def test_no_row_is_ever_left_out(reference, current):
    edges = cut(reference.astype(float), 10)
    assert (np.diff(edges) > 0).all()
    assert not np.isnan(edges).any()
    for sample in (reference, current):
        counts = count(sample.astype(float), edges)
        assert counts.sum() == len(sample)
        assert len(counts) == len(edges) + 2


@given(reference=SAMPLES, current=SAMPLES)
def test_every_pair_of_samples_has_an_answer(reference, current):
    seen = PopulationStability().compare(reference.astype(float), current.astype(float))
    assert 0 <= seen.p_value <= 1
    assert 0 <= seen.effect < math.inf
    assert math.isfinite(seen.statistic)


@given(sample=SAMPLES)
def test_a_sample_does_not_differ_from_itself(sample):
    seen = PopulationStability().compare(sample.astype(float), sample.astype(float))
    assert seen.effect == 0.0
    assert seen.p_value > 0.4


@given(shift=st.floats(-100, 100), scale=st.floats(0.01, 100))
def test_scale_and_origin_do_not_matter(shift, scale):
    rng = np.random.default_rng(3)
    reference, current = rng.normal(size=200), rng.normal(0.3, size=100)
    plain = PopulationStability().compare(reference, current)
    moved = PopulationStability().compare(reference * scale + shift, current * scale + shift)
    assert moved.statistic == pytest.approx(plain.statistic)


def test_a_heavy_value_has_a_bin_of_its_own(rng):
    """Seven tenths of a column were -1 and other systems saw drift in it (Kibana, PR 168757)."""

    def draw(n: int):
        return np.where(rng.random(n) < 0.7, -1.0, rng.normal(5.0, size=n))

    edges = cut(draw(2000), 10)
    assert -1.0 in edges
    assert np.nextafter(-1.0, np.inf) in edges
    p = [PopulationStability().compare(draw(2000), draw(300)).p_value for _ in range(200)]
    assert np.mean(np.array(p) <= 0.05) <= 0.1
    moved = np.where(rng.random(300) < 0.4, -1.0, rng.normal(5.0, size=300))
    assert PopulationStability().compare(draw(2000), moved).p_value < 1e-6


def test_a_neighbor_of_a_heavy_value_is_another_value():
    reference = np.array([0.0] * 100 + [1.0] * 100)
    seen = PopulationStability().compare(reference, np.full(100, 1e-300))
    assert seen.p_value < 1e-6


@pytest.mark.parametrize("bins", [2, 3, 10, 50])
def test_continuous_bins_are_even(rng, bins):
    reference = rng.normal(size=1000)
    counts = count(reference, cut(reference, bins))[:-1]
    assert len(counts) == bins
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (4, 1), (9, 1), (10, 2), (25, 5), (49, 9), (50, 10), (500, 10)])
def test_a_small_reference_has_fewer_bins(rng, rows, expected):
    assert len(cut(rng.normal(size=rows), 10)) + 1 == expected


@pytest.mark.parametrize(("new", "rejected"), [(0, False), (1, False), (10, True)])
def test_a_constant_reference_counts_new_values(new, rejected):
    reference = np.zeros(1000)
    current = np.append(np.zeros(100 - new), np.arange(1.0, new + 1))
    seen = PopulationStability().compare(reference, current)
    assert (seen.p_value < 1e-6) == rejected
    # Chance that all new values are in the window: m of the n + m rows, drawn without replacement.
    expected = math.prod((100 - i) / (1100 - i) for i in range(new))
    assert seen.p_value == pytest.approx(min(1.0, 2 * expected))


def test_an_empty_bin_costs_little():
    """A bin of 1 % that is empty in the window: 7.04 elsewhere with a floor of the smallest float."""
    assert stability(np.array([10, 990]), np.array([0, 1000])) < 0.05


def test_values_beyond_the_reference_are_counted(rng):
    reference = rng.uniform(size=1000)
    current = np.concatenate([rng.uniform(size=50), np.full(50, 1e6)])
    assert PopulationStability().compare(reference, current).effect > 0.9


def test_an_outlier_in_the_window_does_not_hide_a_shift(rng):
    """Edges over reference and window together put nearly everything in one bin."""
    reference, current = rng.normal(size=20_000), np.append(rng.normal(1.0, size=20_000), 1000.0)
    assert PopulationStability().compare(reference, current).effect > 0.8


@pytest.mark.parametrize(("n", "m"), [(360, 20), (360, 50), (1000, 200), (5000, 1000)])
def test_without_drift_the_null_mean_and_the_level_hold(rng, n, m):
    seen = [PopulationStability().compare(rng.normal(size=n), rng.normal(size=m)) for _ in range(400)]
    assert np.mean([each.statistic for each in seen]) <= seen[0].null_mean * 1.1
    assert np.mean([each.p_value <= 0.05 for each in seen]) <= 0.085


def test_a_fixed_level_alarms_on_small_windows_and_ours_does_not(rng):
    """With 50 rows PSI exceeds 0.1 in most windows without any drift."""
    seen = [PopulationStability().compare(rng.normal(size=5000), rng.normal(size=50)) for _ in range(200)]
    assert np.mean([each.statistic > 0.1 for each in seen]) > 0.7
    assert np.mean([each.p_value <= 0.001 for each in seen]) <= 0.02


@pytest.mark.parametrize(("shift", "note"), [(0.0, ""), (0.4, "moderate"), (1.0, "large")])
def test_levels(shift, note):
    rng = np.random.default_rng(0)
    current = rng.normal(shift, size=20_000)
    assert PopulationStability().compare(rng.normal(size=20_000), current).note == note


def test_the_needed_window_keeps_its_promise(rng):
    """A window whose index is 0.2 is rejected in eight of ten cases."""
    needed = PopulationStability().needed(1000, alpha=0.001, power=0.8)
    shift = 0.2**0.5  # a normal moved by s has an index of about s squared over many bins, a little less over ten
    rejected = [
        PopulationStability().compare(rng.normal(size=1000), rng.normal(shift, size=needed)).p_value <= 0.001
        for _ in range(300)
    ]
    assert np.mean(rejected) >= 0.7


def test_a_reference_that_cannot_fill_the_bins_is_too_small():
    assert PopulationStability().needed(49, alpha=0.05, power=0.8) is None
    assert PopulationStability(bins=2).detectable(9, 10**6, alpha=0.05, power=0.8) == math.inf


@pytest.mark.parametrize("bins", [1, 0, -3])
def test_too_few_bins_are_refused(bins):
    with pytest.raises(UsageError, match="at least 2 bins"):
        PopulationStability(bins=bins)


def test_what_is_no_column_of_numbers_is_refused():
    with pytest.raises(MonitorError, match="one column of numbers"):
        PopulationStability().compare(np.zeros(5), np.array(["a"]))


def test_a_bad_minimum_is_refused():
    with pytest.raises(UsageError):
        PopulationStability(minimum=0)
