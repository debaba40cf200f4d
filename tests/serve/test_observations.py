"""The prediction log: what is written, when, and what happens where it cannot be."""

import re
import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fettle.serve.observations as module
from fettle.core.observation import SCHEMA
from fettle.serve.metrics import Metrics
from fettle.serve.observations import Observation, ObservationLog, table_of, write_table
from fettle.serve.options import ServeOptions


def observed(number=0, *, rows=1, classes=3):
    rng = np.random.default_rng(number)
    return Observation(
        time_us=1_700_000_000_000_000 + number,
        request_id=f"request-{number}",
        model="tiny",
        version=number % 3 + 1,
        digest="d" * 64,
        latency_ms=number / 4,
        probabilities=rng.dirichlet(np.ones(classes), size=rows),
        statistics=rng.normal(size=(rows, 5)).astype(np.float32),
    )


def log_of(folder, **options):
    metrics = Metrics()
    return ObservationLog(folder, options=ServeOptions(**options), metrics=metrics), metrics


def value(metrics, name):
    return float(re.search(rf"^{name} (\S+)$", metrics.render().decode(), re.MULTILINE)[1])


def files(folder):
    return sorted(folder.glob("*.parquet"))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=10))
def test_table_is_what_was_observed(sizes):
    observations = [observed(i, rows=rows, classes=classes) for i, (rows, classes) in enumerate(sizes)]
    table = table_of(observations)
    assert table.schema.equals(SCHEMA)
    table.validate(full=True)
    expected = []
    for item in observations:
        for probabilities, statistics in zip(item.probabilities, item.statistics, strict=True):
            row = [float(np.float32(p)) for p in probabilities]
            expected.append((item.request_id, item.version, row, max(row), row.index(max(row)), list(statistics)))
    found = [
        (r["request_id"], r["version"], r["probabilities"], r["confidence"], r["predicted"], r["statistics"])
        for r in table.to_pylist()
    ]
    assert found == expected


def test_written_files_read_back_in_the_schema(tmp_path):
    path = write_table(table_of([observed(1, rows=2)]), tmp_path, 7)
    assert re.fullmatch(r"\d{8}T\d{6}\.\d{6}Z-\d+-000007\.parquet", path.name)
    assert pq.read_schema(path).equals(SCHEMA)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_close_writes_everything(tmp_path):
    log, metrics = log_of(tmp_path / "obs", log_rows=10)
    for number in range(95):
        log.add(observed(number, rows=2))
    assert log.close(10)
    table = pa.concat_tables([pq.read_table(path) for path in files(tmp_path / "obs")])
    assert table.num_rows == 190
    assert table["request_id"].to_pylist()[::2] == [f"request-{n}" for n in range(95)]
    assert value(metrics, "fettle_observations_written_total") == 190
    assert not list((tmp_path / "obs").glob("*.tmp"))


def test_each_model_has_its_folder_where_the_path_says_so(tmp_path):
    log, metrics = log_of(tmp_path / "{model}" / "rows")
    for number, name in enumerate(("tiny", "cats", "tiny")):
        log.add(replace(observed(number, rows=2), model=name))
    assert log.close(20)
    for name, rows in (("tiny", 4), ("cats", 2)):
        (path,) = files(tmp_path / name / "rows")
        assert pq.read_table(path)["model"].to_pylist() == [name] * rows
    assert value(metrics, "fettle_observations_written_total") == 6


def test_nothing_observed_writes_nothing(tmp_path):
    log, _ = log_of(tmp_path / "obs")
    assert log.close(10)
    assert not (tmp_path / "obs").exists()


@pytest.mark.parametrize("options", [{"log_rows": 1}, {"log_flush_s": 0.02}])
def test_flushes_by_rows_and_by_time(tmp_path, kit, options):
    log, _ = log_of(tmp_path, **options)
    log.add(observed(1))
    kit.until(lambda: len(files(tmp_path)) == 1)
    log.add(observed(2))
    kit.until(lambda: len(files(tmp_path)) == 2)
    assert log.close(10)
    assert [pq.read_table(path)["request_id"].to_pylist() for path in files(tmp_path)] == [["request-1"], ["request-2"]]


def test_a_full_queue_drops_and_counts_without_blocking(tmp_path, monkeypatch):
    gate, entered = threading.Event(), threading.Event()
    write = write_table

    def slow(*arguments):
        entered.set()
        assert gate.wait(10)
        return write(*arguments)

    monkeypatch.setattr(module, "write_table", slow)
    log, metrics = log_of(tmp_path, log_rows=1, log_queue_rows=5)
    log.add(observed(0))
    assert entered.wait(10)
    for number in range(1, 10):
        log.add(observed(number))
    assert value(metrics, "fettle_observations_dropped_total") == 5
    gate.set()
    assert log.close(10)
    assert sum(pq.read_table(path).num_rows for path in files(tmp_path)) == 5


def test_a_disk_that_fails_drops_counts_and_recovers(tmp_path, monkeypatch, kit):
    write = write_table
    full = True

    def fails(*arguments):
        if full:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(module, "write_table", fails)
    log, metrics = log_of(tmp_path, log_rows=1)
    log.add(observed(0))
    kit.until(lambda: value(metrics, "fettle_observations_dropped_total") == 1)
    full = False
    log.add(observed(1))
    assert log.close(10)
    assert [pq.read_table(path)["request_id"].to_pylist() for path in files(tmp_path)] == [["request-1"]]


def test_a_half_written_file_is_removed(tmp_path, monkeypatch):
    def fails(table, file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.pq, "write_table", fails)
    with pytest.raises(OSError, match="No space"):
        write_table(table_of([observed(0)]), tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_loses_rows_not_the_server(tmp_path):
    (tmp_path / "file").write_text("")
    log, metrics = log_of(tmp_path / "file" / "obs", log_rows=1)
    log.add(observed(0))
    assert log.close(10)
    assert value(metrics, "fettle_observations_dropped_total") == 1
