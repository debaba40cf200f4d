"""How far two answers differ."""

import json
import math

import numpy as np
import pytest

from fettle.serve.compare import agreeing_rows, largest_difference
from fettle.serve.jobs import Result


def scores(*rows):
    array = np.array(rows, np.float32)
    return Result(b"{}", 0, array.tobytes() + bytes(20 * len(rows)), len(rows), array.shape[1])


def answer(values, *, name="y", shape=None):
    tensor = {"name": name, "shape": shape or [len(values)], "datatype": "FP32", "data": values}
    return Result(json.dumps({"model_version": "1", "outputs": [tensor]}).encode(), 0, b"", 0, 0)


def binary(values, *, dtype="float32", datatype="FP32"):
    array = np.array(values, dtype)
    tensor = {"name": "y", "shape": list(array.shape), "datatype": datatype}
    head = json.dumps({"outputs": [tensor | {"parameters": {"binary_data_size": array.nbytes}}]}).encode()
    return Result(head + array.tobytes(), len(head), b"", 0, 0)


def test_rows_agree_by_their_most_probable_class():
    assert agreeing_rows(scores([0.9, 0.1], [0.2, 0.8]), scores([0.6, 0.4], [0.7, 0.3])) == 1
    assert agreeing_rows(scores([0.9, 0.1, 0.0]), scores([0.6, 0.4])) == 1  # another number of classes
    assert agreeing_rows(scores([0.9, 0.1]), scores([0.9, 0.1], [0.9, 0.1])) == 0


def test_the_largest_difference_whatever_the_form():
    assert largest_difference(answer([1.0, 2.0]), answer([1.0, 2.5])) == 0.5
    assert largest_difference(answer([1.0, 2.0]), binary([1.25, 2.0])) == 0.25
    assert largest_difference(binary([[1, 2]]), binary([[1, 2]])) == 0.0


@pytest.mark.parametrize(("dtype", "datatype"), [("uint8", "UINT8"), ("bool", "BOOL")])
def test_numbers_without_a_sign_differ_by_their_distance(dtype, datatype):
    ones, zeros = (binary([value], dtype=dtype, datatype=datatype) for value in (1, 0))
    assert largest_difference(zeros, ones) == 1.0


def test_what_cannot_be_subtracted_is_infinitely_far():
    assert largest_difference(answer([1.0]), answer([1.0, 2.0])) == math.inf
    assert largest_difference(answer([1.0]), answer([1.0], name="z")) == math.inf
    assert largest_difference(binary([math.nan]), binary([1.0])) == math.inf
    assert largest_difference(binary([math.nan, math.inf]), binary([math.nan, math.inf])) == 0.0
    assert largest_difference(binary([math.inf]), binary([-math.inf])) == math.inf


def test_what_is_too_large_or_no_answer_is_not_compared():
    assert largest_difference(binary([0.0] * 20_000), binary([0.0] * 20_000)) is None
    assert largest_difference(Result(b"junk", 0, b"", 0, 0), answer([1.0])) is None
