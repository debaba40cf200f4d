from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.compress.quantize.calibrate import _histogram
from fettle.compress.quantize.calibrate._histogram import Histogram
from fettle.core.errors import DataError

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
BATCHES = st.lists(st.lists(FLOATS, min_size=0, max_size=8), min_size=1, max_size=12)


def counted(batches, bins=2048):
    histogram = Histogram(bins)
    for batch in batches:
        histogram.add(torch.as_tensor(batch, dtype=torch.float32))
    return histogram


def place_slowly(value, histogram):
    """The definition: which of the equal bins holds the value."""
    return min(max(math.floor((value - histogram.low) / histogram.width), 0), histogram.bins - 1)


def assert_each_is_where_it_belongs(histogram, values):
    """No value further than a rounding error outside its bin: walk bins and sorted values together."""
    slack = histogram.width / 32 + 1e-12 * max(abs(histogram.low), histogram.width * histogram.bins)
    ordered = iter(sorted(float(value) for value in values))
    for place in histogram.counts.nonzero().flatten().tolist():
        left = histogram.low + place * histogram.width
        for _ in range(int(histogram.counts[place])):
            value = next(ordered)
            assert left - slack <= value <= left + histogram.width + slack
    assert next(ordered, None) is None


@settings(max_examples=150, deadline=None)
@given(BATCHES)
def test_every_value_is_counted_once_where_it_belongs(batches):
    histogram = counted(batches)
    values = [value for batch in batches for value in batch]
    assert int(histogram.counts.sum()) == len(values)
    if values:
        assert (histogram.smallest, histogram.largest) == (min(values), max(values))
    if histogram.width > 0.0:
        assert_each_is_where_it_belongs(histogram, values)


@settings(max_examples=100, deadline=None)
@given(BATCHES, st.sampled_from([2, 4, 64, 8192]))
def test_the_range_is_at_most_four_times_what_was_seen(batches, bins):
    histogram = counted(batches, bins)
    values = [value for batch in batches for value in batch]
    if values and min(values) < max(values):
        span = max(values) - min(values)
        assert span * (1 - 1e-12) <= histogram.width * bins <= 4 * span * (1 + 1e-12)


@pytest.mark.parametrize("bins", [2, 16, 2048, 8192])
@pytest.mark.parametrize("scale", [1e-38, 1e-6, 1.0, 1e6, 1e35])
@pytest.mark.parametrize("offset", [0.0, 0.5, -3.0, 40.0, 1000.0])
def test_one_large_batch_agrees_with_numpy(bins, scale, offset, generator):
    values = (torch.randn(20_000, generator=generator) + offset) * scale
    histogram = counted([values], bins)
    low, high = values.min().item(), values.max().item()
    expected, _ = np.histogram(values.double().numpy(), bins=bins, range=(low, high))
    assert int(histogram.counts.sum()) == 20_000
    # A value on an edge may round to either side: the running counts show by how many.
    moved = np.abs(histogram.counts.numpy().cumsum() - expected.cumsum())
    assert moved.max() <= 8


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 1e-44, 1e-45],
        [-3e38, 0.0, 3e38],
        [1e8, 1e8 + 8, 1e8 + 16],
        [16777216.0, 16777218.0],
        [-1e-40, 1e-40],
        [1e30, 1e30 + 1e24],
    ],
)
def test_ranges_that_float32_cannot_divide_are_placed_exactly(values):
    histogram = counted([values, values])
    expected = torch.zeros(2048, dtype=torch.int64)
    for value in torch.tensor(values, dtype=torch.float32).tolist():
        expected[place_slowly(value, histogram)] += 2
    assert torch.equal(histogram.counts, expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 400), min_size=1, max_size=8))
def test_the_split_does_not_matter_where_the_first_batch_spans_all(seed, sizes):
    values = torch.randn(400, generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor([values.min(), values.max()])
    edges = sorted({min(size, 400) for size in sizes})
    parts = torch.tensor_split(values, edges)
    assert torch.equal(counted([ends, values]).counts, counted([ends, *parts]).counts)


def test_merging_keeps_the_coarser_histogram_of_all(generator):
    values = torch.rand(5000, generator=generator)
    fine, then = values * 0.999, torch.tensor([0.0, 7.9])
    merged = counted([torch.tensor([0.0, 1.0]), fine, then])
    direct = counted([torch.tensor([0.0, 8.0]), torch.tensor([0.0, 1.0]), fine, then])
    assert merged.width == direct.width
    # The 8.0 of the direct one is the only difference; a value on an edge may have rounded either way.
    assert (merged.counts - direct.counts).abs().sum() <= 1 + 2 * 8


@pytest.mark.parametrize("toward", [1.0, -1.0])
def test_the_range_doubles_toward_the_value_that_left_it(toward):
    histogram = counted([[0.0, toward]])
    histogram.add(torch.tensor([5.0 * toward]))
    low, high = histogram.low, histogram.low + histogram.width * histogram.bins
    assert (low, high) == ((0.0, 8.0) if toward > 0 else (-8.0, 0.0))


def test_chunks_do_not_show(monkeypatch, generator):
    values = torch.randn(10_000, generator=generator)
    whole = counted([values]).counts
    monkeypatch.setattr(_histogram, "_CHUNK", 7)
    assert torch.equal(counted([values]).counts, whole)


def test_a_refused_batch_leaves_the_histogram_as_it_was(generator):
    histogram = counted([torch.randn(100, generator=generator)])
    before = (histogram.counts.clone(), histogram.low, histogram.width, histogram.smallest, histogram.largest)
    with pytest.raises(DataError):
        histogram.add(torch.tensor([1e9, float("nan")]))
    after = (histogram.low, histogram.width, histogram.smallest, histogram.largest)
    assert torch.equal(histogram.counts, before[0])
    assert after == before[1:]


def test_counts_are_exact_integers():
    histogram = counted([[0.0, 1.0]])
    histogram.counts[0] += 2**53  # a double could not count on from here
    histogram.add(torch.tensor([0.0]))
    assert int(histogram.counts[0]) == 2**53 + 2


def test_centers_are_the_middles():
    histogram = counted([[-1.0, 3.0]], bins=4)
    assert histogram.centers.tolist() == [-0.5, 0.5, 1.5, 2.5]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_values_on_a_gpu_are_counted_alike(generator):
    values = torch.randn(300_000, generator=generator)
    there = Histogram()
    there.add(values.cuda())
    assert int((there.counts - counted([values]).counts).abs().sum()) <= 16
    assert there.counts.device.type == "cpu"
