"""How far two answers to the same input differ."""

from __future__ import annotations

import math

import numpy as np

from fettle.core.signature import Array
from fettle.serve.binary import outputs_in
from fettle.serve.jobs import Result
from fettle.serve.refusal import Refusal

# Reading more of JSON would hold the event loop up.
_AT_MOST_BYTES = 64 * 2**10


def agreeing_rows(first: Result, second: Result) -> int:
    """Rows to which both give the same class. Both were observed: their `rows` are not 0."""
    if first.rows != second.rows:
        return 0
    return int((_classes_of(first) == _classes_of(second)).sum())


def _classes_of(result: Result) -> Array:
    scores = np.frombuffer(result.observed, np.float32, result.rows * result.classes)
    classes: Array = scores.reshape(result.rows, result.classes).argmax(axis=1)
    return classes


def largest_difference(first: Result, second: Result) -> float | None:
    """The largest absolute difference in any output; infinite where names, shapes or NaNs differ.

    None where an answer has more than 64 KiB or cannot be read.
    """
    if max(len(first.content), len(second.content)) > _AT_MOST_BYTES:
        return None
    try:
        ours, theirs = (outputs_in(one.content, header_bytes=one.header_bytes) for one in (first, second))
    except Refusal:
        return None
    if {name: array.shape for name, array in ours.items()} != {name: array.shape for name, array in theirs.items()}:
        return math.inf
    return max((_difference(array, theirs[name]) for name, array in ours.items()), default=0.0)


def _difference(first: Array, second: Array) -> float:
    ours, theirs = first.astype(np.float64), second.astype(np.float64)
    equal = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))  # infinity is as far from itself as NaN
    with np.errstate(invalid="ignore"):
        apart = np.where(equal, 0.0, np.abs(ours - theirs))
    return float(np.nan_to_num(apart, nan=math.inf, posinf=math.inf).max())
