"""One histogram of a stream: exact counts, in memory that does not depend on how much is counted."""

from __future__ import annotations

import torch

from fettle.compress.quantize.calibrate._base import extremes

# Temporaries of this many values stay in the second-level cache: three times as fast as a whole large activation.
_CHUNK = 2**17
# An edge e rounds by 2^-24 · |e| in float32. Over a bin's width of span / B this stays below 1/64 where
# |e| · B <= span · 2^24 / 64; what lies further from zero for its span is placed in float64, a third slower.
_FLOAT32_REACH = 2**24 / 64


class Histogram:
    """Counts in B equal bins over a range that grows: [low, low + B·width).

    Where a batch leaves the range, the range is doubled toward it and pairs of bins are merged, so no earlier value
    is read again and every value stays counted exactly once. The range is thus at most twice what was seen (four
    times where it had to grow both ways), and a value is placed to within one bin, give or take the rounding of
    its place: 1/64 of a bin.

    State: 8·B bytes whatever the number of batches. `add` needs another 1.5 MiB for a moment, and a copy of a
    batch that is not contiguous.

    Merging as in torch's HistogramObserver, but by whole bins: exact, where resampling loses a little at each batch.

    >>> histogram = Histogram(bins=4)
    >>> histogram.add(torch.tensor([0.0, 1.0, 4.0]))
    >>> histogram.counts.tolist(), histogram.width
    ([1, 1, 0, 1], 1.0)
    >>> histogram.add(torch.tensor([7.0]))
    >>> histogram.counts.tolist(), histogram.width
    ([2, 1, 0, 1], 2.0)
    """

    def __init__(self, bins: int = 2048) -> None:
        self.bins = bins  # even, so that pairs can be merged
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.low = self.width = 0.0  # left edge of bin 0, width of one bin; a width of 0 is a single value
        self.smallest, self.largest = float("inf"), float("-inf")

    @property
    def centers(self) -> torch.Tensor:
        """Middle of each bin: (B,) float64."""
        return self.low + self.width * (torch.arange(self.bins, dtype=torch.float64) + 0.5)

    def add(self, values: torch.Tensor) -> None:
        """Count values of any shape and real type, on any device. Raises DataError as `extremes` does."""
        ends = extremes(values)
        if ends is None:
            return
        self._cover(*ends)
        self.smallest, self.largest = min(self.smallest, ends[0]), max(self.largest, ends[1])
        if self.width == 0.0:  # every value so far is this one
            self.counts[0] += values.numel()
            return
        for chunk in torch.split(values.detach().flatten(), _CHUNK):
            self.counts += torch.bincount(self._places(chunk), minlength=self.bins).cpu()

    def _places(self, chunk: torch.Tensor) -> torch.Tensor:
        """The bin of each value, int32. A value that rounding puts past an end belongs to the bin at that end."""
        span = self.width * self.bins
        furthest = max(-self.low, self.low + span)
        single = 1e-30 < span < 1e30 and furthest * self.bins <= span * _FLOAT32_REACH
        # Reading an integer or half tensor as float32 is exact or rounds far below a bin.
        wide = chunk.to(torch.float32 if single else torch.float64)
        return ((wide - self.low) * (1.0 / self.width)).to(torch.int32).clamp_(0, self.bins - 1)

    def _cover(self, low: float, high: float) -> None:
        """Make [low, high] part of the range."""
        if self.smallest > self.largest:  # nothing was counted yet
            self.low, self.width = low, (high - low) / self.bins
        elif self.width == 0.0:
            self._spread(min(low, self.low), max(high, self.low))
        while high > self.low + self.width * self.bins:
            self._merge(into=slice(0, self.bins // 2))
        while low < self.low:
            self.low -= self.width * self.bins
            self._merge(into=slice(self.bins // 2, self.bins))

    def _spread(self, low: float, high: float) -> None:
        """From a single value to a range around it; the values counted so far go where they belong."""
        if low == high:
            return
        value, count = self.low, int(self.counts[0])
        self.low, self.width = low, (high - low) / self.bins
        self.counts.zero_()
        self.counts[min(int((value - low) / self.width), self.bins - 1)] = count

    def _merge(self, into: slice) -> None:
        """Double the width: pairs of counts go to one half, the other half is new and empty."""
        merged = torch.zeros_like(self.counts)
        merged[into] = self.counts.reshape(-1, 2).sum(dim=1)
        self.counts = merged
        self.width *= 2
