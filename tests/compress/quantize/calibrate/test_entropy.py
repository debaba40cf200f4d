from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.compress.quantize.calibrate._histogram import Histogram
from fettle.compress.quantize.calibrate.entropy import Entropy, _without_spike, divergence
from fettle.compress.quantize.calibrate.min_max import MinMax

SMOOTHING = 1e-4


def divergence_slowly(centers, counts, low, high, levels):
    """The definition, bin by bin in plain Python."""
    inside = [i for i, center in enumerate(centers) if low <= center < high]
    mass = sum(counts[i] for i in inside)
    if mass == 0:
        return math.inf
    scale = (high - low) / (levels - 1)
    level = {i: round((centers[i] - low) / scale) for i in inside}
    p = {i: counts[i] for i in inside}
    p[inside[0]] += sum(counts[: inside[0]])
    p[inside[-1]] += sum(counts[inside[-1] + 1 :])
    total = sum(p.values())
    answer = 0.0
    for i in inside:
        if p[i] == 0:
            continue
        alike = [j for j in inside if level[j] == level[i]]
        spread = sum(counts[j] for j in alike) / sum(counts[j] > 0 for j in alike) if counts[i] else 0.0
        q = (1 - SMOOTHING) * spread / mass + SMOOTHING / len(inside)
        answer += p[i] / total * math.log(p[i] / total / q)
    return answer


HISTOGRAMS = st.lists(st.one_of(st.just(0), st.integers(0, 50)), min_size=4, max_size=48).filter(any)


@settings(max_examples=200, deadline=None)
@given(
    counts=HISTOGRAMS,
    levels=st.sampled_from([2, 3, 4, 8, 16]),
    low=st.integers(-30, 0),
    high=st.integers(1, 60),
    first=st.integers(-30, 10),
)
def test_the_divergence_is_the_definition(counts, levels, low, high, first):
    # Ends on the edges of bins, off every tie of the rounding between levels.
    centers = [first + 0.5 + i for i in range(len(counts))]
    ends = (low - 0.0371, high + 0.0173)
    expected = divergence_slowly(centers, counts, *ends, levels)
    found = divergence(torch.tensor(centers, dtype=torch.float64), torch.tensor(counts), *ends, levels=levels)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(counts=HISTOGRAMS, levels=st.sampled_from([2, 4, 16]), share=st.floats(0.1, 1.0))
def test_the_divergence_is_never_negative(counts, levels, share):
    centers = torch.arange(len(counts), dtype=torch.float64) + 0.5
    # Q is a distribution only up to the smoothing, which adds where the bins are empty.
    assert divergence(centers, torch.tensor(counts), 0.0, share * len(counts), levels=levels) >= -2 * SMOOTHING


def test_a_level_for_each_bin_loses_only_the_smoothing():
    counts = torch.tensor([5, 1, 9, 0, 4])
    centers = torch.arange(5, dtype=torch.float64) + 0.5
    assert divergence(centers, counts, 0.0, 5.0, levels=50) == pytest.approx(0.0, abs=2 * SMOOTHING)


DRAWS = {
    "normal": lambda g: torch.randn(30_000, generator=g),
    "relu": lambda g: torch.randn(30_000, generator=g).relu(),
    "negative": lambda g: -torch.randn(30_000, generator=g).abs(),
    "heavy tail": lambda g: torch.randn(30_000, generator=g) ** 3,
    "outlier": lambda g: torch.cat([torch.randn(30_000, generator=g), torch.tensor([100.0])]),
    "lopsided": lambda g: torch.randn(30_000, generator=g).clamp_min(-0.3),
}
drawn = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


def search_slowly(observer, levels):
    """Every share of both ends together, then of each alone, with the slow divergence on coarse lists."""
    seen = observer._histogram
    centers = seen.centers.numpy()
    counts = _without_spike(seen).numpy()
    low, high = min(seen.smallest, 0.0), max(seen.largest, 0.0)
    shares = np.linspace(1.0, levels * seen.width / (high - low), 128)

    def best(ranges):
        costs = [divergence_by_mask(centers, counts, *ends, levels) for ends in ranges]
        return ranges[int(np.argmin(costs))]

    low, high = best([(low * share, high * share) for share in shares])
    if low < 0 < high:
        low, high = best([(low * share, high) for share in shares])
        low, high = best([(low, high * share) for share in shares])
    return low, high


