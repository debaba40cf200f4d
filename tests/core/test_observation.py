from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fettle.core.observation import SCHEMA
from fettle.core.statistics import STATISTICS, input_statistics


def slow(row):
    """Each statistic from its definition, in double precision."""
    values = [float(v) for v in row.flatten()]
    mean = sum(values) / len(values)
    steps = []
    for line in row.reshape(-1, row.shape[-1]) if row.ndim else [[]]:
        steps += [abs(float(b) - float(a)) for a, b in pairwise(line)]
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return [mean, deviation, min(values), max(values), sum(steps) / len(steps) if steps else 0.0]


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=4, max_side=5), elements=st.floats(-1000, 1000, width=32)))
def test_equal_a_slow_loop(rows):
    found = input_statistics(rows)
    assert found.shape == (len(rows), len(STATISTICS))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [slow(row) for row in rows], atol=2e-2, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["uint8", "int64", "bool", "float64", "float16"])
def test_every_type_is_taken_without_wrapping_around(dtype):
    rows = np.array([[1, 0, 1], [0, 1, 1]]).astype(dtype)
    np.testing.assert_allclose(input_statistics(rows), [slow(row) for row in rows.astype(float)], rtol=1e-6)


def test_rows_of_one_value_have_no_roughness():
    assert input_statistics(np.array([[3.0], [5.0]]))[:, 4].tolist() == [0.0, 0.0]


def test_rows_do_not_depend_on_their_batch():
    rows = np.random.default_rng(0).normal(size=(6, 3, 4, 4)).astype(np.float32)
    alone = np.concatenate([input_statistics(row[None]) for row in rows])
    np.testing.assert_allclose(input_statistics(rows), alone, rtol=1e-5)


def test_noise_raises_roughness_and_keeps_the_mean():
    flat = np.full((1, 1, 64, 64), 0.5, np.float32)
    noisy = flat + np.random.default_rng(0).normal(0, 0.1, flat.shape).astype(np.float32)
    before, after = input_statistics(flat)[0], input_statistics(noisy)[0]
    assert after[4] > before[4] + 0.05
    assert abs(after[0] - before[0]) < 0.01


def test_the_schema_holds_as_many_statistics_as_there_are():
    assert SCHEMA.field("statistics").type.list_size == len(STATISTICS)
