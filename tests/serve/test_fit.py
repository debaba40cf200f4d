"""The fit of batch times, against a slow reference: weighted least squares over everything that was observed."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fettle.serve.fit import BatchTimes

MEMORY = 0.99

batches = st.tuples(st.integers(1, 64), st.floats(1e-6, 100.0))
histories = st.lists(batches, min_size=1, max_size=40)
sizes = st.lists(st.integers(1, 64), min_size=2, max_size=40).filter(lambda rows: len(set(rows)) > 1)
costs = st.floats(1e-6, 1.0)


def means(history):
    """Rows and seconds of the mean batch; the latest counts most."""
    weights = MEMORY ** np.arange(len(history))[::-1]
    rows, seconds = np.array(history, float).T
    return np.average(rows, weights=weights), np.average(seconds, weights=weights)


def reference(history):
    """Slope and fixed cost, kept within what a batch can cost: neither less than nothing."""
    weights = np.sqrt(MEMORY ** np.arange(len(history))[::-1])
    rows, seconds = np.array(history, float).T
    columns = np.stack([rows, np.ones_like(rows)], axis=1)
    (slope, _), *_ = np.linalg.lstsq(columns * weights[:, None], seconds * weights, rcond=None)
    mean_rows, mean_s = means(history)
    slope = min(max(slope, 0.0), mean_s / mean_rows)
    return slope, mean_s - slope * mean_rows


@settings(deadline=None)
@given(histories)
def test_the_fit_is_weighted_least_squares(history):
    assume(len({rows for rows, _ in history}) > 1)
    times = BatchTimes(history)
    slope, fixed = reference(history)
    mean_rows, mean_s = means(history)
    assert times.per_row_s == pytest.approx(slope, rel=1e-6, abs=1e-6 * mean_s / mean_rows)
    assert times.fixed_s == pytest.approx(fixed, rel=1e-6, abs=1e-6 * mean_s)


@settings(deadline=None)
@given(histories)
def test_no_cost_is_ever_negative(history):
    times = BatchTimes()
    for rows, seconds in history:
        times.observe(rows, seconds)
        assert times.per_row_s >= 0.0
        assert times.fixed_s >= 0.0


@settings(deadline=None)
@given(sizes, costs, st.floats(0.0, 1.0))
def test_a_straight_line_is_found_again(rows, slope, fixed):
    times = BatchTimes((count, slope * count + fixed) for count in rows)
    for count in (1, 7, 64):
        assert times.seconds(count) == pytest.approx(slope * count + fixed, rel=1e-5, abs=1e-5 * fixed)


def test_a_server_that_becomes_slower_is_believed():
    """What was measured long ago fades: the warm-up of an idle machine says nothing of a busy one."""
    times = BatchTimes([(1, 0.003), (8, 0.017), (32, 0.065)])
    for step in range(600):
        rows = 1 + step % 32
        times.observe(rows, 3 * (0.002 * rows + 0.001))
    assert times.per_row_s == pytest.approx(0.006, rel=0.02)
    assert times.fixed_s == pytest.approx(0.003, rel=0.02)


@settings(deadline=None)
@given(st.integers(1, 64), costs, st.floats(0.001, 1.0), st.floats(1.0, 10.0))
def test_batches_of_one_size_leave_the_fixed_cost_as_it_was(size, slope, fixed, slower):
    times = BatchTimes((rows, slope * rows + fixed) for rows in (1, 2, 4, 8, 16, 32, 64))
    for _ in range(2000):  # until nothing is left of the other sizes
        times.observe(size, slope * size + fixed)
    known = times.fixed_s
    assert known == pytest.approx(fixed, rel=1e-3, abs=1e-3 * slope * size)
    for _ in range(50):
        times.observe(size, slower * (slope * size + fixed))
    assert times.fixed_s == pytest.approx(known)
    assert times.seconds(size) >= (slope * size + fixed) * (1 - 1e-9)


def test_batches_of_one_size_that_take_less_than_the_fixed_cost_correct_it():
    times = BatchTimes([(1, 0.0), (1, 0.0)])
    assert (times.per_row_s, times.fixed_s) == (0.0, 0.0)
    times = BatchTimes((rows, 0.001 * rows + 0.5) for rows in (1, 8))
    for _ in range(3000):
        times.observe(4, 0.1)
    assert times.seconds(4) == pytest.approx(0.1, rel=1e-3)
    assert times.per_row_s >= 0.0


@settings(deadline=None)
@given(histories, st.integers(1, 64))
def test_a_prediction_lies_between_the_mean_batch_and_its_share(history, rows):
    """The line goes through the mean batch and rises no faster than through nothing: bounded for any data."""
    mean_rows, mean_s = means(history)
    predicted = BatchTimes(history).seconds(rows)
    share = rows / mean_rows
    assert mean_s * min(1.0, share) * (1 - 1e-6) <= predicted <= mean_s * max(1.0, share) * (1 + 1e-6)


def test_without_any_batch_nothing_is_promised():
    times = BatchTimes()
    assert times.seconds(32) == 0.0
    assert times.largest(32) == 32
    assert times.largest(32, promise_s=0.001) == 32


@settings(deadline=None)
@given(histories, st.integers(1, 128), st.lists(st.floats(1e-6, 1000.0), min_size=2, max_size=5))
def test_the_largest_batch_grows_with_the_promise(history, limit, promises):
    times = BatchTimes(history)
    found = [times.largest(limit, promise_s=promise_s) for promise_s in sorted(promises)]
    found.append(times.largest(limit))
    assert found == sorted(found)
    assert found[0] >= 1
    assert found[-1] <= limit


@settings(deadline=None)
@given(histories, st.integers(1, 128), st.floats(1e-6, 1000.0))
def test_the_largest_batch_ends_within_the_promise_where_one_row_does(history, limit, promise_s):
    times = BatchTimes(history)
    assume(times.per_row_s > 0)
    largest = times.largest(limit, promise_s=promise_s)
    assert largest == 1 or times.seconds(largest) <= promise_s * (1 + 1e-9)


@settings(deadline=None)
@given(st.floats(1e-5, 1e-2), st.floats(0.0, 0.1))
def test_a_larger_batch_than_the_largest_would_gain_little(slope, fixed):
    times = BatchTimes((rows, slope * rows + fixed) for rows in (1, 8, 32))
    largest = times.largest(10**6)
    assert times.fixed_s <= 0.05 * times.seconds(largest) * (1 + 1e-6) + 1e-12


def test_one_disturbed_measurement_does_not_forbid_batches_for_ever():
    """Where the largest batch of the warm-up was held up, the fixed cost seems to be nothing: time must mend that."""

    def truth(rows):
        return 0.00002 * rows + 0.00008

    times = BatchTimes([*((rows, truth(rows)) for rows in (1, 2, 4, 8, 16)), (32, 0.02)])
    for _ in range(5000):  # as many rows wait as a batch may have
        largest = times.largest(32)
        times.observe(largest, truth(largest))
    assert times.largest(32) == 32
