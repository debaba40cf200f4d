"""What is said of each layer, and which layers are worth saying it of."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core import codec
from fettle.evaluate.layers import WEAK_DB, WIDE_SPREAD, LayerLine, notable, weakest


def line(layer: str = "fc", sqnr_db: float = 30.0, **fields: Any) -> LayerLine:
    return LayerLine(**{"layer": layer, "kind": "linear", "sqnr_db": sqnr_db, "spread": 2.0, **fields})


LINES = st.lists(
    st.builds(
        LayerLine,
        layer=st.uuids().map(str),
        kind=st.sampled_from(["convolution", "linear"]),
        sqnr_db=st.floats(-99, 99) | st.just(WEAK_DB),
        spread=st.floats(1, 1e6) | st.just(WIDE_SPREAD),
        share=st.none() | st.floats(-1, 1),
        cost_ms=st.none() | st.floats(-1, 10),
        precision=st.sampled_from(["int8", "float"]),
    ),
    max_size=40,
)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "fc runs in int8, its output at 30 dB of signal over noise."),
        ({"sqnr_db": 8.6}, "fc runs in int8, its output at 9 dB of signal over noise."),
        (
            {"spread": 900.0},
            "fc runs in int8, its output at 30 dB of signal over noise. Its input's channels differ 900-fold from the "
            "largest to the median, and one grid of 256 steps serves them all.",
        ),
        ({"precision": "float"}, "fc was given back to float."),
        (
            {"precision": "float", "share": 0.8, "cost_ms": 0.25},
            "fc was given back to float: that alone takes away 80 % of the divergence, for 0.250 ms more a call.",
        ),
        (
            {"precision": "float", "cost_ms": -0.01, "sqnr_db": 3.0},
            "fc was given back to float, at no cost that timing shows. In int8 its output keeps 3 dB of signal over "
            "noise.",
        ),
        ({"precision": "float", "cost_ms": 0.0}, "fc was given back to float, at no cost that timing shows."),
    ],
)
def test_the_sentence_says_what_became_of_the_layer_and_why(fields: dict[str, Any], sentence: str) -> None:
    assert line(**fields).sentence() == sentence


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"sqnr_db": WEAK_DB}, False),
        ({"sqnr_db": WEAK_DB - 0.01}, True),
        ({"spread": WIDE_SPREAD}, True),
        ({"spread": WIDE_SPREAD - 0.01}, False),
        ({"precision": "float"}, True),
    ],
)
def test_who_is_notable(fields: dict[str, Any], expected: bool) -> None:
    assert line(**fields).is_notable is expected
    assert notable([line(**fields)]) == ((line(**fields),) if expected else ())


@given(lines=LINES, limit=st.integers(0, 12))
def test_notable_are_the_first_of_all_that_deserve_it(lines: list[LayerLine], limit: int) -> None:
    left = [each for each in lines if each.precision == "float" or each.sqnr_db < 15 or each.spread >= 16]
    expected = []
    while left and len(expected) < limit:
        floats = [each for each in left if each.precision == "float"]
        expected.append(min(floats or left, key=lambda each: each.sqnr_db))
        left.remove(expected[-1])
    assert list(notable(lines, limit=limit)) == expected


@given(lines=LINES, limit=st.integers(0, 12))
def test_of_many_all_that_were_given_back_are_kept_and_nothing_weaker_is_left_out(
    lines: list[LayerLine], limit: int
) -> None:
    shown = weakest(lines, limit=limit)
    hidden = [each for each in lines if each not in shown]
    assert len(shown) + len(hidden) == len(lines)
    assert all(each.precision == "int8" for each in hidden)
    worst = [each.sqnr_db for each in shown if each.precision == "int8"]
    assert not hidden or min(each.sqnr_db for each in hidden) >= max(worst, default=-99)
    assert len(shown) == min(len(lines), max(limit, sum(each.precision == "float" for each in lines)))


@given(lines=LINES)
def test_there_and_back_through_json(lines: list[LayerLine]) -> None:
    for each in lines:
        assert codec.from_json(LayerLine, codec.to_json(each), where="a line") == each
