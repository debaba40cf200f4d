"""Serving one image a request: throughput, latency, CPU and memory, fettle's server beside FastAPI and LitServe.

The int8 ResNet-20 that fettle makes, a base64 JPEG in a JSON body, `POST /predict` over loopback, 1 and 32 connections,
each sending its next request when it has its answer (closed loop; wrk where it is installed: apt-get install -y wrk).
Servers and load generator share two cores. Every system runs the same model.onnx on one thread an inference and does
the same decoding; it is started anew in each round, answers judged requests at 32 connections, which also warms it up,
is measured, and is ended with SIGTERM. Rounds are interleaved, figures are medians over them.

Claimed: fettle answers every request, and rightly, and at 32 connections as many a second as the best peer.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from harness import Claim, Options, PeerMissing, Result, Table, finish, parse_options, peer_python
from serve_peers.artifact import answer_all, bodies_of, describe_task, find_subject, quantize, seal
from serve_peers.generators import HOW_TO_GET_WRK, Judge, Load, drive, generate
from serve_peers.processes import Ending, Launch, Server, ServerFailed, busy_s

SCRIPTS = Path(__file__).parent / "serve_peers"
IMAGES = 64
CORES = 2
FEW, MANY = 1, 32
READY_LIMIT_S = 60.0
# More work of others than this, and the figures are told to be doubtful.
QUIET_CORES = 0.1
OURS = "fettle"


@dataclass(frozen=True, slots=True)
class Effort:
    """How much work a run does: rounds, and seconds of each part of a turn."""

    rounds: int
    check_s: float
    few_s: float
    many_s: float


FULL = Effort(rounds=5, check_s=1.0, few_s=2.0, many_s=4.0)
QUICK = Effort(rounds=2, check_s=0.7, few_s=1.0, many_s=1.0)


@dataclass(frozen=True, slots=True)
class System:
    """One server. ours: of fettle; expected: the class for each image, as the engine it runs on gives it alone."""

    name: str
    launch: Launch
    expected: tuple[int, ...]
    ours: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """One system in one round. elsewhere_cores: what work that is none of ours took of the cores meanwhile."""

    checked: Load
    few: Load
    many: Load
    ready_s: float
    cpu_s: float
    memory_bytes: int
    elsewhere_cores: float
    ending: Ending

    @property
    def errors(self) -> int:
        """Requests without a good answer."""
        return sum(load.refused + load.broken for load in (self.checked, self.few, self.many))

    @property
    def cpu_s_per_1000(self) -> float:
        """CPU time of the server for a thousand answers at 32 connections."""
        return self.cpu_s / max(1, self.many.answered) * 1000


def main(options: Options) -> int:
    """Build, measure in turns, judge, report."""
    effort = QUICK if options.quick else FULL
    cores = set(sorted(os.sched_getaffinity(0))[:CORES])
    os.sched_setaffinity(0, cores)  # inherited by every server and by the load generator
    load_before = os.getloadavg()[0]
    missing: dict[str, str] = {} if shutil.which("wrk") else {"wrk": HOW_TO_GET_WRK}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        systems, note = build(folder, missing=missing)
        turns = measure(systems, folder, effort=effort, cores=cores, missing=missing)
    ours = {system.name for system in systems if system.ours}
    details = {
        "systems": {name: [asdict(turn) for turn in found] for name, found in turns.items()},
        "effort": asdict(effort),
        "generator": "built in" if "wrk" in missing else "wrk",
        "cores": len(cores),
        "load_before": load_before,
    }
    result = Result(
        benchmark="serve",
        tables=(tabulate_load(turns, note=note, rounds=effort.rounds), tabulate_cost(turns)),
        claims=(claim_right(turns, ours), claim_fast(turns, ours)),
        details=details,
        missing=missing,
    )
    return finish(result, options)


def build(folder: Path, *, missing: dict[str, str]) -> tuple[list[System], str]:
    """Seal the artifacts, write what the servers read, and say how each is started; and where the model is from."""
    subject = find_subject(images=IMAGES)
    quantized = quantize(subject)
    (folder / "bodies").write_bytes(b"".join(body + b"\n" for body in bodies_of(subject.jpegs)))
    systems, expected = [], {}
    for runtime, name in (("onnxruntime", OURS), ("openvino", f"{OURS}, OpenVINO")):
        try:
            artifact = seal(subject, folder / runtime, runtime=runtime, quantized=quantized)
        except Exception as problem:
            missing[name] = f"{type(problem).__name__}: {problem}"
            continue
        expected[runtime] = tuple(answer_all(artifact, subject.jpegs))
        systems.append(System(name, launch_fettle(folder / runtime), expected[runtime], ours=True))
        if runtime == "onnxruntime":
            launch = launch_fettle(folder / runtime, observations=folder / "observations")
            systems.append(System(f"{OURS}, with prediction log", launch, expected[runtime], ours=True))
            (folder / "task.json").write_text(json.dumps(describe_task(artifact)), encoding="utf-8")
            shutil.copyfile(folder / runtime / "model.onnx", folder / "model.onnx")
    if "onnxruntime" in expected:
        systems += build_peers(folder, expected["onnxruntime"], missing=missing)
    return systems, subject.note


def launch_fettle(artifact: Path, *, observations: Path | None = None) -> Launch:
    """fettle's server on an artifact, with its defaults."""
    command = (sys.executable, str(SCRIPTS / "fettle_server.py"), "{port}", str(artifact))
    return Launch(command if observations is None else (*command, str(observations)))


