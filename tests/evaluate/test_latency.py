"""The harness on a clock that the calls themselves advance: order, counts and failures, never real timings."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fettle.core.errors import UsageError
from fettle.evaluate.latency import HostClock, Latency, measure_latency, summarize_latency

MS = 1_000_000


class Machine:
    """Time moves only while a call runs."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.log: list[str] = []

    def call(self, label: str, *durations_ns: int) -> Callable[[], None]:
        """Takes the durations in turn, the last one for ever."""
        waiting = list(durations_ns)

        def run() -> None:
            self.log.append(label)
            self.now_ns += waiting.pop(0) if len(waiting) > 1 else waiting[0]

        return run

    @property
    def clock(self) -> HostClock:
        return HostClock(lambda: self.now_ns)


@pytest.fixture
def machine() -> Machine:
    return Machine()


def timed(entry: Latency | Exception) -> Latency:
    assert isinstance(entry, Latency)
    return entry


def test_each_round_visits_everyone_once_in_a_changing_order(machine: Machine) -> None:
    calls = {label: machine.call(label, 3 * MS) for label in "abc"}
    measure_latency(calls, batch=1, threads=1, rounds=20, warmup=2, clock=machine.clock)
    assert machine.log[:6] == ["a", "a", "b", "b", "c", "c"]
    rounds = [tuple(machine.log[start : start + 3]) for start in range(6, len(machine.log), 3)]
    assert len(rounds) == 20
    assert all(sorted(visit) == ["a", "b", "c"] for visit in rounds)
    assert len(set(rounds)) > 3


def test_the_order_follows_the_seed(machine: Machine) -> None:
    logs = []
    for seed in (0, 0, 1):
        machine.log.clear()
        calls = {label: machine.call(label, 3 * MS) for label in "abcd"}
        measure_latency(calls, batch=1, threads=1, rounds=9, seed=seed, clock=machine.clock)
        logs.append(list(machine.log))
    assert logs[0] == logs[1] != logs[2]


def test_drift_hits_all_alike() -> None:
    """A machine that slows to half its speed in mid-run changes both medians, not their ratio."""
    machine = Machine()

    def drifting(base_ns: int) -> Callable[[], None]:
        def run() -> None:
            machine.now_ns += base_ns * (2 if machine.now_ns > 200 * MS else 1)

        return run

    calls = {"slow": drifting(6 * MS), "fast": drifting(3 * MS)}
    found = measure_latency(calls, batch=1, threads=1, rounds=51, clock=machine.clock)
    assert timed(found["slow"]).p50_ms / timed(found["fast"]).p50_ms == pytest.approx(2)


def test_numbers_are_those_of_the_samples(machine: Machine) -> None:
    warm, samples = [50 * MS] * 3, [(10 + i) * MS for i in range(100)]
    calls = {"a": machine.call("a", *warm, *samples, 1)}
    found = timed(measure_latency(calls, batch=8, threads=2, rounds=100, warmup=3, clock=machine.clock)["a"])
    values = [10.0 + i for i in range(100)]
    assert found.n == 100
    assert (found.min_ms, found.max_ms, found.mean_ms) == (10.0, 109.0, pytest.approx(59.5))
    assert found.p50_ms == pytest.approx(np.median(values))
    assert found.p95_ms == pytest.approx(np.quantile(values, 0.95))
    assert found.p99_ms == pytest.approx(np.quantile(values, 0.99))
    assert found.std_ms == pytest.approx(np.std(values, ddof=1))
    assert (found.batch, found.threads) == (8, 2)
    assert found.low_ms is not None
    assert found.high_ms is not None
    assert found.low_ms < found.p50_ms < found.high_ms


@pytest.mark.parametrize(
    ("duration_ns", "per_visit"), [(3 * MS, 1), (2 * MS, 1), (MS, 2), (100_000, 20), (1_000, 64), (0, 64)]
)
def test_short_calls_are_taken_several_at_a_visit_after_one_that_is_not_counted(
    machine: Machine, duration_ns: int, per_visit: int
) -> None:
    calls = {"a": machine.call("a", duration_ns)}
    found = timed(measure_latency(calls, batch=1, threads=1, rounds=7, warmup=1, clock=machine.clock)["a"])
    assert found.n == 7 * per_visit
    settling = 7 if per_visit > 1 else 0
    assert len(machine.log) == 1 + settling + found.n


