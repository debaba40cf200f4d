"""The task's metric: by a known name or as the user's own function, with an interval and the number of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fettle.core.codec import nearest
from fettle.core.data import Inputs, Split
from fettle.core.errors import DataError, FettleError, UsageError
from fettle.core.report import Direction, Measurement
from fettle.core.signature import Array
from fettle.evaluate.intervals import bootstrap, wilson

Run = Callable[[Inputs], Any]
Prepare = Callable[[Array, Array], tuple[Array, ...]]

_RESAMPLES = 1000
# A resample copies every value: above this many the count is lowered, never below a fifth of it.
_RESAMPLED_VALUES_LIMIT = 2 * 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One number from all outputs and targets, in two steps, so that a bootstrap repeats only the second.

    prepare: (outputs, targets) -> arrays of one row each, checked, and as small as the score allows.
    score: those arrays -> the metric.
    proportion: the score is the mean of one boolean array, so Wilson's interval holds.
    """

    name: str
    prepare: Prepare
    score: Callable[..., Any]
    direction: Direction = "higher"
    proportion: bool = False

    def measure(self, outputs: Array, targets: Array, *, data: str = "", seed: int = 0) -> Measurement:
        """The metric with its 95 percent interval, as "metric.<name>".

        outputs: (n, ...) the model's first output; targets: (n, ...).
        Raises UsageError where the arrays do not suit the metric or a custom function fails or is not finite.

        >>> outputs = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [1.0, 0.0]])
        >>> measured = find_metric("accuracy").measure(outputs, np.array([0, 1, 0, 1]))
        >>> measured.value, measured.n, round(measured.low, 3)
        (0.75, 4, 0.301)
        """
        arrays = self.prepare(outputs, targets)
        value = self._scored(arrays)
        if self.proportion:
            interval: tuple[float, float] | None = wilson(int(np.sum(arrays[0])), len(targets))
            note = "Wilson interval"
        else:
            size = sum(array.size for array in arrays)
            resamples = max(_RESAMPLES // 5, min(_RESAMPLES, _RESAMPLED_VALUES_LIMIT // max(1, size)))
            interval = bootstrap(self.score, *arrays, resamples=resamples, seed=seed)
            note = f"percentile bootstrap interval, {resamples} resamples" if interval else "no interval"
        low, high = interval or (None, None)
        return Measurement(
            name=f"metric.{self.name}",
            value=value,
            direction=self.direction,
            n=len(targets),
            low=low,
            high=high,
            data=data,
            note=note,
        )

    def _scored(self, arrays: Sequence[Array]) -> float:
        try:
            value = float(self.score(*arrays))
        except FettleError:
            raise
        except Exception as problem:
            shapes = " and ".join(f"{array.dtype} {list(array.shape)}" for array in arrays)
            raise UsageError(
                f"metric '{self.name}' must return one number for (outputs, targets), and on {shapes} it raised "
                f"{type(problem).__name__}: {problem}"
            ) from problem
        if not math.isfinite(value):
            raise UsageError(f"metric '{self.name}' must be a finite number, got {value}")
        return value


def measure_metric(
    run: Run, split: Split, metric: str | Callable[..., Any] | Metric, *, seed: int = 0
) -> tuple[Measurement, Array]:
    """Run the model over the split and measure. Returns ("metric.<name>", outputs of all rows in order).

    run: a batch's inputs, as a tuple of arrays, to an array or tensor of as many rows; of a model with several
        outputs, the first is measured. A loaded artifact is `lambda inputs: runner(*inputs)`.
    seed: of the bootstrap.

    Raises DataError where the model's answer has another number of rows, a shape that changes, or NaN; and what
    Split and Metric raise. Memory: the outputs of all rows at once.

    >>> x, y = np.eye(3, dtype=np.float32), np.array([0, 1, 0])
    >>> measured, outputs = measure_metric(lambda inputs: inputs[0], Split("validation", [(x, y)]), "accuracy")
    >>> measured.name, round(measured.value, 3), measured.n, outputs.shape
    ('metric.accuracy', 0.667, 3, (3, 3))
    """
    chosen = find_metric(metric)
    outputs, targets = [], []
    for index, (inputs, batch_targets) in enumerate(split):
        outputs.append(_answer(run(inputs), len(batch_targets), f"split '{split.name}', batch {index}"))
        targets.append(batch_targets)
    kinds = {(array.dtype.name, array.shape[1:]) for array in outputs}
    if len(kinds) > 1 or len({array.shape[1:] for array in targets}) > 1:
        raise DataError(
            f"split '{split.name}': outputs and targets must have one row shape in all batches, got outputs "
            f"{sorted(map(str, kinds))}: pad in the loader"
        )
    everything = np.concatenate(outputs)
    return chosen.measure(everything, np.concatenate(targets), data=split.name, seed=seed), everything


def find_metric(metric: str | Callable[..., Any] | Metric) -> Metric:
    """The metric of this name, or one made of the user's function `(outputs, targets) -> float`, higher is better.

    Raises UsageError for an unknown name, naming the nearest known one.

    >>> find_metric("top5_accuracy").direction
    'higher'
    >>> find_metric("acuracy")
    Traceback (most recent call last):
    fettle.core.errors.UsageError: unknown metric 'acuracy'; did you mean 'accuracy'? Known: accuracy, f1_macro, \
mean_squared_error, r2, top5_accuracy; or give your own "module:function" of (outputs, targets)
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        if metric not in METRICS:
            own = '; or give your own "module:function" of (outputs, targets)'
            raise UsageError(f"unknown metric '{metric}'{nearest(metric, list(METRICS))}{own}")
        return METRICS[metric]
    if not callable(metric):
        raise UsageError(f"a metric must be a name or a function of (outputs, targets), got {type(metric).__name__}")
    name = getattr(metric, "__name__", type(metric).__name__)
    return Metric(name="custom" if name == "<lambda>" else name, prepare=lambda o, t: (o, t), score=metric)


def hits(outputs: Array, targets: Array, k: int = 1) -> Array:
    """Per row, whether the target is among the k classes with the highest scores. Ties go to the lower class.

    outputs: (n, classes) scores; targets: (n,) class numbers. Returns (n,) bool; also what `compare_paired` takes.
    Raises UsageError for other shapes, targets that are no class, or fewer than k + 1 classes.

    >>> hits(np.array([[0.1, 0.9], [0.5, 0.5]]), np.array([0, 0])).tolist()
    [False, True]
    """
    _check_classes(outputs, targets)
    if outputs.shape[1] <= k:
        raise UsageError(f"top-{k} accuracy needs more than {k} classes, got {outputs.shape[1]}: all rows would count")
    of_target = np.take_along_axis(outputs, targets[:, None].astype(np.intp), axis=1)
    lower_class = np.arange(outputs.shape[1]) < targets[:, None]
    ahead = (outputs > of_target) | ((outputs == of_target) & lower_class)
    return np.asarray(np.count_nonzero(ahead, axis=1) < k)


def _check_classes(outputs: Array, targets: Array) -> None:
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise UsageError(
            "accuracy and F1 need outputs of shape (rows, classes) with at least 2 classes, got "
            f'{list(outputs.shape)}: give your own metric as "module:function" of (outputs, targets)'
        )
    if targets.shape != outputs.shape[:1] or targets.dtype.kind not in "iub":
        raise UsageError(
            f"accuracy and F1 need targets of shape ({len(outputs)},) holding class numbers, got {targets.dtype} "
            f"{list(targets.shape)}: yield integers, not one-hot rows"
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= outputs.shape[1]:
        raise UsageError(
            f"targets must be classes from 0 to {outputs.shape[1] - 1}, as the model has {outputs.shape[1]} outputs, "
            f"got {low if low < 0 else high}"
        )


def _hits_of(k: int) -> Prepare:
    return lambda outputs, targets: (hits(outputs, targets, k),)


def _classes(outputs: Array, targets: Array) -> tuple[Array, ...]:
    _check_classes(outputs, targets)
    return outputs.argmax(axis=1), targets.astype(np.intp)


def _f1_macro(predicted: Array, targets: Array) -> float:
    """Mean over the classes seen, in targets or predictions, of F1 = 2 TP / (2 TP + FP + FN)."""
    size = int(max(predicted.max(), targets.max())) + 1
    true_positive = np.bincount(targets[predicted == targets], minlength=size)
    # 2 TP + FP + FN: each row adds one for its target and one for its prediction.
    total = np.bincount(targets, minlength=size) + np.bincount(predicted, minlength=size)
    seen = total > 0
    return float(np.mean(2 * true_positive[seen] / total[seen]))


def _values(outputs: Array, targets: Array) -> tuple[Array, ...]:
    """Outputs and targets in float64 and of one shape; (n, 1) and (n,) are the same thing."""
    a = outputs.reshape(len(outputs), -1).astype(np.float64)
    b = targets.reshape(len(targets), -1).astype(np.float64)
    if a.shape != b.shape:
        raise UsageError(
            f"a regression metric needs outputs and targets of one shape, got {list(outputs.shape)} and "
            f"{list(targets.shape)}"
        )
    return a, b


def _squared_errors(outputs: Array, targets: Array) -> tuple[Array, ...]:
    a, b = _values(outputs, targets)
    return (np.mean((a - b) ** 2, axis=1),)


def _r2(outputs: Array, targets: Array) -> float:
    """1 - sum (y - ŷ)² / sum (y - mean y)², over all values."""
    spread = float(np.sum((targets - targets.mean(axis=0)) ** 2))
    if spread == 0:
        raise UsageError("r2 needs targets that differ, got the same value in every row")
    return 1 - float(np.sum((targets - outputs) ** 2)) / spread


def _answer(output: Any, rows: int, where: str) -> Array:
    first = output[0] if isinstance(output, tuple | list) and output else output
    if hasattr(first, "detach"):
        first = first.detach().cpu().numpy()
    if not isinstance(first, np.ndarray) or first.dtype.kind not in "fiub":
        raise DataError(f"{where}: the model must return an array or tensor of numbers, got {type(first).__name__}")
    if first.ndim == 0 or len(first) != rows:
        raise DataError(
            f"{where}: the model must return one row for each of {rows} inputs, got shape {list(first.shape)}"
        )
    if first.dtype.kind == "f" and np.isnan(first).any():
        bad = int(np.isnan(first).reshape(rows, -1).any(axis=1).sum())
        raise DataError(f"{where}: the model's outputs must be numbers, got NaN in {bad} of {rows} rows")
    return first


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(name="accuracy", prepare=_hits_of(1), score=np.mean, proportion=True),
        Metric(name="top5_accuracy", prepare=_hits_of(5), score=np.mean, proportion=True),
        Metric(name="f1_macro", prepare=_classes, score=_f1_macro),
        Metric(name="mean_squared_error", prepare=_squared_errors, score=np.mean, direction="lower"),
        Metric(name="r2", prepare=_values, score=_r2),
    )
}
