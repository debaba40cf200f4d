"""Options that cannot mean anything, and what the defaults are taken from."""

import pytest

from fettle.core.errors import UsageError
from fettle.serve import options as module
from fettle.serve.options import ServeOptions, available_cores, default_workers


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": -1}, {"port": 65536}, {"workers": 0}, {"threads": 0}, {"max_batch_rows": 0}, {"max_body_bytes": 0},
        {"max_queue_rows": 4, "max_batch_rows": 8}, {"request_timeout_s": 0}, {"request_timeout_s": float("nan")},
        {"grace_s": -1}, {"drain_timeout_s": float("inf")}, {"poll_s": 0}, {"log_flush_s": 0}, {"max_connections": 0},
        {"grpc_port": -1}, {"grpc_port": 65536}, {"idle_timeout_s": 1e300}, {"poll_s": 1_000_001},
        {"max_header_bytes": 2**31},
        {"load_timeout_s": 0},
    ],
)  # fmt: skip
def test_wrong_options(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        ServeOptions(**wrong)


def test_defaults_are_valid(monkeypatch):
    monkeypatch.delenv("FETTLE_DEVICE", raising=False)
    assert ServeOptions().workers == available_cores()
    assert ServeOptions(grace_s=0.0).grace_s == 0


@pytest.mark.parametrize(
    ("text", "cores"),
    [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 4), ("800000 100000", 4), ("", 4), ("1 0", 4)],
)
def test_a_containers_quota_counts(tmp_path, monkeypatch, text, cores):
    path = tmp_path / "cpu.max"
    path.write_text(text)
    monkeypatch.setattr(module, "_CGROUP_CPU", path)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert available_cores() == cores


@pytest.mark.parametrize(
    ("device", "cores", "workers"), [("cpu", 64, 64), ("", 3, 3), ("cuda", 64, 2), ("cuda:1", 2, 2), ("cuda", 1, 1)]
)
def test_on_a_gpu_there_are_few_workers(monkeypatch, device, cores, workers):
    monkeypatch.setenv("FETTLE_DEVICE", device)
    monkeypatch.setattr(module, "available_cores", lambda: cores)
    assert ServeOptions().workers == default_workers() == workers
    assert ServeOptions(workers=5).workers == 5


def test_a_device_that_cannot_be_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setenv("FETTLE_DEVICE", "gpu")
    with pytest.raises(UsageError, match='FETTLE_DEVICE must be "cpu", "cuda" or like "cuda:1", got "gpu"'):
        ServeOptions()


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("threads", 1024),
        ("workers", 1024),
        ("max_batch_rows", 65536),
        ("max_body_bytes", 1073741824),
        ("max_header_bytes", 1073741824),
    ],
)
def test_what_no_machine_could_do_is_refused(name, most):
    room = {"max_queue_rows": 2**20}
    assert getattr(ServeOptions(**{**room, name: most}), name) == most
    with pytest.raises(UsageError, match=f"{name} must be at most {most}, got {most + 1}"):
        ServeOptions(**{**room, name: most + 1})
