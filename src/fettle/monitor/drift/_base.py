"""What a drift test must do: compare two samples of one number, and say how much data it needs to see a shift."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from fettle.core.errors import MonitorError, UsageError
from fettle.core.signature import Array

# More rows than anybody compares: what an unlimited sample is in the search for a sample size.
UNLIMITED = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two samples of one feature, compared.

    p_value: chance of a statistic this large without drift, in [0, 1].
    effect: size of the difference, free of sample size: 0 means none.
    statistic: the raw statistic; null_mean: what it is on average without drift at these sample sizes.
    note: a word on the effect, such as PSI's level.
    """

    p_value: float
    effect: float
    statistic: float
    null_mean: float
    note: str = ""

    def __post_init__(self) -> None:
        if not (0.0 <= self.p_value <= 1.0 and 0.0 <= self.effect < math.inf):
            raise MonitorError(
                f"a comparison needs a p-value in [0, 1] and a finite effect of at least 0, "
                f"got {self.p_value} and {self.effect}: the drift test is defective"
            )

    @classmethod
    def nothing(cls) -> Comparison:
        """Where a sample is empty there is nothing to see."""
        return cls(p_value=1.0, effect=0.0, statistic=0.0, null_mean=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftTest(ABC):
    """One two-sample test, as a plug-in in `fettle.monitor.drift`. Its fields are its settings.

    minimum: the smallest effect that counts as drift; a smaller one, however certain, is no drift.
    unit: what the effect is called in a sentence.

    NaN is a value like any other: a rise of missing values is drift. Infinities are values too. A test draws no
    random numbers, so the same log gives the same verdict.
    """

    minimum: float
    unit: ClassVar[str]

    def __post_init__(self) -> None:
        if not (math.isfinite(self.minimum) and self.minimum > 0):
            raise UsageError(f"a drift test's minimum effect must be finite and above 0, got {self.minimum}")

    @property
    def name(self) -> str:
        """The plug-in's name: its file's."""
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def compare(self, reference: Array, current: Array) -> Comparison:
        """Compare current (m,) with reference (n,); any numeric type, any size including 0."""

    @abstractmethod
    def detectable(self, reference_size: int, size: int, *, alpha: float, power: float) -> float:
        """The smallest true effect that is rejected at level alpha with this power at these sample sizes.

        Falls as either size grows; infinite where no effect is large enough.
        """

    def needed(self, reference_size: int, *, alpha: float, power: float) -> int | None:
        """The smallest window in which the minimum effect is rejected at level alpha with this power.

        None where the reference is so small that no window would do.
        """
        return _smallest(lambda size: self.detectable(reference_size, size, alpha=alpha, power=power) <= self.minimum)

    def needed_reference(self, *, alpha: float, power: float) -> int | None:
        """The smallest reference with which some window would do; None where none is."""
        return _smallest(lambda size: self.detectable(size, UNLIMITED, alpha=alpha, power=power) <= self.minimum)


def _smallest(enough: Callable[[int], bool]) -> int | None:
    """The smallest size from 1 to UNLIMITED that is enough, by bisection: more is never less."""
    if not enough(UNLIMITED):
        return None
    low, high = 0, UNLIMITED
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def as_values(sample: Array) -> Array:
    """A sample as float64 (n,). Raises MonitorError for another shape or a type that is no number."""
    values = sample
    if values.ndim != 1 or values.dtype.kind not in "buif":
        raise MonitorError(
            f"a drift test compares one column of numbers, got shape {list(values.shape)} of {values.dtype.name}"
        )
    return values.astype("float64")
