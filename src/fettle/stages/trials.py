"""Try every recipe in every runtime: a failed candidate is named and does not stop the run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fettle.compress.quantize.post_training import PostTraining
from fettle.core import plugins
from fettle.core.recipe import Recipe
from fettle.core.report import Report
from fettle.core.runner import RuntimeBase
from fettle.evaluate.comparison import Candidate
from fettle.stages.build import Built, Prepared, build, prepare, with_activation
from fettle.stages.measure import first_line, is_classification
from fettle.stages.task import Task

BASELINE = "float in eager"


@dataclass(slots=True)
class Tried:
    """What came of all candidates: those built, by label, and those that failed, with the reason."""

    built: dict[str, Built] = field(default_factory=dict)
    failed: list[Candidate] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def fail(self, label: str, precision: str, runtime: str, reason: str) -> None:
        """Note a candidate that could not be had."""
        empty = Report(subject="")
        self.failed.append(
            Candidate(
                label=label, digest="", runtime=runtime, precision=precision, steps=(), report=empty, failure=reason
            )
        )


def recipes(task: Task) -> tuple[Recipe, ...]:
    """What is tried on the model, the untouched one first."""
    return (
        Recipe(name="float", budget=task.budget, seed=task.seed),
        Recipe(name="int8", steps=(PostTraining().spec(),), budget=task.budget, seed=task.seed),
    )


def try_all(task: Task, root: Path, *, runtimes: Sequence[str] = ()) -> Tried:
    """Build the baseline first (its failure is raised), then every other recipe in every installed runtime.

    runtimes: names to use besides eager; empty for all that are installed and compute.
    """
    installed = plugins.installed("fettle.runtime", RuntimeBase)
    names = list(runtimes) or [name for name, runtime in installed.items() if runtime.computes]
    limit_s, start = task.budget.time_limit_s, time.monotonic()
    float_recipe, *others = recipes(task)
    tried = Tried()
    task.progress(BASELINE, 0.0)
    original = prepare(task, float_recipe)
    first = build(task, original, "eager", root=root / "draft", parent="", signature=task.signature)
    classification = is_classification(task.metric.name, task.signature.classes)
    signature = with_activation(task.signature, first.outputs, classification=classification)
    baseline = build(task, original, "eager", root=root / "float-eager", parent="", signature=signature)
    tried.built[BASELINE] = baseline
    # Compressed candidates before float ones: where time runs out, they are what the user came for.
    for recipe in (*others, float_recipe):
        prepared: Prepared | None = None
        for name in names:
            precision = "int8" if recipe.steps else "float"
            if precision not in plugins.load("fettle.runtime", name, RuntimeBase).precisions or (
                recipe is float_recipe and name == "eager"
            ):
                continue
            label = f"{recipe.name} in {name}"
            if limit_s is not None and time.monotonic() - start > limit_s:
                tried.fail(label, precision, name, f"not tried: the time limit of {task.budget.time_limit} was reached")
                continue
            task.progress(label, 0.0)
            try:
                prepared = prepared or (original if recipe is float_recipe else prepare(task, recipe))
                folder = root / f"{recipe.name}-{name}"
                parent = baseline.artifact.digest
                tried.built[label] = build(task, prepared, name, root=folder, parent=parent, signature=signature)
                tried.notes = tried.notes or prepared.notes
            except Exception as problem:
                tried.fail(label, precision, name, first_line(problem))
    return tried
