"""Testing many features at once without alarming more often."""

from __future__ import annotations

import numpy as np

from fettle.core.signature import Array


def holm(p_values: Array) -> Array:
    """Holm's corrected p-values: reject those at most alpha, and the chance of any false rejection is at most alpha.

    With the K values sorted, p(1) <= ... <= p(K), the corrected one is max over j <= i of min(1, (K - j + 1)·p(j)).
    Holds under any dependence between the tests, which softmax outputs, summing to 1, surely have.

    p_values: (K,) in [0, 1]. Returns (K,) float64 in the same order.

    Reference: S. Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statistics 6 (1979).

    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    stepped = np.maximum.accumulate(np.minimum(1.0, p_values[order] * factors))
    corrected = np.empty(len(p_values))
    corrected[order] = stepped
    return corrected
