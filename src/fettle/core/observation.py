"""One answered prediction, as the server logs it and the monitor reads it: the rows of a Parquet file.

The two sides share only this schema and the folder. Files are complete once they have their `.parquet` name
(written aside, then renamed), sorted by name in order of time, and never changed afterwards.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from fettle.core.signature import Array

# Statistics of one request's input row, over all its values; the same at optimize time and at serving time.
STATISTICS = ("mean", "std", "min", "max", "roughness")

SCHEMA = pa.schema(
    [
        pa.field("time", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("version", pa.int32(), nullable=False),
        pa.field("digest", pa.string(), nullable=False),
        pa.field("latency_ms", pa.float32(), nullable=False),
        pa.field("predicted", pa.int32(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("probabilities", pa.list_(pa.float32()), nullable=False),
        pa.field("statistics", pa.list_(pa.float32(), len(STATISTICS)), nullable=False),
    ]
)


def input_statistics(rows: Array) -> Array:
    """Per row: mean, standard deviation, minimum, maximum and roughness of its values.

    rows: (n, ...) of any numeric type. Returns (n, 5) float32 in the order of STATISTICS. Roughness is the mean
    absolute difference of neighbors along the last axis: noise raises it, blur lowers it, both leave the mean.

    >>> input_statistics(np.array([[0.0, 1.0, 0.0, 1.0]])).tolist()
    [[0.5, 0.5, 0.0, 1.0, 1.0]]
    """
    values = rows.astype(np.float32, copy=False).reshape(len(rows), -1)
    steps = np.abs(np.diff(rows.astype(np.float32, copy=False), axis=-1)).reshape(len(rows), -1)
    roughness = steps.mean(axis=1) if steps.shape[1] else np.zeros(len(rows), np.float32)
    columns = (values.mean(axis=1), values.std(axis=1), values.min(axis=1), values.max(axis=1), roughness)
    return np.stack(columns, axis=1).astype(np.float32)
