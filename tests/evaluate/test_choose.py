"""Which candidate wins, against a slow reading of the rule; the front against brute force."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.errors import UsageError
from fettle.core.recipe import Budget
from fettle.core.report import Measurement
from fettle.evaluate.choose import choose, describe, describe_precision, describe_slack, shortfall
from fettle.evaluate.comparison import Candidate
from fettle.evaluate.pareto import front_of, pareto_mask

Make = Callable[..., Candidate]
VALUES = st.sampled_from([0.0, 1.0, 2.0, 3.0, math.inf, -1.0])


@given(st.lists(st.tuples(VALUES, VALUES, VALUES), max_size=25))
def test_the_front_is_the_brute_force_one(points: list[tuple[float, float, float]]) -> None:
    def dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))

    expected = [not any(dominates(other, point) for other in points) for point in points]
    assert pareto_mask(np.array(points).reshape(-1, 3)).tolist() == expected
    assert not points or any(expected)


@pytest.mark.parametrize("costs", [np.array([[1.0, np.nan]]), np.array([1.0, 2.0])])
def test_the_front_refuses(costs: np.ndarray) -> None:
    with pytest.raises(UsageError, match="Pareto front"):
        pareto_mask(costs)


def test_the_front_of_candidates(candidate: Make) -> None:
    precise, fast = candidate("precise", 0.9, 2.0, 400), candidate("fast", 0.8, 1.0, 400)
    small, beaten = candidate("small", 0.7, 3.0, 100), candidate("beaten", 0.8, 2.0, 400)
    failed = candidate("failed", failure="no")
    assert front_of([precise, beaten, small, failed, fast]) == (fast, precise, small)
    assert front_of([failed]) == ()


def test_the_front_knows_metrics_where_lower_is_better(candidate: Make) -> None:
    good, bad = candidate("good", 0.1, direction="lower"), candidate("bad", 0.2, direction="lower")
    assert front_of([bad, good]) == (good,)


BUDGET = Budget(max_drop=0.01)


def test_the_fastest_that_keeps_the_floor(candidate: Make) -> None:
    original = candidate("original", 0.90, 4.0)
    tried = [original, candidate("kept", 0.891, 2.0), candidate("below", 0.889, 1.0), candidate("slow", 0.95, 3.0)]
    assert choose(tried, BUDGET, original).label == "kept"


def test_a_drop_of_exactly_the_budget_is_allowed(candidate: Make) -> None:
    original = candidate("original", 0.90, 4.0)
    assert choose([candidate("edge", 0.90 - 0.01, 1.0)], BUDGET, original).label == "edge"


@pytest.mark.parametrize(("second_ms", "winner"), [(1.009, "small"), (1.02, "quick")])
def test_a_tie_within_one_percent_goes_to_the_next_objective(candidate: Make, second_ms: float, winner: str) -> None:
    original = candidate("original", 0.90, 4.0, 9000)
    tried = [candidate("quick", 0.9, 1.0, 2000), candidate("small", 0.9, second_ms, 1000)]
    assert choose(tried, Budget(minimize=("latency", "size")), original).label == winner
    assert choose(tried, Budget(minimize=("size", "latency")), original).label == "small"


def test_a_tie_in_all_objectives_goes_to_the_better_metric(candidate: Make) -> None:
    original = candidate("original", 0.90, 4.0)
    tried = [candidate("a", 0.895, 1.0), candidate("b", 0.899, 1.005)]
    assert choose(tried, BUDGET, original).label == "b"
    assert choose(tried[::-1], BUDGET, original).label == "b"


def test_below_the_floor_the_best_metric_then_the_latency(candidate: Make) -> None:
    original = candidate("original", 0.90, 4.0)
    budget = Budget(min_metric=0.99)
    tried = [original, candidate("slow", 0.93, 3.0), candidate("quick", 0.93, 2.0), candidate("poor", 0.5, 0.1)]
    assert choose(tried, budget, original).label == "quick"


@pytest.mark.parametrize("tried", ["none", "failed", "worse"])
def test_never_none(candidate: Make, tried: str) -> None:
    original = candidate("original", 0.90, 4.0)
    others = {"none": [], "failed": [candidate("x", failure="no")], "worse": [candidate("x", 0.1, 0.1)]}[tried]
    assert choose(others, BUDGET, original) is original
    assert choose(others, Budget(max_drop=-0.5), original) is original


def test_a_metric_where_lower_is_better_is_refused(candidate: Make) -> None:
    original = candidate("original", 0.2, direction="lower")
    with pytest.raises(UsageError, match=r"higher must be better, got 'accuracy'"):
        choose([], BUDGET, original)


@given(data=st.data())
def test_choose_is_the_slow_reading_of_its_rule(data: st.DataObject) -> None:
    from_values = st.tuples(
        st.sampled_from([0.85, 0.89, 0.9, 0.92]), st.sampled_from([1.0, 1.005, 2.0]), st.sampled_from([100, 200])
    )
    values = data.draw(st.lists(from_values, min_size=1, max_size=6))
    original = make("original", 0.9, 3.0, 500)
    tried = [original, *(make(f"c{i}", *value) for i, value in enumerate(values))]
    best = choose(tried, Budget(max_drop=0.01, minimize=("latency", "size")), original)
    allowed = [one for one in tried if one.metric.value >= 0.89 - 1e-9]
    near = [one for one in allowed if one.p50_ms <= 1.01 * min(other.p50_ms for other in allowed)]
    nearer = [one for one in near if one.size_bytes <= 1.01 * min(other.size_bytes for other in near)]
    assert best in nearer
    assert best.metric.value == max(one.metric.value for one in nearer)


def away(divergence: float) -> tuple[Measurement, ...]:
    return (Measurement(name="parity.divergence", value=divergence),)


@pytest.mark.parametrize(
    ("slack", "p50", "size", "divergence", "wanted"),
    [
        (0.03, 1.029, 102, 0.5, "near"),
        (0.03, 1.031, 100, 0.5, "fast"),
        (0.03, 1.029, 104, 0.5, "fast"),
        (0.03, 1.029, 100, 0.99, "fast"),
        (0.03, 1.029, 100, 0.0, "near"),
        (0.0, 1.0, 100, 0.5, "fast"),
        (0.5, 1.4, 140, 0.5, "near"),
    ],
    ids=["paid for", "too slow", "too large", "hardly nearer", "exact", "no slack", "much slack"],
)
def test_a_little_time_and_size_may_be_spent_on_nearer_answers(
    candidate: Make, slack: float, p50: float, size: int, divergence: float, wanted: str
) -> None:
    original = candidate("original", 0.90, 4.0, 400, extra=away(0.0))
    fast = candidate("fast", 0.9, 1.0, 100, extra=away(1.0))
    near = candidate("near", 0.899, p50, size, extra=away(divergence))
    budget = Budget(max_drop=0.01, minimize=("latency", "size"), slack=slack)
    assert choose([fast, near], budget, original).label == wanted
    assert choose([near, fast], budget, original).label == wanted


def test_slack_buys_no_loss_of_the_metric(candidate: Make) -> None:
    original = candidate("original", 0.90, 4.0, extra=away(0.0))
    fast, near = candidate("fast", 0.9, 1.0, extra=away(1.0)), candidate("near", 0.8, 1.0, extra=away(0.1))
    assert choose([fast, near], BUDGET, original).label == "fast"


def test_what_the_slack_has_bought_in_words(candidate: Make) -> None:
    fast, near = candidate("int8", 0.9, 1.0, extra=away(0.5)), candidate("near", 0.9, 1.02, extra=away(0.25))
    assert describe_slack(fast, fast) is None
    assert describe_slack(near, fast) == (
        "It takes 1.020 times as long as int8, and its answers diverge 50 % less from the original's: that is what "
        "budget.slack is for."
    )


def make(label: str, accuracy: float, p50: float, size: float) -> Candidate:
    from fettle.core.report import Report

    report = Report(
        subject=label,
        measurements=(
            Measurement(name="metric.accuracy", value=accuracy, direction="higher"),
            Measurement(name="latency.p50", value=p50),
            Measurement(name="size", value=size),
        ),
    )
    return Candidate(label=label, digest=label, runtime="r", precision="int8", steps=(), report=report)


def test_the_verdict_in_words(candidate: Make) -> None:
    original = candidate("original", 0.9, 4.0, 4_000_000)
    paired = Measurement(name="paired.difference", value=-0.005, low=-0.009, high=-0.001)
    best = candidate("int8", 0.895, 1.0, 1_000_000, extra=(paired,))
    assert describe(best, original) == (
        "int8 is 4.0× faster and 4.0× smaller than the original, and keeps the budget.",
        "It takes 1.00 ms instead of 4.00 ms at batch 1 on 2 threads (median), and 1.00 MB instead of 4.00 MB.",
        "Its accuracy is 0.8950 instead of 0.9000 on 1000 rows of validation "
        "(difference -0.0050, 95 % interval -0.0090 to -0.0010).",
    )


def test_a_missed_floor_comes_first(candidate: Make) -> None:
    original, best = candidate("original", 0.9, 4.0, 100), candidate("int8", 0.8, 8.0, 200)
    missed = shortfall(best, BUDGET, original)
    first, second, *_ = describe(best, original, missed=missed)
    assert first.startswith("The floor is missed: accuracy 0.8000 is below the floor of 0.8900")
    assert second == "The best found is int8: 2.0× slower and 2.0× larger than the original."


def test_when_the_original_stays_it_says_so(candidate: Make) -> None:
    original = candidate("original")
    assert "The original stays" in describe(original, original)[0]
    assert describe(original, original, missed="x is below y")[0] == "The floor is missed: x is below y."


@pytest.mark.parametrize(("int8_ms", "pays"), [(1.0, True), (2.0, False), (3.0, False)])
def test_int8_that_does_not_pay_is_said_in_words(candidate: Make, int8_ms: float, pays: bool) -> None:
    tried = [candidate("q", p50=int8_ms), candidate("f", p50=2.0, precision="float"), candidate("x", failure="no")]
    sentence = describe_precision(tried)
    assert (sentence is None) is pays
    assert pays or (sentence is not None and sentence.startswith("int8 does not pay on this machine"))
    assert describe_precision(tried[:1]) is None