def build_peers(folder: Path, expected: tuple[int, ...], *, missing: dict[str, str]) -> list[System]:
    """Each peer with one worker process and with one for each core."""
    systems = []
    for peer, name in (("fastapi", "FastAPI + uvicorn"), ("litserve", "LitServe")):
        try:
            python = str(peer_python(peer))
        except PeerMissing as problem:
            missing[name] = str(problem)
            continue
        for workers in (1, CORES):
            command = (python, str(SCRIPTS / f"{peer}_server.py"), "{port}", str(workers))
            launch = Launch(command, {"SERVE_FOLDER": str(folder)})
            systems.append(System(f"{name}, {workers} worker{'s' * (workers > 1)}", launch, expected))
    return systems


def measure(
    systems: Sequence[System], folder: Path, *, effort: Effort, cores: set[int], missing: dict[str, str]
) -> dict[str, list[Turn]]:
    """Round after round, everyone in turn, and another one first each time. Who fails once is out, and is named."""
    turns: dict[str, list[Turn]] = {system.name: [] for system in systems}
    for number in range(effort.rounds):
        start = number % len(systems) if systems else 0
        for system in [*systems[start:], *systems[:start]]:
            if system.name in missing:
                continue
            try:
                turns[system.name].append(take_turn(system, folder, effort=effort, cores=cores))
            except (ServerFailed, OSError, ValueError, subprocess.SubprocessError) as problem:
                missing[system.name] = f"round {number + 1}: {problem}"
    return {name: found for name, found in turns.items() if name not in missing}


def take_turn(system: System, folder: Path, *, effort: Effort, cores: set[int]) -> Turn:
    """Start it, judge its answers, measure it, end it. Raises ServerFailed."""
    bodies = folder / "bodies"
    contents = bodies.read_bytes().splitlines()
    server = Server(system.launch, folder / "server.log")
    try:
        server.wait_ready(contents[0], limit_s=READY_LIMIT_S)
        judge = judge_by(system.expected)
        checked = asyncio.run(drive(server.port, contents, connections=MANY, seconds=effort.check_s, judge=judge))
        few = generate(server.port, bodies, connections=FEW, seconds=effort.few_s)
        busy, own, cpu_s = busy_s(cores), own_cpu_s(), server.cpu_s()
        many = generate(server.port, bodies, connections=MANY, seconds=effort.many_s)
        cpu_s = server.cpu_s() - cpu_s
        elsewhere_s = busy_s(cores) - busy - (own_cpu_s() - own) - cpu_s
        memory_bytes = server.memory_bytes()
    finally:
        ending = server.stop()
    return Turn(
        checked=checked,
        few=few,
        many=many,
        ready_s=server.ready_s,
        cpu_s=cpu_s,
        memory_bytes=memory_bytes,
        elsewhere_cores=max(0.0, elsewhere_s / many.seconds),
        ending=ending,
    )


def judge_by(expected: Sequence[int]) -> Judge:
    """Right is an answer with the index that the engine gives for that image."""

    def judge(number: int, body: bytes) -> bool:
        try:
            return bool(json.loads(body)["index"] == expected[number])
        except (ValueError, TypeError, KeyError):
            return False

    return judge


def own_cpu_s() -> float:
    """CPU time of this process and of the load generators that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def per_s(turns: Sequence[Turn]) -> float:
    """Median answers a second at 32 connections."""
    return statistics.median(turn.many.per_s for turn in turns)


def claim_right(turns: Mapping[str, Sequence[Turn]], ours: set[str]) -> Claim:
    """No error of fettle's, and no wrong answer of anyone: a peer that answers something else does other work."""
    statement = "fettle answers every request, and everyone the class that the engine gives"
    found = [turn for name in turns if name in ours for turn in turns[name]]
    if not found:
        return Claim(statement, holds=False, figures="no server of fettle was measured")
    errors = sum(turn.errors for turn in found)
    judged = sum(turn.checked.answered for turn in found)
    wrong = {name: sum(turn.checked.wrong for turn in turns[name]) for name in turns}
    served = sum(load.answered for turn in found for load in (turn.few, turn.many)) + judged
    figures = f"fettle {errors} errors in {served + errors} requests, {sum(wrong[n] for n in ours & wrong.keys())} "
    figures += f"wrong of {judged} judged"
    strayed = [f"{name} {count} wrong" for name, count in wrong.items() if count and name not in ours]
    holds = not errors and not any(wrong.values()) and judged > 0
    return Claim(statement, holds=holds, figures=", ".join([figures, *strayed]))


