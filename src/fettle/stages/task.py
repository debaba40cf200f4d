"""What is to be optimized, in one value: the model, the data, the metric, the wishes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from fettle.compress.capture import export_program, quiet, two_rows
from fettle.compress.step import Tensors
from fettle.core.data import Inputs, Split
from fettle.core.errors import CaptureError, DataError, UsageError
from fettle.core.recipe import Budget
from fettle.core.signature import Array, ImagePreprocess, Signature, TensorSpec
from fettle.evaluate.metric import Metric, find_metric

Progress = Callable[[str, float], None]


class Misfit(UsageError):
    """An argument that cannot be used, or does not fit the others; `argument` is its name in `optimize`."""

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(message)
        self.argument = argument


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One job for the optimizer.

    calibration: the training split where there is one, else `validation` itself. checkpoints: a folder for the state
    of steps that train, so that a run that was killed goes on.
    """

    name: str
    model: torch.nn.Module
    example: Tensors
    program: torch.export.ExportedProgram
    signature: Signature
    validation: Split
    test: Split | None
    calibration: Split
    metric: Metric
    budget: Budget
    seed: int
    threads: int
    batch: int
    progress: Progress
    checkpoints: Path | None = None

    def labelled_batches(self) -> Iterable[tuple[Tensors, torch.Tensor]]:
        """The training split as tensors, for steps that train."""
        for inputs, targets in self.calibration:
            (wanted,) = as_tensors((targets,))
            yield as_tensors(inputs), wanted

    def calibration_batches(self) -> Iterable[Tensors]:
        """Inputs only, as tensors."""
        return (as_tensors(inputs) for inputs, _ in self.calibration)

    def leading_rows(self, rows: int) -> Inputs:
        """At most the first `rows` rows of the validation split, input by input."""
        parts: list[Inputs] = []
        for inputs, _ in self.validation:
            parts.append(inputs)
            if sum(len(part[0]) for part in parts) >= rows:
                break
        return tuple(np.concatenate(columns)[:rows] for columns in zip(*parts, strict=True))


