"""A split of the data: batches of (inputs, targets), checked on every pass before a model sees them.

Batches come from the user's loader as arrays or tensors; a tensor is recognized by its methods, so torch is never
imported here. What leaves a Split is numpy, of the expected data types and shapes, and finite.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np

from fettle.core.errors import DataError, FettleError, InvalidInput, UsageError
from fettle.core.signature import DTYPES, Array, Signature, TensorSpec

Inputs: TypeAlias = tuple[Array, ...]
Batch: TypeAlias = tuple[Inputs, Array]

_PAIR = "a batch must be a pair (inputs, targets), where inputs is an array, a tensor or a tuple of them"


class Split:
    """Batches `((input, ...), targets)` of numpy arrays, the same on every pass.

    source: a re-iterable such as a list or a torch DataLoader; a callable without arguments that returns a fresh
        iterable for each pass; or a one-shot iterator, whose batches are kept in memory up to `limit_bytes`.
    signature_inputs: what the model takes, or None to expect what the first batch holds (data type and rank).
    shuffled: True for training data that comes in another order on each pass. Otherwise a pass whose targets
        differ from the first pass's is an error, because outputs of two models could not be compared row by row.

    Nothing is cast silently: float64 rows for a float32 model are an error that says what to write. Iterating
    raises DataError, naming the split and the batch, for: nothing yielded, no pair, rows that disagree, a wrong
    data type or shape, NaN or infinity, and a loader that raises. Not safe to iterate from two threads.

    >>> x, y = np.zeros((5, 2), np.float32), np.arange(5)
    >>> split = Split("validation", [(x[:3], y[:3]), (x[3:], y[3:])])
    >>> split.rows
    5
    >>> [targets.tolist() for _, targets in split]
    [[0, 1, 2], [3, 4]]
    >>> split.digest == Split("same rows", [(x, y)]).digest
    True
    """

    def __init__(
        self,
        name: str,
        source: Callable[[], Iterable[Any]] | Iterable[Any],
        *,
        signature_inputs: tuple[TensorSpec, ...] | None = None,
        limit_bytes: int = 2**30,
        shuffled: bool = False,
    ) -> None:
        self.name = name
        self.shuffled = shuffled
        self.signature_inputs = signature_inputs
        self._open = _opener(name, source, limit_bytes)
        self._first: _Pass | None = None

    def __iter__(self) -> Iterator[Batch]:
        expected = self.signature_inputs
        seen = _Pass(inputs_too=self._first is None)
        for index, raw in enumerate(self._raw()):
            where = f"split '{self.name}', batch {index}"
            batch = _arrays(raw, where)
            expected = expected or _infer(batch[0], where)
            _check(batch, expected, where)
            seen.add(batch)
            yield batch
        self._finish(seen)

    @property
    def rows(self) -> int:
        """How many rows one pass yields. Costs a pass where none was made yet."""
        return self._measured().rows

    @property
    def digest(self) -> str:
        """SHA-256 of all rows' bytes, data types and shapes, whatever the batch size; of the first pass."""
        return self._measured().digest()

    def __repr__(self) -> str:
        return f"Split({self.name!r})"

    def _raw(self) -> Iterator[Any]:
        try:
            yield from self._open()
        except FettleError:
            raise
        except Exception as problem:
            raise DataError(f"split '{self.name}': the loader raised {type(problem).__name__}: {problem}") from problem

    def _measured(self) -> _Pass:
        if self._first is None:
            for _ in self:
                pass
        assert self._first is not None
        return self._first

    def _finish(self, seen: _Pass) -> None:
        first = self._first
        if seen.rows == 0 and first is None:
            raise DataError(f"split '{self.name}' must yield at least one batch (inputs, targets), got none")
        if seen.rows == 0:
            raise DataError(
                f"split '{self.name}' must yield its rows on every pass, got none after a pass with rows: "
                "its callable must return a fresh iterable each time, not the same exhausted iterator"
            )
        if first is None:
            self._first = seen
        elif not self.shuffled and seen.targets_digest() != first.targets_digest():
            raise DataError(
                f"split '{self.name}' must yield the same rows in the same order on every pass, and its targets "
                f"differ from the first pass's ({first.rows} rows then, {seen.rows} now): turn shuffling and random "
                "augmentation off in its loader"
            )


class _Pass:
    """What one complete pass adds up to: one running hash per array position, so that batch size cannot matter."""

    def __init__(self, *, inputs_too: bool) -> None:
        self.rows = 0
        self._inputs_too = inputs_too
        self._streams: dict[int, _Stream] = {}

    def add(self, batch: Batch) -> None:
        inputs, targets = batch
        self.rows += len(targets)
        for position, array in enumerate((targets, *(inputs if self._inputs_too else ()))):
            self._streams.setdefault(position, _Stream()).add(array)

    def targets_digest(self) -> str:
        return self._streams[0].hash.hexdigest()

    def digest(self) -> str:
        whole = hashlib.sha256(f"{self.rows} rows, {len(self._streams)} arrays".encode())
        for position in sorted(self._streams):
            whole.update(self._streams[position].hash.digest())
        return whole.hexdigest()


