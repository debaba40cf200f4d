from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.compress.quantize.calibrate._base import Observer
from fettle.compress.quantize.calibrate.histogram_mse import HistogramMSE
from fettle.compress.quantize.calibrate.min_max import MinMax
from fettle.core import plugins
from fettle.core.errors import DataError

FOUND = plugins.installed("fettle.compress.quantize.calibrate", Observer)
every = pytest.mark.parametrize("observer", FOUND.values(), ids=FOUND)


def see(cls, *batches):
    observer = cls()
    for batch in batches:
        observer.update(torch.as_tensor(batch, dtype=torch.float32))
    return observer


def quantization_error(values, low, high):
    """The definition, on all values at once: mean square of x - q(x)."""
    scale = (high - low) / 255
    zero = torch.round(torch.tensor(-low / scale, dtype=torch.float64))
    steps = (torch.round(values.double() / scale) + zero).clamp(0, 255)
    return ((steps - zero) * scale - values.double()).square().mean().item()


def best_error(values):
    """Brute force over both ends."""
    low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
    shares = torch.linspace(0.3, 1.0, 36).tolist()
    lows = [low * share for share in shares] if low < 0 else [0.0]
    highs = [high * share for share in shares] if high > 0 else [0.0]
    return min(quantization_error(values, left, right) for left in lows for right in highs)


DRAWS = {
    "normal": lambda g: torch.randn(4000, generator=g),
    "relu": lambda g: torch.randn(4000, generator=g).relu(),
    "negative": lambda g: -torch.randn(4000, generator=g).abs() - 1,
    "heavy tail": lambda g: torch.randn(4000, generator=g) ** 5,
    "outlier": lambda g: torch.cat([torch.randn(4000, generator=g), torch.tensor([100.0])]),
    "uniform": lambda g: torch.rand(4000, generator=g) * 7 - 2,
    "two values": lambda g: torch.randint(0, 2, (4000,), generator=g) * 3.0 - 1,
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_histogram_mse_is_as_good_as_brute_force(draw, generator):
    values = draw(generator)
    low, high = see(HistogramMSE, *values.split(100)).range()
    full = quantization_error(values, min(values.min().item(), 0), max(values.max().item(), 0))
    assert quantization_error(values, low, high) <= max(best_error(values) * 1.1, 1e-12) + (full * 1e-3)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_split_into_batches_hardly_matters(draw, size, generator):
    values = draw(generator)[:1500]
    low, high = see(HistogramMSE, values).range()
    found = see(HistogramMSE, *values.split(size)).range()
    width = values.max() - values.min()
    # Neighboring candidates lie 2 percent of an end apart, and a bin is a 2048th of up to 4 times the range.
    assert abs(found[0] - low) <= abs(low) * 0.08 + width / 256
    assert abs(found[1] - high) <= abs(high) * 0.08 + width / 256


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8), min_size=1, max_size=12))
def test_no_value_is_lost(batches):
    observer = see(HistogramMSE, *batches)
    assert observer._counts.sum().item() == sum(len(batch) for batch in batches)
    low, high = observer.range()
    assert min(0.0, min(map(min, batches))) <= low <= 0.0 <= high <= max(0.0, max(map(max, batches)))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8), min_size=1, max_size=12))
def test_min_max_is_the_smallest_and_largest(batches):
    flat = [value for batch in batches for value in batch]
    assert see(MinMax, *batches).range() == (min(0.0, *flat), max(0.0, *flat))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ([0.0, 1e-6], [-1e6, 1e6]),
        ([0.0, 1e-30], [1e30]),
        ([1.0, 1.0 + 1e-6], [1e9]),
        ([0.0, 1e-44], [1.0]),
        ([-1e-40, 0.0], [3e38]),
        ([0.0, 1e-6], [-3e38]),
        ([1e6, 1e6], [1e-6]),
        ([-3e38], [3e38]),
        ([1e8, 1e8 + 8], [1e8 + 16, 0.0]),
    ],
)
@every
def test_a_range_that_explodes_loses_nothing(observer, first, then):
    seen = see(observer, first, then, first)
    low, high = seen.range()
    assert low <= 0.0 <= high
    assert low >= min(*first, *then, 0.0) * (1 + 1e-6)
    assert high <= max(*first, *then, 0.0) * (1 + 1e-6)
    if observer is HistogramMSE:
        assert seen._counts.sum().item() == 2 * len(first) + len(then)


@every
@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-40, 3e38])
def test_a_constant_is_covered(observer, value):
    low, high = see(observer, [value] * 5, [value]).range()
    assert low == pytest.approx(min(value, 0.0))
    assert high == pytest.approx(max(value, 0.0))


@every
def test_one_sided_values_keep_the_range_at_zero(observer, generator):
    values = torch.rand(1000, generator=generator)
    assert see(observer, values).range()[0] == 0.0
    assert see(observer, -values).range()[1] == 0.0
    low, _ = see(observer, values + 10).range()
    assert low == 0.0


@every
def test_nothing_seen_is_an_error(observer):
    for seen in (see(observer), see(observer, [])):
        with pytest.raises(DataError, match="saw no value"):
            seen.range()


@every
def test_an_empty_batch_between_others_changes_nothing(observer):
    assert see(observer, [1.0, 2.0], [], [3.0]).range() == see(observer, [1.0, 2.0], [3.0]).range()


@every
def test_the_values_are_left_as_they_were(observer, generator):
    values = torch.randn(50, generator=generator)
    before = values.clone()
    see(observer).update(values)
    assert torch.equal(values, before)


def test_the_state_does_not_grow(generator):
    observer = HistogramMSE()
    size = observer._counts.numel()
    for power in range(30):
        observer.update(torch.randn(10, generator=generator) * 2.0**power)
    assert observer._counts.numel() == size == 2048


def test_one_outlier_is_clipped_only_by_the_histogram(generator):
    values = torch.cat([torch.randn(20_000, generator=generator), torch.tensor([40.0])])
    assert see(MinMax, values).range()[1] == 40.0
    assert see(HistogramMSE, values).range()[1] < 39.5
