"""One server measured once: started, judged, loaded in a closed and in an open loop, weighed, ended."""

from __future__ import annotations

import asyncio
import os
import resource
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from serve_peers.compute import Limit, LimitFailed, limit_of
from serve_peers.generators import Load, drive, generate
from serve_peers.open_loop import OpenLoad, drive_open
from serve_peers.payloads import Payload
from serve_peers.processes import Ending, Server, ServerFailed, busy_s
from serve_peers.systems import OURS, Field, System

FEW, MANY = 1, 32
READY_LIMIT_S = 60.0
DEADLINE_S = 0.1
SETTLE_LIMIT_S = 5.0
LIMIT = "decoding and inference alone"
DEADLINE_HEADER = "X-Request-Timeout-Ms"


@dataclass(frozen=True, slots=True)
class Effort:
    """How much work a run does: rounds, seconds of each part of a turn, and the loads beyond the closed loop.

    factors: offered rates of the open loop, as multiples of the capacity, which `burst_s` at 32 connections tell.
    pairs: bursts of fettle between measurements of what the cores allow no server, with `limit_s` for a size of batch.
    """

    rounds: int
    check_s: float
    few_s: float
    many_s: float
    open_s: float
    factors: tuple[float, ...]
    pairs: int
    burst_s: float
    limit_s: float


FULL = Effort(
    rounds=3, check_s=0.7, few_s=1.0, many_s=2.0, open_s=2.0, factors=(0.5, 1.0, 1.5, 2.0), pairs=8, burst_s=1.0,
    limit_s=0.15,
)  # fmt: skip
QUICK = Effort(
    rounds=1, check_s=0.4, few_s=1.0, many_s=1.0, open_s=0.7, factors=(1.0, 2.0), pairs=3, burst_s=1.0, limit_s=0.1
)


@dataclass(frozen=True, slots=True)
class Part:
    """One system under one kind of request. elsewhere_cores: what work that is none of ours took of the cores."""

    checked: Load
    few: Load
    many: Load
    cpu_s: float
    elsewhere_cores: float

    @property
    def errors(self) -> int:
        """Requests without a good answer."""
        return sum(load.refused + load.broken for load in (self.checked, self.few, self.many))

    @property
    def served(self) -> int:
        """Good answers."""
        return sum(load.answered for load in (self.checked, self.few, self.many))

    @property
    def cpu_s_per_1000(self) -> float:
        """CPU time of the server for a thousand answers at 32 connections."""
        return self.cpu_s / max(1, self.many.answered) * 1000


@dataclass(frozen=True, slots=True)
class Open:
    """One open-loop load beside the capacity, the mean of just before and just after it, for speeds change.

    judged: how many of its answers were; cpu_s: of the server.
    """

    factor: float
    capacity_per_s: float
    load: OpenLoad
    judged: int
    wrong: int
    cpu_s: float = 0.0

    @property
    def goodput(self) -> float:
        """Answers within the deadline, as a share of the capacity."""
        return self.load.goodput_per_s / self.capacity_per_s

    @property
    def unkept(self) -> float:
        """What was neither answered in time nor shed, as a share of all that was due."""
        load = self.load
        bad = load.late + load.refused + load.broken + load.unanswered
        return bad / max(1, bad + load.good + load.shed)


@dataclass(frozen=True, slots=True)
class Pair:
    """A burst at 32 connections, and what the cores allowed no server, the mean of just before and just after it.

    limits_per_s: rows a second by rows in a batch. A host's speed may change within seconds: only neighbors compare.
    """

    per_s: float
    limits_per_s: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Turn:
    """One system in one round. parts, pairs: by kind of request; pairs of fettle alone."""

    parts: Mapping[str, Part]
    opened: Sequence[Open]
    ready_s: float
    first_s: float
    memory_bytes: int
    ending: Ending
    pairs: Mapping[str, Sequence[Pair]] = field(default_factory=dict)

    @property
    def errors(self) -> int:
        """Requests of the closed loop without a good answer."""
        return sum(part.errors for part in self.parts.values())

    @property
    def served(self) -> int:
        """Good answers of the closed loop."""
        return sum(part.served for part in self.parts.values())

    @property
    def judged(self) -> int:
        """Answers that were looked into."""
        return sum(part.checked.answered for part in self.parts.values()) + sum(one.judged for one in self.opened)

    @property
    def wrong(self) -> int:
        """Those of them that were not the engine's."""
        return sum(part.checked.wrong for part in self.parts.values()) + sum(one.wrong for one in self.opened)


