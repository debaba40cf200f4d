"""Every drift test that is found keeps what fettle.testing.drift asks of it; and the kit catches those that do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from fettle.core import plugins
from fettle.core.signature import Array
from fettle.monitor.drift._base import Comparison, DriftTest
from fettle.monitor.drift.ks import KolmogorovSmirnov
from fettle.testing import drift

FOUND = plugins.installed("fettle.monitor.drift", DriftTest)


@pytest.mark.parametrize("check", drift.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", sorted(FOUND))
def test_every_drift_test_conforms(name, check):
    check(FOUND[name]())


def test_the_plug_ins_are_found_by_their_files():
    assert {"ks", "psi"} <= set(FOUND)
    assert all(cls().name == name for name, cls in FOUND.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers(DriftTest):
    """A test that always gives the same answer."""

    minimum: float = 0.2
    p_value: float = 1.0
    unit: ClassVar[str] = "D"

    def compare(self, reference: Array, current: Array) -> Comparison:
        return Comparison(p_value=self.p_value, effect=0.0, statistic=0.0, null_mean=0.0)

    def detectable(self, reference_size: int, size: int, *, alpha: float, power: float) -> float:
        return 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class DropsMissing(DriftTest):
    """KS as it is commonly written: NaN thrown away."""

    minimum: float = 0.2
    unit: ClassVar[str] = "D"

    def compare(self, reference: Array, current: Array) -> Comparison:
        return KolmogorovSmirnov().compare(reference[~np.isnan(reference)], current[~np.isnan(current)])

    def detectable(self, reference_size: int, size: int, *, alpha: float, power: float) -> float:
        return 0.1


@pytest.mark.parametrize(
    ("test", "check"),
    [
        (Answers(p_value=0.0), drift.holds_its_level),
        (Answers(p_value=1.0), drift.sees_a_known_shift),
        (Answers(p_value=0.0), drift.sees_nothing_in_nothing),
        (Answers(p_value=1.0), drift.knows_constants),
        (Answers(p_value=1.0), drift.asks_for_enough_data),
        (DropsMissing(), drift.counts_missing_values),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_the_kit_catches_a_bad_test(test, check):
    with pytest.raises(AssertionError):
        check(test)
