"""What is to be optimized, in one value: the model, the data, the metric, the wishes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fettle.compress.capture import export_program
from fettle.compress.step import Tensors
from fettle.core.data import Split
from fettle.core.errors import CaptureError
from fettle.core.recipe import Budget
from fettle.core.signature import Array, ImagePreprocess, Signature, TensorSpec
from fettle.evaluate.metric import Metric, find_metric

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One job for the optimizer. `calibration` is training data where there is some, else validation data."""

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

    def calibration_batches(self) -> Iterable[Tensors]:
        """Inputs only, as tensors."""
        for inputs, _ in self.calibration:
            yield tuple(torch.from_numpy(array) for array in inputs)


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
    """Capture the model once and check what can be checked before any work starts.

    Raises CaptureError, DataError, UsageError.
    """
    example = example if isinstance(example, tuple) else (example,)
    program = export_program(model, example)
    signature = signature_of(program, classes=classes, image=image)
    calibration = sources.train if sources.train is not None else sources.validation
    return Task(
        model=model,
        example=example,
        program=program,
        signature=signature,
        validation=Split("validation", sources.validation, signature_inputs=signature.inputs),
        test=None if sources.test is None else Split("test", sources.test, signature_inputs=signature.inputs),
        calibration=Split("calibration", calibration, signature_inputs=signature.inputs, shuffled=True),
        metric=find_metric(metric),
        **wishes,
    )


def signature_of(
    program: torch.export.ExportedProgram, *, classes: tuple[str, ...] = (), image: ImagePreprocess | None = None
) -> Signature:
    """Names from forward's parameters, shapes with the free dimension "batch"."""
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
        raise CaptureError(f"image preprocessing gives {['batch', *image.shape]}, but the model takes {shape}")
    if classes and outputs[0].shape[1:] != (len(classes),):
        raise CaptureError(f"the task names {len(classes)} classes, but the output has shape {list(outputs[0].shape)}")
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
