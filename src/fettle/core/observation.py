"""One answered prediction, as the server logs it and the monitor reads it: the rows of a Parquet file.

The two sides share only this schema and the folder. Files are complete once they have their `.parquet` name
(written aside, then renamed), sorted by name in order of time, and never changed afterwards.
"""

from __future__ import annotations

import pyarrow as pa

from fettle.core.statistics import STATISTICS

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