@dataclass(frozen=True, slots=True)
class Findings:
    """All turns by system."""

    turns: dict[str, list[Turn]]

    def kinds(self) -> list[str]:
        """The kinds of request that anyone was asked."""
        parts = [part for found in self.turns.values() for turn in found for part in turn.parts]
        return list(dict.fromkeys(parts))

    def of(self, name: str, kind: str) -> list[Part]:
        """One system's parts, round by round."""
        return [turn.parts[kind] for turn in self.turns.get(name, ()) if kind in turn.parts]

    def per_s(self, name: str, kind: str) -> float:
        """Median answers a second at 32 connections."""
        return statistics.median(part.many.per_s for part in self.of(name, kind))

    def p99_ms(self, name: str, kind: str) -> float:
        """Median of the 99th percentiles at 32 connections."""
        return statistics.median(part.many.p99_ms for part in self.of(name, kind))

    def limit(self, kind: str) -> list[float]:
        """Rows a second without a server beside each of fettle's bursts, in the batches best by their median."""
        by_rows: dict[int, list[float]] = {}
        for pair in self._pairs(kind):
            for rows, per_s in pair.limits_per_s.items():
                by_rows.setdefault(rows, []).append(per_s)
        return max(by_rows.values(), key=statistics.median, default=[])

    def shares(self, kind: str) -> list[float]:
        """Of what the cores allow no server, what fettle reaches at 32 connections, burst by burst."""
        return [pair.per_s / limit for pair, limit in zip(self._pairs(kind), self.limit(kind), strict=True)]

    def _pairs(self, kind: str) -> list[Pair]:
        return [pair for turn in self.turns.get(OURS, ()) for pair in turn.pairs.get(kind, ())]


def measure(competitors: Field, folder: Path, *, effort: Effort, cores: set[int], missing: dict[str, str]) -> Findings:
    """Round after round, everyone in turn, and another one first each time. Who fails once is out, and is named."""
    systems = competitors.systems
    turns: dict[str, list[Turn]] = {system.name: [] for system in systems}
    for number in range(effort.rounds):
        start = number % len(systems) if systems else 0
        for system in [*systems[start:], *systems[:start]]:
            if system.name in missing:
                continue
            artifact = competitors.artifact if system.name == OURS else None
            try:
                turn = take_turn(system, folder, artifact=artifact, effort=effort, cores=cores, missing=missing)
            except (ServerFailed, OSError, ValueError, subprocess.SubprocessError) as problem:
                missing[system.name] = f"round {number + 1}: {problem}"
                continue
            turns[system.name].append(turn)
    return Findings({name: found for name, found in turns.items() if name not in missing})


def take_turn(
    system: System, folder: Path, *, artifact: Path | None, effort: Effort, cores: set[int], missing: dict[str, str]
) -> Turn:
    """Start it, judge its answers, measure it, end it. Raises ServerFailed.

    artifact: where it is to be compared with what the cores allow no server; if that fails, `missing` has the reason.
    """
    server = Server(system.launch, folder / "server.log")
    try:
        first = next(iter(system.payloads.values()))
        server.wait_ready(first, limit_s=READY_LIMIT_S)
        parts = {kind: take_part(server, system, kind, effort=effort, cores=cores) for kind in system.payloads}
        memory_bytes = server.memory_bytes()
        pairs = {} if artifact is None else compare(server, system, artifact, folder, effort, cores, missing)
        kind = next(iter(parts))
        opened = take_open(server, system, kind, effort=effort) if system.overload and effort.factors else []
    finally:
        ending = server.stop()
    return Turn(
        parts=parts,
        opened=opened,
        ready_s=server.ready_s,
        first_s=server.first_s,
        memory_bytes=memory_bytes,
        ending=ending,
        pairs=pairs,
    )


