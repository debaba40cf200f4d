"""What to do to a model: steps in order, the budget they must keep, a seed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from fettle.core import codec
from fettle.core.errors import UsageError

Objective = Literal["latency", "size"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What the compressed model may cost, and what to make small.

    max_drop: largest loss of the metric against the original, absolute (0.005 is half a point of accuracy).
        A negative value demands a gain.
    min_metric: smallest value of the metric itself; None for no such floor.
    minimize: objectives in order of weight; the first decides, the next break ties within one percent.
    time_limit: for the whole run, such as "90s", "20m" or "2h"; None for no limit.
    slack: share of every objective that may be spent on answers nearer to the original's, such as 0.03 for three
        percent more latency. With 0 the smallest wins, however near.
    """

    max_drop: float = 0.01
    min_metric: float | None = None
    minimize: tuple[Objective, ...] = ("latency",)
    time_limit: str | None = None
    slack: float = 0.03

    def __post_init__(self) -> None:
        if not math.isfinite(self.max_drop):
            raise UsageError(f"budget.max_drop must be a finite number, got {self.max_drop}")
        if self.min_metric is not None and not math.isfinite(self.min_metric):
            raise UsageError(f"budget.min_metric must be a finite number, got {self.min_metric}")
        if not self.minimize:
            raise UsageError('budget.minimize must name at least one of "latency", "size"')
        if not (math.isfinite(self.slack) and self.slack >= 0):
            raise UsageError(f"budget.slack must be a share of at least 0, such as 0.03, got {self.slack}")
        _ = self.time_limit_s

    @property
    def time_limit_s(self) -> float | None:
        """The time limit in seconds.

        >>> Budget(time_limit="20m").time_limit_s
        1200.0
        """
        if self.time_limit is None:
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", self.time_limit)
        if match is None or float(match[1]) == 0:
            raise UsageError(f'budget.time_limit must be like "90s", "20m" or "2h", got "{self.time_limit}"')
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]

    def floor(self, baseline: float) -> float:
        """The smallest metric that is allowed, given the original's."""
        floor = baseline - self.max_drop
        return floor if self.min_metric is None else max(floor, self.min_metric)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpec:
    """A step as data: the plug-in's name, such as "quantize.post_training", and its hyper-parameters."""

    name: str
    parameters: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Steps in order of execution, the precision they lead to, the budget and the seed.

    >>> Recipe(name="float").digest == Recipe(name="float").digest
    True
    """

    name: str
    steps: tuple[StepSpec, ...] = ()
    budget: Budget = Budget()
    seed: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 over the canonical JSON."""
        return codec.digest(self)