def claim_fast(turns: Mapping[str, Sequence[Turn]], ours: set[str]) -> Claim:
    """fettle on the engine that the peers use, beside the best of them."""
    statement = f"fettle answers at least as many requests a second at {MANY} connections as the best peer"
    peers = {name: per_s(turns[name]) for name in turns if name not in ours}
    if not turns.get(OURS) or not peers:
        return Claim(statement, holds=False, figures="fettle or every peer is missing")
    best = max(peers, key=lambda name: peers[name])
    rate = per_s(turns[OURS])
    figures = f"fettle {rate:.0f} requests/s at {MANY} connections, {rate / peers[best]:.2f} × the best peer"
    return Claim(statement, holds=rate >= peers[best], figures=f"{figures} ({best}, {peers[best]:.0f})")


def tabulate_load(turns: Mapping[str, Sequence[Turn]], *, note: str, rounds: int) -> Table:
    """Throughput and latency; in brackets the slowest and the fastest round."""
    rows = []
    for name, found in turns.items():
        rates = [turn.many.per_s for turn in found]
        many, few = [turn.many for turn in found], [turn.few for turn in found]
        rows.append(
            (
                name,
                f"{statistics.median(rates):.0f} ({min(rates):.0f}–{max(rates):.0f})",
                f"{statistics.median(load.p50_ms for load in many):.1f}",
                f"{statistics.median(load.p99_ms for load in many):.1f}",
                f"{statistics.median(load.per_s for load in few):.0f}",
                f"{statistics.median(load.p50_ms for load in few):.2f}",
                f"{statistics.median(load.p99_ms for load in few):.2f}",
                f"{sum(turn.errors for turn in found)}",
                f"{sum(turn.checked.wrong for turn in found)} of {sum(turn.checked.answered for turn in found)}",
            )
        )
    title = f"int8 ResNet-20 as a service: {note}, base64 in JSON, closed loop, two cores shared with the load, "
    title += f"median of {rounds} rounds"
    elsewhere = statistics.median(turn.elsewhere_cores for found in turns.values() for turn in found) if turns else 0.0
    if elsewhere >= QUIET_CORES:
        title += f"; NOT a quiet machine: other work took {elsewhere:.1f} of the cores meanwhile"
    columns = ("system", f"req/s, {MANY} conn.", "p50, ms", "p99, ms", f"req/s, {FEW} conn.", "p50 alone, ms",
               "p99 alone, ms", "errors", "wrong of judged")  # fmt: skip
    return Table(title, columns, tuple(rows))


def tabulate_cost(turns: Mapping[str, Sequence[Turn]]) -> Table:
    """What the same service takes of the machine, and how it begins and ends."""
    rows = tuple(
        (
            name,
            f"{statistics.median(turn.cpu_s_per_1000 for turn in found):.2f}",
            f"{statistics.median(turn.memory_bytes for turn in found) / 2**20:.0f}",
            f"{statistics.median(turn.ready_s for turn in found):.2f}",
            describe_endings([turn.ending for turn in found]),
            f"{statistics.median(turn.elsewhere_cores for turn in found):.2f}",
        )
        for name, found in turns.items()
    )
    columns = ("system", "CPU s / 1000 requests", "memory, MiB", "start to first answer, s", "after SIGTERM",
               "other work, cores")  # fmt: skip
    return Table(f"What it costs, at {MANY} connections", columns, rows)


def describe_endings(endings: Sequence[Ending]) -> str:
    """The worst of them.

    >>> describe_endings([Ending(code=0, left=0)])
    'ended, code 0'
    >>> describe_endings([Ending(code=0, left=0), Ending(code=-15, left=3)])
    'left 3 processes behind'
    >>> describe_endings([Ending(code=None, left=1)])
    'had to be killed'
    """
    if any(ending.code is None for ending in endings):
        return "had to be killed"
    left = max(ending.left for ending in endings)
    if left:
        return f"left {left} process{'es' * (left > 1)} behind"
    return "ended, code " + ", ".join(str(code) for code in sorted({ending.code for ending in endings}))


if __name__ == "__main__":
    raise SystemExit(main(parse_options(__doc__)))
