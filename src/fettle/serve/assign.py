"""Which variant gets a request: by its key, for ever the same one, or in turn, in exact proportion.

By key it is weighted rendezvous hashing: each variant draws a number from the key, and the best draw for its weight
wins. So a larger weight only takes keys away from the others, whatever their number, and a variant that is not ready
gives its keys to the others without moving any of theirs. In turn it is a Weyl sequence: the fractional parts of
multiples of the golden ratio fill the unit interval evenly, also for every second or every n-th request, so that no
rhythm in the traffic can favor a variant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def seed_of(model: str, label: str) -> bytes:
    """What tells the draws of one variant from all others'."""
    return blake2b(f"{model}\0{label}".encode(), digest_size=32).digest()


def by_key(key: bytes, seeds: Sequence[bytes], weights: Sequence[float]) -> int:
    """The place of the variant that this key belongs to.

    >>> seeds = [seed_of("digits", label) for label in ("champion", "challenger")]
    >>> picks = [by_key(b"user %d" % number, seeds, [90, 10]) for number in range(1000)]
    >>> picks.count(1)
    108
    """
    times = [_draw(key, seed) / weight for seed, weight in zip(seeds, weights, strict=True)]
    return times.index(min(times))


def _draw(key: bytes, seed: bytes) -> float:
    """Exponentially distributed: the first of several such times is the i-th in proportion to its rate."""
    number = int.from_bytes(blake2b(key, digest_size=8, key=seed).digest(), "little")
    return -math.log(((number >> 11) + 0.5) / 2**53)


class Turns:
    """The choice without a key. After n requests each variant has had its share of them, off by a few at most.

    >>> turns = Turns()
    >>> [turns.next([3, 1]) for _ in range(400)].count(1)
    99
    """

    def __init__(self) -> None:
        self._point = 0

    def next(self, weights: Sequence[float]) -> int:
        """The place of the variant whose turn it is."""
        point = (self._point >> 11) / 2**53 * math.fsum(weights)
        self._point = (self._point + _GOLDEN) & _MASK
        for place, weight in enumerate(weights):
            point -= weight
            if point < 0:
                return place
        return len(weights) - 1
