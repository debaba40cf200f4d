"""An hour of steady load: whether anything is lost, answered wrongly, or grows.

fettle serves the int8 ResNet-20 out of a registry, with its prediction log, at half of the requests a second that it
was found to answer before (open loop, Poisson arrivals: a slow answer does not slow the arrivals down, and latency
counts from the arrival). Now and then another version is promoted, rolled back, or a worker killed with -9.
`--minutes M` sets the duration, 60 by default; `--quick` is one minute. `--rate R` sends R requests a second instead,
which leaves the machine to others.

Claimed: every request is answered, rightly, or shed with 429 or 503; and neither the front nor any worker grows.
Growth is the median of the slopes between all pairs of samples of one process (Theil-Sen) after a warm-up, times the
measured time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path

from harness import Claim, Options, Result, Table, finish, parse_options
from serve_peers.artifact import answer_all, find_subject, preprocess_all, quantize, seal
from serve_peers.generators import Judge, drive, split_answer
from serve_peers.payloads import Images, Payload, judge_by, plain
from serve_peers.processes import Launch, Server, processes_with

from fettle.core.home import Home
from fettle.registry import Registry

NAME = "resnet20"
IMAGES = 64
CONNECTIONS = 32
SHARE = 0.5
READY_LIMIT_S = 60.0
# A process may seem to have grown by so much: allocators keep some of what they were given.
ALLOWED_SHARE, ALLOWED_BYTES = 0.05, 8 * 2**20
# Of a process's life, how much is warm-up.
WARM_UP_SHARE = 0.3
# Who lived for a smaller share of the whole time is not judged.
JUDGED_SHARE = 0.5
MAX_SAMPLES = 400
LOST_S = 30.0
TROUBLE_S = 1.5
SHED = frozenset({429, 503})
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class Tally:
    """What became of the requests, and how large the processes were: (seconds, bytes) by process id."""

    latencies_s: list[float] = field(default_factory=list)
    sent: int = 0
    shed: int = 0
    refused: int = 0
    broken: int = 0
    wrong: int = 0
    switches: int = 0
    kills: int = 0
    front: int = 0
    sizes: dict[int, list[tuple[float, int]]] = field(default_factory=dict)


class Connection(asyncio.Protocol):
    """One request at a time; whoever waits longest is next."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._received = bytearray()
        self._arrival: tuple[int, float] | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.next()

    def next(self) -> None:
        """Send what waits, or wait for it."""
        if self._load.waiting and self.transport is not None:
            self._arrival = self._load.waiting.popleft()
            self.transport.write(self._load.requests[self._arrival[0]])
        else:
            self._load.free.append(self)

    def data_received(self, data: bytes) -> None:
        self._received += data
        answer = split_answer(self._received)
        if answer is None or self._arrival is None:
            return
        self._received.clear()
        arrival, self._arrival = self._arrival, None
        self._load.answered(arrival, answer.status, answer.body)
        if not answer.last:
            self.next()

    def connection_lost(self, problem: Exception | None) -> None:
        self.transport = None
        if self in self._load.free:
            self._load.free.remove(self)
        if self._arrival is not None:
            self._load.tally.broken += 1
        self._load.reconnect()


