"""How the ranges of activations are found: the observer whose rounding validation rows mind least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fettle.compress.quantize.graph.simulate import Simulated
from fettle.compress.quantize.graph.trainable import unrounded
from fettle.compress.quantize.post_training import PostTraining
from fettle.stages.judge import Judge, helps
from fettle.stages.steps import carry_out
from fettle.stages.task import Task

# Which is best differs from model to model: squared error counts every value alike, a percentile lets the rarest go.
_OTHERS = ("percentile",)


def choose_observer(
    task: Task, judge: Judge, source: torch.nn.Module, base: PostTraining, *, proceed: Callable[[], bool]
) -> tuple[PostTraining, list[str]]:
    """The step with the observer that comes nearest to float, and a sentence for each other one that was tried.

    Judged with weights unrounded: their error, which adaptive rounding will take away, would drown the difference.
    proceed: whether there is time for one more. Raises what the step raises with its own observer.
    """

    def distance(step: PostTraining) -> Any:
        model = carry_out(task, (step,), source, seed=task.seed)
        assert isinstance(model, Simulated)
        return judge.divergence(unrounded(model, activations=False))

    best, sentences = distance(base), []
    for name in _OTHERS:
        if name == base.observer:
            continue
        title = f"ranges by {name.replace('_', ' ')}"
        if not proceed():
            sentences.append(f"{title}: not tried, the time limit was near")
            continue
        other = replace(base, observer=name)
        found = distance(other)
        kept = helps(best, found)
        sentences.append(
            f"{title}: {'kept' if kept else 'tried and left out'}, divergence from float with weights unrounded "
            f"{best.mean():.2g} before and {found.mean():.2g} after, on {len(found)} validation rows"
        )
        if kept:
            base, best = other, found
    return base, sentences
