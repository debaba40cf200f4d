"""The prediction log: answered predictions to Parquet files, at bounded cost, never in the way of an answer.

The event loop puts rows on a bounded queue; a thread writes them. A full queue, or a disk that does not take the
file, loses rows and counts them.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fettle.core.observation import SCHEMA
from fettle.core.signature import Array
from fettle.core.statistics import STATISTICS
from fettle.serve.jobs import Result
from fettle.serve.metrics import Metrics
from fettle.serve.model import Served
from fettle.serve.options import ServeOptions

_log = logging.getLogger("fettle.serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """The answered rows of one request. probabilities: (rows, classes); statistics: (rows, 5); time_us: Unix time."""

    time_us: int
    request_id: str
    model: str
    version: int
    digest: str
    latency_ms: float
    probabilities: Array
    statistics: Array


def observation_of(result: Result, *, model: Served, request_id: str, latency_ms: float) -> Observation:
    """What a worker observed of one request."""
    split = 4 * result.rows * result.classes
    return Observation(
        time_us=time.time_ns() // 1000,
        request_id=request_id,
        model=model.name,
        version=model.version,
        digest=model.digest,
        latency_ms=latency_ms,
        probabilities=np.frombuffer(result.observed[:split], np.float32).reshape(result.rows, result.classes),
        statistics=np.frombuffer(result.observed[split:], np.float32).reshape(result.rows, len(STATISTICS)),
    )


def table_of(observations: list[Observation]) -> pa.Table:
    """One table in `core.observation.SCHEMA`, a row for each predicted row; numbers of classes may differ."""
    counts = [len(item.probabilities) for item in observations]

    def repeated(values: list[object], kind: pa.DataType) -> pa.Array:
        return pa.array([value for value, count in zip(values, counts, strict=True) for _ in range(count)], kind)

    widths = np.repeat([item.probabilities.shape[1] for item in observations], counts)
    offsets = np.concatenate([[0], np.cumsum(widths)]).astype(np.int32)
    values = np.concatenate([item.probabilities.astype(np.float32).ravel() for item in observations])
    statistics = np.concatenate([item.statistics.astype(np.float32).ravel() for item in observations])
    predicted = np.concatenate([item.probabilities.argmax(axis=1) for item in observations]).astype(np.int32)
    confidence = np.concatenate([item.probabilities.max(axis=1) for item in observations]).astype(np.float32)
    columns = [
        repeated([item.time_us for item in observations], SCHEMA.field("time").type),
        repeated([item.request_id for item in observations], pa.string()),
        repeated([item.model for item in observations], pa.string()),
        repeated([item.version for item in observations], pa.int32()),
        repeated([item.digest for item in observations], pa.string()),
        repeated([item.latency_ms for item in observations], pa.float32()),
        pa.array(predicted),
        pa.array(confidence),
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)),
        pa.FixedSizeListArray.from_arrays(pa.array(statistics), len(STATISTICS)),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def write_table(table: pa.Table, folder: Path, number: int) -> Path:
    """Write aside, then rename: a reader sees the whole file or none. Names sort in order of time."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    path = folder / f"{stamp}-{os.getpid()}-{number:06d}.parquet"
    aside = path.with_suffix(".tmp")
    try:
        with aside.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return path


class ObservationLog:
    """A bounded queue and its writer thread. `add` never blocks and never raises."""

    def __init__(self, folder: Path, *, options: ServeOptions, metrics: Metrics) -> None:
        self._folder = folder
        self._flush_rows = options.log_rows
        self._flush_s = options.log_flush_s
        self._max_queue_rows = options.log_queue_rows
        self._metrics = metrics
        self._queue: queue.SimpleQueue[Observation | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._rows = 0
        self._files = 0
        self._thread = threading.Thread(target=self._write, name="fettle-log", daemon=True)
        self._thread.start()

    def add(self, observation: Observation) -> None:
        """Queue the rows, or drop and count them where too many wait."""
        rows = len(observation.probabilities)
        with self._lock:
            fits = self._rows + rows <= self._max_queue_rows
            self._rows += rows if fits else 0
        if fits:
            self._queue.put(observation)
        else:
            self._metrics.observations_dropped.inc(rows)

    def close(self, timeout_s: float) -> bool:
        """Write what waits and stop; False where that did not end in time."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _write(self) -> None:
        held: list[Observation] = []
        rows = 0
        due = 0.0
        while True:
            try:
                item = self._queue.get(timeout=max(0.0, due - time.monotonic()) if held else None)
            except queue.Empty:
                self._flush(held, rows)
                held, rows = [], 0
                continue
            if item is not None:
                due = due if held else time.monotonic() + self._flush_s
                held.append(item)
                rows += len(item.probabilities)
            if held and (item is None or rows >= self._flush_rows or time.monotonic() >= due):
                self._flush(held, rows)
                held, rows = [], 0
            if item is None:
                return

    def _flush(self, held: list[Observation], rows: int) -> None:
        try:
            for name in dict.fromkeys(item.model for item in held):
                mine = [item for item in held if item.model == name]
                self._files += 1
                write_table(table_of(mine), _folder_of(name, self._folder), self._files)
                written = sum(len(item.probabilities) for item in mine)
                self._metrics.observations.inc(written)
                rows -= written
        except Exception as problem:  # whatever it is, it must not end the log or reach a request
            self._metrics.observations_dropped.inc(rows)
            _log.error("%d rows of the prediction log were lost: %s", rows, problem)
        finally:
            with self._lock:
                self._rows -= sum(len(item.probabilities) for item in held)


def _folder_of(model: str, folder: Path) -> Path:
    """Where the rows of a model go: "{model}" in the folder's path stands for its name.

    >>> _folder_of("digits", Path("/logs/{model}/rows")).as_posix()
    '/logs/digits/rows'
    """
    return Path(*(part.replace("{model}", model) for part in folder.parts))
