"""One image a request: throughput, latency, overload, CPU, memory and start, fettle's server beside six others.

The int8 ResNet-20 that fettle makes, over loopback on two cores that servers and load share. Everyone runs the same
model.onnx on one thread an inference after the same decoding (Flask: the float model in eager PyTorch, judged by that
model); answers are compared with the engine's to the last bit. Requests: base64 JPEG in JSON, 3×32×32 floats in JSON,
the same floats in binary (Open Inference Protocol; peers that do not speak it take the same numbers in a route of
their own, and who has no way to take raw tensors is not in that table).

Closed loop: 1 and 32 connections, each sending its next request when it has its answer (wrk where it is installed:
apt-get install -y wrk). Open loop: Poisson arrivals at multiples of what the closed loop has reached, latency from
when a request was due. Every system is started anew in each round and ended with SIGTERM; rounds are interleaved,
figures are medians over them. A shared machine changes its speed within seconds, so what is set against each other is
measured side by side: an open loop and the closed loop of just before and just after it; and in fettle's turns, burst
by burst, the closed loop and what two processes decode and infer without any server.

Peers are installed into `.peers/` on first use, or all with --install-peers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from harness import Options, PeerMissing, Result, finish, make_parser
from serve_claims import claims
from serve_peers.generators import HOW_TO_GET_WRK
from serve_peers.open_loop import generator
from serve_peers.payloads import KINDS
from serve_peers.systems import build, install_peers
from serve_tables import tables
from serve_turns import FULL, QUICK, measure, pin

CORES = 2


@dataclass(frozen=True, slots=True)
class ServeBenchOptions(Options):
    """payloads: kinds of request; peers: parts of names, "" is in all of them; install: make environments and end."""

    payloads: tuple[str, ...] = KINDS
    peers: tuple[str, ...] = ("",)
    install: bool = False


def parse(description: str | None, *, arguments: Sequence[str] | None = None) -> ServeBenchOptions:
    """The command line."""
    parser = make_parser(description)
    parser.add_argument("--payload", action="append", choices=KINDS, help="only this kind of request; may be repeated")
    parser.add_argument("--peer", action="append", metavar="NAME", help='only peers with this in their name; "none"')
    parser.add_argument("--install-peers", action="store_true", help="make the peers' environments and end")
    given = parser.parse_args(arguments)
    return ServeBenchOptions(
        quick=given.quick,
        json=given.json,
        payloads=tuple(kind for kind in KINDS if kind in (given.payload or KINDS)),
        peers=tuple(given.peer or ("",)),
        install=given.install_peers,
    )


def main(options: ServeBenchOptions) -> int:
    """Build, measure in turns, judge, report."""
    if options.install:
        failed = install_peers()
        for name, reason in failed.items():
            print(f"missing: {name}: {reason}")
        return 1 if failed else 0
    effort = QUICK if options.quick else FULL
    cores = pin(CORES)  # inherited by every server and by the load generators
    load_before = os.getloadavg()[0]
    missing: dict[str, str] = {} if shutil.which("wrk") else {"wrk": HOW_TO_GET_WRK}
    try:
        generator()
    except PeerMissing as problem:
        missing["open loop"] = str(problem)
        effort = replace(effort, factors=())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        competitors = build(folder, kinds=options.payloads, peers=options.peers, missing=missing)
        findings = measure(competitors, folder, effort=effort, cores=cores, missing=missing)
    ours = {system.name for system in competitors.systems if system.ours}
    details = {
        "systems": {name: [asdict(turn) for turn in found] for name, found in findings.turns.items()},
        "effort": asdict(effort),
        "generator": "built in" if "wrk" in missing else "wrk",
        "cores": len(cores),
        "load_before": load_before,
    }
    result = Result(
        benchmark="serve",
        tables=tables(findings, note=competitors.note, rounds=effort.rounds),
        claims=claims(findings, ours),
        details=details,
        missing=missing,
    )
    return finish(result, options)


if __name__ == "__main__":
    raise SystemExit(main(parse(__doc__)))
