"""How long a batch takes: t(n) = a · n + b, fitted while the server runs, and what follows for the largest batch."""

from __future__ import annotations

from collections.abc import Iterable

# Each batch makes those before it count this much less: the last hundred or so decide.
_MEMORY = 0.99
# A larger batch is not worth its latency once the fixed cost is less than this share of its time.
_FIXED_SHARE = 0.05
# So many rows are always worth it: batches that vary are what the fit learns from.
_AT_LEAST = 8
# So many answers are averaged over, about.
_ERRORS = 16


class BatchTimes:
    """Least squares over (rows, seconds) with fading memory.

    >>> times = BatchTimes([(1, 0.003), (2, 0.005), (8, 0.017)])
    >>> round(times.per_row_s, 6), round(times.fixed_s, 6), round(times.seconds(4), 6)
    (0.002, 0.001, 0.009)
    >>> times.largest(32), times.largest(32, promise_s=0.0125)
    (10, 5)
    """

    def __init__(self, measured: Iterable[tuple[int, float]] = ()) -> None:
        self._count = self._rows = self._seconds = self._squares = self._products = 0.0
        self.per_row_s = self.fixed_s = 0.0
        self._all_of = 0.0  # rows, where the batches of late had all the same
        self._largest: dict[tuple[int, float | None], int] = {}
        for rows, seconds in measured:
            self.observe(rows, seconds)

    def observe(self, rows: int, seconds: float) -> None:
        """Add a batch that has ended."""
        self._count = self._count * _MEMORY + 1.0
        self._rows = self._rows * _MEMORY + rows
        self._seconds = self._seconds * _MEMORY + seconds
        self._squares = self._squares * _MEMORY + rows * rows
        self._products = self._products * _MEMORY + rows * seconds
        self._largest.clear()
        self._solve()

    def _solve(self) -> None:
        mean_rows, mean_s = self._rows / self._count, self._seconds / self._count
        spread = self._squares / self._count - mean_rows * mean_rows
        self._all_of = mean_rows if spread <= 1e-6 * mean_rows * mean_rows else 0.0
        if not self._all_of:
            slope = (self._products / self._count - mean_rows * mean_s) / spread
        else:  # batches of one size tell nothing of the fixed cost: what was known of it stays
            slope = (mean_s - self.fixed_s) / mean_rows
        self.per_row_s = min(max(slope, 0.0), mean_s / mean_rows)
        self.fixed_s = max(0.0, mean_s - self.per_row_s * mean_rows)

    def seconds(self, rows: int) -> float:
        """What a batch of so many rows is expected to take."""
        return self.per_row_s * rows + self.fixed_s

    def largest(self, limit: int, *, promise_s: float | None = None) -> int:
        """The largest batch that is worth its latency and ends within the promise; at least 1, at most `limit`."""
        found = self._largest.get((limit, promise_s))
        if found is None:
            found = self._largest[limit, promise_s] = self._find_largest(limit, promise_s)
        return found

    def _find_largest(self, limit: int, promise_s: float | None) -> int:
        if self.per_row_s <= 0.0:
            return limit
        worth = self.fixed_s * (1.0 - _FIXED_SHARE) / (_FIXED_SHARE * self.per_row_s)
        # Where all batches had one size, twice as many rows will tell what they cost.
        best = max(_AT_LEAST, round(worth + 0.5), round(2 * self._all_of))
        if promise_s is not None:
            best = min(best, int((promise_s - self.fixed_s) / self.per_row_s * (1 + 1e-9)))
        return max(1, min(limit, best))


class Margin:
    """How much later than expected answers may come: the mean of the errors and twice their mean deviation.

    Fading averages, as TCP keeps them to tell a late packet from a lost one (Jacobson, Congestion Avoidance and
    Control, 1988). Never below 0: what was too careful of late is not made up for.

    >>> margin = Margin()
    >>> for _ in range(100):
    ...     margin.observe(0.010)
    >>> round(margin.seconds, 3)
    0.01
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._mean = self._deviation = 0.0

    def observe(self, error_s: float) -> None:
        """Add how long an answer took beyond what was expected of it; negative where it was sooner."""
        off = error_s - self._mean
        self._mean += off / _ERRORS
        self._deviation += (abs(off) - self._deviation) / _ERRORS
        self.seconds = max(0.0, self._mean + 2.0 * self._deviation)
