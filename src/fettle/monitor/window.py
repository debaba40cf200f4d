"""A window: the rows of the prediction log that one artifact answered, as arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fettle.core.errors import UsageError
from fettle.core.observation import SCHEMA
from fettle.core.signature import Array
from fettle.core.statistics import STATISTICS

_COLUMNS = ("time", "version", "digest", "latency_ms", "confidence", "probabilities", "statistics")
_ROWS = pa.schema([SCHEMA.field(name) for name in _COLUMNS])
_BATCH_ROWS = 8192
# What pyarrow raises on files that are truncated, altered or not Parquet; OverflowError on a time beyond year 9999.
_UNREADABLE = (OSError, ValueError, KeyError, OverflowError, pa.ArrowException)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Current metrics of a window; None where there is no row to take it from.

    not_finite: rows whose confidence is NaN or infinite; the means are over the others.
    predictions_per_minute: over the window's bounds where both are known and all rows between are in it, else
        between its first and last row.
    """

    count: int
    mean_confidence: float | None
    min_confidence: float | None
    mean_latency_ms: float | None
    p95_latency_ms: float | None
    predictions_per_minute: float | None
    not_finite: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Observations of one artifact in order of time, n rows.

    probabilities: (n, classes) float32; statistics: (n, 5) float32 in the order of core.observation.STATISTICS.
    confidences, latencies_ms: (n,) float32; times: (n,) datetime64[us] in UTC; versions: (n,) int32.
    since, until: the bounds asked for, since <= time < until.
    cut: it holds as many rows as were asked for, so the log may hold more within the bounds.
    problems: what was left out and why, one sentence each.
    """

    digest: str
    probabilities: Array
    statistics: Array
    confidences: Array
    latencies_ms: Array
    times: Array
    versions: Array
    since: datetime | None = None
    until: datetime | None = None
    cut: bool = False
    problems: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.times)

    def summary(self) -> Summary:
        """Count, confidence, latency and rate."""
        confidences = self.confidences[np.isfinite(self.confidences)].astype(np.float64)
        latencies = self.latencies_ms[np.isfinite(self.latencies_ms)].astype(np.float64)
        return Summary(
            count=len(self),
            mean_confidence=float(confidences.mean()) if len(confidences) else None,
            min_confidence=float(confidences.min()) if len(confidences) else None,
            mean_latency_ms=float(latencies.mean()) if len(latencies) else None,
            p95_latency_ms=float(np.quantile(latencies, 0.95)) if len(latencies) else None,
            predictions_per_minute=self._rate(),
            not_finite=len(self) - len(confidences),
        )

    def _rate(self) -> float | None:
        if self.since is not None and self.until is not None and not self.cut:
            return len(self) / ((self.until - self.since).total_seconds() / 60)
        if len(self) < 2:
            return None
        minutes = float((self.times[-1] - self.times[0]) / np.timedelta64(1, "us")) / 60e6
        # n rows bound n - 1 gaps.
        return (len(self) - 1) / minutes if minutes > 0 else None


def read_window(
    folder: Path,
    *,
    digest: str,
    since: datetime | None = None,
    until: datetime | None = None,
    last: int | None = None,
) -> Window:
    """Read the rows that artifact `digest` answered with since <= time < until, the newest `last` of them.

    A file whose footer rules it out is not read; one that cannot be read as a log is left out and named in
    `Window.problems`. Memory is bounded by the rows asked for plus two batches, whatever the log's size. Rows with
    another number of classes than most are left out and named too. A folder that does not exist is an empty one.

    Raises UsageError for bounds that cannot mean anything.

    >>> len(read_window(Path("/nowhere"), digest="0" * 64))
    0
    """
    since, until = _utc(since, "since"), _utc(until, "until")
    if since is not None and until is not None and since >= until:
        raise UsageError(f"a window needs since before until, got {since.isoformat()} and {until.isoformat()}")
    if last is not None and last < 1:
        raise UsageError(f"a window of the last rows needs at least 1, got {last}")
    problems: list[str] = []
    rows = _ROWS.empty_table()
    for path, newest in _newest_first(folder, problems):
        if last is not None and len(rows) >= last and newest is not None and _micros(newest) < rows["time"][0].value:
            break
        try:
            found = _read_file(path, digest=digest, since=since, until=until, last=last)
        except _UNREADABLE as problem:
            problems.append(_left_out(path, problem))
            continue
        rows = _keep_newest([rows, found], last) if len(found) else rows
    window = _window(rows, digest=digest, problems=problems)
    return replace(window, since=since, until=until, cut=last is not None and len(rows) == last)


def _newest_first(folder: Path, problems: list[str]) -> Iterator[tuple[Path, datetime | None]]:
    """Every log file with the time of its newest row (None: unknown), newest first, unknown ones before all."""
    found: list[tuple[Path, datetime | None]] = []
    for path in sorted(folder.glob("*.parquet")) if folder.is_dir() else []:
        if path.name.startswith(".") or not path.is_file():
            continue
        try:
            found.append((path, _bounds(pq.read_metadata(path), "time")[1]))
        except _UNREADABLE as problem:
            problems.append(_left_out(path, problem))
    endless = datetime.max.replace(tzinfo=UTC)
    yield from sorted(found, key=lambda entry: entry[1] or endless, reverse=True)


def _bounds(metadata: pq.FileMetaData, column: str) -> tuple[datetime | None, datetime | None]:
    """The smallest and largest time in a file's footer, None where it does not say."""
    low: list[datetime] = []
    high: list[datetime] = []
    for group in range(metadata.num_row_groups):
        span = _group_span(metadata.row_group(group), column)
        if span is None or not all(isinstance(end, datetime) and end.tzinfo for end in span):
            return None, None
        low.append(span[0])
        high.append(span[1])
    return (min(low), max(high)) if low else (None, None)


