"""Reading the log: the right rows, in order, in bounded memory, whatever else lies in the folder."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fettle.core.errors import UsageError
from fettle.monitor import window as module
from fettle.monitor.window import read_window

START = datetime(2026, 11, 1, 12, tzinfo=UTC)
DIGEST = "a" * 64


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def test_arrays_hold_what_was_logged(log):
    table = log("1", 100)
    window = read_window(log.folder, digest=DIGEST)
    assert len(window) == 100
    assert window.probabilities.dtype == window.statistics.dtype == np.float32
    np.testing.assert_array_equal(window.probabilities, np.array(table["probabilities"].to_pylist(), np.float32))
    np.testing.assert_array_equal(window.statistics, np.array(table["statistics"].to_pylist(), np.float32))
    np.testing.assert_array_equal(window.confidences, np.array(table["confidence"].to_pylist(), np.float32))
    np.testing.assert_array_equal(window.latencies_ms, np.arange(100, dtype=np.float32))
    assert window.times[0] == np.datetime64("2026-11-01T12:00:00")
    assert window.versions.tolist() == [1] * 100
    assert window.problems == ()


@pytest.mark.parametrize("exists", [True, False])
def test_an_empty_folder_is_an_empty_window(tmp_path, exists):
    folder = tmp_path if exists else tmp_path / "none"
    window = read_window(folder, digest=DIGEST)
    assert len(window) == 0
    assert window.statistics.shape == (0, 5)
    assert window.probabilities.shape == (0, 0)
    summary = window.summary()
    assert (summary.count, summary.mean_confidence, summary.p95_latency_ms) == (0, None, None)
    assert summary.predictions_per_minute is None


def test_a_file_without_rows_is_fine(log):
    log("1", 0)
    log("2", 3)
    window = read_window(log.folder, digest=DIGEST)
    assert len(window) == 3
    assert window.problems == ()


def test_only_rows_of_the_artifact_are_read(log):
    log("1", 10, digest=[DIGEST, "b" * 64] * 5)
    log("2", 4, digest="b" * 64)
    assert len(read_window(log.folder, digest=DIGEST)) == 5
    assert len(read_window(log.folder, digest="b" * 64)) == 9
    assert len(read_window(log.folder, digest="c" * 64)) == 0


def test_one_artifact_may_serve_as_several_versions(log):
    log("1", 3, version=[1, 2, 2])
    assert read_window(log.folder, digest=DIGEST).versions.tolist() == [1, 2, 2]


@pytest.mark.parametrize(
    ("since", "until", "expected"),
    [(None, None, 30), (10, None, 20), (None, 10, 10), (10, 20, 10), (29, None, 1), (30, None, 0), (None, 0, 0)],
)
def test_bounds_include_since_and_exclude_until(log, since, until, expected):
    for i in range(3):
        log(str(i), 10, start=at(10 * i))
    window = read_window(
        log.folder,
        digest=DIGEST,
        since=None if since is None else at(since),
        until=None if until is None else at(until),
    )
    assert len(window) == expected


@pytest.mark.parametrize("last", [1, 5, 10, 11, 25, 30, 1000])
def test_last_keeps_the_newest_rows_in_order(log, last):
    for i in range(3):
        log(str(i), 10, start=at(10 * i))
    times = read_window(log.folder, digest=DIGEST, last=last).times
    expected = [np.datetime64(at(i).replace(tzinfo=None), "us") for i in range(30)][-last:]
    assert times.tolist() == np.array(expected).tolist()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 12), st.booleans()), min_size=1, max_size=5),
    last=st.integers(1, 40),
)
def test_last_equals_sorting_everything(log, files, last):
    """Files of several workers overlap in time and are named in any order; the slow way reads all of them."""
    for old in log.folder.glob("*.parquet") if log.folder.is_dir() else []:
        old.unlink()
    expected = []
    for i, (offset, rows, mine) in enumerate(files):
        table = log(str(i), rows, start=at(offset), digest=DIGEST if mine else "b" * 64)
        expected += table["time"].to_pylist() if mine else []
    times = read_window(log.folder, digest=DIGEST, last=last).times
    assert [time.replace(tzinfo=UTC) for time in times.tolist()] == sorted(expected)[-last:]


def test_files_that_cannot_matter_are_not_read(log, monkeypatch):
    for i in range(20):
        log(f"{i:02}", 10, start=at(10 * i))
    read: list[str] = []
    whole = module._read_file
    monkeypatch.setattr(module, "_read_file", lambda path, **bounds: read.append(path.stem) or whole(path, **bounds))
    assert len(read_window(log.folder, digest=DIGEST, last=15)) == 15
    assert read == ["19", "18"]


def test_a_file_outside_the_bounds_has_no_rows_decoded(log, monkeypatch):
    log("old", 10)
    log("new", 10, start=at(100))
    decoded: list[int] = []
    iterate = pq.ParquetFile.iter_batches

    def count(self, *arguments, **options):
        decoded.append(1)
        return iterate(self, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", count)
    assert len(read_window(log.folder, digest=DIGEST, since=at(100))) == 10
    assert len(read_window(log.folder, digest=DIGEST, until=at(50))) == 10
    assert len(decoded) == 2


def test_memory_is_bounded_by_the_rows_asked_for(log, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_ROWS", 100)
    log("1", 5000, group=500)
    held: list[int] = []
    keep = module._keep_newest

    def watch(tables, last):
        held.append(sum(map(len, tables)))
        return keep(tables, last)

    monkeypatch.setattr(module, "_keep_newest", watch)
    assert len(read_window(log.folder, digest=DIGEST, last=50)) == 50
    assert max(held) <= 50 + 2 * 100


BROKEN = {
    "empty": b"",
    "text": b"time,digest\n1,2\n",
    "magic only": b"PAR1PAR1",
    "wrong footer": b"PAR1" + b"\xff" * 64 + b"\x10\x00\x00\x00PAR1",
}


@pytest.mark.parametrize("kind", sorted(BROKEN))
def test_an_unreadable_file_is_named_and_the_rest_is_read(log, kind):
    log("1", 5)
    (log.folder / "2.parquet").write_bytes(BROKEN[kind])
    log("3", 5, start=at(100))
    window = read_window(log.folder, digest=DIGEST)
    assert len(window) == 10
    assert [problem.partition(":")[0] for problem in window.problems] == ["2.parquet left out"]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_named(log, share):
    log("1", 500)
    path = log.folder / "1.parquet"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    window = read_window(log.folder, digest=DIGEST)
    assert len(window) == 0
    assert len(window.problems) == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_an_altered_byte_is_never_fatal(log, place, value):
    log("good", 5)
    log("1", 50, start=at(100))
    path = log.folder / "1.parquet"
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= value
    path.write_bytes(content)
    window = read_window(log.folder, digest=DIGEST)
    assert len(window) >= 5
    assert len(window) == len(window.probabilities) == len(window.statistics) == len(window.versions)


def test_a_file_that_breaks_half_way_gives_no_row(log):
    log("1", 2000, group=100)
    path = log.folder / "1.parquet"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    window = read_window(log.folder, digest=DIGEST)
    assert len(window) == 0
    assert len(window.problems) == 1


FOREIGN = {
    "other columns": lambda table: pa.table({"a": [1, 2]}),
    "a column missing": lambda table: table.drop_columns(["statistics"]),
    "text for numbers": lambda table: _with(table, "latency_ms", pa.array(["x"] * len(table))),
    "a null time": lambda table: _with(table, "time", pa.array([None] * len(table), table["time"].type)),
    "a null probability": lambda table: _with(table, "probabilities", pa.array([[0.5, None]] * len(table))),
    "null probabilities": lambda table: _with(
        table, "probabilities", pa.array([None] * len(table), table["probabilities"].type)
    ),
    "too few statistics": lambda table: _with(table, "statistics", pa.array([[1.0, 2.0]] * len(table))),
}


def _with(table, name, values):
    return table.set_column(table.schema.get_field_index(name), pa.field(name, values.type), values)


@pytest.mark.parametrize("kind", sorted(FOREIGN))
def test_a_foreign_file_is_named(log, kind):
    table = log("1", 5)
    pq.write_table(FOREIGN[kind](table), log.folder / "2.parquet")
    window = read_window(log.folder, digest=DIGEST)
    assert len(window) == 5
    assert len(window.problems) == 1
    assert window.problems[0].startswith("2.parquet left out")


def test_a_file_of_an_equivalent_schema_is_read(log):
    """Another writer may use wider types, other units, large strings and no statistics."""
    table = log("1", 5)
    wide = _with(table, "digest", table["digest"].cast(pa.large_string()))
    wide = _with(wide, "latency_ms", wide["latency_ms"].cast(pa.float64()))
    wide = _with(wide, "time", wide["time"].cast(pa.timestamp("ns", tz="UTC")))
    wide = _with(wide, "version", wide["version"].cast(pa.int64()))
    wide = wide.append_column("extra", pa.array([1] * 5)).select([*reversed(wide.column_names), "extra"])
    pq.write_table(wide, log.folder / "1.parquet", write_statistics=False, store_schema=False)
    window = read_window(log.folder, digest=DIGEST, last=3)
    assert window.latencies_ms.tolist() == [2.0, 3.0, 4.0]
    assert window.problems == ()


def test_what_is_no_log_file_is_passed_over(log):
    log("1", 5)
    (log.folder / ".2.parquet").write_bytes(b"half written")
    (log.folder / "3.parquet.tmp").write_bytes(b"half written")
    (log.folder / "4.parquet").mkdir()
    (log.folder / "notes.txt").write_text("hello")
    os.mkfifo(log.folder / "5.parquet")
    window = read_window(log.folder, digest=DIGEST)
    assert len(window) == 5
    assert window.problems == ()


def test_a_file_removed_while_reading_is_named(log, monkeypatch):
    log("1", 5)
    log("2", 5, start=at(100))
    footer = pq.read_metadata

    def remove(path):
        known = footer(path)
        if path.stem == "1":
            path.unlink()
        return known

    monkeypatch.setattr(pq, "read_metadata", remove)
    window = read_window(log.folder, digest=DIGEST)
    assert len(window) == 5
    assert len(window.problems) == 1


def test_rows_with_another_number_of_classes_are_left_out_and_named(log):
    log("1", 8)
    log("2", 2, classes=4, start=at(100))
    window = read_window(log.folder, digest=DIGEST)
    assert window.probabilities.shape == (8, 3)
    assert window.problems == ("2 rows left out: they do not have 3 classes, as most rows have",)


@pytest.mark.parametrize("classes", [1, 2, 1000])
def test_any_number_of_classes(log, classes):
    log("1", 4, classes=classes)
    assert read_window(log.folder, digest=DIGEST).probabilities.shape == (4, classes)


def test_nan_is_kept(log):
    log("1", 2, probabilities=[[float("nan")] * 3, [0.1, 0.2, 0.7]], confidence=[float("nan"), 0.5])
    window = read_window(log.folder, digest=DIGEST)
    assert np.isnan(window.probabilities[0]).all()
    summary = window.summary()
    assert (summary.mean_confidence, summary.not_finite) == (0.5, 1)


@pytest.mark.parametrize(
    "bounds",
    [
        {"since": datetime(2026, 1, 1)},
        {"until": datetime(2026, 1, 1)},
        {"since": at(1), "until": at(1)},
        {"since": at(2), "until": at(1)},
        {"last": 0},
        {"last": -1},
    ],
    ids=str,
)
def test_bounds_that_mean_nothing_are_refused(tmp_path, bounds):
    with pytest.raises(UsageError):
        read_window(tmp_path, digest=DIGEST, **bounds)


def test_bounds_in_another_time_zone(log):
    log("1", 10)
    zone = timezone(timedelta(hours=5, minutes=30))
    assert len(read_window(log.folder, digest=DIGEST, since=at(4).astimezone(zone))) == 6


def test_summary_against_the_slow_way(log):
    table = log("1", 61)
    summary = read_window(log.folder, digest=DIGEST).summary()
    confidences = [float(value) for value in table["confidence"].to_pylist()]
    assert summary.count == 61
    assert summary.mean_confidence == pytest.approx(sum(confidences) / 61)
    assert summary.min_confidence == min(confidences)
    assert summary.mean_latency_ms == pytest.approx(30.0)
    assert summary.p95_latency_ms == pytest.approx(57.0)
    assert summary.predictions_per_minute == pytest.approx(60.0)  # 60 gaps of one second


def test_the_rate_is_over_the_bounds_asked_for(log):
    log("1", 60)
    whole = read_window(log.folder, digest=DIGEST, since=at(0), until=at(120))
    assert whole.summary().predictions_per_minute == pytest.approx(30.0)


def test_the_rate_of_a_window_cut_short_is_that_of_its_rows(log):
    log("1", 120)
    cut = read_window(log.folder, digest=DIGEST, since=at(0), until=at(3600), last=61)
    assert cut.cut
    assert cut.summary().predictions_per_minute == pytest.approx(60.0)


@pytest.mark.parametrize("times", [[START], [START, START]])
def test_no_rate_from_one_moment(log, times):
    log("1", len(times), time=times)
    assert read_window(log.folder, digest=DIGEST).summary().predictions_per_minute is None
