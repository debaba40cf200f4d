"""Closed-loop load: every connection sends its next request when it has the answer to the last.

`run_wrk` is the one to measure with; `drive` is slower and can look into every answer. Both count what was refused
(an answer that is not 200) and what broke (no whole answer at all).
"""

from __future__ import annotations

import asyncio
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serve_peers.payloads import Judge, Payload

ROTATE = Path(__file__).with_name("rotate.lua")
HOW_TO_GET_WRK = "the built-in generator stood in, which takes more of the cores: apt-get install -y wrk"
# A request this old when the time is up counts as broken: the server has lost it.
LOST_S = 2.0


@dataclass(frozen=True, slots=True)
class Load:
    """What came of some seconds of load. answered: with 200; wrong: those of them that a judge did not accept."""

    connections: int
    seconds: float
    answered: int
    refused: int
    broken: int
    p50_ms: float
    p99_ms: float
    wrong: int = 0

    @property
    def per_s(self) -> float:
        """Good answers in a second."""
        return self.answered / self.seconds


def generate(port: int, payload: Payload, *, connections: int, seconds: float) -> Load:
    """The best generator there is on this machine."""
    if shutil.which("wrk"):
        return run_wrk(port, payload, connections=connections, seconds=seconds)
    return asyncio.run(drive(port, payload.requests(), connections=connections, seconds=seconds))


def run_wrk(port: int, payload: Payload, *, connections: int, seconds: float) -> Load:
    """wrk with one thread. `seconds` is rounded up to whole ones."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{-int(-seconds // 1)}s", "--timeout", "5s", "-s", str(ROTATE)]
    with tempfile.TemporaryDirectory() as folder:
        bodies = Path(folder, "bodies")
        payload.write(bodies)
        headers = [part for header in payload.headers.items() for part in header]
        command += [f"http://127.0.0.1:{port}{payload.path}", "--", str(bodies), *headers]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30, check=True)
    return parse_wrk(done.stdout, connections=connections)


def parse_wrk(output: str, *, connections: int) -> Load:
    """The line of JSON that `rotate.lua` prints last. Raises ValueError where there is none."""
    line = output.strip().rpartition("\n")[2]
    if not line.startswith("{"):
        raise ValueError(f"wrk must end with the line of rotate.lua, got {line!r}")
    found = json.loads(line)
    return Load(
        connections=connections,
        seconds=found["duration_us"] / 1e6,
        answered=found["requests"] - found["refused"],
        refused=found["refused"],
        broken=found["broken"],
        p50_ms=found["p50_us"] / 1e3,
        p99_ms=found["p99_us"] / 1e3,
    )


async def drive(
    port: int, requests: Sequence[bytes], *, connections: int, seconds: float, judge: Judge | None = None
) -> Load:
    """Load from this process; connections that break are opened anew. Answers that come too late are not counted.

    requests: whole HTTP requests, sent in turn.
    """
    tally = Tally(requests, judge)
    tally.end = time.perf_counter() + seconds
    started = time.perf_counter()
    clients = [asyncio.create_task(keep_connected(port, tally)) for _ in range(connections)]
    try:
        await asyncio.sleep(seconds)
    finally:
        now = time.perf_counter()
        lost = sum(now - sent > LOST_S for sent in tally.waiting.values())
        for client in clients:
            client.cancel()
        ended = await asyncio.gather(*clients, return_exceptions=True)
    for problem in ended:
        if not isinstance(problem, asyncio.CancelledError):
            raise RuntimeError("a client of the load generator failed") from problem
    return tally.load(connections, now - started, lost=lost)


class Tally:
    """What all connections of one drive share: whose turn it is, and the counts."""

    def __init__(self, requests: Sequence[bytes], judge: Judge | None) -> None:
        self.requests = requests
        self.judge = judge
        self.end = 0.0
        self.turn = -1
        self.waiting: dict[Client, float] = {}
        self.latencies_s: list[float] = []
        self.refused = self.broken = self.wrong = 0

    def next(self) -> int:
        self.turn = (self.turn + 1) % len(self.requests)
        return self.turn

    def add(self, number: int, status: int, body: bytes, latency_s: float) -> None:
        if status != 200:
            self.refused += 1
            return
        self.latencies_s.append(latency_s)
        if self.judge is not None and not self.judge(number, body):
            self.wrong += 1

    def load(self, connections: int, seconds: float, *, lost: int) -> Load:
        p50_s, p99_s = percentiles(self.latencies_s)
        return Load(
            connections=connections,
            seconds=seconds,
            answered=len(self.latencies_s),
            refused=self.refused,
            broken=self.broken + lost,
            p50_ms=p50_s * 1e3,
            p99_ms=p99_s * 1e3,
            wrong=self.wrong,
        )


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The 50th and the 99th; infinite where nothing was answered.

    >>> percentiles([1.0])
    (1.0, 1.0)
    """
    if len(values) < 2:
        return (values[0], values[0]) if values else (float("inf"), float("inf"))
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]