def _group_span(group: pq.RowGroupMetaData, column: str) -> tuple[datetime, datetime] | None:
    for index in range(group.num_columns):
        chunk = group.column(index)
        if chunk.path_in_schema == column:
            known = chunk.statistics
            return (known.min, known.max) if known is not None and known.has_min_max else None
    return None


def _read_file(
    path: Path, *, digest: str, since: datetime | None, until: datetime | None, last: int | None
) -> pa.Table:
    """The rows wanted of one file, all or none: a file that breaks half-way raises."""
    with pq.ParquetFile(path) as file:
        missing = [name for name in _COLUMNS if name not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"no column {', '.join(missing)}")
        oldest, newest = _bounds(file.metadata, "time")
        if (since and newest and newest < since) or (until and oldest and oldest >= until):
            return _ROWS.empty_table()
        kept: list[pa.Table] = []
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(_COLUMNS)):
            rows = pa.Table.from_batches([batch]).select(_COLUMNS).cast(_ROWS)
            if any(column.null_count for column in rows.columns) or pc.list_flatten(rows["probabilities"]).null_count:
                raise ValueError("a null where the log has none")
            wanted = rows.filter(_mask(rows, digest, since, until))
            wanted.validate(full=True)
            if len(wanted):
                kept.append(wanted)
            if last is not None and sum(map(len, kept)) > last + _BATCH_ROWS:
                kept = [_keep_newest(kept, last)]
        return _keep_newest(kept, last) if kept else _ROWS.empty_table()


def _mask(rows: pa.Table, digest: str, since: datetime | None, until: datetime | None) -> pa.ChunkedArray:
    mask = pc.equal(rows["digest"], digest)
    if since is not None:
        mask = pc.and_(mask, pc.greater_equal(rows["time"], pa.scalar(since, SCHEMA.field("time").type)))
    if until is not None:
        mask = pc.and_(mask, pc.less(rows["time"], pa.scalar(until, SCHEMA.field("time").type)))
    return mask


def _keep_newest(tables: list[pa.Table], last: int | None) -> pa.Table:
    """All tables as one in order of time, cut to the newest rows."""
    rows = pa.concat_tables(tables)
    order = np.argsort(rows["time"].cast(pa.int64()).to_numpy(), kind="stable")
    # take() copies, so the memory of what is left out is given back.
    return rows.take(pa.array(order if last is None else order[-last:]))


def _window(rows: pa.Table, *, digest: str, problems: list[str]) -> Window:
    widths = pc.list_value_length(rows["probabilities"]).to_numpy()
    classes = Counter(widths.tolist()).most_common(1)[0][0] if len(rows) else 0
    if odd := int((widths != classes).sum()):
        problems = [*problems, f"{odd} rows left out: they do not have {classes} classes, as most rows have"]
        rows = rows.filter(pa.array(widths == classes))

    def matrix(name: str, width: int) -> Array:
        flat: Array = pc.list_flatten(rows[name]).to_numpy()
        return flat.reshape(len(rows), width)

    return Window(
        digest=digest,
        probabilities=matrix("probabilities", classes),
        statistics=matrix("statistics", len(STATISTICS)),
        confidences=rows["confidence"].to_numpy(),
        latencies_ms=rows["latency_ms"].to_numpy(),
        times=rows["time"].cast(pa.int64()).to_numpy().astype("datetime64[us]"),
        versions=rows["version"].to_numpy(),
        problems=tuple(problems),
    )


def _left_out(path: Path, problem: Exception) -> str:
    reason = " ".join(str(problem).split())[:200] or type(problem).__name__
    return f"{path.name} left out: it cannot be read as a prediction log ({reason})"


def _micros(time: datetime) -> int:
    return int(pa.scalar(time, SCHEMA.field("time").type).value)


def _utc(time: datetime | None, name: str) -> datetime | None:
    if time is not None and time.tzinfo is None:
        raise UsageError(f"{name} must have a time zone, got {time.isoformat()}: use datetime.now(UTC)")
    return None if time is None else time.astimezone(UTC)
