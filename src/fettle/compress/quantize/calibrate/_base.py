"""The interface of every observer."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


class Observer(ABC):
    """Sees a tensor's values batch by batch, holds a bounded state, and names the range to quantize.

    `update` is called once for each batch, with finite values of any shape; `range` at the end.
    """

    @abstractmethod
    def update(self, values: torch.Tensor) -> None:
        """Take one batch into account. The state does not grow with the number of calls."""

    @abstractmethod
    def range(self) -> tuple[float, float]:
        """(low, high) with low <= 0 <= high. Raises DataError where no value was seen."""