def compare(
    server: Server,
    system: System,
    artifact: Path,
    folder: Path,
    effort: Effort,
    cores: set[int],
    missing: dict[str, str],
) -> dict[str, list[Pair]]:
    """Its bursts beside what the cores allow no server, as far as that could be measured."""
    pairs: dict[str, list[Pair]] = {}
    if LIMIT not in missing:
        try:
            with limit_of(artifact, folder, processes=len(cores)) as limit:
                for kind, payload in system.payloads.items():
                    pairs[kind] = take_pairs(server, payload, kind, limit, effort=effort)
        except LimitFailed as problem:
            missing[LIMIT] = str(problem)
    return pairs


def take_pairs(server: Server, payload: Payload, kind: str, limit: Limit, *, effort: Effort) -> list[Pair]:
    """Bursts between measurements of the limit. Raises LimitFailed."""
    pairs = []
    before = limit.measure(kind, seconds=effort.limit_s)
    for _ in range(effort.pairs):
        burst = generate(server.port, payload, connections=MANY, seconds=effort.burst_s)
        after = limit.measure(kind, seconds=effort.limit_s)
        pairs.append(Pair(burst.per_s, {rows: (before[rows] + after[rows]) / 2 for rows in before}))
        before = after
    return pairs


def take_part(server: Server, system: System, kind: str, *, effort: Effort, cores: set[int]) -> Part:
    """Judged, which also warms it up, then at 1 and at 32 connections."""
    payload = system.payloads[kind]
    judged = drive(server.port, payload.requests(), connections=MANY, seconds=effort.check_s, judge=system.judge(kind))
    checked = asyncio.run(judged)
    few = generate(server.port, payload, connections=FEW, seconds=effort.few_s)
    busy, own, cpu_s = busy_s(cores), own_cpu_s(), server.cpu_s()
    many = generate(server.port, payload, connections=MANY, seconds=effort.many_s)
    cpu_s = server.cpu_s() - cpu_s
    elsewhere_s = busy_s(cores) - busy - (own_cpu_s() - own) - cpu_s
    return Part(checked, few, many, cpu_s, max(0.0, elsewhere_s / many.seconds))


def take_open(server: Server, system: System, kind: str, *, effort: Effort) -> list[Open]:
    """Loads that are offered at multiples of what was reached just before."""
    opened = []
    before = capacity_of(server, system, kind, effort=effort)
    for factor in effort.factors:
        found = overload(server, system, kind, factor, before, effort)
        after = capacity_of(server, system, kind, effort=effort)
        opened.append(replace(found, capacity_per_s=max((before + after) / 2, 1e-9)))
        before = after
    return opened


def capacity_of(server: Server, system: System, kind: str, *, effort: Effort) -> float:
    """Answers a second at 32 connections, once the server has nothing else to do."""
    payload = system.payloads[kind]
    server.settle(payload, limit_s=SETTLE_LIMIT_S)
    return generate(server.port, payload, connections=MANY, seconds=effort.burst_s).per_s


def overload(server: Server, system: System, kind: str, factor: float, capacity: float, effort: Effort) -> Open:
    """Offer a multiple of the capacity. fettle is told the deadline; the others have no header for it."""
    extra = {DEADLINE_HEADER: str(round(DEADLINE_S * 1000))} if system.ours else {}
    cpu_s = server.cpu_s()
    load, samples = drive_open(
        server.port,
        system.payloads[kind].requests(extra),
        rate_per_s=max(1.0, factor * capacity),
        seconds=effort.open_s,
        deadline_s=DEADLINE_S,
    )
    cpu_s = server.cpu_s() - cpu_s
    judge = system.judge(kind)
    wrong = sum(not judge(number, body) for number, body in samples)
    return Open(factor, capacity, load, judged=len(samples), wrong=wrong, cpu_s=cpu_s)


def own_cpu_s() -> float:
    """CPU time of this process and of the load generators that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def pin(count: int) -> set[int]:
    """Keep this process, and all it starts, on so many cores."""
    cores = set(sorted(os.sched_getaffinity(0))[:count])
    os.sched_setaffinity(0, cores)
    return cores
