"""Metrics against slow loops, and every way in which data, model or function can be wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.data import Split
from fettle.core.errors import DataError, UsageError
from fettle.evaluate.intervals import bootstrap, wilson
from fettle.evaluate.metric import METRICS, Metric, find_metric, hits, measure_metric


def scores(seed: int, n: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    # One decimal, so that ties happen.
    return rng.normal(size=(n, classes)).round(1).astype(np.float32), rng.integers(0, classes, n)


@given(seed=st.integers(0, 999), n=st.integers(1, 40), classes=st.integers(2, 9))
def test_accuracy_is_the_share_of_rows_whose_argmax_is_the_target(seed: int, n: int, classes: int) -> None:
    outputs, targets = scores(seed, n, classes)
    right = sum(int(np.argmax(row)) == target for row, target in zip(outputs, targets, strict=True))
    measured = METRICS["accuracy"].measure(outputs, targets)
    assert measured.value == pytest.approx(right / n)
    assert (measured.low, measured.high) == wilson(right, n)
    assert (measured.n, measured.direction) == (n, "higher")


@given(seed=st.integers(0, 999), n=st.integers(1, 30), k=st.integers(1, 5))
def test_top_k_is_a_stable_sort(seed: int, n: int, k: int) -> None:
    outputs, targets = scores(seed, n, 8)
    for found, row, target in zip(hits(outputs, targets, k), outputs, targets, strict=True):
        best = sorted(range(8), key=lambda c: (-row[c], c))[:k]
        assert found == (target in best)


@given(seed=st.integers(0, 999), n=st.integers(1, 40), classes=st.integers(2, 6))
def test_f1_macro_class_by_class(seed: int, n: int, classes: int) -> None:
    outputs, targets = scores(seed, n, classes)
    predicted = outputs.argmax(axis=1)
    found = []
    for c in set(predicted.tolist()) | set(targets.tolist()):
        tp = sum((predicted == c) & (targets == c))
        fp, fn = sum((predicted == c) & (targets != c)), sum((predicted != c) & (targets == c))
        found.append(2 * tp / (2 * tp + fp + fn))
    assert METRICS["f1_macro"].measure(outputs, targets).value == pytest.approx(sum(found) / len(found))


@pytest.mark.parametrize("shape", [(30,), (30, 1), (30, 3)])
def test_regression_metrics(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    outputs, targets = rng.normal(size=shape).astype(np.float32), rng.normal(size=shape)
    flat = [(float(a), float(b)) for a, b in zip(outputs.ravel(), targets.ravel(), strict=True)]
    error = METRICS["mean_squared_error"].measure(outputs, targets)
    assert error.value == pytest.approx(sum((a - b) ** 2 for a, b in flat) / len(flat))
    assert error.direction == "lower"
    assert error.low is not None
    assert error.high is not None
    assert error.low < error.value < error.high
    centered = targets - targets.mean(axis=0)
    expected = 1 - sum((a - b) ** 2 for a, b in flat) / float((centered**2).sum())
    assert METRICS["r2"].measure(outputs, targets).value == pytest.approx(expected)


def test_a_column_and_a_row_of_targets_are_never_broadcast() -> None:
    outputs, targets = np.arange(5.0)[:, None], np.arange(5.0)
    assert METRICS["mean_squared_error"].measure(outputs, targets).value == 0


def test_intervals_of_other_metrics_are_the_bootstrap() -> None:
    outputs, targets = scores(3, 200, 4)
    measured = METRICS["f1_macro"].measure(outputs, targets, seed=5)
    metric = METRICS["f1_macro"]
    assert (measured.low, measured.high) == bootstrap(metric.score, *metric.prepare(outputs, targets), seed=5)
    assert "bootstrap" in measured.note


WRONG: dict[str, tuple[str, Any, Any, str]] = {
    "one column": ("accuracy", np.zeros((4, 1)), np.zeros(4, int), "at least 2 classes"),
    "one dimension": ("accuracy", np.zeros(4), np.zeros(4, int), "shape .rows, classes."),
    "pixels": ("accuracy", np.zeros((4, 3, 2, 2)), np.zeros((4, 2, 2), int), "give your own metric"),
    "one-hot": ("accuracy", np.zeros((4, 3)), np.eye(3)[[0, 1, 2, 0]], "not one-hot"),
    "float targets": ("f1_macro", np.zeros((4, 3)), np.zeros(4), "holding class numbers"),
    "class too large": ("accuracy", np.zeros((4, 3)), np.array([0, 1, 2, 3]), "from 0 to 2, .* got 3"),
    "negative class": ("f1_macro", np.zeros((4, 3)), np.array([0, 1, 2, -100]), "got -100"),
    "top 5 of 5": ("top5_accuracy", np.zeros((4, 5)), np.zeros(4, int), "more than 5 classes"),
    "regression shapes": ("mean_squared_error", np.zeros((4, 2)), np.zeros((4, 3)), "of one shape"),
    "constant targets": ("r2", np.zeros((4, 1)), np.ones((4, 1)), "targets that differ"),
    "infinite outputs": ("mean_squared_error", np.full((4, 1), np.inf), np.zeros(4), "finite number, got inf"),
}


@pytest.mark.parametrize(("metric", "outputs", "targets", "message"), WRONG.values(), ids=WRONG)
def test_arrays_that_do_not_suit_the_metric(metric: str, outputs: Any, targets: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        METRICS[metric].measure(outputs, targets)


def test_unsigned_targets_are_classes_too() -> None:
    outputs = np.eye(3)
    assert METRICS["accuracy"].measure(outputs, np.array([0, 1, 2], np.uint8)).value == 1.0


def mean_gap(outputs: np.ndarray, targets: np.ndarray) -> float:
    return float(np.mean(outputs[:, 0] - targets))


def test_a_function_of_the_user_is_a_metric() -> None:
    outputs, targets = np.arange(8.0).reshape(8, 1), np.zeros(8)
    measured = find_metric(mean_gap).measure(outputs, targets, data="test")
    assert (measured.name, measured.value, measured.n, measured.data) == ("metric.mean_gap", 3.5, 8, "test")
    assert measured.low is not None
    assert measured.low < 3.5


def test_a_function_may_return_a_tensor_or_an_array_of_one() -> None:
    for returned in (np.array([0.5]), np.float32(0.5), torch.tensor(0.5), np.array(0.5)):

        def function(outputs: Any, targets: Any, value: Any = returned) -> Any:
            return value.item() if isinstance(value, np.ndarray) else value

        assert find_metric(function).measure(np.zeros((3, 1)), np.zeros(3)).value == 0.5


def broken(outputs: np.ndarray, targets: np.ndarray) -> float:
    raise KeyError("oops")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (broken, "metric 'broken' must return one number .* raised KeyError"),
        (lambda o, t: "high", "metric 'custom' .* raised ValueError"),
        (lambda o, t: None, "raised TypeError"),
        (lambda o: 1.0, "raised TypeError"),
        (lambda o, t: math.nan, "finite number, got nan"),
        (lambda o, t: math.inf, "finite number, got inf"),
    ],
)
def test_a_function_that_fails_is_named(function: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_metric(function).measure(np.zeros((3, 2)), np.zeros(3))


@pytest.mark.parametrize("metric", [3, None, b"accuracy"])
def test_what_is_no_metric(metric: Any) -> None:
    with pytest.raises(UsageError, match="a name or a function"):
        find_metric(metric)


def test_a_metric_stays_itself() -> None:
    metric = Metric(name="mine", prepare=lambda o, t: (o, t), score=lambda o, t: 1.0)
    assert find_metric(metric) is metric


X = np.eye(4, dtype=np.float32)
Y = np.array([0, 1, 2, 0])
SPLIT = [(X[:3], Y[:3]), (X[3:], Y[3:])]


@pytest.mark.parametrize(
    "run",
    [
        lambda inputs: inputs[0],
        lambda inputs: torch.from_numpy(inputs[0]).requires_grad_(),
        lambda inputs: (inputs[0], inputs[0] * 0),
        lambda inputs: [inputs[0]],
    ],
)
def test_measure_metric_over_batches(run: Any) -> None:
    measured, outputs = measure_metric(run, Split("validation", SPLIT), "accuracy")
    assert (measured.name, measured.value, measured.n) == ("metric.accuracy", 0.75, 4)
    assert measured.data == "validation"
    np.testing.assert_array_equal(outputs, X)


def spoiled(inputs: tuple[np.ndarray, ...]) -> np.ndarray:
    outputs = inputs[0].copy()
    outputs[0] = np.nan
    return outputs


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (spoiled, "split 'validation', batch 0: .* got NaN in 1 of 3 rows"),
        (lambda inputs: inputs[0][:1], "one row for each of 3 inputs"),
        (lambda inputs: inputs[0].mean(), "array or tensor of numbers, got float32"),
        (lambda inputs: None, "array or tensor of numbers, got NoneType"),
        (lambda inputs: (), "array or tensor of numbers, got tuple"),
        (lambda inputs: {"logits": inputs[0]}, "got dict"),
        (lambda inputs: inputs[0][:, : 1 + len(inputs[0])], "one row shape in all batches"),
        (lambda inputs: np.array(3.0), "one row for each"),
    ],
)
def test_a_model_that_answers_wrongly_is_named(run: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        measure_metric(run, Split("validation", SPLIT), "accuracy")


def test_masked_classes_may_be_minus_infinity() -> None:
    outputs = np.where(X > 0, X, -np.inf)
    measured, _ = measure_metric(lambda inputs: outputs[: len(inputs[0])], Split("v", [(X, Y)]), "accuracy")
    assert measured.value == 0.75


def test_same_seed_same_interval() -> None:
    rng = np.random.default_rng(0)
    split = Split("v", [(rng.normal(size=(50, 3)).astype(np.float32), rng.integers(0, 3, 50))])
    first, second = (measure_metric(lambda inputs: inputs[0], split, "f1_macro", seed=4)[0] for _ in range(2))
    assert first == second
