"""Parity against plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.errors import UsageError
from fettle.evaluate import parity as module
from fettle.evaluate.intervals import wilson
from fettle.evaluate.parity import compare_outputs


@given(
    seed=st.integers(0, 999),
    shape=st.sampled_from([(1, 2), (7, 3), (50, 10), (9,), (6, 1), (4, 3, 2)]),
    chunk=st.sampled_from([1, 7, 2**20]),
)
def test_parity_is_the_plain_loop(seed: int, shape: tuple[int, ...], chunk: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=shape).astype(np.float32)
    b = (a + 0.3 * rng.normal(size=shape)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_VALUES", chunk)
        found = compare_outputs(a, b)
    gaps = [abs(float(x) - float(y)) for x, y in zip(a.ravel(), b.ravel(), strict=True)]
    assert found.max_abs == pytest.approx(max(gaps))
    assert found.mean_abs == pytest.approx(sum(gaps) / len(gaps))
    signal = sum(float(x) ** 2 for x in a.ravel())
    assert found.sqnr_db == pytest.approx(10 * math.log10(signal / sum(gap**2 for gap in gaps)))
    if len(shape) == 2 and shape[1] > 1:
        same = sum(int(x.argmax() == y.argmax()) for x, y in zip(a, b, strict=True))
        assert found.agreement == same / shape[0]
        assert (found.low, found.high) == wilson(same, shape[0])
    else:
        assert (found.agreement, found.low, found.high) == (None, None, None)


def test_identical_outputs() -> None:
    a = np.eye(3)
    found = compare_outputs(a, a.copy())
    assert (found.agreement, found.max_abs, found.mean_abs, found.sqnr_db) == (1.0, 0.0, 0.0, math.inf)
    assert "parity.sqnr" not in {measurement.name for measurement in found.measurements()}


def test_masked_classes_that_agree_differ_by_nothing() -> None:
    a = np.array([[1.0, -np.inf], [2.0, -np.inf]])
    found = compare_outputs(a, a + np.array([[0.5, 0.0], [0.0, 0.0]]))
    assert (found.max_abs, found.agreement) == (0.5, 1.0)


def test_zeros_against_something_have_no_ratio() -> None:
    found = compare_outputs(np.zeros((2, 2)), np.ones((2, 2)))
    assert found.sqnr_db == -math.inf


def test_regression_has_no_agreement() -> None:
    assert compare_outputs(np.eye(3), np.eye(3), classification=False).agreement is None


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (np.zeros((0, 3)), np.zeros((0, 3))),
        (np.array(1.0), np.array(1.0)),
        (np.array([[np.nan, 1.0]]), np.array([[1.0, 1.0]])),
        (np.array([[1.0, 1.0]]), np.array([[np.nan, 1.0]])),
    ],
)
def test_what_it_refuses(a: Any, b: Any) -> None:
    with pytest.raises(UsageError, match="outputs"):
        compare_outputs(a, b)


def test_measurements() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(100, 5))
    by_name = {m.name: m for m in compare_outputs(a, a + 0.1 * rng.normal(size=a.shape)).measurements("test")}
    assert set(by_name) == {"parity.agreement", "parity.max_abs", "parity.mean_abs", "parity.sqnr", "parity.divergence"}
    agreement = by_name["parity.agreement"]
    assert agreement.low is not None
    assert agreement.low < agreement.value
    assert (agreement.n, agreement.data, agreement.direction) == (100, "test", "higher")
    assert by_name["parity.sqnr"].unit == "dB"


def test_divergence_is_the_mean_root_over_the_rows() -> None:
    generator = np.random.default_rng(3)
    a, b = generator.normal(size=(50, 4)), generator.normal(size=(50, 4))
    expected = 0.0
    for row, other in zip(a, b, strict=True):
        p, q = np.exp(row) / np.exp(row).sum(), np.exp(other) / np.exp(other).sum()
        expected += float(np.sqrt(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))) / 50
    assert compare_outputs(a, b).divergence == pytest.approx(expected)
    assert compare_outputs(a, a).divergence == 0.0
    column = compare_outputs(a[:, :1], b[:, :1])
    assert column.divergence == pytest.approx(float(np.abs(a[:, 0] - b[:, 0]).mean()))
    masked = np.array([[0.0, -math.inf, 1.0]])
    assert "parity.divergence" not in {each.name for each in compare_outputs(masked, masked).measurements()}
