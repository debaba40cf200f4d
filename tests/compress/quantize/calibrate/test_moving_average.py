from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.compress.quantize.calibrate.moving_average import MovingAverage
from fettle.core.errors import UsageError

BATCHES = st.lists(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=6), min_size=1, max_size=15
)


def average_slowly(ends, momentum):
    """The definition: batch t of T weighs m^(T - t)."""
    weights = [momentum ** (len(ends) - 1 - index) for index in range(len(ends))]
    return sum(weight * end for weight, end in zip(weights, ends, strict=True)) / sum(weights)


@settings(max_examples=80, deadline=None)
@given(batches=BATCHES, momentum=st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0]))
def test_it_is_the_weighted_mean_of_the_ends(see, batches, momentum):
    low = average_slowly([min(batch) for batch in batches], momentum)
    high = average_slowly([max(batch) for batch in batches], momentum)
    largest = max(abs(value) for batch in batches for value in batch)
    found = see(MovingAverage(momentum=momentum), *batches).range()
    assert found == pytest.approx((min(low, 0.0), max(high, 0.0)), rel=1e-9, abs=largest * 1e-12)


def test_momentum_zero_is_the_last_batch_and_one_is_the_mean(see):
    batches = [[-1.0, 2.0], [-5.0, 4.0], [-3.0, 9.0]]
    assert see(MovingAverage(momentum=0.0), *batches).range() == (-3.0, 9.0)
    assert see(MovingAverage(momentum=1.0), *batches).range() == (-3.0, 5.0)


def test_a_small_end_is_not_lost_beside_a_large_one_before_it(see):
    assert see(MovingAverage(momentum=0.0), [0.0, 9007200328482816.0], [1.0]).range() == (0.0, 1.0)


def test_an_outlier_in_one_batch_of_fifty_fades(see, generator):
    batches = [torch.randn(500, generator=generator) for _ in range(50)]
    batches[20][0] = 1000.0
    assert see(MovingAverage(), *batches).range()[1] < 10.0


def test_equal_batches_give_their_own_range_from_the_first_on(see):
    observer = MovingAverage()
    for _ in range(30):
        assert see(observer, [-2.0, 3.0]).range() == pytest.approx((-2.0, 3.0), rel=1e-12)


def test_values_on_both_ends_of_float32_do_not_overflow(see):
    low, high = see(MovingAverage(), [-3e38, -3e38], [3e38, 3e38]).range()
    assert low == 0.0 or low > -3e38
    assert 0.0 <= high < 3e38


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_an_impossible_momentum_is_refused(momentum):
    with pytest.raises(UsageError, match="momentum must be 0"):
        MovingAverage(momentum=momentum)
