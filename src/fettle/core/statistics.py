"""Five numbers that say how an input looks: the same when a model is optimized, served and monitored."""

from __future__ import annotations

import numpy as np

from fettle.core.signature import Array

# Statistics of one request's input row, over all its values; the same at optimize time and at serving time.
STATISTICS = ("mean", "std", "min", "max", "roughness")


def input_statistics(rows: Array) -> Array:
    """Per row: mean, standard deviation, minimum, maximum and roughness of its values.

    rows: (n, ...) of any numeric type. Returns (n, 5) float32 in the order of STATISTICS. Roughness is the mean
    absolute difference of neighbors along the last axis: noise raises it, blur lowers it, both leave the mean.

    >>> input_statistics(np.array([[0.0, 1.0, 0.0, 1.0]])).tolist()
    [[0.5, 0.5, 0.0, 1.0, 1.0]]
    """
    values = rows.astype(np.float32, copy=False).reshape(len(rows), -1)
    lines = rows.astype(np.float32, copy=False) if rows.ndim > 1 else values  # one number has no neighbors
    steps = np.abs(np.diff(lines, axis=-1)).reshape(len(rows), -1)
    roughness = steps.mean(axis=1) if steps.shape[1] else np.zeros(len(rows), np.float32)
    columns = (values.mean(axis=1), values.std(axis=1), values.min(axis=1), values.max(axis=1), roughness)
    return np.stack(columns, axis=1).astype(np.float32)
