from __future__ import annotations

import numpy as np
import pytest
import torch

from fettle.compress.batches import checked_batches
from fettle.core.errors import DataError, UsageError

CPU = torch.device("cpu")
EXAMPLE = (torch.zeros(1, 3), torch.zeros(1, 2, dtype=torch.int64))
X, Z, Y = torch.ones(4, 3), torch.ones(4, 2, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)


def checked(*batches):
    return list(checked_batches(batches, EXAMPLE, CPU, where="epoch 2"))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", [tuple, list])
def test_a_batch_that_fits_comes_through(rows, kind):
    [(inputs, targets)] = checked(kind([kind([X[:rows], Z[:rows]]), Y[:rows]]))
    assert isinstance(inputs, tuple)
    assert torch.equal(inputs[0], X[:rows])
    assert torch.equal(inputs[1], Z[:rows])
    assert torch.equal(targets, Y[:rows])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (X, "must be a pair .* got Tensor"),
        ((X, Z, Y), "must be a pair .* got 3 items"),
        ((X, Y), "bare tensor for the inputs: wrap it"),
        (((X, Z), Y.numpy()), "of tensors, got Tensor, Tensor, ndarray"),
        ((np.ones((4, 3)), Y), "of tensors, got ndarray, Tensor"),
        (((X,), Y), "the model takes 2 inputs, got 1"),
        (((X.double(), Z), Y), r"input 0 must be like the example, torch\.float32 .* got torch\.float64"),
        (((X[:, :2], Z), Y), r"input 0 must be like the example, .*'rows', 3\], got .*\[4, 2\]"),
        (((X[:, 0], Z), Y), r"input 0 must be like the example"),
        (((X, Z[:3]), Y), r"must share dimension 0, got shapes \[\[4, 3\], \[3, 2\], \[4\]\]"),
        (((X, Z), Y[:3]), "must share dimension 0"),
        (((X, Z), Y[0]), "must share dimension 0"),
        (((X[:0], Z[:0]), Y[:0]), "at least one row"),
        (((X * float("nan"), Z), Y), "input 0 must be finite"),
        (((X / 0, Z), Y), "input 0 must be finite"),
    ],
)
def test_a_batch_that_does_not_fit_is_named(batch, message):
    with pytest.raises(DataError, match=rf"epoch 2, batch 1: .*{message}"):
        checked(((X, Z), Y), batch)


def failing(problem):
    yield (X, Z), Y
    raise problem


def test_a_loader_that_raises_is_named():
    with pytest.raises(DataError, match="epoch 2, batch 1: the loader raised OSError: disk gone"):
        list(checked_batches(failing(OSError("disk gone")), EXAMPLE, CPU, where="epoch 2"))


def test_our_own_errors_pass_through():
    with pytest.raises(UsageError, match="mine"):
        list(checked_batches(failing(UsageError("mine")), EXAMPLE, CPU, where="epoch 2"))


def test_batches_are_read_one_at_a_time():
    seen = []

    def loader():
        for index in range(3):
            seen.append(index)
            yield (X, Z), Y

    batches = checked_batches(loader(), EXAMPLE, CPU, where="epoch 1")
    next(batches)
    assert seen == [0]
