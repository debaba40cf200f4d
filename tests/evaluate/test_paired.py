"""McNemar's test against scipy and against enumeration; the interval's coverage by simulation."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fettle.core.errors import UsageError
from fettle.evaluate.paired import Paired, compare_paired


def paired(both: int, lost: int, won: int, neither: int) -> Paired:
    first = np.array([True] * (both + lost) + [False] * (won + neither))
    second = np.array([True] * both + [False] * lost + [True] * won + [False] * neither)
    return compare_paired(first, second)


@given(st.integers(0, 400), st.integers(0, 400))
def test_exact_p_is_scipys_binomial_test(lost: int, won: int) -> None:
    expected = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert paired(1, lost, won, 0).p_exact == pytest.approx(min(1.0, expected), rel=1e-9)


@pytest.mark.parametrize(("lost", "won"), list(itertools.product(range(5), range(5))))
def test_p_values_by_enumeration_of_all_coin_flips(lost: int, won: int) -> None:
    m = lost + won
    test = paired(3, lost, won, 2)
    if m == 0:
        assert (test.p_exact, test.p_mid) == (1.0, 1.0)
        return
    k = min(lost, won)
    flips = [sum(flip) for flip in itertools.product((0, 1), repeat=m)]
    up_to, at = np.mean([f <= k for f in flips]), np.mean([f == k for f in flips])
    assert test.p_exact == pytest.approx(min(1, 2 * up_to))
    assert test.p_mid == pytest.approx(1 - at / 2 if lost == won else 2 * up_to - at)


def test_the_worked_example_of_fagerland_lydersen_and_laake() -> None:
    test = paired(1, 1, 7, 12)
    assert (round(test.p_exact, 4), round(test.p_mid, 4)) == (0.0703, 0.0391)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_what_always_holds(both: int, lost: int, won: int, neither: int) -> None:
    n = both + lost + won + neither
    if n == 0:
        return
    test, reverse = paired(both, lost, won, neither), paired(both, won, lost, neither)
    assert (test.lost, test.won, test.n) == (lost, won, n)
    assert 0 < test.p_mid <= test.p_exact <= 1
    assert test.p_mid == reverse.p_mid
    assert -1 <= test.low < test.high <= 1
    assert test.low == pytest.approx(-reverse.high)
    assert test.difference == pytest.approx((won - lost) / n)


def test_thousands_of_discordant_rows_do_not_underflow() -> None:
    test = paired(0, 5000, 5200, 0)
    assert 0.04 < test.p_mid < 0.06
    assert paired(0, 0, 3000, 0).p_exact == 0.0 or paired(0, 0, 3000, 0).p_exact < 1e-300


def test_interval_covers_the_true_difference() -> None:
    rng = np.random.default_rng(7)
    shares = [0.7, 0.08, 0.05, 0.17]
    held = 0
    for both, lost, won, neither in rng.multinomial(150, shares, size=1000):
        test = paired(int(both), int(lost), int(won), int(neither))
        held += test.low <= shares[2] - shares[1] <= test.high
    assert 0.93 < held / 1000 < 0.985


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.array([1, 0]), np.array([True, False])),
        (np.array([True]), np.array([True, False])),
        (np.array([], dtype=bool), np.array([], dtype=bool)),
        (np.ones((2, 2), dtype=bool), np.ones((2, 2), dtype=bool)),
    ],
)
def test_what_it_refuses(first: Any, second: Any) -> None:
    with pytest.raises(UsageError, match="two boolean arrays"):
        compare_paired(first, second)


def test_measurements_carry_the_interval() -> None:
    by_name = {m.name: m for m in paired(80, 6, 4, 10).measurements("test")}
    assert set(by_name) == {"paired.difference", "paired.p", "paired.lost", "paired.won"}
    difference = by_name["paired.difference"]
    assert difference.low is not None
    assert difference.high is not None
    assert difference.low < difference.value < difference.high
    assert difference.data == "test"
    assert all(math.isfinite(m.value) for m in by_name.values())
