"""How long one call takes: warm-up, then interleaved rounds, so that a noisy machine is unfair to nobody.

Timing model after model gives the drift of the machine (frequency, neighbors, heat) to whichever ran at the wrong
time. Here every round visits all models, in an order shuffled anew, and what disturbs one disturbs them all alike.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from fettle.core.errors import UsageError
from fettle.core.report import Measurement
from fettle.evaluate.intervals import median_interval

Call = Callable[[], object]

_VISIT_NS = 2_000_000
_MOST_CALLS_PER_VISIT = 64


class HostClock:
    """Times a call on the host. `now_ns`: a monotonic clock in nanoseconds."""

    def __init__(self, now_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self.now_ns = now_ns

    def time_ns(self, call: Call) -> int:
        """Nanoseconds from before to after the call."""
        start = self.now_ns()
        call()
        return self.now_ns() - start


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """The distribution of n single calls, in milliseconds; batch and threads are what they were taken at.

    low_ms, high_ms: 95 percent interval of the median, with one observation per round counted as independent; None
        for fewer than six rounds. Below n = 100, p99 is little more than the largest value.
    """

    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    std_ms: float
    min_ms: float
    max_ms: float
    n: int
    low_ms: float | None
    high_ms: float | None
    batch: int
    threads: int

    def measurements(self) -> tuple[Measurement, ...]:
        """For a Report: "latency.p50", ..., and the conditions "latency.batch" and "latency.threads".

        >>> [m.name for m in summarize_latency(np.array([1.0, 2.0]), batch=1, threads=2).measurements()][:3]
        ['latency.p50', 'latency.p95', 'latency.p99']
        """
        note = f"batch {self.batch}, {self.threads} thread{'s' if self.threads != 1 else ''}"
        values = {
            "p50": self.p50_ms, "p95": self.p95_ms, "p99": self.p99_ms, "mean": self.mean_ms,
            "std": self.std_ms, "min": self.min_ms, "max": self.max_ms,
        }  # fmt: skip
        timed = tuple(
            Measurement(
                name=f"latency.{name}",
                value=value,
                unit="ms",
                direction="lower",
                n=self.n,
                low=self.low_ms if name == "p50" else None,
                high=self.high_ms if name == "p50" else None,
                note=note,
            )
            for name, value in values.items()
        )
        conditions = (
            Measurement(name="latency.batch", value=float(self.batch), unit="rows"),
            Measurement(name="latency.threads", value=float(self.threads), unit="threads"),
        )
        return timed + conditions


def measure_latency(
    calls: Mapping[str, Call],
    *,
    batch: int,
    threads: int,
    rounds: int = 50,
    warmup: int = 5,
    time_limit_s: float = 60.0,
    seed: int = 0,
    clock: HostClock | None = None,
) -> dict[str, Latency | Exception]:
    """Time the calls side by side. Returns, per label, its Latency, or the exception that it raised.

    calls: label to a call without arguments that runs one batch to the end; on a GPU pass a `CudaClock` as `clock`.
    batch, threads: what the calls do; they are recorded, not set.
    rounds: visits to each label. A visit is one call, or for a call under two milliseconds as many as fill
        them, at most 64, after one untimed call that refills the caches which the others emptied. Every
        call is timed alone, since an average over calls would hide the slow ones.
    time_limit_s: for all of it, warm-up included; the round it falls in is finished, and the first one always is.

    A call that raises ends its own timing only. Garbage collection is off meanwhile and put back afterwards.
    Raises UsageError for no calls, and for rounds, warm-up, batch, threads or a limit that cannot be.

    >>> found = measure_latency({"sum": lambda: sum(range(100))}, batch=1, threads=1, rounds=6)
    >>> found["sum"].n >= 6 and found["sum"].min_ms <= found["sum"].p50_ms <= found["sum"].p99_ms
    True
    """
    if not calls or rounds < 1 or warmup < 0 or batch < 1 or threads < 1 or not time_limit_s > 0:
        raise UsageError(
            "timing needs a call, rounds, batch and threads of at least 1, warmup of at least 0 and a positive limit, "
            f"got {len(calls)} calls, {rounds=}, {batch=}, {threads=}, {warmup=}, {time_limit_s=}"
        )
    clock = clock or HostClock()
    generator = np.random.default_rng(seed)
    deadline_ns = clock.now_ns() + int(time_limit_s * 1e9)
    timings = {label: _Timing(call) for label, call in calls.items()}
    with _no_garbage_collection():
        for timing in timings.values():
            timing.warm_up(clock, warmup, deadline_ns)
        for index in range(rounds):
            if index and clock.now_ns() >= deadline_ns:
                break
            for timing in generator.permutation(np.array([*timings.values()], dtype=object)):
                timing.visit(clock)
    return {label: timing.result(batch, threads) for label, timing in timings.items()}


def summarize_latency(samples_ms: np.ndarray, *, batch: int, threads: int, visits: int | None = None) -> Latency:
    """The Latency of these timings in milliseconds, shape (n,). `visits`: how many of them are independent."""
    p50, p95, p99 = (float(value) for value in np.percentile(samples_ms, [50, 95, 99]))
    low, high = median_interval(samples_ms, blocks=visits) or (None, None)
    return Latency(
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        mean_ms=float(samples_ms.mean()),
        std_ms=float(samples_ms.std(ddof=1)) if len(samples_ms) > 1 else 0.0,
        min_ms=float(samples_ms.min()),
        max_ms=float(samples_ms.max()),
        n=len(samples_ms),
        low_ms=low,
        high_ms=high,
        batch=batch,
        threads=threads,
    )


class _Timing:
    """One label: its call, what was measured, or what it raised."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.samples_ns: list[int] = []
        self.visits = 0
        self.calls_per_visit = 1
        self.problem: Exception | None = None

    def warm_up(self, clock: HostClock, warmup: int, deadline_ns: int) -> None:
        """At least one call, whose fastest repetition sets how many calls a visit has."""
        fastest_ns: float = math.inf
        try:
            for index in range(max(1, warmup)):
                if index and clock.now_ns() >= deadline_ns:
                    break
                fastest_ns = min(fastest_ns, clock.time_ns(self.call))
        except Exception as problem:
            self.problem = problem
            return
        self.calls_per_visit = min(_MOST_CALLS_PER_VISIT, max(1, math.ceil(_VISIT_NS / max(1.0, fastest_ns))))

    def visit(self, clock: HostClock) -> None:
        if self.problem is not None:
            return
        try:
            if self.calls_per_visit > 1:
                self.call()
            self.samples_ns += [clock.time_ns(self.call) for _ in range(self.calls_per_visit)]
        except Exception as problem:
            self.problem = problem
        self.visits += 1

    def result(self, batch: int, threads: int) -> Latency | Exception:
        if self.problem is not None:
            return self.problem
        samples_ms = np.array(self.samples_ns, dtype=np.float64) / 1e6
        return summarize_latency(samples_ms, batch=batch, threads=threads, visits=self.visits)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect(1)  # what torch and its like hold lives on: looking that through takes a quarter of a second
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
