"""Open-loop load: requests leave when they are due, whatever became of those before them (Poisson arrivals).

Latency counts from the moment a request was due, so that what a slow server or a busy generator holds up is not left
out. One thread on epoll, and requests made beforehand, because generator and server share the cores: about 20 µs a
request, which is told with the result.
"""

from __future__ import annotations

import gc
import random
import re
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from serve_peers.generators import percentiles

# Further requests wait in the generator, and their time counts: a client has a bound too.
MAX_CONNECTIONS = 1024
READ_BYTES = 2**18
# How long answers are still awaited after the last request, as a share of the deadline and at least this.
GRACE_S = 0.5
SAMPLE = 16
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class OpenLoad:
    """What came of requests that were due at a rate.

    good: answered with 200 within the deadline; late: with 200 after it; shed: with 429; refused: with another status;
    broken: their connection ended; unanswered: nothing came until the end. latencies of good and late ones, from when
    they were due; of shed ones, from when they were sent. lag: from when a request was due to when it was sent.
    cpu_s: of the generator.
    """

    rate_per_s: float
    seconds: float
    sent: int
    good: int
    late: int
    shed: int
    refused: int
    broken: int
    unanswered: int
    p50_ms: float
    p99_ms: float
    shed_p50_ms: float
    shed_p99_ms: float
    lag_p99_ms: float
    cpu_s: float

    @property
    def goodput_per_s(self) -> float:
        """Answers within the deadline in a second."""
        return self.good / self.seconds


def arrivals(rate_per_s: float, seconds: float, *, seed: int) -> list[float]:
    """When requests are due, seconds from the start: a Poisson process.

    >>> times = arrivals(1000, 1, seed=0)
    >>> 900 < len(times) < 1100, times == sorted(times), times[-1] < 1
    (True, True, True)
    """
    rng = random.Random(seed)
    times: list[float] = []
    now = rng.expovariate(rate_per_s)
    while now < seconds:
        times.append(now)
        now += rng.expovariate(rate_per_s)
    return times


class _Connection:
    """One socket with at most one request under way. due, sent: of that; number: of its body, -1 where it is idle."""

    __slots__ = ("due", "number", "received", "sent", "socket", "unsent")

    def __init__(self, port: int) -> None:
        # Not blocking even here: where a server does not accept, a connection waits a second, and others would with it.
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.connect_ex(("127.0.0.1", port))
        self.number = -1
        self.due = self.sent = 0.0
        self.received = b""
        self.unsent = b""


