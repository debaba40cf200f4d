"""The average of the batches' smallest and largest values, the last batches weighing most."""

from __future__ import annotations

import torch

from fettle.compress.quantize.calibrate._base import Observer, extremes, holding_zero
from fettle.core.errors import UsageError


class MovingAverage(Observer):
    """Exponential average of each end over T batches: low = Σₜ m^(T−t) lowₜ / Σₜ m^(T−t), and high alike.

    momentum m: 0 keeps only the last batch, 1 is the plain mean over all batches; 0.9 remembers about ten. Dividing
    by the sum of the weights keeps the first batch from weighing more than its turn, as it does where it is the
    average's start. An outlier in one batch of many moves the range little; the batch size and, for m < 1, the order
    matter: a range from batches of one row is narrower than one from batches of a thousand.

    State: three numbers. `levels` does not matter. An empty batch is none.

    After Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", section 3.1; the correction of the start as in Kingma and Ba 2015, "Adam".

    >>> observer = MovingAverage(momentum=0.5)
    >>> observer.update(torch.tensor([0.0, 3.0]))
    >>> observer.update(torch.tensor([0.0, 6.0]))
    >>> observer.range()  # (0.5 · 3 + 1 · 6) / 1.5
    (0.0, 5.0)
    """

    def __init__(self, levels: int = 256, *, momentum: float = 0.9) -> None:
        super().__init__(levels)
        if not 0.0 <= momentum <= 1.0:
            raise UsageError(f"momentum must be 0 (the last batch alone) to 1 (the mean of all), got {momentum}")
        self.momentum = momentum
        self._weight = 0.0
        self._low, self._high = 0.0, 0.0

    def update(self, values: torch.Tensor) -> None:
        ends = extremes(values)
        if ends is None:
            return
        self._weight = self.momentum * self._weight + 1.0
        # As a sum of shares: a step toward the new end would lose it beside a larger old one.
        share = 1.0 / self._weight
        self._low = (1.0 - share) * self._low + share * ends[0]
        self._high = (1.0 - share) * self._high + share * ends[1]

    def range(self) -> tuple[float, float]:
        if self._weight == 0.0:
            return holding_zero(float("inf"), float("-inf"))
        return holding_zero(self._low, self._high)
