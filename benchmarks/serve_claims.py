"""What is claimed of fettle's server, and whether the findings keep it."""

from __future__ import annotations

import statistics

from harness import Claim
from serve_peers.payloads import TITLES
from serve_peers.systems import OURS
from serve_turns import MANY, Findings, Open

TIMES_THE_BEST = 2.5
SHARE_OF_LIMIT = 0.7
OVERLOAD = 2.0
GOODPUT = 0.9
SHED_MS = 5.0
# Of what is due, so much may be neither in time nor shed.
UNKEPT = 0.01
READY_S = 1.0


def claims(findings: Findings, ours: set[str]) -> tuple[Claim, ...]:
    """All of them, in the order of their weight."""
    kinds = findings.kinds()
    return (
        claim_right(findings, ours),
        *(claim_fast(findings, ours, kind) for kind in kinds),
        *(claim_near_limit(findings, kind) for kind in kinds[:1]),
        claim_overload(findings),
        claim_start(findings),
    )


def claim_right(findings: Findings, ours: set[str]) -> Claim:
    """No error of fettle's, and no wrong answer of anyone: a peer that answers something else does other work."""
    statement = "fettle answers every request, and everyone the scores that the engine gives"
    turns = findings.turns
    found = [turn for name in turns if name in ours for turn in turns[name]]
    if not found:
        return Claim(statement, holds=False, figures="no server of fettle was measured")
    errors, judged = sum(turn.errors for turn in found), sum(turn.judged for turn in found)
    wrong = {name: sum(turn.wrong for turn in turns[name]) for name in turns}
    served = sum(turn.served for turn in found)
    figures = f"fettle {errors} errors in {served + errors} requests, {sum(wrong[n] for n in ours & wrong.keys())} "
    figures += f"wrong of {judged} judged"
    strayed = [f"{name} {count} wrong" for name, count in wrong.items() if count and name not in ours]
    holds = not errors and not any(wrong.values()) and judged > 0
    return Claim(statement, holds=holds, figures=", ".join([figures, *strayed]))


def claim_fast(findings: Findings, ours: set[str], kind: str) -> Claim:
    """fettle on the engine that the peers use, beside the best of them: in throughput, and in the 99th percentile."""
    statement = f"{TITLES[kind]}: {TIMES_THE_BEST:g} × the best peer at {MANY} connections, p99 no higher than any's"
    peers = [name for name in findings.turns if name not in ours and findings.of(name, kind)]
    if not findings.of(OURS, kind) or not peers:
        return Claim(statement, holds=False, figures=f"{kind}: fettle or every peer is missing")
    best = max(peers, key=lambda name: findings.per_s(name, kind))
    calm = min(peers, key=lambda name: findings.p99_ms(name, kind))
    rate, theirs = findings.per_s(OURS, kind), findings.per_s(best, kind)
    p99_ms, their_p99_ms = findings.p99_ms(OURS, kind), findings.p99_ms(calm, kind)
    figures = f"{kind}: {rate:.0f} requests/s, {rate / theirs:.2f} × the best peer ({best}, {theirs:.0f}), "
    figures += f"p99 {p99_ms:.1f} ms (lowest of a peer: {calm}, {their_p99_ms:.1f})"
    return Claim(statement, holds=rate >= TIMES_THE_BEST * theirs and p99_ms <= their_p99_ms, figures=figures)


def claim_near_limit(findings: Findings, kind: str) -> Claim:
    """How much of the cores is left for the work itself."""
    statement = f"{TITLES[kind]}: at least {SHARE_OF_LIMIT:.0%} of what decoding and inference alone allow"
    shares = findings.shares(kind)
    if not shares:
        return Claim(statement, holds=False, figures=f"{kind}: fettle or the limit was not measured")
    share, limit = statistics.median(shares), statistics.median(findings.limit(kind))
    figures = f"{kind}: {share:.0%} of the limit of {limit:.0f}/s, median of {len(shares)} bursts"
    return Claim(statement, holds=share >= SHARE_OF_LIMIT, figures=figures)


def claim_overload(findings: Findings) -> Claim:
    """At twice the capacity: goodput, and how the rest is refused."""
    statement = f"at {OVERLOAD:g} × capacity at least {GOODPUT:.0%} of it answered within the deadline, and the rest "
    statement += f"shed with 429 in under {SHED_MS:g} ms"
    found = [one for turn in findings.turns.get(OURS, ()) for one in turn.opened if one.factor == OVERLOAD]
    if not found:
        return Claim(statement, holds=False, figures="overload was not measured")
    goodput, unkept, shed_ms = (statistics.median(pick(one) for one in found) for pick in (_goodput, _unkept, _shed_ms))
    figures = f"at {OVERLOAD:g} × capacity goodput {goodput:.0%} of it, {unkept:.1%} neither in time nor shed, "
    figures += f"429 within {shed_ms:.1f} ms (p99)"
    holds = goodput >= GOODPUT and unkept <= UNKEPT and shed_ms < SHED_MS
    return Claim(statement, holds=holds, figures=figures)


def _goodput(one: Open) -> float:
    return one.goodput


def _unkept(one: Open) -> float:
    return one.unkept


def _shed_ms(one: Open) -> float:
    return one.load.shed_p99_ms


def claim_start(findings: Findings) -> Claim:
    """From the start of the process to a readiness of 200."""
    statement = f"ready within {READY_S:g} s of its start"
    turns = findings.turns.get(OURS)
    if not turns:
        return Claim(statement, holds=False, figures="the start was not measured")
    ready_s = statistics.median(turn.ready_s for turn in turns)
    return Claim(statement, holds=ready_s < READY_S, figures=f"ready after {ready_s:.2f} s")
