"""Ranges of the outputs of chosen layers, from forward hooks on an ordinary module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, Literal

import torch
from torch import nn

from fettle.compress.quantize.calibrate._base import Observer
from fettle.core import plugins
from fettle.core.errors import DataError, UsageError

Batch = torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor]
Types = type[nn.Module] | tuple[type[nn.Module], ...]


def collect_ranges(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    types: Types = (nn.Conv2d, nn.Linear),
    observer: str = "histogram_mse",
    levels: int = 256,
    limit: int = 100,
    unreached: Literal["error", "omit"] = "error",
) -> dict[str, tuple[float, float]]:
    """The range of the output of every layer of the chosen types, by the layer's name, over at most `limit` batches.

    batches: inputs without targets, a tensor or a tuple of them each, on the model's device; read lazily, and no
        further than the limit. Sizes and shapes may differ from batch to batch. Memory does not depend on their number.
    types: module types, subclasses included. A layer used several times, or held under several names, is one layer
        under its first name; of several outputs the first tensor counts; the model itself is named "".
    observer: a file name in `calibrate/`; levels: of the integers that the ranges are for.
    unreached: what to do about a layer that no batch passes through, such as an auxiliary head, or the projection
        inside `nn.MultiheadAttention`, whose weight torch reads without calling it: "error", or "omit" it from the
        result.

    The model runs in evaluation mode without gradients. Its hooks and training flags are afterwards as they were,
    after an error too.

    Raises UsageError where the model holds no such layer, and DataError for an empty set, for NaN or infinity naming
    batch and layer, for a batch that the model refuses, and for a layer never reached.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> ranges = collect_ranges(model, [torch.ones(8, 3), torch.zeros(1, 3)], types=nn.ReLU, observer="min_max")
    >>> list(ranges), ranges["1"][0]
    (['1'], 0.0)
    """
    if limit < 1:
        raise UsageError(f"limit must be at least 1 batch, got {limit}")
    if unreached not in ("error", "omit"):
        raise UsageError(f"unreached must be 'error' or 'omit', got {unreached!r}")
    kind = plugins.load("fettle.compress.quantize.calibrate", observer, Observer)
    watchers = [_Watcher(name, kind(levels)) for name in _layers(model, types)]
    count = 0
    with _watching(model, watchers), torch.no_grad():
        for batch in islice(batches, limit):
            _run(model, batch, count)
            count += 1
    if count == 0:
        raise DataError("the calibration set must hold at least one batch, got none")
    missed = [watcher.name for watcher in watchers if not watcher.reached]
    if missed and unreached == "error":
        raise DataError(
            f"every chosen layer must see a value, got none in {count} batches for: {', '.join(missed)}. "
            "Calibrate with batches that pass through them, or leave them out by unreached='omit'"
        )
    return {watcher.name: watcher.observer.range() for watcher in watchers if watcher.reached}


class _Watcher:
    """A forward hook that shows one layer's output to its observer."""

    def __init__(self, name: str, observer: Observer) -> None:
        self.name = name
        self.observer = observer
        self.reached = False

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        values = _first_tensor(output)
        if values is None or values.is_complex():
            got = "no tensor" if values is None else f"{values.dtype}"
            raise DataError(f"the output of layer '{self.name}' must hold a real tensor, got {got}: choose other types")
        try:
            self.observer.update(values)
        except DataError as problem:
            raise DataError(f"the output of layer '{self.name}': {problem}") from None
        self.reached = self.reached or values.numel() > 0


def _first_tensor(output: Any) -> torch.Tensor | None:
    """Depth first through tuples, lists and dictionaries."""
    if isinstance(output, torch.Tensor):
        return output
    items = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return next((found for item in items if (found := _first_tensor(item)) is not None), None)


def _layers(model: nn.Module, types: Types) -> list[str]:
    """Names of the layers of these types, in the model's order. Raises UsageError where there is none."""
    wanted = types if isinstance(types, tuple) else (types,)
    if not wanted or not all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in wanted):
        raise UsageError(f"types must be one or more subclasses of torch.nn.Module, got {types!r}")
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, wanted)]
    if not names:
        held = sorted({type(module).__name__ for module in modules.values()})
        asked = ", ".join(kind.__name__ for kind in wanted)
        raise UsageError(f"types must name layers that the model has, got {asked}; it holds {', '.join(held)}")
    return names


@contextmanager
def _watching(model: nn.Module, watchers: list[_Watcher]) -> Iterator[None]:
    """Hooks in place and the model in evaluation mode; afterwards both as they were."""
    training = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        stack.callback(_restore, training)
        for watcher in watchers:
            handle = model.get_submodule(watcher.name).register_forward_hook(watcher)
            stack.callback(handle.remove)
        # Not model.eval(), which a model may override.
        for module in training:
            module.training = False
        yield


def _restore(training: dict[nn.Module, bool]) -> None:
    for module, flag in training.items():
        module.training = flag


def _run(model: nn.Module, batch: Batch, index: int) -> None:
    """One batch through the model, whose errors are told with the batch's number."""
    inputs = (batch,) if isinstance(batch, torch.Tensor) else batch
    if not isinstance(inputs, tuple | list) or not all(isinstance(value, torch.Tensor) for value in inputs):
        got = type(batch).__name__
        raise DataError(f"batch {index}: calibration batches must be a tensor or a tuple of tensors, got {got}")
    try:
        model(*inputs)
    except DataError as problem:
        raise DataError(f"batch {index}, {problem}") from None
    except Exception as problem:
        raise DataError(
            f"batch {index}: the model raised {type(problem).__name__}: {problem}. "
            "A batch must hold the model's inputs alone, without targets, on the model's device"
        ) from problem
