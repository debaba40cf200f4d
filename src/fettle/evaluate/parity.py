"""How far a compressed model's answers are from the original's, whatever the labels say.

Accuracy alone hardly tells two quantizers apart: one may lose as many rows as it wins by luck. Agreement does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fettle.core.errors import UsageError
from fettle.core.report import Direction, Measurement
from fettle.core.signature import Array
from fettle.evaluate.intervals import wilson

_CHUNK_VALUES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """The outcome of `compare_outputs`.

    agreement: share of rows that are given the same class, with Wilson's interval [low, high]; all None where the
        outputs are no class scores. n: rows.
    max_abs, mean_abs: of |reference - candidate| over all values.
    sqnr_db: signal to quantization noise; infinite where the outputs are identical.
    divergence: mean over the rows of the root of `divergence`, the steadiest of these: it weighs every row by how far
        its answer moved, where agreement counts the few that moved past a border.
    """

    agreement: float | None
    low: float | None
    high: float | None
    n: int
    max_abs: float
    mean_abs: float
    sqnr_db: float
    divergence: float

    def measurements(self, data: str = "") -> tuple[Measurement, ...]:
        """For a Report: "parity.agreement", "parity.max_abs", "parity.mean_abs", "parity.sqnr",
        "parity.divergence".

        A number that JSON cannot hold (an infinite ratio) or that is not there is left out.
        """
        note = "against the original's outputs"
        known: list[tuple[str, float | None, str, Direction]] = [
            ("agreement", self.agreement, "", "higher"),
            ("max_abs", self.max_abs, "", "lower"),
            ("mean_abs", self.mean_abs, "", "lower"),
            ("sqnr", self.sqnr_db, "dB", "higher"),
            ("divergence", self.divergence, "", "lower"),
        ]
        return tuple(
            Measurement(
                name=f"parity.{name}",
                value=value,
                unit=unit,
                direction=direction,
                n=self.n,
                low=self.low if name == "agreement" else None,
                high=self.high if name == "agreement" else None,
                data=data,
                note=note,
            )
            for name, value, unit, direction in known
            if value is not None and math.isfinite(value)
        )


def compare_outputs(reference: Array, candidate: Array, *, classification: bool = True) -> Parity:
    """Compare two models' outputs on the same rows in the same order.

        sqnr_db = 10 log10( sum reference² / sum (reference - candidate)² )

    reference, candidate: (n, ...) of one shape. The class of a row is its argmax, where the shape is (n, classes)
    with at least two classes and `classification` is True. Computed in float64, chunk by chunk, so that memory
    stays a few megabytes above the arrays'. Two equal infinities differ by nothing.
    Raises UsageError for shapes that differ, no rows, or NaN.

    >>> a = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.9]])
    >>> b = np.array([[1.0, 0.0], [0.0, 1.0], [0.9, 1.0]])
    >>> parity = compare_outputs(a, b)
    >>> round(parity.agreement, 3), round(parity.max_abs, 3), round(parity.sqnr_db, 1)
    (0.667, 0.1, 22.8)
    """
    if reference.shape != candidate.shape or reference.ndim == 0 or not reference.size:
        raise UsageError(
            "outputs can be compared where both models give the same shape, at least one row, got "
            f"{list(reference.shape)} and {list(candidate.shape)}"
        )
    n = len(reference)
    classes = classification and reference.ndim == 2 and reference.shape[1] >= 2
    step = max(1, _CHUNK_VALUES * n // reference.size)
    agreeing, largest, absolute, noise, signal, distance = 0, 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, n, step):
        a = reference[start : start + step].astype(np.float64)
        b = candidate[start : start + step].astype(np.float64)
        if np.isnan(a).any() or np.isnan(b).any():
            raise UsageError("outputs must be numbers to be compared, got NaN")
        if classes:
            agreeing += int(np.sum(a.argmax(axis=1) == b.argmax(axis=1)))
        # inf - inf would be NaN where the two models agree to mask a class.
        difference = np.abs(np.subtract(a, b, out=np.zeros_like(a), where=a != b))
        largest = max(largest, float(difference.max()))
        absolute += float(difference.sum())
        noise += float(np.sum(difference**2))
        signal += float(np.sum(a[np.isfinite(a)] ** 2))
        distance += float(np.sqrt(divergence(a, b)).sum())
    low, high = wilson(agreeing, n) if classes else (None, None)
    return Parity(
        agreement=agreeing / n if classes else None,
        low=low,
        high=high,
        n=n,
        max_abs=largest,
        mean_abs=absolute / reference.size,
        sqnr_db=_decibels(signal, noise),
        divergence=distance / n,
    )


def divergence(reference: Array, candidate: Array) -> Array:
    """(n,): of class scores (n, classes) the Kullback-Leibler divergence of their softmax, else the squared error.

    >>> divergence(np.zeros((1, 2)), np.zeros((1, 2)))
    array([0.])
    """
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    with np.errstate(invalid="ignore"):  # an infinite score has no distance that could be compared: NaN
        if a.ndim == 2 and a.shape[1] >= 2:
            p, q = _log_softmax(a), _log_softmax(b)
            return np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0)  # type: ignore[no-any-return]
        return np.square(a - b).reshape(len(a), -1).mean(axis=1)  # type: ignore[no-any-return]


def _log_softmax(scores: Array) -> Array:
    shifted = scores - scores.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # type: ignore[no-any-return]


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and noise < math.inf else -math.inf
