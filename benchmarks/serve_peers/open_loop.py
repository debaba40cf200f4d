"""Open-loop load: requests leave when they are due, whatever became of those before them (Poisson arrivals).

Latency counts from the moment a request was due, so that what a slow server or a busy generator holds up is not left
out. Generator and server share the cores, so it is a small program in C (`open_loop.c`, compiled on first use): in
Python it took 45 µs a request, a tenth of what the server could have used at twice its capacity. What it takes now is
told with the result.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from harness import PEERS, PeerMissing
from serve_peers.generators import percentiles

SOURCE = Path(__file__).with_suffix(".c")
# Further requests wait in the generator, and their time counts: a client has a bound too.
MAX_CONNECTIONS = 1024
# How long answers are still awaited after the last request, beyond the deadline.
GRACE_S = 0.5
SAMPLE = 16
_UNANSWERED, _BROKEN, _UNSENT = 0, -1, -2
_OUTCOME, _SAMPLE_HEAD = struct.Struct("=ddii"), struct.Struct("=II")


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


class _Outcome(NamedTuple):
    """What became of a request. sent, done: seconds from the start; status: of HTTP, or one of the above."""

    sent: float
    done: float
    status: int
    number: int


def generator() -> Path:
    """The compiled program, made anew when its source has changed. Raises PeerMissing without a C compiler."""
    content = SOURCE.read_bytes()
    program = PEERS / f"open_loop-{hashlib.sha256(content).hexdigest()[:16]}"
    if not program.exists():
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise PeerMissing("the open loop needs a C compiler: apt-get install -y gcc libc6-dev")
        PEERS.mkdir(parents=True, exist_ok=True)
        draft = program.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O2", "-o", str(draft), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise PeerMissing(f"{SOURCE.name} cannot be compiled: {done.stderr.strip().splitlines()[-1:]}")
        draft.replace(program)
    return program


def drive_open(
    port: int, requests: Sequence[bytes], *, rate_per_s: float, seconds: float, deadline_s: float, seed: int = 0
) -> tuple[OpenLoad, list[tuple[int, bytes]]]:
    """Load from a process of its own; also every 16th answer with 200 and the number of its body, to be judged.

    Raises PeerMissing where the generator cannot be compiled.
    """
    due_s = arrivals(rate_per_s, seconds, seed=seed)
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name, part) for part in ("requests", "due", "outcomes", "samples")]
        paths[0].write_bytes(b"".join(len(one).to_bytes(4, "big") + one for one in requests))
        paths[1].write_bytes(struct.pack(f"={len(due_s)}d", *due_s))
        command = [str(generator()), str(port), *map(str, paths), str(MAX_CONNECTIONS), str(SAMPLE)]
        cpu_s = _run([*command, str(deadline_s + GRACE_S)], limit_s=seconds + deadline_s + 60.0)
        outcomes = [_Outcome(*found) for found in _OUTCOME.iter_unpack(paths[2].read_bytes())]
        samples = list(_samples(paths[3].read_bytes()))
    load = _judge(due_s, outcomes, deadline_s=deadline_s, rate_per_s=rate_per_s, seconds=seconds, cpu_s=cpu_s)
    return load, samples


def _run(command: Sequence[str], *, limit_s: float) -> float:
    """Run to the end; CPU seconds that it took. Raises CalledProcessError, and TimeoutExpired after the limit."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, words = process.communicate(timeout=limit_s)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=words)
    return float(words.strip())


def _samples(content: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(content):
        number, size = _SAMPLE_HEAD.unpack_from(content, at)
        at += _SAMPLE_HEAD.size
        yield number, content[at : at + size]
        at += size


def _judge(
    due_s: Sequence[float],
    outcomes: Sequence[_Outcome],
    *,
    deadline_s: float,
    rate_per_s: float,
    seconds: float,
    cpu_s: float,
) -> OpenLoad:
    sent = [(due, one) for due, one in zip(due_s, outcomes, strict=True) if one.status != _UNSENT]
    taken_s = [one.done - due for due, one in sent if one.status == 200]
    shed_s = [one.done - one.sent for _, one in sent if one.status == 429]
    good = sum(one <= deadline_s for one in taken_s)
    broken = sum(one.status == _BROKEN for _, one in sent)
    refused = sum(one.status not in (200, 429, _BROKEN, _UNANSWERED) for _, one in sent)
    (p50_s, p99_s), (shed_p50_s, shed_p99_s) = percentiles(taken_s), percentiles(shed_s)
    return OpenLoad(
        rate_per_s=rate_per_s,
        seconds=seconds,
        sent=len(sent),
        good=good,
        late=len(taken_s) - good,
        shed=len(shed_s),
        refused=refused,
        broken=broken,
        unanswered=len(due_s) - len(taken_s) - len(shed_s) - refused - broken,
        p50_ms=p50_s * 1e3,
        p99_ms=p99_s * 1e3,
        shed_p50_ms=shed_p50_s * 1e3,
        shed_p99_ms=shed_p99_s * 1e3,
        lag_p99_ms=percentiles([one.sent - due for due, one in sent])[1] * 1e3,
        cpu_s=cpu_s,
    )
