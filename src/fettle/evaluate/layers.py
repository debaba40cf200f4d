"""Where the accuracy went: one line for each layer, as numbers and as a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fettle.evaluate.wording import format_ms

WIDE_SPREAD = 16.0
WEAK_DB = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLine:
    """One layer that can run in integers.

    sqnr_db: signal to noise of its output on data, everything before it rounded as well.
    share: of the model's divergence from float, what goes away when this layer alone is float; None where not tried.
    cost_ms: what giving it back costs, measured; None where not measured.
    spread: of its input's channels, the largest over the median: one grid must serve them all.
    precision: "int8", or "float" where it was given back.
    """

    layer: str
    kind: Literal["convolution", "linear"]
    sqnr_db: float
    spread: float
    share: float | None = None
    cost_ms: float | None = None
    precision: Literal["int8", "float"] = "int8"

    @property
    def is_notable(self) -> bool:
        """Whether it is worth a sentence: given back, or weak, or reading channels of very different size."""
        return self.precision == "float" or self.sqnr_db < WEAK_DB or self.spread >= WIDE_SPREAD

    def sentence(self) -> str:
        """What became of the layer, and why.

        >>> line = LayerLine(layer="fc", kind="linear", sqnr_db=3.0, spread=900.0, share=0.8, precision="float")
        >>> line.sentence()[:74]
        'fc was given back to float: that alone takes away 80 % of the divergence. '
        """
        parts = [f"{self.layer} runs in int8, its output at {self.sqnr_db:.0f} dB of signal over noise."]
        if self.precision == "float":
            gain = "" if self.share is None else f": that alone takes away {100 * self.share:.0f} % of the divergence"
            parts = [f"{self.layer} was given back to float{gain}{self._cost()}."]
            if self.sqnr_db < WEAK_DB:
                parts.append(f"In int8 its output keeps {self.sqnr_db:.0f} dB of signal over noise.")
        if self.spread >= WIDE_SPREAD:
            parts.append(
                f"Its input's channels differ {self.spread:.0f}-fold from the largest to the median, and one grid "
                "of 256 steps serves them all."
            )
        return " ".join(parts)

    def _cost(self) -> str:
        if self.cost_ms is None:
            return ""
        # A difference of two timings may come out below zero: noise, not a gain.
        return f", for {format_ms(self.cost_ms)} more a call" if self.cost_ms > 0 else ", at no cost that timing shows"


def notable(lines: Sequence[LayerLine], *, limit: int = 8) -> tuple[LayerLine, ...]:
    """Those worth a sentence: given back, or weak, or with a wide spread; in the order of `weakest`.

    >>> def line(name, sqnr_db):
    ...     return LayerLine(layer=name, kind="linear", sqnr_db=sqnr_db, spread=2.0)
    >>> [each.layer for each in notable([line("a", 30.0), line("b", 9.0), line("c", 4.0)])]
    ['c', 'b']
    """
    return tuple(sorted((line for line in lines if line.is_notable), key=_order)[:limit])


def weakest(lines: Sequence[LayerLine], *, limit: int) -> tuple[LayerLine, ...]:
    """All that were given back, then the weakest of the rest up to `limit` in all; the weakest of each first."""
    given_back = sum(line.precision == "float" for line in lines)
    return tuple(sorted(lines, key=_order)[: max(limit, given_back)])


def _order(line: LayerLine) -> tuple[bool, float]:
    return (line.precision == "int8", line.sqnr_db)
