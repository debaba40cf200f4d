from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.errors import UsageError
from fettle.core.recipe import Budget

shares = st.floats(-1, 1)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("20m", 1200), ("2h", 7200), ("1.5h", 5400), ("3 m", 180), (None, None)]
)
def test_time_limits(text, seconds):
    assert Budget(time_limit=text).time_limit_s == seconds


@pytest.mark.parametrize("text", ["", "20", "m", "-3m", "0s", "0.0h", "3d", "1h30m", "1e3s", "nan s", "3m\n", "٣m!"])
def test_bad_time_limits_say_what_is_meant(text):
    with pytest.raises(UsageError, match=r"budget\.time_limit must be like"):
        Budget(time_limit=text)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["max_drop", "min_metric"])
def test_budgets_are_finite(key, value):
    with pytest.raises(UsageError, match=rf"budget\.{key} must be a finite number"):
        Budget(**{key: value})


def test_something_must_be_minimized():
    with pytest.raises(UsageError, match="at least one of"):
        Budget(minimize=())


@given(shares, shares, st.none() | shares)
def test_the_floor_is_the_higher_of_both(baseline, drop, least):
    floor = Budget(max_drop=drop, min_metric=least).floor(baseline)
    assert floor >= baseline - drop
    assert least is None or floor >= least
    assert floor in (baseline - drop, least)


@pytest.mark.parametrize("slack", [-0.01, math.nan, math.inf])
def test_a_slack_that_is_no_share_is_refused(slack):
    with pytest.raises(UsageError, match=r"budget\.slack must be a share of at least 0"):
        Budget(slack=slack)
