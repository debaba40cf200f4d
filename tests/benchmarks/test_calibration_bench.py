import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("openvino")  # engines.py imports every engine


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.delitem(sys.modules, "calibration", raising=False)
    threads = torch.get_num_threads()
    yield importlib.import_module("calibration")
    torch.set_num_threads(threads)


@pytest.fixture
def rows(bench: ModuleType) -> list[Any]:
    """fettle flat and fast, ONNX Runtime growing, and stopped on 1000."""
    ours = [
        bench.Row("fettle", method, batches, batches / 20, 80_000_000 + 1000 * batches)
        for batches in (10, 100, 1000)
        for method in bench.OBSERVERS
    ]
    theirs = [bench.Row("ONNX Runtime", method, 100, 10.0, 3 * 10**9) for method in bench.PEER_METHODS]
    stopped = [
        bench.Row("ONNX Runtime", method, 1000, 5.0, 6 * 10**9, stopped="stopped at 6.0 GB after 160 batches")
        for method in bench.PEER_HISTOGRAMS
    ]
    return [*ours, *theirs, *stopped, bench.Row("ONNX Runtime", "MinMax", 1000, 1.0, 10**8)]


def changed(rows: list[Any], by: str, method: str, batches: int, **changes: Any) -> list[Any]:
    wanted = (by, method, batches)
    return [replace(row, **changes) if (row.by, row.method, row.batches) == wanted else row for row in rows]


def test_both_claims_hold_where_every_figure_is_within_its_bound(bench: ModuleType, rows: list[Any]) -> None:
    memory, time = bench.claim_memory(rows), bench.claim_time(rows)
    assert memory.holds
    assert time.holds
    assert "peak 80 MB at 10 and 81 MB at 1000 batches, 1.01 ×" in memory.figures
    assert "5.0 s (histogram_mse, the slowest) against 10.0 s (Percentile, the fastest) on 100 batches" in time.figures


@pytest.mark.parametrize("method", ["histogram_mse", "min_max"])
@pytest.mark.parametrize(("growth", "holds"), [(1.09, True), (1.12, False)])
def test_one_observer_that_grows_breaks_the_memory_claim(
    bench: ModuleType, rows: list[Any], method: str, growth: float, holds: bool
) -> None:
    claim = bench.claim_memory(changed(rows, "fettle", method, 1000, peak_bytes=int(80_010_000 * growth)))
    assert claim.holds is holds
    assert f"({method}, the worst)" in claim.figures


@pytest.mark.parametrize(("method", "holds"), [("entropy", False), ("moving_average", True)])
def test_the_slowest_histogram_observer_decides(bench: ModuleType, rows: list[Any], method: str, holds: bool) -> None:
    assert bench.claim_time(changed(rows, "fettle", method, 100, time_s=10.1)).holds is holds


def test_the_fastest_peer_counts_and_its_min_max_does_not(bench: ModuleType, rows: list[Any]) -> None:
    assert bench.claim_time(changed(rows, "ONNX Runtime", "MinMax", 100, time_s=0.1)).holds
    assert not bench.claim_time(changed(rows, "ONNX Runtime", "Entropy", 100, time_s=4.9)).holds


def test_what_did_not_finish_is_no_claim_kept(bench: ModuleType, rows: list[Any]) -> None:
    broken = changed(rows, "fettle", "percentile", 1000, stopped="out of memory")
    assert "did not finish" in bench.claim_memory(broken).figures
    assert not bench.claim_memory(broken).holds
    assert not bench.claim_memory([]).holds
    assert not bench.claim_time([row for row in rows if row.by == "fettle"]).holds


def test_a_stopped_peer_is_told_in_the_table(bench: ModuleType, rows: list[Any]) -> None:
    assert "stopped at 6.0 GB after 160 batches" in bench.tabulate(rows).text()


def test_the_stream_is_lazy_and_goes_round(bench: ModuleType) -> None:
    images = np.arange(40, dtype=np.float32)
    batches = list(bench.Stream(images, 4))
    assert [len(batch) for batch in batches] == [16] * 4
    assert np.concatenate(batches).tolist() == [float(i % 40) for i in range(64)]
    first = next(iter(bench.Stream(images, 10**12)))
    first[:] = -1
    assert images.min() == 0


@pytest.mark.parametrize(("limit", "message"), [("LIMIT_BYTES", "GB after 0 batches"), ("LIMIT_S", "s after 0")])
def test_the_stream_stops_at_a_limit(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, limit: str, message: str
) -> None:
    monkeypatch.setattr(bench, limit, -1)
    with pytest.raises(bench.Stopped, match=message):
        list(bench.Stream(np.zeros(16, np.float32), 3))


def test_the_reader_ends_with_none(bench: ModuleType) -> None:
    reader = bench.Reader(bench.Stream(np.zeros(16, np.float32), 2))
    assert [reader.get_next() is None for _ in range(4)] == [False, False, True, True]


def test_a_peak_is_seen_and_forgotten(bench: ModuleType) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's clear_refs")
    before = bench.forget_peak()
    held = np.ones(8 * 2**20)
    del held
    assert bench.memory_bytes("VmHWM") >= before + 60 * 2**20
    assert bench.forget_peak() < before + 60 * 2**20
    with pytest.raises(LookupError, match="needs Linux"):
        bench.memory_bytes("VmNone")


def test_the_fastest_finished_round_is_kept(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([3.0, 1.0, 2.0, 0.5])
    calls = []

    def fake(folder: Path, by: str, method: str, batches: int) -> Any:
        calls.append((by, method, batches))
        return bench.Row(by, method, batches, next(times), 1, stopped="stopped" if len(calls) == 4 else "")

    monkeypatch.setattr(bench, "measure_apart", fake)
    effort = bench.Effort(batches=(10, 50), peer_batches=(), observers=("min_max",), rounds=3, repeated=10)
    rows = bench.measure_all(Path(), effort)
    assert [(row.batches, row.time_s, row.stopped) for row in rows] == [(10, 2.0, ""), (50, 1.0, "")]


def test_a_process_that_dies_is_told(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def killed(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], -9, stdout="", stderr="")

    monkeypatch.setattr(bench.subprocess, "run", killed)
    assert bench.measure_apart(tmp_path, "fettle", "min_max", 10).stopped == "exit code -9"