class Load:
    """Open loop: arrivals at random moments, `rate` of them a second, over a fixed number of connections."""

    def __init__(self, port: int, requests: Sequence[bytes], judge: Judge, *, rate: float, seed: int = 0) -> None:
        self.requests = requests
        self.tally = Tally()
        self.waiting: deque[tuple[int, float]] = deque()
        self.free: list[Connection] = []
        self._port = port
        self._judge = judge
        self._rate = rate
        self._random = random.Random(seed)
        self._ended = False
        self._opening: set[asyncio.Task[object]] = set()

    @property
    def missing(self) -> int:
        """Requests that nobody has answered."""
        tally = self.tally
        return tally.sent - len(tally.latencies_s) - tally.shed - tally.refused - tally.broken - tally.wrong

    def reconnect(self) -> None:
        """Open a connection, unless it is over."""
        if not self._ended:
            opening = asyncio.get_running_loop().create_task(self._open())
            self._opening.add(opening)
            opening.add_done_callback(self._opening.discard)

    async def _open(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: Connection(self), "127.0.0.1", self._port)
        except OSError:
            self.tally.broken += 1
            await asyncio.sleep(0.1)
            self.reconnect()

    def answered(self, arrival: tuple[int, float], status: int, body: bytes) -> None:
        """Count an answer."""
        number, arrived = arrival
        if status in SHED:
            self.tally.shed += 1
        elif status != 200:
            self.tally.refused += 1
        elif not self._judge(number, body):
            self.tally.wrong += 1
        else:
            self.tally.latencies_s.append(time.perf_counter() - arrived)

    async def run(self, seconds: float) -> None:
        """Send for so long, then wait for the last answers."""
        for _ in range(CONNECTIONS):
            self.reconnect()
        start = due = time.perf_counter()
        while due < start + seconds:
            due += self._random.expovariate(self._rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            self.tally.sent += 1
            self.waiting.append((self.tally.sent % len(self.requests), due))
            if self.free:
                self.free.pop().next()
        end = time.perf_counter() + LOST_S
        while self.missing and time.perf_counter() < end:
            await asyncio.sleep(0.02)
        self._ended = True
        for connection in self.free:
            if connection.transport is not None:
                connection.transport.abort()


async def soak(server: Server, registry: Registry, load: Load, *, seconds: float) -> Tally:
    """Load, watch, and now and then trouble the server."""
    events = asyncio.create_task(trouble(server, registry, load.tally, every_s=max(TROUBLE_S, seconds / 40)))
    watch = asyncio.create_task(weigh(server, load.tally, every_s=max(0.25, seconds / MAX_SAMPLES)))
    try:
        await load.run(seconds)
    finally:
        for task in (events, watch):
            task.cancel()
        ended = await asyncio.gather(events, watch, return_exceptions=True)
    for problem in ended:
        if not isinstance(problem, asyncio.CancelledError):
            raise RuntimeError("the soak itself failed") from problem if isinstance(problem, Exception) else None
    return load.tally


async def trouble(server: Server, registry: Registry, tally: Tally, *, every_s: float) -> None:
    """Promote, roll back, and, once in eight times, kill a worker."""
    turn = 0
    while True:
        await asyncio.sleep(every_s)
        turn += 1
        if turn % 8 == 3:
            workers = [pid for pid in processes_with(server.mark) if pid != tally.front]
            os.kill(max(workers), signal.SIGKILL)
            tally.kills += 1
        elif turn % 2:
            await asyncio.to_thread(registry.promote, NAME, 2)
            tally.switches += 1
        else:
            await asyncio.to_thread(registry.promote, NAME, 1)
            tally.switches += 1


async def weigh(server: Server, tally: Tally, *, every_s: float) -> None:
    """Write down how much memory each process has."""
    start = time.perf_counter()
    while True:
        for pid in processes_with(server.mark):
            try:
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            tally.sizes.setdefault(pid, []).append((time.perf_counter() - start, pages * PAGE_BYTES))
        await asyncio.sleep(every_s)


def growth(samples: Sequence[tuple[float, int]]) -> float:
    """Bytes by which a process grew over the measured time, by the median slope between samples.

    >>> round(growth([(0.0, 100), (1.0, 110), (2.0, 120), (3.0, 900), (4.0, 140)]))
    40
    """
    if len(samples) < 2:
        return 0.0
    slopes = [(late - early) / (end - begin) for (begin, early), (end, late) in combinations(samples, 2) if end > begin]
    return statistics.median(slopes) * (samples[-1][0] - samples[0][0])


def settled(samples: Sequence[tuple[float, int]]) -> Sequence[tuple[float, int]]:
    """Without the warm-up of this process."""
    return samples[int(len(samples) * WARM_UP_SHARE) :]


def claims_of(tally: Tally, *, front: int, missing: int) -> tuple[Claim, Claim]:
    """Whether all was answered, and whether all stayed as it was."""
    lost = tally.refused + tally.broken + missing
    figures = f"{len(tally.latencies_s)} of {tally.sent} requests answered, {tally.shed} shed, {lost} lost, "
    figures += f"{tally.wrong} wrong, with {tally.switches} switches and {tally.kills} killed workers"
    answered = Claim("every request is answered rightly or shed", lost + tally.wrong == 0 < tally.sent, figures)
    # Who was started late has had no time to settle.
    enough = max(20, len(tally.sizes.get(front, ())) * JUDGED_SHARE)
    long = {pid: settled(found) for pid, found in tally.sizes.items() if len(found) >= enough}
    over = {}
    for pid, found in long.items():
        allowed = ALLOWED_BYTES + ALLOWED_SHARE * statistics.median(size for _, size in found)
        over[pid] = growth(found) / allowed
    of_front = growth(long.get(front, ())) / 2**20
    of_workers = max((growth(found) / 2**20 for pid, found in long.items() if pid != front), default=0.0)
    figures = f"front {of_front:+.1f} MiB, worker that grew most {of_workers:+.1f} MiB"
    return answered, Claim("memory is flat", front in long and max(over.values(), default=2.0) <= 1.0, figures)


def prepare(folder: Path) -> tuple[Registry, Payload, Judge]:
    """A registry with two versions of the model, what is asked, and what is right."""
    subject = find_subject(images=IMAGES)
    quantized = quantize(subject)
    # The same model with other golden rows is another version.
    other = replace(subject, calibration=[batch.flip(0) for batch in subject.calibration])
    registry = Registry(Home(folder / "home"))
    for number, one in enumerate((subject, other), 1):
        artifact = seal(one, folder / str(number), runtime="onnxruntime", quantized=quantized)
        registry.put(NAME, artifact)
    rows = preprocess_all(artifact, subject.jpegs)
    payload = plain(Images(subject.jpegs, rows))["image"]
    expected = answer_all(artifact, rows).of(payload)
    return registry, payload, judge_by(expected, payload.read, tolerance=1e-5)


def run(folder: Path, *, seconds: float, rate: float | None = None) -> Result:
    """Build, find the capacity unless a rate is given, soak, judge."""
    registry, payload, judge = prepare(folder)
    command = (sys.executable, "-m", "fettle", "serve", f"{NAME}@champion", "--port", "{port}")
    server = Server(Launch(command, {"FETTLE_HOME": str(folder / "home")}, "/health/ready"), folder / "server.log")
    try:
        server.wait_ready(payload, limit_s=READY_LIMIT_S)
        front = min(processes_with(server.mark))
        if rate is None:
            found = asyncio.run(
                drive(server.port, payload.requests(), connections=CONNECTIONS, seconds=min(5.0, seconds / 8))
            )
            rate = max(1.0, SHARE * found.per_s)
        load = Load(server.port, payload.requests(), judge, rate=rate)
        load.tally.front = front
        tally = asyncio.run(soak(server, registry, load, seconds=seconds))
    finally:
        ending = server.stop(grace_s=40.0)
    ended = Claim("SIGTERM ends it cleanly", ending.code == 0 and not ending.left, f"code {ending.code}")
    claims = (*claims_of(tally, front=front, missing=load.missing), ended)
    details = asdict(tally)
    del details["latencies_s"]
    return Result("soak", (tabulate(tally, rate=rate, seconds=seconds, front=front),), claims, details=details)


def tabulate(tally: Tally, *, rate: float, seconds: float, front: int) -> Table:
    """Latency, and memory at the begin and at the end."""
    cuts = (
        statistics.quantiles(tally.latencies_s, n=1000, method="inclusive") if len(tally.latencies_s) > 1 else [0] * 999
    )
    rows = [("latency p50, ms", f"{cuts[499] * 1e3:.1f}"), ("latency p99, ms", f"{cuts[989] * 1e3:.1f}"),
            ("latency p99.9, ms", f"{cuts[998] * 1e3:.1f}")]  # fmt: skip
    for pid, found in tally.sizes.items():
        name = "front" if pid == front else "worker"
        first, last = settled(found)[0][1], found[-1][1]
        rows.append((f"{name} {pid}, MiB after warm-up and at the end", f"{first / 2**20:.0f}, {last / 2**20:.0f}"))
    return Table(f"{seconds:.0f} s at {rate:.0f} requests a second", ("what", "figure"), tuple(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, soak, report."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float)
    own, rest = parser.parse_known_args(arguments)
    options: Options = parse_options(__doc__, arguments=rest)
    seconds = 60.0 if options.quick else own.minutes * 60.0
    with tempfile.TemporaryDirectory() as name:
        return finish(run(Path(name), seconds=seconds, rate=own.rate), options)


if __name__ == "__main__":
    raise SystemExit(main())
