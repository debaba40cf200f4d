from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.compress.quantize.calibrate.percentile import Percentile
from fettle.core.errors import UsageError

PERCENTILES = ["50.1", "75", "90", "99", "99.9", "99.99", "99.999", "100"]


def cut_slowly(values, percentile):
    """The definition, on all values at once, sorted, the share in exact fractions."""
    ordered = sorted(values.tolist())
    cut = int((100 - Fraction(percentile)) / 100 * len(ordered))
    kept = ordered[cut : len(ordered) - cut]
    return min(kept[0], 0.0), max(kept[-1], 0.0)


DRAWS = {
    "normal": lambda g, n: torch.randn(n, generator=g),
    "relu": lambda g, n: torch.randn(n, generator=g).relu(),
    "negative": lambda g, n: -torch.rand(n, generator=g) - 2,
    "heavy tail": lambda g, n: torch.randn(n, generator=g) ** 5,
    "two values": lambda g, n: torch.randint(0, 2, (n,), generator=g) * 3.0 - 1,
    "far away": lambda g, n: torch.randn(n, generator=g) + 1e6,
    "tiny": lambda g, n: torch.randn(n, generator=g) * 1e-30,
}
drawn = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


@drawn
@pytest.mark.parametrize("percentile", PERCENTILES)
@pytest.mark.parametrize("count", [1, 2, 9, 1000, 20_000])
@pytest.mark.parametrize("batches", [1, 7])
def test_it_is_the_sorted_data_within_a_bin(see, draw, percentile, count, batches, generator):
    values = draw(generator, count)
    observer = see(Percentile(percentile=float(percentile)), *values.chunk(batches))
    low, high = cut_slowly(values, percentile)
    slack = observer._histogram.width * (1 + 1 / 32)
    # Never narrower than asked, but for the rounding of a value's place; wider by at most a bin.
    assert low - slack <= observer.range()[0] <= low + slack / 32
    assert high - slack / 32 <= observer.range()[1] <= high + slack


@settings(max_examples=80, deadline=None)
@given(
    batches=st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), min_size=1, max_size=10),
    percentile=st.sampled_from(PERCENTILES),
)
def test_any_batches_agree_with_the_sorted_data(see, batches, percentile):
    values = torch.tensor([value for batch in batches for value in batch], dtype=torch.float64)
    observer = see(Percentile(percentile=float(percentile)), *batches)
    low, high = cut_slowly(values, percentile)
    slack = observer._histogram.width * (1 + 1 / 32) + 1e-9
    assert observer.range() == (pytest.approx(low, abs=slack), pytest.approx(high, abs=slack))


def test_100_is_min_max(see, generator):
    values = torch.randn(5000, generator=generator)
    assert see(Percentile(percentile=100.0), *values.split(99)).range() == (values.min().item(), values.max().item())


@pytest.mark.parametrize("percentile", ["99.9", "99.99", "99.8", "97.3"])
def test_the_count_cut_off_is_exact(see, percentile):
    """On the numbers 0 to 9999 the value at the end says how many lie beyond it."""
    values = torch.arange(10_000, dtype=torch.float32)
    _, high = see(Percentile(percentile=float(percentile)), values).range()
    assert 0 <= high - cut_slowly(values, percentile)[1] <= 10_000 / 8192 * 1.1


def test_few_values_lose_none(see, generator):
    values = torch.randn(9_999, generator=generator)
    assert see(Percentile(), values).range() == (values.min().item(), values.max().item())


def test_a_few_outliers_are_cut_off_and_one_too_many_is_not(see, generator):
    values = torch.rand(20_000, generator=generator)
    for outliers, clipped in ((1, True), (2, True), (3, False)):
        seen = torch.cat([values, torch.full((outliers,), 50.0)])
        assert (see(Percentile(), seen).range()[1] < 2.0) is clipped


@pytest.mark.parametrize("percentile", [50.0, 0.01, -1.0, 100.1, float("nan")])
def test_an_impossible_percentile_is_refused(percentile):
    with pytest.raises(UsageError, match="percentile must be above 50"):
        Percentile(percentile=percentile)
