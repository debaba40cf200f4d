"""The range that minimizes the mean squared error of 8-bit quantization, from one histogram kept as values stream."""

from __future__ import annotations

import torch

from fettle.compress.quantize.calibrate._base import Observer
from fettle.core.errors import DataError

_BINS = 2048
_LEVELS = 256
_SHRINKS = torch.cat([torch.linspace(0.3, 0.96, 34, dtype=torch.float64), torch.linspace(0.97, 1.0, 4).double()])


class HistogramMSE(Observer):
    """Clip outliers as far as it pays: E(l, h) = Σᵢ nᵢ (cᵢ − q(cᵢ; l, h))² over bins i of center cᵢ and count nᵢ.

    State: 2048 counts whatever the number of batches, 16 KiB. Where a batch leaves the range, the range is doubled
    toward it and pairs of bins are merged, so no earlier value is read again and none is lost. The ends are shrunk
    together first, then each alone; a range that touches zero stays there, so that a ReLU keeps all its levels.

    After the error measure of Sung et al. 2015, "Resiliency of Deep Neural Networks under Quantization"; streaming as
    in torch's HistogramObserver, but with exact merges.

    >>> observer = HistogramMSE()
    >>> values = torch.linspace(0, 1, 1_000_000)
    >>> observer.update(torch.cat([values, torch.tensor([8.0])]))
    >>> low, high = observer.range()
    >>> low == 0.0 and high < 4.0
    True
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(_BINS, dtype=torch.float64)
        self._low = self._width = 0.0  # left edge of bin 0, width of one bin
        self._seen = (float("inf"), float("-inf"))

    def update(self, values: torch.Tensor) -> None:
        if not values.numel():
            return
        flat = values.detach().to(torch.float32).flatten()
        low, high = (float(end) for end in torch.aminmax(flat))
        self._seen = (min(self._seen[0], low), max(self._seen[1], high))
        self._cover(low, high)
        if self._width == 0.0:  # every value so far is this one
            self._counts[0] += flat.numel()
            return
        end = self._low + self._width * _BINS
        # A value that rounding puts on an edge belongs to the bin beside it; histc would drop it. In float64, because
        # a doubled range may have outgrown float32.
        self._counts += torch.histc(flat.double().clamp(self._low, end), bins=_BINS, min=self._low, max=end)

    def _cover(self, low: float, high: float) -> None:
        """Make [low, high] part of the histogram's range."""
        if self._counts.sum() == 0:
            self._low, self._width = low, (high - low) / _BINS
            return
        if self._width == 0.0:
            if low == high == self._low:
                return
            old, count = self._low, self._counts[0].clone()
            left, right = min(low, old), max(high, old)
            self._low, self._width = left, (right - left) / _BINS
            self._counts.zero_()
            self._counts[min(int((old - left) / self._width), _BINS - 1)] = count
            return
        while high > self._low + self._width * _BINS:
            self._merge(into=slice(0, _BINS // 2))
        while low < self._low:
            self._low -= self._width * _BINS
            self._merge(into=slice(_BINS // 2, _BINS))

    def _merge(self, into: slice) -> None:
        """Double the bin width: pairs of counts go to one half, the other is new and empty."""
        merged = torch.zeros_like(self._counts)
        merged[into] = self._counts.reshape(-1, 2).sum(dim=1)
        self._counts = merged
        self._width *= 2

    def range(self) -> tuple[float, float]:
        low, high = self._seen
        if low > high:
            raise DataError("calibration saw no value: the calibration set is empty or this layer is never reached")
        low, high = min(low, 0.0), max(high, 0.0)
        if self._width == 0.0 or low == high:
            return low, high
        low, high = self._best(low * _SHRINKS, high * _SHRINKS)
        if low < 0.0 < high:
            low, high = self._best(low * _SHRINKS, torch.full_like(_SHRINKS, high))
            low, high = self._best(torch.full_like(_SHRINKS, low), high * _SHRINKS)
        return low, high

    def _best(self, lows: torch.Tensor, highs: torch.Tensor) -> tuple[float, float]:
        """The candidate range with the smallest error. lows, highs: (k,)."""
        used = self._counts > 0
        centers = self._low + self._width * (torch.arange(_BINS, dtype=torch.float64)[used] + 0.5)  # (b,)
        scales = ((highs - lows) / (_LEVELS - 1)).clamp_min(1e-300)[:, None]  # (k, 1)
        zeros = torch.round(-lows[:, None] / scales)
        steps = (torch.round(centers / scales) + zeros).clamp(0, _LEVELS - 1)
        errors = (((steps - zeros) * scales - centers).square() * self._counts[used]).sum(dim=1)  # (k,)
        best = int(errors.argmin())
        return float(lows[best]), float(highs[best])
