"""The range that holds every value seen."""

from __future__ import annotations

import torch

from fettle.compress.quantize.calibrate._base import Observer
from fettle.core.errors import DataError


class MinMax(Observer):
    """Smallest and largest value: exact, and at the mercy of one outlier.

    >>> observer = MinMax()
    >>> observer.update(torch.tensor([-1.0, 3.0]))
    >>> observer.range()
    (-1.0, 3.0)
    """

    def __init__(self) -> None:
        self._low, self._high = float("inf"), float("-inf")

    def update(self, values: torch.Tensor) -> None:
        if values.numel():
            low, high = torch.aminmax(values)
            self._low, self._high = min(self._low, float(low)), max(self._high, float(high))

    def range(self) -> tuple[float, float]:
        if self._low > self._high:
            raise DataError("calibration saw no value: the calibration set is empty or this layer is never reached")
        return min(self._low, 0.0), max(self._high, 0.0)
