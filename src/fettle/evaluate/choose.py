"""Which candidate is best under a budget, and what to say of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fettle.core.errors import UsageError
from fettle.core.recipe import Budget, Objective
from fettle.evaluate.comparison import Candidate, gain
from fettle.evaluate.pareto import loss
from fettle.evaluate.wording import format_bytes, format_ms

_TIE = 1.01
# Nearer by less than this share is not worth any slack.
_LEAST_GAIN = 0.02

_COSTS: dict[Objective, Callable[[Candidate], float]] = {
    "latency": lambda candidate: candidate.p50_ms,
    "size": lambda candidate: float(candidate.size_bytes),
}


def choose(candidates: Sequence[Candidate], budget: Budget, baseline: Candidate) -> Candidate:
    """The best candidate; always one.

    Among those whose metric keeps the budget against the baseline's: the smallest by the budget's first objective;
    those within one percent of it are tied, and the next objective decides among them, then the metric. An objective
    that the budget does not name does not count. Of those within the budget's slack of that one in every objective,
    and nearer to the original's answers by two percent or more, the nearest is taken in its place. Where none keeps the
    budget: the highest metric, then the lowest latency. The baseline is always among the candidates; failed ones
    never are.

    All must be measured on the same split. Raises UsageError for a metric where lower is better, since a budget's
    floor has no meaning for it.
    """
    usable = [candidate for candidate in candidates if candidate.failure is None]
    if not any(candidate.is_same(baseline) for candidate in usable):
        usable.append(baseline)
    for candidate in usable:
        if candidate.metric.direction == "lower":
            raise UsageError(
                f"a budget keeps a metric from falling, so higher must be better, got '{candidate.metric_name}': "
                'use "r2", or a "module:function" that returns the negative'
            )
    kept = [candidate for candidate in usable if shortfall(candidate, budget, baseline) is None]
    if not kept:
        return min(usable, key=lambda candidate: (loss(candidate), candidate.p50_ms, candidate.label))
    best = _smallest(kept, budget)
    costs = [_COSTS[objective] for objective in budget.minimize]
    nearer = [
        candidate
        for candidate in kept
        if all(cost(candidate) <= cost(best) * (1 + budget.slack) for cost in costs)
        and _divergence(candidate) < _divergence(best) * (1 - _LEAST_GAIN)
    ]
    if budget.slack == 0 or not nearer:
        return best
    return min(nearer, key=lambda candidate: (_divergence(candidate), candidate.p50_ms, candidate.label))


def _smallest(kept: Sequence[Candidate], budget: Budget) -> Candidate:
    """By the first objective, those tied by the next, and so on; then by the metric."""
    for objective in budget.minimize:
        cost = _COSTS[objective]
        smallest = min(map(cost, kept))
        kept = [candidate for candidate in kept if cost(candidate) <= smallest * _TIE]
    exact = [_COSTS[objective] for objective in budget.minimize]
    return min(kept, key=lambda candidate: (loss(candidate), *(cost(candidate) for cost in exact), candidate.label))


def _divergence(candidate: Candidate) -> float:
    """From the original's answers; infinite where it was not measured."""
    report = candidate.report
    return report["parity.divergence"].value if "parity.divergence" in report else math.inf


def shortfall(candidate: Candidate, budget: Budget, baseline: Candidate) -> str | None:
    """None where the candidate keeps the budget, else what is missing, in a sentence."""
    return candidate.report.check(budget, baseline=baseline.report)


def describe(best: Candidate, baseline: Candidate, *, missed: str | None = None) -> tuple[str, ...]:
    """The verdict in sentences, the most important first.

    missed: what `shortfall` says of the best, None where the floor is met.
    """
    if best.is_same(baseline):
        kept = "The original stays: nothing that was tried is better under this budget."
        return (kept,) if missed is None else (f"The floor is missed: {missed}.", kept)
    speed = _times(gain(baseline.p50_ms, best.p50_ms), "faster", "slower")
    size = _times(gain(baseline.size_bytes, best.size_bytes), "smaller", "larger")
    won = f"{speed} and {size} than the original"
    verdict: tuple[str, ...] = (f"{best.label} is {won}, and keeps the budget.",)
    if missed is not None:
        verdict = (f"The floor is missed: {missed}.", f"The best found is {best.label}: {won}.")
    metric, threads = best.metric, f"{best.threads} thread{'s' if best.threads != 1 else ''}"
    return (
        *verdict,
        f"It takes {format_ms(best.p50_ms)} instead of {format_ms(baseline.p50_ms)} at batch {best.batch} on {threads} "
        f"(median), and {format_bytes(best.size_bytes)} instead of {format_bytes(baseline.size_bytes)}.",
        f"Its {best.metric_name} is {metric.value:.4f} instead of {baseline.metric.value:.4f} on {metric.n} rows"
        f"{f' of {metric.data}' if metric.data else ''}{_change(best, baseline)}.",
    )


def describe_slack(best: Candidate, smallest: Candidate) -> str | None:
    """A sentence where the best is not the smallest under the same budget without slack; None where it is."""
    if best.is_same(smallest):
        return None
    nearer = 1 - _divergence(best) / _divergence(smallest) if math.isfinite(_divergence(smallest)) else 1.0
    return (
        f"It takes {best.p50_ms / smallest.p50_ms:.3f} times as long as {smallest.label}, and its answers "
        f"diverge {100 * nearer:.0f} % less from the original's: that is what budget.slack is for."
    )


def describe_precision(candidates: Sequence[Candidate]) -> str | None:
    """A sentence where int8 was tried and does not pay on this machine; None where it pays or was not tried."""
    usable = [candidate for candidate in candidates if candidate.failure is None]
    integer = [candidate for candidate in usable if "int8" in candidate.precision]
    other = [candidate for candidate in usable if "int8" not in candidate.precision]
    if not integer or not other:
        return None
    fastest, rival = (min(group, key=lambda candidate: candidate.p50_ms) for group in (integer, other))
    if fastest.p50_ms < rival.p50_ms:
        return None
    return (
        f"int8 does not pay on this machine: its fastest candidate, {fastest.label}, takes "
        f"{format_ms(fastest.p50_ms)}, and {rival.label} in {rival.precision} {format_ms(rival.p50_ms)}."
    )


def _times(ratio: float, above: str, below: str) -> str:
    return f"{ratio:.1f}× {above}" if ratio >= 1 else f"{gain(1, ratio):.1f}× {below}"


def _change(best: Candidate, baseline: Candidate) -> str:
    change = best.metric.value - baseline.metric.value
    if "paired.difference" in best.report:
        paired = best.report["paired.difference"]
        if paired.low is not None and paired.high is not None:
            return f" (difference {change:+.4f}, 95 % interval {paired.low:+.4f} to {paired.high:+.4f})"
    return f" (difference {change:+.4f})"
