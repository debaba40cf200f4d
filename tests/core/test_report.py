from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.recipe import Budget
from fettle.core.report import Measurement, Report


def report(value, name="metric.accuracy"):
    return Report(subject="s", measurements=(Measurement(name="size", value=1.0), Measurement(name=name, value=value)))


@given(st.floats(0, 1), st.floats(0, 1), st.floats(-0.5, 0.5))
def test_a_report_passes_exactly_where_the_metric_keeps_the_floor(value, baseline, drop):
    said = report(value).check(Budget(max_drop=drop), baseline=report(baseline))
    assert (said is None) == (value >= baseline - drop - 1e-9)


def test_a_drop_of_exactly_the_budget_is_allowed():
    assert report(0.9 - 0.005).check(Budget(max_drop=0.005), baseline=report(0.9)) is None


@pytest.mark.parametrize(
    ("value", "budget", "sentence"),
    [
        (
            0.80,
            Budget(max_drop=0.01),
            "accuracy 0.8000 is below the floor of 0.8900: the original reaches 0.9000 and may lose 0.0100",
        ),
        (
            0.80,
            Budget(min_metric=0.95),
            "accuracy 0.8000 is below the floor of 0.9500: the budget asks for at least 0.9500",
        ),
        (0.80, Budget(min_metric=0.5), "the original reaches 0.9000"),
        (0.90, Budget(max_drop=-0.02), "below the floor of 0.9200"),
    ],
)
def test_the_sentence_says_what_is_missing(value, budget, sentence):
    assert sentence in report(value).check(budget, baseline=report(0.9))


def test_measurements_are_found_by_name():
    one = report(0.5, "metric.f1")
    assert one["metric.f1"].value == 0.5
    assert one.metric.name == "metric.f1"
    assert "size" in one
    assert "latency.p50" not in one
    with pytest.raises(KeyError, match=r"latency\.p50"):
        one["latency.p50"]
    with pytest.raises(KeyError, match="metric"):
        _ = Report(subject="s").metric
