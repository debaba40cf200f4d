"""What `quantize_accuracy.py` finds of one system, and what it claims of fettle's among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from harness import Claim, Timing
from numpy.typing import NDArray

from fettle.evaluate.paired import compare_paired

MAX_RATIO = 1.05
# Half a row of slack: shares of 5000 rows do not add up exactly in binary.
SLACK = 1e-4


@dataclass(frozen=True, slots=True)
class Net:
    """A project under `examples/`, and what is claimed of it. kind: see Problem; data: what its rows are, in words."""

    name: str
    project: str
    max_drop: float
    min_agreement: float | None = None
    kind: str = "plain"
    data: str = "images of CIFAR-10 (JPEG)"


@dataclass(frozen=True, slots=True)
class Row:
    """One system on one network. accuracy, drop, agreement: shares of the n test rows, drop and p against float.

    picks: the batch sizes for which fettle chose it. differs: the test rows given another class than float gives.
    validation_agreement: nan for a system that ran apart. timings: by batch size, none for such a one.
    """

    net: str
    by: str
    name: str
    engine: str
    precision: str
    note: str
    picks: tuple[int, ...]
    n: int
    accuracy: float
    drop: float
    p: float
    agreement: float
    differs: tuple[int, ...]
    validation_agreement: float
    timings: dict[int, Timing]

    @property
    def is_int8(self) -> bool:
        """Whether activations are int8 too, in all layers or with some given back; int8 weights alone do not count."""
        return self.precision.startswith("int8") and self.precision != "int8-weights"


def int8_of_fettle(rows: list[Row], net: Net) -> list[Row]:
    """Its int8 on this network: for each batch size its pick, or where that is another precision, the int8 that agrees
    most often on validation. One row, where they are the same one; none, where it has no int8.
    """
    ours = [row for row in rows if row.net == net.name and row.by == "fettle" and row.is_int8]
    found = []
    for batch in sorted({batch for row in rows if row.net == net.name for batch in row.picks}):
        best = max(ours, key=lambda row: (batch in row.picks, row.validation_agreement), default=None)
        if best is not None and best not in found:
            found.append(best)
    return found


def claim_closest(rows: list[Row], nets: tuple[Net, ...]) -> Claim:
    """fettle's int8, for each batch size, beside the int8 peer that agrees most often.

    p: whether the two differ by more than chance.
    """
    statement = "no int8 peer agrees with float more often than fettle's int8"
    figures, holds = [], True
    for net in nets:
        ours = int8_of_fettle(rows, net)
        peers = [row for row in rows if row.net == net.name and row.by == "peer" and row.is_int8]
        if not ours or not peers:
            return Claim(statement, holds=False, figures=f"{net.name}: no int8 of {'fettle' if peers else 'a peer'}")
        best = max(peers, key=lambda row: row.agreement)
        for row in ours:
            holds &= row.agreement >= best.agreement
            p = compare_paired(agrees(best), agrees(row)).p_mid
            figures.append(
                f"{net.name} {row.agreement:.2%} against {best.agreement:.2%} of {best.name} in {best.engine} "
                f"(p {p:.2f})"
            )
    return Claim(statement, holds=holds, figures=", ".join(figures))


def agrees(row: Row) -> NDArray[np.bool_]:
    """(n,) whether each test row was given the float model's class."""
    same = np.ones(row.n, dtype=bool)
    same[list(row.differs)] = False
    return same


def claim_agreement(rows: list[Row], nets: tuple[Net, ...]) -> Claim:
    """fettle's int8 against a fixed bound, where the network has one."""
    statement = "fettle's int8 agrees with float as often as is promised"
    figures, holds = [], True
    for net in nets:
        if net.min_agreement is None:
            continue
        ours = int8_of_fettle(rows, net)
        if not ours:
            return Claim(statement, holds=False, figures=f"{net.name}: no int8 of fettle")
        for row in ours:
            holds &= row.agreement >= net.min_agreement - SLACK
            figures.append(f"{net.name} {row.agreement:.2%} of {net.min_agreement:.1%}")
    return Claim(statement, holds=holds, figures=", ".join(figures))


def claim_drop(rows: list[Row], nets: tuple[Net, ...]) -> Claim:
    """Accuracy of fettle's int8 against float."""
    statement = "fettle's int8 loses no more accuracy than is promised"
    figures, holds = [], True
    for net in nets:
        ours = int8_of_fettle(rows, net)
        if not ours:
            return Claim(statement, holds=False, figures=f"{net.name}: no int8 of fettle")
        for row in ours:
            holds &= row.drop <= net.max_drop + SLACK
            figures.append(f"{net.name} {100 * row.drop:+.2f} of {100 * net.max_drop:.1f} points")
    return Claim(statement, holds=holds, figures=", ".join(figures))


def claim_speed(rows: list[Row], nets: tuple[Net, ...]) -> Claim:
    """fettle's pick for a batch size, of any precision, beside the fastest int8 at that size, its own included."""
    statement = f"fettle's pick takes at most {MAX_RATIO} times as long as the fastest int8"
    figures, holds = [], True
    for net in nets:
        timed = [row for row in rows if row.net == net.name and row.timings]
        picks = {batch: row for row in timed for batch in row.picks}
        int8 = [row for row in timed if row.is_int8]
        if not picks or not int8:
            return Claim(statement, holds=False, figures=f"{net.name}: no {'int8' if picks else 'pick of fettle'}")
        for batch, pick in sorted(picks.items()):
            fastest = min(int8, key=lambda row: row.timings[batch].median_ms)
            ratio = pick.timings[batch].median_ms / fastest.timings[batch].median_ms
            holds &= ratio <= MAX_RATIO
            figures.append(f"{net.name} batch {batch} {ratio:.2f} × {fastest.name} in {fastest.engine}")
    return Claim(statement, holds=holds, figures=", ".join(figures))