class _Stream:
    """SHA-256 over rows; data type and row shape enter at the start and wherever they change."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self._kind = ""

    def add(self, array: Array) -> None:
        kind = f"{array.dtype.name}{array.shape[1:]}"
        if kind != self._kind:
            self.hash.update(kind.encode())
            self._kind = kind
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        # A view of the bytes: tobytes() would copy every batch.
        self.hash.update(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)


class _OneShot:
    """Makes a one-shot iterator re-iterable: keeps what it yields, up to a limit."""

    def __init__(self, name: str, iterator: Iterator[Any], limit_bytes: int) -> None:
        self._name = name
        self._iterator = iterator
        self._limit_bytes = limit_bytes
        self._kept: list[Any] = []
        self._kept_bytes = 0
        self._problem: Exception | None = None

    def __call__(self) -> Iterator[Any]:
        index = 0
        while True:
            if index == len(self._kept) and not self._pull():
                return
            yield self._kept[index]
            index += 1

    def _pull(self) -> bool:
        if self._problem is not None:
            raise self._problem
        try:
            raw = next(self._iterator)
        except StopIteration:
            return False
        except Exception as problem:
            # A generator that raised is exhausted: the next pass would take the rows before it for all of them.
            self._problem = problem
            raise
        self._kept_bytes += _size_bytes(raw)
        if self._kept_bytes > self._limit_bytes:
            raise DataError(
                f"split '{self._name}' is a one-shot iterator, and one may hold at most {self._limit_bytes} bytes, got "
                f"more: give a callable that returns a fresh iterable for each pass, or a re-iterable loader"
            )
        self._kept.append(raw)
        return True


def _opener(name: str, source: Any, limit_bytes: int) -> Callable[[], Iterable[Any]]:
    if isinstance(source, Iterator):
        return _OneShot(name, source, limit_bytes)
    # A class is callable and may look iterable; a loader object may be both, and then it is iterated.
    if hasattr(source, "__iter__") and not isinstance(source, type | str | bytes | dict):
        return lambda: source
    if callable(source):
        return lambda: _opened(name, source)
    raise UsageError(
        f"split '{name}' must be an iterable of batches or a callable that returns one, got {type(source).__name__}"
    )


def _opened(name: str, source: Callable[[], Any]) -> Iterable[Any]:
    found: Iterable[Any] = source()
    if not hasattr(found, "__iter__") or isinstance(found, str | bytes | dict):
        raise DataError(
            f"split '{name}': its callable must return an iterable of (inputs, targets), got {type(found).__name__}"
        )
    return found


def _arrays(raw: Any, where: str) -> Batch:
    """The batch as numpy arrays, in native byte order."""
    if not isinstance(raw, tuple | list):
        raise DataError(f"{where}: {_PAIR}, got {type(raw).__name__}")
    if len(raw) != 2:
        advice = ": wrap several inputs as ((first, second), targets)" if len(raw) > 2 else ""
        raise DataError(f"{where}: {_PAIR}, got {len(raw)} items{advice}")
    inputs = raw[0] if isinstance(raw[0], tuple | list) else (raw[0],)
    if not inputs:
        raise DataError(f"{where}: {_PAIR}, got no input")
    arrays = tuple(_array(value, f"{where}: input {position}") for position, value in enumerate(inputs))
    return arrays, _array(raw[1], f"{where}: targets")


def _array(value: Any, what: str) -> Array:
    if not isinstance(value, np.ndarray):
        if not (hasattr(value, "detach") and hasattr(value, "cpu")):
            raise DataError(f"{what} must be a numpy array or a tensor, got {type(value).__name__}: use numpy.asarray")
        try:
            value = value.detach().cpu().numpy()
        except (TypeError, RuntimeError) as problem:
            raise DataError(f"{what} must be a tensor that numpy can hold, and it cannot: {problem}") from None
    array: Array = value
    if array.dtype.name not in DTYPES:
        raise DataError(f"{what} must be one of {', '.join(DTYPES)}, got {array.dtype}")
    if array.ndim == 0 or array.shape[0] == 0:
        raise DataError(f"{what} must hold at least one row in its first dimension, got shape {list(array.shape)}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _infer(inputs: Inputs, where: str) -> tuple[TensorSpec, ...]:
    """What every later batch must look like: the first one's data types and ranks."""
    return tuple(
        TensorSpec(
            name=f"input {position}",
            dtype=array.dtype.name,
            shape=("rows", *(f"{position}.{axis}" for axis in range(1, array.ndim))),
        )
        for position, array in enumerate(inputs)
    )


def _check(batch: Batch, expected: tuple[TensorSpec, ...], where: str) -> None:
    inputs, targets = batch
    if len(inputs) != len(expected):
        names = ", ".join(spec.name for spec in expected)
        raise DataError(f"{where}: the model takes {len(expected)} inputs ({names}), got {len(inputs)}")
    named = {spec.name: array for spec, array in zip(expected, inputs, strict=True)}
    try:
        rows = Signature(inputs=expected, outputs=()).check(named)
    except InvalidInput as problem:
        raise DataError(f"{where}: {problem}{_advice(named, expected)}") from None
    if len(targets) != rows:
        raise DataError(
            f"{where}: inputs and targets must have one row each, got {rows} inputs and {len(targets)} targets"
        )
    if targets.dtype.kind == "f" and not np.isfinite(targets).all():
        raise DataError(f"{where}: targets must be finite, got NaN or infinity: drop or repair such rows in the loader")


def _advice(named: dict[str, Array], expected: tuple[TensorSpec, ...]) -> str:
    for spec in expected:
        if named[spec.name].dtype.name != spec.dtype:
            return f": convert in the loader, such as inputs.astype(numpy.{spec.dtype})"
    if any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in named.values()):
        return ": drop or repair such rows in the loader"
    return ": make the loader yield what the model was built for"


def _size_bytes(raw: Any) -> int:
    if isinstance(raw, tuple | list):
        return sum(_size_bytes(item) for item in raw)
    return int(getattr(raw, "nbytes", 0))
