"""Holm's correction against the procedure as the paper states it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fettle.monitor.correction import holm

P_VALUES = st.lists(st.floats(0, 1), max_size=12)


def reject_step_by_step(p_values: list[float], alpha: float) -> list[bool]:
    """Smallest first, each against alpha over the number left; stop at the first that does not reject."""
    rejected = [False] * len(p_values)
    for step, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] * (len(p_values) - step) > alpha:
            break
        rejected[index] = True
    return rejected


@given(p_values=P_VALUES, alpha=st.sampled_from([0.001, 0.01, 0.05, 0.5, 0.999]))
def test_rejects_what_the_procedure_rejects(p_values, alpha):
    corrected = holm(np.array(p_values, dtype=float))
    assert (corrected <= alpha).tolist() == reject_step_by_step(p_values, alpha)


@given(p_values=P_VALUES)
def test_corrects_upwards_in_the_same_order(p_values):
    raw = np.array(p_values, dtype=float)
    corrected = holm(raw)
    assert (corrected >= raw).all()
    assert (corrected <= 1).all()
    assert (np.diff(corrected[np.argsort(raw, kind="stable")]) >= 0).all()


def test_never_alarms_more_often_than_alpha(rng):
    alarms = sum(holm(rng.uniform(size=20)).min() <= 0.05 for _ in range(2000))
    assert alarms <= 140  # 100 expected, 4 standard deviations
