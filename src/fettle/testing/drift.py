"""What every drift test must keep, as checks that raise AssertionError with a sentence.

from fettle.testing.drift import CHECKS

@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_mine_conforms(check):
    check(MyTest())
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from scipy import stats

from fettle.core.signature import Array
from fettle.monitor.drift._base import Comparison, DriftTest

_PAIRS = 400
_REFERENCE_ROWS = 500
# The chance that a test which holds its level fails one rate check.
_BAD_LUCK = 1e-6

_SAMPLERS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "softmax": lambda rng, n: rng.beta(0.05, 0.5, n).astype(np.float32),
    "tied": lambda rng, n: rng.poisson(1.5, n),
    "mostly one value": lambda rng, n: np.where(rng.random(n) < 0.7, -1.0, rng.normal(size=n)),
    "partly NaN": lambda rng, n: np.where(rng.random(n) < 0.2, np.nan, rng.normal(size=n)),
}


def holds_its_level(test: DriftTest) -> None:
    """Without drift, p <= alpha comes no more often than alpha, whatever the distribution and the sizes."""
    rng = np.random.default_rng(0)
    for name, draw in _SAMPLERS.items():
        for size in (30, 300):
            p = np.array([_compare(test, draw(rng, _REFERENCE_ROWS), draw(rng, size)).p_value for _ in range(_PAIRS)])
            for alpha in (0.05, 0.01):
                alarms, allowed = int((p <= alpha).sum()), int(stats.binom.isf(_BAD_LUCK, _PAIRS, alpha))
                assert alarms <= allowed, (
                    f"at alpha {alpha} a test may alarm in {allowed} of {_PAIRS} pairs without drift, "
                    f"got {alarms} on {name} data with windows of {size}"
                )


def sees_a_known_shift(test: DriftTest) -> None:
    """A shift of one standard deviation in 500 rows is certain, and its effect counts."""
    rng = np.random.default_rng(1)
    for sign in (-1, 1):
        seen = _compare(test, rng.normal(size=_REFERENCE_ROWS), rng.normal(sign, size=500))
        assert seen.p_value < 1e-6, f"p must be below 1e-6 for a shift of {sign} sd, got {seen.p_value}"
        assert seen.effect >= test.minimum, f"the effect must be at least {test.minimum}, got {seen.effect}"


def sees_nothing_in_nothing(test: DriftTest) -> None:
    """An empty sample on either side, and a single equal row, give p = 1 or close and no alarm."""
    some, none = np.arange(50.0), np.array([])
    for reference, current in ((some, none), (none, some), (none, none)):
        seen = _compare(test, reference, current)
        assert (seen.p_value, seen.effect) == (1.0, 0.0), f"an empty sample must give p 1 and effect 0, got {seen}"
    for reference, current in ((some, some[:1]), (some[:1], some), (some[:1], some[:1])):
        seen = _compare(test, reference, current)
        assert seen.p_value > 0.01, f"one row must not reject, got {seen}"


def knows_constants(test: DriftTest) -> None:
    """The same constant is no drift; a constant that becomes another value, or values, is."""
    for value in (0.0, -1.0, np.inf, np.nan, 1e300):
        same = _compare(test, np.full(200, value), np.full(100, value))
        assert (same.p_value, same.effect) == (1.0, 0.0), f"equal constants {value} must be no drift, got {same}"
        for other in (np.full(100, 5.0), np.linspace(5.0, 6.0, 100), np.full(100, -7.0)):
            seen = _compare(test, np.full(200, value), other)
            assert seen.p_value < 1e-6, f"a constant {value} that changes must be seen, got {seen}"
            assert seen.effect >= test.minimum, f"a constant {value} that changes must count, got {seen}"


def counts_missing_values(test: DriftTest) -> None:
    """NaN is a value: its rise is drift, the same share of it is not, and nothing else hides behind it."""
    rng = np.random.default_rng(2)
    whole, half = rng.normal(size=400), rng.normal(size=400)
    half[::2] = np.nan
    for reference, current in ((whole, half), (half, whole), (whole, np.full(400, np.nan))):
        seen = _compare(test, reference, current)
        assert seen.p_value < 1e-6, f"a change of half of the values to or from NaN must be seen, got {seen}"
        assert seen.effect >= test.minimum, f"a change of half of the values to or from NaN must count, got {seen}"
    same = _compare(test, half, half)
    assert same.p_value > 0.5, f"the same share of NaN must be no drift, got {same}"


def counts_values_out_of_range(test: DriftTest) -> None:
    """Values far outside the reference are not lost, and one outlier does not hide a shift."""
    rng = np.random.default_rng(3)
    reference = rng.normal(size=400)
    outside = np.where(np.arange(400) % 2 == 0, rng.normal(size=400), rng.choice([-1e9, 1e9, np.inf, -np.inf], 400))
    shifted = np.append(rng.normal(1.0, size=400), 1e12)
    for current in (outside, shifted):
        seen = _compare(test, reference, current)
        assert seen.p_value < 1e-6, f"values out of range must be seen, got {seen}"


def repeats_itself(test: DriftTest) -> None:
    """The same rows give the same answer in any order and type, and are left as they were."""
    rng = np.random.default_rng(4)
    reference, current = rng.integers(0, 50, 300), rng.integers(0, 40, 200)
    before = reference.copy(), current.copy()
    first = _compare(test, reference, current)
    assert (reference == before[0]).all(), "the reference must be left as it was"
    assert (current == before[1]).all(), "the window must be left as it was"
    again = _compare(test, rng.permutation(reference).astype(np.float32), rng.permutation(current).astype(np.float64))
    assert first == again, f"order and type of the rows must not matter, got {first} and {again}"


def asks_for_enough_data(test: DriftTest) -> None:
    """More data never hides an effect; `needed` is the smallest window that shows the minimum."""
    settings = {"alpha": 0.001, "power": 0.8}
    limits = [test.detectable(1000, size, **settings) for size in (1, 10, 100, 1000, 10_000)]
    assert limits == sorted(limits, reverse=True), f"the detectable effect must fall with the size, got {limits}"
    needed = test.needed(1000, **settings)
    assert needed is not None, "1000 reference rows must be enough for the default minimum"
    assert test.detectable(1000, needed, **settings) <= test.minimum, "the needed window must show the minimum"
    if needed > 1:
        assert test.detectable(1000, needed - 1, **settings) > test.minimum, "a smaller window must not"
    least = test.needed_reference(**settings)
    assert least is not None, "some reference must be enough"
    assert test.needed(least, **settings) is not None, "a reference of the needed size must be enough"
    assert least == 1 or test.needed(least - 1, **settings) is None, "a smaller reference must not"


CHECKS: tuple[Callable[[DriftTest], None], ...] = (
    holds_its_level,
    sees_a_known_shift,
    sees_nothing_in_nothing,
    knows_constants,
    counts_missing_values,
    counts_values_out_of_range,
    repeats_itself,
    asks_for_enough_data,
)


def _compare(test: DriftTest, reference: Array, current: Array) -> Comparison:
    """Compare, with every warning an error: a monitor must not fill its host's log."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return test.compare(reference, current)