def as_tensors(arrays: Iterable[Array]) -> Tensors:
    """The arrays as torch takes them: not mirrored, not read-only; only such an array is copied here."""
    return tuple(torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The user's loaders: each an iterable of (inputs, targets) batches, or a callable that returns one."""

    validation: Any
    train: Any = None
    test: Any = None


def make_task(
    model: torch.nn.Module,
    example: Tensors,
    sources: Sources,
    *,
    metric: str | Callable[[Array, Array], float],
    classes: tuple[str, ...],
    image: ImagePreprocess | None,
    **wishes: Any,
) -> Task:
    """Capture the model once and check what can be checked before any work starts; the training data is read once.

    Raises CaptureError, DataError, and Misfit for an argument that does not fit.
    """
    _check_numbers(**{key: wishes[key] for key in ("seed", "threads", "batch")})
    chosen = _chosen_metric(metric)
    example = example if isinstance(example, tuple) else (example,)
    program = _captured(model, example)
    signature = signature_of(program, classes=classes, image=image)
    validation = Split("validation", sources.validation, signature_inputs=signature.inputs)
    calibration = validation  # one Split for one loader: two would share, and exhaust, a one-shot iterator
    if sources.train is not None and sources.train is not sources.validation:
        calibration = Split("train", sources.train, signature_inputs=signature.inputs, shuffled=True)
        _ = calibration.rows  # a bad training loader is an error of the run, not of one candidate
    return Task(
        model=model,
        example=example,
        program=program,
        signature=signature,
        validation=validation,
        test=None if sources.test is None else Split("test", sources.test, signature_inputs=signature.inputs),
        calibration=calibration,
        metric=chosen,
        **wishes,
    )


def _check_numbers(*, seed: int, threads: int, batch: int) -> None:
    for name, value, least in (("seed", seed, 0), ("threads", threads, 1), ("batch", batch, 1)):
        if value < least:
            raise Misfit(name, f"{name} must be at least {least}, got {value}")


def _chosen_metric(metric: str | Callable[[Array, Array], float]) -> Metric:
    try:
        chosen = find_metric(metric)
    except UsageError as problem:
        raise Misfit("metric", str(problem)) from None
    if chosen.direction == "lower":
        raise Misfit(
            "metric",
            f"a budget keeps a metric from falling, so higher must be better, got '{chosen.name}': "
            'use "r2", or a function that returns the negative',
        )
    return chosen


def _captured(model: torch.nn.Module, example: Tensors) -> torch.export.ExportedProgram:
    if not isinstance(model, torch.nn.Module):
        raise Misfit("model", f"the model must be a torch.nn.Module, got {type(model).__name__}")
    try:
        inputs = two_rows(example)
    except DataError as problem:
        raise Misfit("example", str(problem)) from None
    _check_example(model, inputs, example)
    return export_program(model, inputs)


def _check_example(model: torch.nn.Module, inputs: Tensors, example: Tensors) -> None:
    """Run the model once: torch.export would blame the capture for a wrong example, or even let it pass."""
    still = model if not any(module.training for module in model.modules()) else copy.deepcopy(model).eval()
    with torch.no_grad(), quiet():
        try:
            still(*inputs)
        except Exception as problem:
            shapes = ", ".join(f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in example)
            first = next(iter(str(problem).strip().splitlines()), "no message")
            raise Misfit(
                "example",
                f"the model must run on its example inputs, got {shapes}, on which {type(model).__name__} raised "
                f"{type(problem).__name__}: {first}",
            ) from problem


def signature_of(
    program: torch.export.ExportedProgram, *, classes: tuple[str, ...] = (), image: ImagePreprocess | None = None
) -> Signature:
    """Names from forward's parameters, shapes with the free dimension "batch". Raises CaptureError, Misfit."""
    nodes = {node.name: node for node in program.graph.nodes}
    inputs = tuple(_spec(name, nodes[name].meta["val"]) for name in program.graph_signature.user_inputs)
    values = [nodes[name].meta["val"] if name in nodes else None for name in program.graph_signature.user_outputs]
    taken = {spec.name for spec in inputs}
    outputs = []
    for index, value in enumerate(values):
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            raise CaptureError(
                f"output {index} of the model must be a tensor with a row for each input row, got {value}"
            )
        name = "output" if len(values) == 1 else f"output_{index}"
        spec = _spec(name if name not in taken else f"{name}_", value)
        if spec.shape[0] != "batch":
            raise CaptureError(f"output {index} must have a row for each input row, got shape {list(spec.shape)}")
        outputs.append(spec)
    if image is not None and (len(inputs) != 1 or inputs[0].shape != ("batch", *image.shape)):
        shape = [list(spec.shape) for spec in inputs]
        raise Misfit(
            "image", f"image preprocessing must give what the model takes, {shape}, got {['batch', *image.shape]}"
        )
    if classes and outputs[0].shape[1:] != (len(classes),):
        raise Misfit(
            "classes", f"one class must be named for each score, got {len(classes)} for {list(outputs[0].shape)}"
        )
    return Signature(inputs=inputs, outputs=tuple(outputs), classes=classes, image=image)


def _spec(name: str, value: torch.Tensor) -> TensorSpec:
    free: dict[str, str] = {}
    shape: list[int | str] = []
    for size in value.shape:
        if isinstance(size, int):
            shape.append(size)
        else:
            shape.append(free.setdefault(str(size), "batch" if not shape else f"size_{len(shape)}"))
    return TensorSpec(name=str(name), dtype=str(value.dtype).removeprefix("torch."), shape=tuple(shape))


def outputs_of(value: Any) -> Array:
    """The first tensor of what a model returns, as an array."""
    first: torch.Tensor = pytree.tree_leaves(value)[0]
    return first.detach().cpu().numpy()