class _Run:
    """The state of one run of load."""

    def __init__(self, port: int, requests: Sequence[bytes], *, deadline_s: float) -> None:
        self._port = port
        self._requests = requests
        self._deadline_s = deadline_s
        self._epoll = select.epoll()
        self._open: dict[int, _Connection] = {}
        self._idle: list[_Connection] = []
        self._backlog: deque[float] = deque()
        self._turn = -1
        self.counts = {"sent": 0, "good": 0, "late": 0, "shed": 0, "refused": 0, "broken": 0}
        self.latencies_s: list[float] = []
        self.shed_s: list[float] = []
        self.lags_s: list[float] = []
        self.samples: list[tuple[int, bytes]] = []

    def run(self, due_s: Sequence[float]) -> None:
        """Send all at their times, and wait for the answers within the deadline and a grace."""
        start = time.perf_counter() + 0.01
        due = deque(start + moment for moment in due_s)
        end = start + (due_s[-1] if due_s else 0.0) + self._deadline_s + GRACE_S
        while due or self._waiting():
            now = time.perf_counter()
            if now > end:
                break
            while due and due[0] <= now:
                self._backlog.append(due.popleft())
            self._send_due()
            left_s = (due[0] if due else end) - time.perf_counter()
            for descriptor, events in self._epoll.poll(max(0.0, left_s)):
                self._ready(self._open[descriptor], events)

    def _waiting(self) -> bool:
        return bool(self._backlog) or len(self._idle) < len(self._open)

    def close(self) -> None:
        for connection in self._open.values():
            connection.socket.close()
        self._epoll.close()

    def _connect(self) -> _Connection:
        connection = _Connection(self._port)
        descriptor = connection.socket.fileno()
        self._open[descriptor] = connection
        self._epoll.register(descriptor, select.EPOLLIN)
        return connection

    def _send_due(self) -> None:
        while self._backlog:
            if self._idle:
                connection = self._idle.pop()
            elif len(self._open) < MAX_CONNECTIONS:
                connection = self._connect()
            else:
                return
            self._send(connection, self._backlog.popleft())

    def _send(self, connection: _Connection, due: float) -> None:
        self._turn = (self._turn + 1) % len(self._requests)
        request = self._requests[self._turn]
        connection.number, connection.due = self._turn, due
        connection.sent = time.perf_counter()
        self.counts["sent"] += 1
        self.lags_s.append(connection.sent - due)
        self._push(connection, request)

    def _push(self, connection: _Connection, content: bytes) -> None:
        try:
            written = connection.socket.send(content)
        except BlockingIOError:  # also where it is not yet connected
            written = 0
        except OSError:
            self._drop(connection)
            return
        waited, connection.unsent = bool(connection.unsent), content[written:]
        if waited != bool(connection.unsent):
            events = select.EPOLLIN | (select.EPOLLOUT if connection.unsent else 0)
            self._epoll.modify(connection.socket.fileno(), events)

    def _ready(self, connection: _Connection, events: int) -> None:
        if events & select.EPOLLOUT and connection.unsent:
            self._push(connection, connection.unsent)
        if not events & ~select.EPOLLOUT:
            return
        try:
            data = connection.socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(connection)
            return
        received = connection.received = connection.received + data if connection.received else data
        end = received.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _LENGTH.search(received, 0, end)
        if length is None:
            self._drop(connection)  # an answer that does not tell its length is none here
        elif len(received) >= end + 4 + int(length[1]):
            self._answered(connection, received, end)

    def _answered(self, connection: _Connection, received: bytes, end: int) -> None:
        now = time.perf_counter()
        status = received[9:12]
        if status == b"200":
            taken_s = now - connection.due
            self.latencies_s.append(taken_s)
            self.counts["good" if taken_s <= self._deadline_s else "late"] += 1
            if len(self.latencies_s) % SAMPLE == 0:
                self.samples.append((connection.number, received[end + 4 :]))
        elif status == b"429":
            self.shed_s.append(now - connection.sent)
            self.counts["shed"] += 1
        else:
            self.counts["refused"] += 1
        connection.number = -1
        connection.received = b""
        if b"\r\nconnection: close" in received[:end].lower():
            self._drop(connection)
        else:
            self._idle.append(connection)

    def _drop(self, connection: _Connection) -> None:
        """The connection is over; so is its request, if one was under way."""
        del self._open[connection.socket.fileno()]
        self._epoll.unregister(connection.socket.fileno())
        connection.socket.close()
        if connection.number >= 0:
            self.counts["broken"] += 1
        elif connection in self._idle:
            self._idle.remove(connection)


def drive_open(
    port: int, requests: Sequence[bytes], *, rate_per_s: float, seconds: float, deadline_s: float, seed: int = 0
) -> tuple[OpenLoad, list[tuple[int, bytes]]]:
    """Load from this thread; also every 16th good answer with the number of its body, to be judged afterwards."""
    due_s = arrivals(rate_per_s, seconds, seed=seed)
    run = _Run(port, requests, deadline_s=deadline_s)
    cpu_s = time.thread_time()
    gc.disable()  # a collection would stop the sending, and nothing here makes cycles
    try:
        run.run(due_s)
    finally:
        gc.enable()
        cpu_s = time.thread_time() - cpu_s
        run.close()
    (p50_s, p99_s), (shed_p50_s, shed_p99_s) = percentiles(run.latencies_s), percentiles(run.shed_s)
    answered = sum(run.counts[name] for name in ("good", "late", "shed", "refused", "broken"))
    load = OpenLoad(
        rate_per_s=rate_per_s,
        seconds=seconds,
        **run.counts,
        unanswered=len(due_s) - answered,
        p50_ms=p50_s * 1e3,
        p99_ms=p99_s * 1e3,
        shed_p50_ms=shed_p50_s * 1e3,
        shed_p99_ms=shed_p99_s * 1e3,
        lag_p99_ms=percentiles(run.lags_s)[1] * 1e3,
        cpu_s=cpu_s,
    )
    return load, run.samples
