"""Carry out the steps of a recipe on a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fettle.compress.capture import quiet
from fettle.compress.step import Context, Step
from fettle.core import plugins
from fettle.core.data import Inputs
from fettle.core.errors import UsageError
from fettle.core.recipe import StepSpec
from fettle.core.signature import Array
from fettle.evaluate.metric import measure_metric
from fettle.stages.task import Task, as_tensors, outputs_of


def carry_out(
    task: Task,
    steps: Sequence[Step],
    model: torch.nn.Module,
    *,
    seed: int,
    note: Callable[[str], None] = lambda sentence: None,
    progress: Callable[[float], None] = lambda share: None,
) -> torch.nn.Module:
    """Apply the steps in order; `progress` is told the share of them that is done. Raises what they raise."""
    for index, step in enumerate(steps):
        context = Context(
            example=task.example,
            calibration=task.calibration_batches(),
            train=task.labelled_batches if task.calibration is not task.validation else None,
            score=lambda model: simulated_metric(task, model),
            checkpoint=task.checkpoints,
            seed=seed,
            note=note,
            progress=lambda share, index=index: progress((index + share) / len(steps)),  # type: ignore[misc]
        )
        model = step.apply(model, context)
    return model


def simulated_metric(task: Task, model: torch.nn.Module) -> float:
    """The metric of a simulation, over the validation split."""

    def answer(inputs: Inputs) -> Array:
        with torch.no_grad(), quiet():
            return outputs_of(model(*as_tensors(inputs)))

    measured, _ = measure_metric(answer, task.validation, task.metric, seed=task.seed)
    return measured.value


def check_order(steps: Sequence[Step]) -> None:
    """Raise UsageError where a step lacks the one that must have come before it."""
    for index, step in enumerate(steps):
        before = [earlier.step_name() for earlier in steps[:index]]
        if step.follows and step.follows not in before:
            raise UsageError(
                f"{step.step_name()} must come after {step.follows} in a recipe, got {', '.join(before) or 'nothing'} "
                "before it"
            )


def load_step(spec: StepSpec) -> Step:
    """The step of that name, such as "quantize.post_training", with these parameters. Raises UsageError."""
    package, _, name = spec.name.rpartition(".")
    step = plugins.load(f"fettle.compress.{package}", name, Step).from_spec(spec)
    assert isinstance(step, Step)
    return step


def precision_of(steps: Sequence[Step]) -> str:
    """What the result of these steps runs at."""
    for step in reversed(steps):
        if step.precision:
            return step.precision
    return "float"