async def keep_connected(port: int, tally: Tally) -> None:
    """One connection after another, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        closed = loop.create_future()
        try:
            transport, _ = await loop.create_connection(lambda end=closed: Client(tally, end), "127.0.0.1", port)
        except OSError:
            tally.broken += 1
            await asyncio.sleep(0.01)  # a port that refuses must not be asked in a tight loop
            continue
        try:
            await closed
        finally:
            transport.abort()


class Client(asyncio.Protocol):
    """One connection with one request under way."""

    def __init__(self, tally: Tally, closed: asyncio.Future[None]) -> None:
        self._tally = tally
        self._closed = closed
        self._received = bytearray()
        self._number = 0
        self._sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._number = self._tally.next()
        self._sent = self._tally.waiting[self] = time.perf_counter()
        self._transport.write(self._tally.requests[self._number])

    def data_received(self, data: bytes) -> None:
        self._received += data
        try:
            answer = split_answer(self._received)
        except ValueError:
            self._transport.abort()  # which counts as broken
            return
        if answer is None:
            return
        self._received.clear()
        now = time.perf_counter()
        del self._tally.waiting[self]
        if now >= self._tally.end:
            return
        try:
            self._tally.add(self._number, answer.status, answer.body, now - self._sent)
        except Exception as problem:  # of the judge: asyncio would only log it
            self._closed.set_exception(problem)
            return
        if answer.last:
            self._transport.abort()
        else:
            self._ask()

    def connection_lost(self, problem: Exception | None) -> None:
        # Nothing waits where the server closed after its answer, and when the time is up every close is ours.
        if self._tally.waiting.pop(self, None) is not None and time.perf_counter() < self._tally.end:
            self._tally.broken += 1
        if not self._closed.done():
            self._closed.set_result(None)


@dataclass(frozen=True, slots=True)
class Answer:
    """One whole HTTP answer. last: the server closes the connection after it."""

    status: int
    body: bytes
    last: bool


def split_answer(received: bytes | bytearray) -> Answer | None:
    """The answer, or None where more is to come. Raises ValueError for what is no answer with a length.

    >>> split_answer(b"HTTP/1.1 200 OK\\r\\ncontent-length: 2\\r\\n\\r\\nhi")
    Answer(status=200, body=b'hi', last=False)
    >>> split_answer(b"HTTP/1.1 200 OK\\r\\ncontent-length: 3\\r\\n\\r\\nhi") is None
    True
    """
    head, blank, body = bytes(received).partition(b"\r\n\r\n")
    if not blank:
        return None
    first, *lines = head.split(b"\r\n")
    lengths = [line.partition(b":")[2] for line in lines if line.lower().startswith(b"content-length:")]
    if len(lengths) != 1:
        raise ValueError(f"an answer must have one Content-Length, got {head[:200]!r}")
    missing = int(lengths[0]) - len(body)
    if missing < 0:
        raise ValueError(f"an answer must end after its length, got {-missing} bytes more")
    if missing:
        return None
    return Answer(int(first.split(b" ")[1]), body, last=b"\r\nconnection: close" in head.lower())
