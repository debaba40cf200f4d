"""Spend a little time on answers nearer to float: the layers that take away most of the divergence for the least."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from fettle.compress.quantize.graph.simulate import Simulated
from fettle.compress.quantize.graph.small import work_shares
from fettle.core.signature import Array
from fettle.evaluate.layers import LayerLine
from fettle.stages.judge import Judge, helps
from fettle.stages.sensitivity import Lighten, measure_shares

# A layer that takes away less of the divergence is not worth an export.
_LEAST_SHARE = 0.02
# Exports and timings; each takes seconds.
_MOST_TRIES = 6
# A ratio of two timings is noisy: all but one of these must be inside the slack. Far outside of it, two are enough.
_REPETITIONS = 5
_FAR = 2.0
# Where its work is small a layer's cost is that of converting what it reads and writes.
_LEAST_WORK = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a model costs beside the one all in integers, measured in the engine.

    ratio: of its time to the other's; high: what that ratio stays below in most repetitions; growth: of its file.
    """

    ratio: float
    high: float
    growth: float

    def fits(self, slack: float) -> bool:
        """Whether noise aside neither costs more than the slack."""
        return max(self.high, self.growth) <= 1 + slack


def repeat(ratio: Callable[[], float], *, slack: float, growth: float = 1.0) -> Price:
    """The price, from a ratio of two times that is measured anew at each call.

    >>> ratios = iter([1.01, 1.02, 1.50, 0.99, 1.00])
    >>> repeat(lambda: next(ratios), slack=0.03)
    Price(ratio=1.01, high=1.02, growth=1.0)
    """
    found: list[float] = []
    while len(found) < _REPETITIONS and not (len(found) == 2 and min(found) > 1 + _FAR * slack):
        found.append(ratio())
    return Price(ratio=statistics.median(found), high=sorted(found)[-2], growth=growth)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """slack: see Budget. price: measures a model, and may raise; latency_ms: of the model all in integers.

    proceed: told the share done, says whether there is time for more.
    """

    slack: float
    price: Callable[[torch.nn.Module], Price]
    latency_ms: float
    proceed: Callable[[float], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """The layers to give back, in the order they were found, every layer's line, and a sentence for each one tried."""

    layers: tuple[str, ...]
    lines: tuple[LayerLine, ...]
    decisions: tuple[str, ...]


def spend(
    lighten: Lighten, judge: Judge, lines: Sequence[LayerLine], work: dict[str, float], allowance: Allowance
) -> Spent:
    """Greedy: the layer that takes away most of the divergence for its work is given back first.

    It stays so where the answers really come nearer (see `judge.helps`) and the model with all layers given back so
    far, exported and timed beside the one in integers, stays inside the slack. work: share of the multiplications.
    """
    cheapest_first = sorted(lines, key=lambda line: work.get(line.layer, 1.0))
    measured = measure_shares(
        lighten, judge, cheapest_first, disagreeing=False, proceed=lambda share: allowance.proceed(share / 2)
    )
    search = _Search(lighten, judge, allowance)
    for line in _ranked(measured, work):
        if search.tries >= _MOST_TRIES or not allowance.proceed(0.5 + search.tries / (2 * _MOST_TRIES)):
            break
        search.consider(line)
    known = {line.layer: line for line in (*measured, *search.kept)}
    return Spent(
        layers=tuple(line.layer for line in search.kept),
        lines=tuple(known[line.layer] for line in lines),
        decisions=tuple(search.decisions),
    )


def _ranked(lines: Sequence[LayerLine], work: dict[str, float]) -> list[LayerLine]:
    """Best gain for its work first. The order is an estimate; what it costs is measured."""

    def worth(line: LayerLine) -> float:
        return (line.share or 0.0) / max(work.get(line.layer, 1.0), _LEAST_WORK)

    return sorted((line for line in lines if (line.share or 0.0) >= _LEAST_SHARE), key=worth, reverse=True)


@dataclass(slots=True)
class _Search:
    """The layers given back so far, the divergence of each row that they leave, and what they cost together."""

    lighten: Lighten
    judge: Judge
    allowance: Allowance
    kept: list[LayerLine] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)
    distance: Array | None = None
    ratio: float = 1.0
    tries: int = 0

    def consider(self, line: LayerLine) -> None:
        """Keep the layer in float where that helps and is paid for."""
        if self.distance is None:
            self.distance = self.judge.divergence(self.lighten(()))
        model = self.lighten((*(each.layer for each in self.kept), line.layer))
        distance = self.judge.divergence(model)
        if not helps(self.distance, distance):
            return
        self.tries += 1
        try:
            price = self.allowance.price(model)
        except Exception as problem:
            self.decisions.append(f"{line.layer} in float: left out, the engine refused it: {problem}")
            return
        fits = price.fits(self.allowance.slack)
        self.decisions.append(
            f"{line.layer} in float: {'kept' if fits else 'tried and left out'}, divergence from float "
            f"{self.distance.mean():.2g} before and {distance.mean():.2g} after; with it the model takes "
            f"{price.ratio:.3f} times as long as in int8 and {price.growth:.3f} times the bytes, "
            f"{1 + self.allowance.slack:.3f} are allowed"
        )
        if fits:
            cost_ms = (price.ratio - self.ratio) * self.allowance.latency_ms
            self.kept.append(replace(line, precision="float", cost_ms=cost_ms))
            self.distance, self.ratio = distance, price.ratio


def work_of(simulated: Simulated) -> dict[str, float]:
    """Of all multiplications that layers in integers do for a row, the share of each, by name."""
    return work_shares({node: (layer.layer, layer.weight) for node, layer in simulated.layers().items()})
