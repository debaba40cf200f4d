"""The range that holds every value seen."""

from __future__ import annotations

import torch

from fettle.compress.quantize.calibrate._base import Observer, extremes, holding_zero


class MinMax(Observer):
    """Smallest and largest value: exact, and at the mercy of one outlier.

    State: two numbers. `levels` does not matter.

    >>> observer = MinMax()
    >>> observer.update(torch.tensor([-1.0, 3.0]))
    >>> observer.range()
    (-1.0, 3.0)
    """

    def __init__(self, levels: int = 256) -> None:
        super().__init__(levels)
        self._low, self._high = float("inf"), float("-inf")

    def update(self, values: torch.Tensor) -> None:
        ends = extremes(values)
        if ends is not None:
            self._low, self._high = min(self._low, ends[0]), max(self._high, ends[1])

    def range(self) -> tuple[float, float]:
        return holding_zero(self._low, self._high)
