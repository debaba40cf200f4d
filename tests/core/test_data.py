"""Splits: what they yield, what they refuse, and that a digest does not depend on how rows are batched."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.data import Split
from fettle.core.errors import DataError, InvalidInput, UsageError
from fettle.core.signature import TensorSpec

ROWS = 10
X = np.arange(ROWS * 3, dtype=np.float32).reshape(ROWS, 3)
Y = np.arange(ROWS)
SPEC = (TensorSpec(name="x", dtype="float32", shape=("batch", 3)),)


def batches(size: int, x: Any = X, y: Any = Y) -> list[tuple[Any, Any]]:
    return [(x[start : start + size], y[start : start + size]) for start in range(0, len(x), size)]


def consume(split: Split) -> None:
    for _ in split:
        pass


def generator(size: int = 4) -> Iterator[tuple[Any, Any]]:
    yield from batches(size)


class Loader:
    """Re-iterable and callable at once, as some loaders are."""

    def __iter__(self) -> Iterator[Any]:
        return iter(batches(4))

    def __call__(self) -> None:
        raise AssertionError("a loader that can be iterated must not be called")


SOURCES = {
    "list": lambda: batches(4),
    "tuple": lambda: tuple(batches(4)),
    "generator object": generator,
    "generator function": lambda: generator,
    "callable returning a list": lambda: lambda: batches(4),
    "iterator": lambda: iter(batches(4)),
    "loader": Loader,
    "class": lambda: Loader,
    "torch loader": lambda: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), batch_size=4
    ),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_kind_of_source_yields_the_same_rows_on_every_pass(source: Any) -> None:
    split = Split("validation", source(), signature_inputs=SPEC)
    for _ in range(3):
        seen = list(split)
        assert [len(targets) for _, targets in seen] == [4, 4, 2]
        np.testing.assert_array_equal(np.concatenate([inputs[0] for inputs, _ in seen]), X)
        np.testing.assert_array_equal(np.concatenate([targets for _, targets in seen]), Y)
    assert split.rows == ROWS
    assert split.digest == Split("x", batches(10)).digest


@pytest.mark.parametrize(
    "batch",
    [(X, Y), [X, Y], ((X,), Y), ([X], Y), (torch.from_numpy(X), torch.from_numpy(Y)), (torch.from_numpy(X), Y)],
)
def test_the_ways_to_write_a_batch_mean_the_same(batch: Any) -> None:
    ((inputs, targets),) = list(Split("validation", [batch]))
    assert len(inputs) == 1
    assert isinstance(inputs[0], np.ndarray)
    np.testing.assert_array_equal(inputs[0], X)
    np.testing.assert_array_equal(targets, Y)


def test_tensors_that_need_gradients_are_detached() -> None:
    ((inputs, _),) = list(Split("train", [(torch.ones(2, 3, requires_grad=True), torch.zeros(2))]))
    assert inputs[0].tolist() == [[1, 1, 1], [1, 1, 1]]


def test_big_endian_rows_become_native_and_keep_the_digest() -> None:
    split = Split("validation", [(X.astype(">f4"), Y)], signature_inputs=SPEC)
    ((inputs, _),) = list(split)
    assert inputs[0].dtype.isnative
    assert split.digest == Split("validation", [(X, Y)]).digest


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6), again=st.integers(1, 20), seed=st.integers(0, 99))
def test_digest_does_not_depend_on_batch_size(sizes: list[int], again: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    x, y = rng.normal(size=(n, 2, 2)).astype(np.float32), rng.integers(0, 5, n)
    edges = np.cumsum([0, *sizes])
    uneven = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(edges)]
    assert Split("a", uneven).digest == Split("b", batches(again, x, y)).digest


def test_digest_is_a_sha256_that_a_slow_reference_finds_too() -> None:
    whole = hashlib.sha256(b"10 rows, 2 arrays")
    whole.update(hashlib.sha256(b"int64()" + b"".join(row.tobytes() for row in Y)).digest())
    whole.update(hashlib.sha256(b"float32(3,)" + b"".join(row.tobytes() for row in X)).digest())
    assert Split("validation", batches(3)).digest == whole.hexdigest()


CHANGES = {
    "a value": (np.where(X == 4, 5, X), Y),
    "a target": (X, np.where(Y == 4, 5, Y)),
    "the order": (X[::-1], Y[::-1]),
    "a row less": (X[:-1], Y[:-1]),
    "the data type": (X.astype(np.int32), Y),
    "the shape": (X.reshape(ROWS, 3, 1), Y),
    "an input more": ((X, X), Y),
}


@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
def test_digest_sees(changed: Any) -> None:
    assert Split("a", [changed]).digest != Split("b", [(X, Y)]).digest


def nan(value: float) -> Any:
    spoiled = X.copy()
    spoiled[5, 1] = value
    return spoiled


BAD = {
    "nothing": ([], "must yield at least one batch"),
    "no pair": ([X], "must be a pair .*got ndarray"),
    "a dictionary": ([{"x": X, "y": Y}], "must be a pair .*got dict"),
    "three items": ([(X, X, Y)], r"got 3 items: wrap several inputs"),
    "one item": ([(X,)], "got 1 items"),
    "no input": ([((), Y)], "got no input"),
    "a list of numbers": ([(X, [1, 2, 3])], r"batch 0: targets must be a numpy array or a tensor, got list"),
    "None": ([(X, None)], "targets must be a numpy array or a tensor, got NoneType"),
    "text": ([(X, np.array(["a"] * ROWS))], "targets must be one of"),
    "objects": ([(np.array([None] * ROWS), Y)], "input 0 must be one of"),
    "a scalar": ([(X, np.array(3))], "at least one row"),
    "no rows": ([(X[:0], Y[:0])], "at least one row"),
    "rows that disagree": ([(X, Y[:-1])], "one row each, got 10 inputs and 9 targets"),
    "float64": (
        [(X.astype(np.float64), Y)],
        r"must be float32, got float64: convert .* inputs.astype\(numpy.float32\)",
    ),
    "integers": ([(X.astype(np.int64), Y)], "must be float32, got int64"),
    "another shape": ([(X[:, :2], Y)], r"must have shape \['batch', 3\], got \[10, 2\]"),
    "another rank": ([(X[:, :, None], Y)], "must have shape"),
    "two inputs for one": ([((X, X), Y)], r"takes 1 inputs \(x\), got 2"),
    "NaN": ([(X, Y), (nan(np.nan), Y)], "split 'validation', batch 1: .*finite, got NaN or infinity: drop or repair"),
    "infinity": ([(nan(np.inf), Y)], "batch 0: .*finite"),
    "NaN targets": ([(X, np.full(ROWS, np.nan))], "targets must be finite"),
    "bfloat16": ([(torch.zeros(2, 3, dtype=torch.bfloat16), Y[:2])], "numpy can hold"),
}


@pytest.mark.parametrize(("source", "message"), BAD.values(), ids=BAD)
def test_what_a_loader_must_not_yield(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        consume(Split("validation", source, signature_inputs=SPEC))


def test_two_inputs_must_have_the_same_rows() -> None:
    with pytest.raises(DataError, match="dimension 'rows' must be one size"):
        consume(Split("validation", [((X, X[:-1]), Y)]))


@pytest.mark.parametrize("second", [X.astype(np.float64), X[:, :, None], nan(np.nan)])
def test_without_a_signature_later_batches_must_be_like_the_first(second: Any) -> None:
    with pytest.raises(DataError, match="batch 1"):
        consume(Split("validation", [(X, Y), (second, Y)]))


def test_without_a_signature_a_free_dimension_may_change() -> None:
    assert Split("validation", [(X, Y), (X[:, :2], Y)]).rows == 2 * ROWS


@pytest.mark.parametrize("source", [3, None, "text", b"bytes", {"x": X}])
def test_what_is_no_source(source: Any) -> None:
    with pytest.raises(UsageError, match="must be an iterable of batches or a callable"):
        Split("validation", source)


@pytest.mark.parametrize("returned", [None, 3, "text", {"a": 1}])
def test_a_callable_must_return_an_iterable(returned: Any) -> None:
    with pytest.raises(DataError, match="its callable must return an iterable"):
        consume(Split("validation", lambda: returned))


def test_a_loader_that_raises_is_named() -> None:
    def broken() -> Iterator[Any]:
        yield X, Y
        raise OSError("disk on fire")

    split = Split("test", broken)
    with pytest.raises(DataError, match="split 'test': the loader raised OSError: disk on fire") as caught:
        consume(split)
    assert isinstance(caught.value.__cause__, OSError)


def test_an_error_of_ours_passes_as_it_is() -> None:
    def broken() -> Iterator[Any]:
        raise InvalidInput("as it is")
        yield

    with pytest.raises(InvalidInput, match=r"^as it is$"):
        consume(Split("test", broken))


def test_a_one_shot_iterator_that_raised_is_never_taken_for_whole() -> None:
    def broken() -> Iterator[Any]:
        yield X, Y
        raise OSError("disk on fire")

    split = Split("test", broken())
    for _ in range(2):
        with pytest.raises(DataError, match="disk on fire"):
            consume(split)


def test_a_one_shot_iterator_over_the_limit_is_refused_each_time() -> None:
    split = Split("validation", generator(), limit_bytes=X.nbytes)
    for _ in range(2):
        with pytest.raises(DataError, match="give a callable that returns a fresh iterable"):
            consume(split)


def test_a_one_shot_iterator_is_read_once_even_after_a_pass_that_stopped_early() -> None:
    pulled = 0

    def counting() -> Iterator[Any]:
        nonlocal pulled
        for batch in batches(2):
            pulled += 1
            yield batch

    split = Split("validation", counting())
    next(iter(split))
    assert pulled == 1
    assert split.rows == ROWS
    consume(split)
    assert pulled == 5


def test_an_exhausted_iterator_behind_a_callable_is_named() -> None:
    exhausted = iter(batches(4))
    split = Split("validation", lambda: exhausted)
    assert split.rows == ROWS
    with pytest.raises(DataError, match="fresh iterable each time"):
        consume(split)


@pytest.mark.parametrize("change", ["order", "fewer"])
def test_a_pass_that_differs_is_an_error_unless_the_split_is_shuffled(change: str) -> None:
    passes = iter([batches(4), batches(4, X[::-1], Y[::-1]) if change == "order" else batches(4)[:-1]])
    split = Split("validation", lambda: next(passes))
    consume(split)
    with pytest.raises(DataError, match="turn shuffling and random augmentation off"):
        consume(split)


def test_a_shuffled_split_keeps_the_digest_of_its_first_pass() -> None:
    rng = np.random.default_rng(0)

    def shuffled() -> list[Any]:
        order = rng.permutation(ROWS)
        return batches(4, X[order], Y[order])

    split = Split("train", shuffled, shuffled=True)
    first = split.digest
    consume(split)
    assert split.digest == first


def test_a_pass_that_stops_early_fixes_nothing() -> None:
    split = Split("validation", batches(4))
    next(iter(split))
    assert split.rows == ROWS
