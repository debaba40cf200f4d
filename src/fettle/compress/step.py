"""What every compression method is: a frozen dataclass whose fields are its hyper-parameters."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch

from fettle.core import codec
from fettle.core.recipe import StepSpec

Tensors = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a step may use besides the model and its own fields.

    example: example inputs, batch first.
    calibration: batches of inputs, read once; only the steps that need data read it.
    train: called for each pass, returns batches of (inputs, targets); only the steps that train need it. Called with
        torch's global generator seeded for that pass, so a loader that shuffles by it shuffles alike after a kill.
    score: of a model, such as its accuracy on validation data, higher is better. The model takes and gives tensors
        on the CPU wherever it runs.
    device: that training runs on: "cpu", "cuda", "cuda:1", or "auto", the first GPU where there is one.
    checkpoint: a folder in which training leaves its state, so that the same work can go on after a kill.
    seed: of everything random in the step.
    note: called with one sentence for each thing the reader of the report should know.
    progress: called with the share of the step that is done, 0 to 1.
    """

    example: Tensors
    calibration: Iterable[Tensors] = ()
    train: Callable[[], Iterable[tuple[Tensors, torch.Tensor]]] | None = None
    score: Callable[[torch.nn.Module], float] | None = None
    device: str = "auto"
    checkpoint: Path | None = None
    seed: int = 0
    note: Callable[[str], None] = lambda sentence: None
    progress: Callable[[float], None] = lambda share: None


class Step(ABC):
    """One compression method. `apply` returns a new module and leaves the given one as it was.

    precision: what the result runs at ("int8"), or "" where the step does not change it.
    shrinks: the kinds of layer whose weights it makes smaller in the file; none for a step that corrects.
    follows: the step that must have come before, by name, or "".
    """

    precision: ClassVar[str] = ""
    follows: ClassVar[str] = ""
    shrinks: ClassVar[frozenset[str]] = frozenset({"convolution", "linear"})

    @abstractmethod
    def apply(self, model: torch.nn.Module, context: Context) -> torch.nn.Module:
        """The compressed model; same inputs and outputs. Deterministic under `context.seed`."""

    @classmethod
    def step_name(cls) -> str:
        """The name in a recipe, from the file: "quantize.post_training"."""
        return cls.__module__.removeprefix("fettle.compress.")

    def spec(self) -> StepSpec:
        """This step as data."""
        return StepSpec(name=self.step_name(), parameters=codec.to_json(self))

    @classmethod
    def from_spec(cls, spec: StepSpec) -> Any:
        """The step that `spec` describes. Raises UsageError for unknown or ill-typed parameters."""
        return codec.from_json(cls, spec.parameters, where=f"step '{spec.name}'")
