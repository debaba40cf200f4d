"""A worker's process: where it runs."""

import os
import sys

import pytest

from fettle.serve.options import ServeOptions
from fettle.serve.process import end_process, keep_to_core, start_process

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="asked of Linux only")
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
WAITS = [sys.executable, "-c", "import socket, sys; socket.socket(fileno=int(sys.argv[1])).recv(1)"]


@pytest.fixture
def started():
    found = []

    def start(core):
        process, ours = start_process(WAITS, dict(os.environ), core=core, background=False)
        found.append((process, ours))
        return process

    yield start
    for process, ours in found:
        ours.close()
        assert end_process(process, 30.0) == 0


@pytest.mark.parametrize("core", CORES[:2])
def test_a_process_is_kept_to_its_core(started, core):
    assert os.sched_getaffinity(started(core).pid) == {core}


def test_a_process_without_a_core_runs_on_any(started):
    assert os.sched_getaffinity(started(None).pid) == set(CORES)


def test_a_core_that_is_not_there_is_no_error(started, caplog):
    process = started(None)
    keep_to_core(process.pid, 1_000_000)
    assert "runs on any core" in caplog.text
    assert os.sched_getaffinity(process.pid) == set(CORES)


@pytest.mark.parametrize("cores", [{0}, {0, 1}, {3, 5, 6}])
def test_workers_are_kept_to_cores_where_there_are_as_many(monkeypatch, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
    count = len(cores)
    assert ServeOptions(workers=count).worker_cores() == sorted(cores)
    for options in ({"pin_workers": False}, {"threads": 2}, {"workers": count + 1}):
        found = ServeOptions(**{"workers": count, **options})
        assert found.worker_cores() == [None] * found.workers


def test_a_system_that_knows_no_affinity_keeps_nothing(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert ServeOptions(workers=2).worker_cores() == [None, None]