def test_single_slow_calls_are_not_averaged_away(machine: Machine) -> None:
    durations = [100_000] * 10 + [5 * MS] + [100_000]
    calls = {"a": machine.call("a", *durations)}
    found = timed(measure_latency(calls, batch=1, threads=1, rounds=5, warmup=3, clock=machine.clock)["a"])
    assert found.max_ms == 5.0
    assert found.p50_ms == 0.1


@pytest.mark.parametrize("when", [0, 1, 4, 9])
def test_a_call_that_raises_fails_alone(machine: Machine, when: int) -> None:
    healthy, count = machine.call("healthy", 3 * MS), 0

    def failing() -> None:
        nonlocal count
        machine.now_ns += 3 * MS
        count += 1
        if count > when:
            raise RuntimeError("engine lost")

    found = measure_latency(
        {"failing": failing, "healthy": healthy}, batch=1, threads=1, rounds=10, warmup=2, clock=machine.clock
    )
    assert isinstance(found["failing"], RuntimeError)
    assert str(found["failing"]) == "engine lost"
    assert count == when + 1
    assert timed(found["healthy"]).n == 10


def test_an_interrupt_is_no_failure_of_a_call(machine: Machine) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_latency({"a": interrupted}, batch=1, threads=1, clock=machine.clock)
    assert gc.isenabled()


def test_the_time_limit_ends_rounds_but_never_the_first(machine: Machine) -> None:
    calls = {"a": machine.call("a", 400 * MS), "b": machine.call("b", 400 * MS)}
    found = measure_latency(calls, batch=1, threads=1, rounds=1000, warmup=1, time_limit_s=4.0, clock=machine.clock)
    assert timed(found["a"]).n == timed(found["b"]).n == 4
    found = measure_latency(calls, batch=1, threads=1, rounds=1000, warmup=50, time_limit_s=0.001, clock=machine.clock)
    assert timed(found["a"]).n == timed(found["b"]).n == 1


def test_garbage_collection_is_off_meanwhile_and_as_before_afterwards() -> None:
    seen: list[bool] = []
    for enabled in (True, False):
        if not enabled:
            gc.disable()
        try:
            measure_latency({"a": lambda: seen.append(gc.isenabled())}, batch=1, threads=1, rounds=1, warmup=0)
            assert gc.isenabled() is enabled
        finally:
            gc.enable()
    assert seen
    assert not any(seen)


@pytest.mark.parametrize(
    "wrong",
    [
        {"calls": {}},
        {"rounds": 0},
        {"warmup": -1},
        {"batch": 0},
        {"threads": 0},
        {"time_limit_s": 0.0},
        {"time_limit_s": float("nan")},
    ],
)
def test_what_it_refuses(wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"calls": {"a": lambda: None}, "batch": 1, "threads": 1, **wrong}
    with pytest.raises(UsageError, match="timing needs"):
        measure_latency(arguments.pop("calls"), **arguments)


def test_measurements_state_their_conditions() -> None:
    latency = summarize_latency(np.arange(1.0, 21.0), batch=32, threads=1)
    by_name = {measurement.name: measurement for measurement in latency.measurements()}
    assert [f"latency.{name}" for name in ("p50", "p95", "p99", "mean", "std", "min", "max", "batch", "threads")] == [
        *by_name
    ]
    p50 = by_name["latency.p50"]
    assert (p50.value, p50.unit, p50.direction, p50.n, p50.note) == (10.5, "ms", "lower", 20, "batch 32, 1 thread")
    assert (p50.low, p50.high) == (6.0, 15.0)
    assert (by_name["latency.batch"].value, by_name["latency.threads"].value) == (32.0, 1.0)


def test_one_sample_has_no_spread_and_no_interval() -> None:
    latency = summarize_latency(np.array([3.0]), batch=1, threads=1)
    assert (latency.p50_ms, latency.p99_ms, latency.std_ms, latency.low_ms) == (3.0, 3.0, 0.0, None)


def test_the_host_clock_times_a_real_call() -> None:
    found = measure_latency({"sum": lambda: sum(range(1000))}, batch=1, threads=1, rounds=8)
    assert 0 < timed(found["sum"]).min_ms <= timed(found["sum"]).p50_ms
