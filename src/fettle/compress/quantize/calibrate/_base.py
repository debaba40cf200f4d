"""The interface of every observer."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from fettle.core.errors import DataError, UsageError

_LARGEST = torch.finfo(torch.float32).max


class Observer(ABC):
    """Sees a tensor's values batch by batch, holds a bounded state, and names the range to quantize.

    `update` is called once for each batch, with values of any shape and size; `range` at the end, or at any time
    in between. levels: how many integers the range will be divided among, 2 to 65536 (2 to the power of the bits);
    an observer that weighs rounding against clipping needs it.
    """

    def __init__(self, levels: int = 256) -> None:
        if not 2 <= levels <= 65536:
            raise UsageError(f"levels must be 2 to 65536 (1 to 16 bits), got {levels}")
        self.levels = levels

    @abstractmethod
    def update(self, values: torch.Tensor) -> None:
        """Take one batch into account. The state does not grow with the number of calls.

        Raises DataError for NaN, infinity and what float32 cannot hold; the state is then as it was.
        """

    @abstractmethod
    def range(self) -> tuple[float, float]:
        """(low, high) with low <= 0 <= high. Raises DataError where no value was seen."""


def extremes(values: torch.Tensor) -> tuple[float, float] | None:
    """Smallest and largest value of a real tensor, or None for an empty one.

    One pass: a NaN or infinity anywhere shows in the result, so nothing else need look for it.
    Raises DataError for NaN, infinity and what float32 cannot hold.

    >>> extremes(torch.tensor([[2.0, -1.0]]))
    (-1.0, 2.0)
    """
    if not values.numel():
        return None
    low, high = (float(end) for end in torch.aminmax(values.detach()))
    if not -_LARGEST <= low <= high <= _LARGEST:  # false for NaN too
        raise DataError(f"calibration data must stay finite in float32, got values from {low} to {high}")
    return low, high


def holding_zero(low: float, high: float) -> tuple[float, float]:
    """The range extended to hold zero, which must be exact. Raises DataError for low > high: nothing was seen.

    >>> holding_zero(1.0, 3.0)
    (0.0, 3.0)
    """
    if low > high:
        raise DataError("calibration saw no value: the calibration set is empty or this layer is never reached")
    return min(low, 0.0), max(high, 0.0)
