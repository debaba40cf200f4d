"""The serving benchmark's findings as tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from harness import Table
from serve_peers.payloads import TITLES
from serve_peers.processes import Ending
from serve_turns import DEADLINE_S, FEW, LIMIT, MANY, Findings, Open, Part, Turn

# More work of others than this, and the figures are told to be doubtful.
QUIET_CORES = 0.1


def tables(findings: Findings, *, note: str, rounds: int) -> tuple[Table, ...]:
    """Closed loop for each kind of request, what it costs, and the open loop."""
    closed = [tabulate_load(findings, kind, note=note, rounds=rounds) for kind in findings.kinds()]
    return (*closed, tabulate_cost(findings), tabulate_open(findings))


def tabulate_load(findings: Findings, kind: str, *, note: str, rounds: int) -> Table:
    """Throughput and latency; in brackets the slowest and the fastest round."""
    rows: list[tuple[str, ...]] = []
    for name in findings.turns:
        if found := findings.of(name, kind):
            rows.append((name, *_load_cells(found)))
    if rates := findings.limit(kind):
        cell = f"{statistics.median(rates):.0f} ({min(rates):.0f}–{max(rates):.0f})"
        rows.append((LIMIT, cell, *["–"] * 7))
    title = f"int8 ResNet-20 as a service, {TITLES[kind]}: {note}, closed loop, two cores shared with the load, "
    title += f"median of {rounds} round{'s' * (rounds > 1)}{_doubt(findings)}"
    columns = ("system", f"req/s, {MANY} conn.", "p50, ms", "p99, ms", f"req/s, {FEW} conn.", "p50 alone, ms",
               "p99 alone, ms", "errors", "wrong of judged")  # fmt: skip
    return Table(title, columns, tuple(rows))


def _load_cells(found: Sequence[Part]) -> tuple[str, ...]:
    def median(pick: Callable[[Part], float]) -> float:
        return statistics.median(map(pick, found))

    rates = [part.many.per_s for part in found]
    return (
        f"{statistics.median(rates):.0f} ({min(rates):.0f}–{max(rates):.0f})",
        f"{median(lambda part: part.many.p50_ms):.1f}",
        f"{median(lambda part: part.many.p99_ms):.1f}",
        f"{median(lambda part: part.few.per_s):.0f}",
        f"{median(lambda part: part.few.p50_ms):.2f}",
        f"{median(lambda part: part.few.p99_ms):.2f}",
        f"{sum(part.errors for part in found)}",
        f"{sum(part.checked.wrong for part in found)} of {sum(part.checked.answered for part in found)}",
    )


def _doubt(findings: Findings) -> str:
    taken = [
        part.elsewhere_cores for found in findings.turns.values() for turn in found for part in turn.parts.values()
    ]
    elsewhere = statistics.median(taken) if taken else 0.0
    if elsewhere < QUIET_CORES:
        return ""
    return f"; NOT a quiet machine: other work took {elsewhere:.1f} of the cores meanwhile"


def tabulate_cost(findings: Findings) -> Table:
    """What the same service takes of the machine, and how it begins and ends."""
    rows = []
    for name, found in findings.turns.items():
        first = [next(iter(turn.parts.values())) for turn in found]

        def median(pick: Callable[[Turn], float], found: Sequence[Turn] = found) -> float:
            return statistics.median(map(pick, found))

        rows.append(
            (
                name,
                f"{statistics.median(part.cpu_s_per_1000 for part in first):.2f}",
                f"{median(lambda turn: turn.memory_bytes) / 2**20:.0f}",
                f"{median(lambda turn: turn.ready_s):.2f}",
                f"{median(lambda turn: turn.first_s):.2f}",
                describe_endings([turn.ending for turn in found]),
                f"{statistics.median(part.elsewhere_cores for part in first):.2f}",
            )
        )
    columns = ("system", "CPU s / 1000 requests", "memory, MiB", "start to ready, s", "start to first answer, s",
               "after SIGTERM", "other work, cores")  # fmt: skip
    kind = next(iter(findings.kinds()), "image")
    return Table(f"What it costs, {TITLES[kind]}, at {MANY} connections", columns, tuple(rows))


def tabulate_open(findings: Findings) -> Table:
    """Goodput under load that does not wait for answers, up to twice what the server can do."""
    rows = []
    for name, found in findings.turns.items():
        for factor in dict.fromkeys(one.factor for turn in found for one in turn.opened):
            loads = [one for turn in found for one in turn.opened if one.factor == factor]
            rows.append((name, *_open_cells(factor, loads)))
    title = f"Open loop at multiples of each server's own capacity, a deadline of {DEADLINE_S * 1000:.0f} ms from when "
    title += "a request was due; fettle is told it in X-Request-Timeout-Ms"
    columns = ("system", "load", "offered/s", "in time/s", "of capacity", "shed 429", "neither", "p50, ms", "p99, ms",
               "429 p50, ms", "429 p99, ms", "generator, cores")  # fmt: skip
    return Table(title, columns, tuple(rows))


def _open_cells(factor: float, loads: Sequence[Open]) -> tuple[str, ...]:
    def median(pick: Callable[[Open], float]) -> float:
        return statistics.median(map(pick, loads))

    def ms(pick: Callable[[Open], float]) -> str:
        value = median(pick)
        return f"{value:.1f}" if value < float("inf") else "–"

    return (
        f"{factor:g} ×",
        f"{median(lambda one: one.load.rate_per_s):.0f}",
        f"{median(lambda one: one.load.goodput_per_s):.0f}",
        f"{median(lambda one: one.goodput):.0%}",
        f"{median(lambda one: one.load.shed / max(1, one.load.sent)):.1%}",
        f"{median(lambda one: one.unkept):.1%}",
        ms(lambda one: one.load.p50_ms),
        ms(lambda one: one.load.p99_ms),
        ms(lambda one: one.load.shed_p50_ms),
        ms(lambda one: one.load.shed_p99_ms),
        f"{median(lambda one: one.load.cpu_s / one.load.seconds):.2f}",
    )


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
