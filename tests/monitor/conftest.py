"""Logs, windows and references made to order."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fettle.core.observation import SCHEMA
from fettle.monitor.window import Window

START = datetime(2026, 11, 1, 12, tzinfo=UTC)
DIGEST = "a" * 64


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def make_table(rows: int, **changes) -> pa.Table:
    """Log rows one second apart; a change is a column's list, or one value for every row."""
    rng = np.random.default_rng(rows)
    start = changes.pop("start", START)
    probabilities = rng.dirichlet(np.full(changes.pop("classes", 3), 0.5), rows).astype(np.float32)
    columns = {
        "time": [start + timedelta(seconds=i) for i in range(rows)],
        "request_id": [f"r{i}" for i in range(rows)],
        "model": "digits",
        "version": 1,
        "digest": DIGEST,
        "latency_ms": np.arange(rows, dtype=np.float32).tolist(),
        "predicted": probabilities.argmax(axis=1).tolist() if rows else [],
        "confidence": probabilities.max(axis=1).tolist() if rows else [],
        "probabilities": probabilities.tolist(),
        "statistics": rng.normal(size=(rows, 5)).astype(np.float32).tolist(),
        **changes,
    }
    filled = {key: value if isinstance(value, list) else [value] * rows for key, value in columns.items()}
    return pa.table(filled, schema=SCHEMA)


@pytest.fixture
def log(tmp_path):
    """log(name, rows, **changes) writes one file of the folder log.folder and returns its table."""

    def write(name: str, rows: int, *, group: int = 64, **changes) -> pa.Table:
        table = make_table(rows, **changes)
        write.folder.mkdir(exist_ok=True)
        pq.write_table(table, write.folder / f"{name}.parquet", row_group_size=group)
        return table

    write.folder = tmp_path / "log"
    return write


@pytest.fixture
def make_window():
    """A window of these arrays; what is not given follows from the number of rows."""

    def make(probabilities, statistics, digest: str = DIGEST) -> Window:
        n = len(probabilities)
        return Window(
            digest=digest,
            probabilities=np.asarray(probabilities, np.float32),
            statistics=np.asarray(statistics, np.float32),
            confidences=np.ones(n, np.float32),
            latencies_ms=np.ones(n, np.float32),
            times=np.arange(n).astype("datetime64[us]"),
            versions=np.ones(n, np.int32),
        )

    return make
