"""Small parts of building: the first rows, the softmax that is for the server to apply, one answer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.data import Split
from fettle.core.errors import DataError
from fettle.core.signature import Signature, TensorSpec
from fettle.stages.build import answer, first_rows, with_activation
from fettle.stages.task import Task

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 2)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),),
)


class Job:
    """What `first_rows` reads of a task."""

    leading_rows = Task.leading_rows

    def __init__(self, sizes):
        numbers = iter(range(1000))
        x = [np.array([[next(numbers), 0] for _ in range(size)], np.float32) for size in sizes]
        self.validation = Split("validation", [(each, np.zeros(len(each))) for each in x])
        self.signature = SIGNATURE


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), rows=st.integers(1, 30))
def test_first_rows_come_in_order_and_again_from_the_start(sizes, rows):
    found = first_rows(Job(sizes), rows)
    assert list(found) == ["x"]
    assert found["x"][:, 0].tolist() == [row % min(sum(sizes), _read(sizes, rows)) for row in range(rows)]


def _read(sizes, rows):
    """Whole batches, until there are enough rows."""
    total = 0
    for size in sizes:
        total += size
        if total >= rows:
            break
    return total


@pytest.mark.parametrize(
    ("outputs", "classification", "activation"),
    [
        (np.array([[3.0, -1.0, 0.0]]), True, "softmax"),
        (np.array([[0.5, 0.25, 0.25]]), True, "none"),
        (np.array([[3.0, -1.0, 0.0]]), False, "none"),
        (np.array([[3, 1, 0]]), True, "none"),
        (np.array([3.0]), True, "none"),
    ],
)
def test_softmax_only_for_scores_of_classes(outputs, classification, activation):
    assert with_activation(SIGNATURE, outputs, classification=classification).activation == activation


def test_what_breaks_on_a_good_batch_is_told_with_its_shapes():
    def runner(x):
        raise IndexError("index out of range\nin self")

    with pytest.raises(DataError, match=r"float32 \[4, 2\] it raised IndexError: index out of range$"):
        answer(runner, (np.zeros((4, 2), np.float32),))


def test_errors_of_ours_pass_as_they_are():
    def runner(x):
        raise DataError("as it is")

    with pytest.raises(DataError, match=r"^as it is$"):
        answer(runner, (np.zeros((4, 2), np.float32),))


def test_runners_get_plain_memory():
    seen = []
    x = np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::-1]
    answer(seen.append, (x,))
    assert seen[0].flags.c_contiguous
    np.testing.assert_array_equal(seen[0], x)
