"""Batches on their way into a model: checked before it sees them, and for training put on its device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fettle.compress.step import Tensors
from fettle.core.errors import DataError, FettleError


def input_batches(batches: Iterable[Any], example: Tensors) -> Iterator[Tensors]:
    """Batches of inputs without targets, each as many tensors as the example; a bare tensor stands for one input.

    Raises DataError naming the batch for anything else: unpacked as it is, a tensor's rows would pass for inputs.

    >>> x = torch.zeros(2, 3)
    >>> [len(batch) for batch in input_batches([x, (x,), [x]], (x,))]
    [1, 1, 1]
    >>> list(input_batches([(x, torch.tensor([0, 1]))], (x,)))
    Traceback (most recent call last):
    fettle.core.errors.DataError: calibration batch 0 must be a tuple of the model's inputs, 1 tensor and no targets, \
got 2 items
    """
    for index, raw in enumerate(batches):
        batch = (raw,) if isinstance(raw, torch.Tensor) else raw
        listed = isinstance(batch, tuple | list)
        if not listed or len(batch) != len(example) or not all(isinstance(value, torch.Tensor) for value in batch):
            wanted = f"{len(example)} tensor{'s' if len(example) != 1 else ''}"
            got = f"{len(batch)} item{'s' if len(batch) != 1 else ''}" if listed else type(raw).__name__
            raise DataError(
                f"calibration batch {index} must be a tuple of the model's inputs, {wanted} and no targets, got {got}"
            )
        yield tuple(batch)


def checked_batches(
    batches: Iterable[Any], example: Tensors, device: torch.device, *, where: str
) -> Iterator[tuple[Tensors, torch.Tensor]]:
    """The batches on the device, each like the example in number, types and shapes of its inputs, and finite.

    batches: pairs ((input, ...), targets) of tensors. where: such as "epoch 1", for messages. Raises DataError naming
    the batch for anything else, and for a loader that raises.

    >>> x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    >>> [(inputs, targets)] = checked_batches([((x,), y)], (x[:1],), torch.device("cpu"), where="epoch 1")
    >>> list(checked_batches([(x, y)], (x[:1],), torch.device("cpu"), where="epoch 1"))
    Traceback (most recent call last):
    fettle.core.errors.DataError: epoch 1, batch 0: a batch must be a pair ((input, ...), targets) of tensors, \
got a bare tensor for the inputs: wrap it as (tensor,)
    """
    rows = iter(batches)
    index = 0
    while True:
        at = f"{where}, batch {index}"
        try:
            raw = next(rows)
        except StopIteration:
            return
        except FettleError:
            raise
        except Exception as problem:
            raise DataError(f"{at}: the loader raised {type(problem).__name__}: {problem}") from problem
        inputs, targets = _pair(raw, at)
        if len(inputs) != len(example):
            raise DataError(f"{at}: the model takes {len(example)} inputs, got {len(inputs)}")
        for position, (tensor, pattern) in enumerate(zip(inputs, example, strict=True)):
            _check_input(tensor, pattern, f"{at}: input {position}")
        if targets.ndim == 0 or len({len(targets), *(len(tensor) for tensor in inputs)}) > 1:
            sizes = [list(tensor.shape) for tensor in (*inputs, targets)]
            raise DataError(f"{at}: inputs and targets must share dimension 0, got shapes {sizes}")
        yield tuple(tensor.to(device) for tensor in inputs), targets.to(device)
        index += 1


def _pair(raw: Any, where: str) -> tuple[Tensors, torch.Tensor]:
    rule = f"{where}: a batch must be a pair ((input, ...), targets) of tensors"
    if not isinstance(raw, tuple | list) or len(raw) != 2:
        got = f"{len(raw)} items" if isinstance(raw, tuple | list) else type(raw).__name__
        raise DataError(f"{rule}, got {got}")
    inputs, targets = raw
    if isinstance(inputs, torch.Tensor):
        raise DataError(f"{rule}, got a bare tensor for the inputs: wrap it as (tensor,)")
    if not isinstance(inputs, tuple | list) or not all(isinstance(value, torch.Tensor) for value in (*inputs, targets)):
        kinds = [
            type(value).__name__ for value in (*(inputs if isinstance(inputs, tuple | list) else [inputs]), targets)
        ]
        raise DataError(f"{rule}, got {', '.join(kinds)}")
    return tuple(inputs), targets


def _check_input(tensor: torch.Tensor, pattern: torch.Tensor, what: str) -> None:
    if tensor.dtype != pattern.dtype or tensor.shape[1:] != pattern.shape[1:] or tensor.ndim != pattern.ndim:
        raise DataError(
            f"{what} must be like the example, {pattern.dtype} of shape {['rows', *pattern.shape[1:]]}, "
            f"got {tensor.dtype} of shape {list(tensor.shape)}"
        )
    if not len(tensor):
        raise DataError(f"{what} must hold at least one row, got none")
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise DataError(f"{what} must be finite, got NaN or infinity: drop or repair such rows in the loader")
