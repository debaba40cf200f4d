"""Which corrections bring int8 nearer to the float model: each is tried on validation rows and kept where it helps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from fettle.compress.capture import capture
from fettle.compress.quantize.adaround import AdaRound
from fettle.compress.quantize.bias_correction import BiasCorrection
from fettle.compress.quantize.cross_layer_equalization import CrossLayerEqualization
from fettle.compress.quantize.post_training import PostTraining
from fettle.compress.quantize.smooth_quant import SmoothQuant
from fettle.compress.step import Step
from fettle.core.recipe import Recipe
from fettle.core.signature import Array
from fettle.stages.judge import Judge, helps
from fettle.stages.ranges import choose_observer
from fettle.stages.steps import carry_out
from fettle.stages.task import Task

# Alternatives of one kind: the first that finds something to do is judged. ReLU6 lets no scale pass; relaxed, it is
# another function, a little.
_BEFORE: tuple[tuple[Step, ...], ...] = (
    (CrossLayerEqualization(), CrossLayerEqualization(relax_clips=True)),
    (SmoothQuant(alpha=0.75),),
)
_AFTER: tuple[tuple[Step, ...], ...] = ((AdaRound(),), (BiasCorrection(),))


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrected:
    """The recipe that was found, its model, what the steps noted, and a sentence for each correction tried."""

    recipe: Recipe
    model: torch.nn.Module
    notes: tuple[str, ...]
    decisions: tuple[str, ...]


def find_corrections(
    task: Task,
    base: PostTraining,
    *,
    name: str = "int8",
    limit_s: float | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Corrected:
    """Greedy: the observer of ranges, then what changes the float model, then what changes the quantized one.

    Judged by the divergence from the float model's answers, which tells two quantizers apart where accuracy cannot.
    No correction is begun after `limit_s` seconds.
    """
    start, judge = time.monotonic(), Judge(task)

    def proceed() -> bool:
        return limit_s is None or time.monotonic() - start <= limit_s

    search = _Search(task, judge, source=capture(task.model, task.example))
    base, search.decisions = choose_observer(task, judge, search.source, base, proceed=proceed)
    search.accept((base,))
    tried = [*_BEFORE, *_AFTER]
    for index, alternatives in enumerate(tried):
        progress((index + 1) / (len(tried) + 1))
        if not proceed():
            search.decisions.append(f"{_title(alternatives[0])}: not tried, the time limit was near")
            continue
        for step in alternatives:
            if search.consider(step, before=alternatives in _BEFORE):
                break
    steps = tuple(step.spec() for step in (*search.before, *search.steps))
    return Corrected(
        recipe=Recipe(name=name, steps=steps, budget=task.budget, seed=task.seed),
        model=search.model,
        notes=tuple(search.notes),
        decisions=tuple(search.decisions),
    )


@dataclass(slots=True)
class _Search:
    """The best so far: steps on the float model, the model they give, the steps that quantize it, and what results."""

    task: Task
    judge: Judge
    source: torch.nn.Module
    before: tuple[Step, ...] = ()
    steps: tuple[Step, ...] = ()
    model: torch.nn.Module = field(default_factory=torch.nn.Identity)
    distance: Array = field(default_factory=lambda: np.empty(0))
    notes: list[str] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)

    def accept(self, steps: tuple[Step, ...]) -> None:
        """Take these steps as they are; what they note is kept."""
        self.model = self._carry_out(steps, self.source, self.notes)
        self.steps, self.distance = steps, self.judge.divergence(self.model)

    def consider(self, step: Step, *, before: bool) -> bool:
        """Keep the step where it helps; one that fails is named and left out. False where it found nothing to do."""
        said: list[str] = []
        try:
            if before:
                source = self._carry_out((step,), self.source, said)
                if any("nothing to" in note for note in said):
                    return False
                model = self._carry_out(self.steps, source, said)
            else:
                source, model = self.source, self._carry_out((step,), self.model, said)
            distance = self.judge.divergence(model)
        except Exception as problem:
            self.decisions.append(f"{_title(step)}: left out, it failed: {problem}")
            return True
        kept = helps(self.distance, distance)
        self.decisions.append(
            f"{_title(step)}: {'kept' if kept else 'tried and left out'}, divergence from float "
            f"{self.distance.mean():.2g} before and {distance.mean():.2g} after, on {len(distance)} validation rows"
        )
        if kept:
            self.decisions += [note for note in said if note not in self.notes]
            self.before, self.steps = (
                ((*self.before, step), self.steps) if before else (self.before, (*self.steps, step))
            )
            self.source, self.model, self.distance = source, model, distance
        return True

    def _carry_out(self, steps: tuple[Step, ...], model: torch.nn.Module, said: list[str]) -> torch.nn.Module:
        return carry_out(self.task, steps, model, seed=self.task.seed, note=said.append)


def _title(step: Step) -> str:
    """ "quantize.bias_correction" -> "bias correction"."""
    return step.step_name().rpartition(".")[2].replace("_", " ")