def divergence_by_mask(centers, counts, low, high, levels):
    """The definition again, level by level in numpy: the plain one takes minutes on 4096 bins."""
    inside = (centers >= low) & (centers < high)
    kept = counts[inside].astype(float)
    if kept.sum() == 0:
        return math.inf
    level = np.rint((centers[inside] - low) * ((levels - 1) / (high - low)))
    q = np.zeros_like(kept)
    for value in np.unique(level):
        alike = (level == value) & (kept > 0)
        if alike.any():
            q[alike] = kept[alike].sum() / alike.sum()
    q = (1 - SMOOTHING) * q / kept.sum() + SMOOTHING / len(kept)
    p = kept.copy()
    outside = np.flatnonzero(inside)
    p[0] += counts[: outside[0]].sum()
    p[-1] += counts[outside[-1] + 1 :].sum()
    p /= p.sum()
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())


@drawn
@pytest.mark.parametrize("levels", [16, 64])
def test_the_range_is_the_best_of_all_candidates(see, draw, levels, generator):
    observer = see(Entropy(levels), *draw(generator).split(7000))
    assert observer.range() == pytest.approx(search_slowly(observer, levels), rel=1e-9)


@drawn
def test_it_is_never_worse_than_the_whole_range(see, draw, generator):
    observer = see(Entropy(), draw(generator))
    seen = observer._histogram
    counts = _without_spike(seen)
    whole = divergence(seen.centers, counts, min(seen.smallest, 0.0), max(seen.largest, 0.0), levels=256)
    assert divergence(seen.centers, counts, *observer.range(), levels=256) <= whole


def test_a_far_outlier_is_clipped_away(see, generator):
    values = torch.cat([torch.randn(50_000, generator=generator), torch.tensor([60.0])])
    low, high = see(Entropy(), values).range()
    assert high < 10.0
    assert low < -2.0
    assert see(MinMax(), values).range()[1] == 60.0


@pytest.mark.parametrize("zeros", [0, 50_000, 1_000_000])
def test_the_spike_of_a_relu_does_not_decide(see, zeros, generator):
    """However many zeros there are, the rest of the values keep their range."""
    values = torch.randn(100_000, generator=generator).abs()
    low, high = see(Entropy(), values, torch.zeros(zeros)).range()
    assert low == 0.0
    assert 3.0 < high < 5.0


def test_uniform_values_are_not_clipped(see, generator):
    values = torch.rand(200_000, generator=generator) * 6 - 2
    low, high = see(Entropy(), values).range()
    assert low == pytest.approx(-2.0, rel=0.02)
    assert high == pytest.approx(4.0, rel=0.02)


@pytest.mark.parametrize("levels", [4096, 8192, 65536])
def test_more_levels_than_bins_keep_the_whole_range(see, levels, generator):
    values = torch.randn(20_000, generator=generator)
    assert see(Entropy(levels), values).range() == (values.min().item(), values.max().item())


@pytest.mark.parametrize("values", [[0.0, 8.0], [-1.0, 1.0], [5.0, 6.0], [-7.0, -6.5, 0.0], [1e8, 1e8 + 8]])
def test_a_few_distinct_values_are_all_kept(see, values):
    low, high = see(Entropy(), values * 50).range()
    assert low == pytest.approx(min(*values, 0.0), rel=0.01)
    assert high == pytest.approx(max(*values, 0.0), rel=0.01)


@drawn
@pytest.mark.parametrize("size", [500, 7000])
def test_the_split_costs_little(see, draw, size, generator):
    """Another split gives other bins; its range is about as good on the bins of the first."""
    values = draw(generator)
    whole, split = see(Entropy(), values), see(Entropy(), *values.split(size))
    seen = whole._histogram
    counts = _without_spike(seen)
    best = divergence(seen.centers, counts, *whole.range(), levels=256)
    found = divergence(seen.centers, counts, *split.range(), levels=256)
    assert found <= best * 1.35 + 0.01


@pytest.mark.parametrize(
    ("low", "counts", "expected"),
    [
        (0.0, [80, 9, 7, 1], [9, 9, 7, 1]),
        (0.0, [3, 9, 7, 1], [3, 9, 7, 1]),
        (-1.5, [4, 80, 9, 1], [4, 9, 9, 1]),
        (-4.0, [1, 7, 9, 80], [1, 7, 9, 80]),
        (-3.5, [1, 7, 9, 80], [1, 7, 9, 9]),
        (1.0, [80, 9, 7, 1], [80, 9, 7, 1]),
        (-9.0, [80, 9, 7, 1], [80, 9, 7, 1]),
    ],
)
def test_the_bin_of_zero_counts_no_more_than_its_neighbor(low, counts, expected):
    """Bins of width 1 from `low`; where none of them holds zero, nothing is cut down."""
    seen = Histogram(4)
    seen.low, seen.width, seen.counts = low, 1.0, torch.tensor(counts)
    assert _without_spike(seen).tolist() == expected
    assert seen.counts.tolist() == counts
