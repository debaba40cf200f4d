"""How long to wait before the next worker is started, from how those before it ended."""

from __future__ import annotations

from collections import deque

# As many deaths within the window, and the place is given up: whatever kills its workers will do so again.
MANY = 5
WITHIN_S = 60.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 2.0
LONGEST_REST_S = 300.0


class Deaths:
    """Of the workers of one place, on the clock of the caller. first_rest_s: see `rest`.

    >>> deaths = Deaths(first_rest_s=5.0)
    >>> [deaths.died(now, lived_s=1.0) for now in range(5)]
    [False, False, False, False, True]
    >>> deaths.rest(), deaths.died(100.0, lived_s=1.0), deaths.rest()
    (5.0, True, 10.0)
    >>> deaths.died(200.0, lived_s=90.0), deaths.rest()
    (False, 5.0)
    """

    def __init__(self, *, first_rest_s: float) -> None:
        self._times: deque[float] = deque(maxlen=MANY)
        self._first_rest_s = first_rest_s
        self._begin()

    def _begin(self) -> None:
        self._wait_s, self._rest_s, self._again = FIRST_WAIT_S, self._first_rest_s, False

    def died(self, now: float, *, lived_s: float) -> bool:
        """Count a death. True where the place should be given up: after many, or one soon after a rest."""
        self._times.append(now)
        if lived_s > WITHIN_S:
            self._begin()
        often = len(self._times) == MANY and self._times[-1] - self._times[0] < WITHIN_S
        return often or self._again

    @property
    def sentence(self) -> str:
        """What a place has been given up for."""
        return "died again, soon after its rest" if self._again else f"died {MANY} times within {WITHIN_S:g} s"

    def wait(self) -> float:
        """Before another worker is started: each time longer, until one has lived for a while."""
        found, self._wait_s = self._wait_s, min(self._wait_s * 2, LONGEST_WAIT_S)
        return found

    def rest(self) -> float:
        """Before a place that was given up is tried again: each time longer, likewise."""
        found, self._rest_s = self._rest_s, min(self._rest_s * 2, LONGEST_REST_S)
        self._again = True
        return found
