"""Try every recipe in every runtime: a failed candidate is named and does not stop the run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fettle.compress.quantize.post_training import PostTraining
from fettle.core import plugins
from fettle.core.recipe import Recipe
from fettle.core.report import Report
from fettle.core.runner import RuntimeBase
from fettle.evaluate.comparison import Candidate
from fettle.stages.build import Built, Prepared, build, load_step, prepare, with_activation
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
    float_recipe, *others = recipes(task)
    start, tried = time.monotonic(), Tried()
    task.progress(BASELINE, 0.0)
    original = prepare(task, float_recipe)
    first = build(task, original, "eager", root=root / "float-eager", parent="", signature=task.signature)
    classification = is_classification(task.metric.name, task.signature.classes)
    signature = with_activation(task.signature, first.outputs, classification=classification)
    baseline = build(task, original, "eager", root=root / "float-eager", parent="", signature=signature)
    tried.built[BASELINE] = baseline
    # Compressed candidates before float ones: where time runs out, they are what the user came for.
    plan = [(recipe, name) for recipe in (*others, float_recipe) for name in _runtimes_for(recipe, runtimes)]
    prepared: dict[str, Prepared] = {float_recipe.name: original}
    for index, (recipe, name) in enumerate(plan):
        label, precision = f"{recipe.name} in {name}", _precision(recipe)
        if _is_over(task, start):
            tried.fail(label, precision, name, f"not tried: the time limit of {task.budget.time_limit} was reached")
            continue
        # Timing and final figures are the last tenth; the baseline was about one candidate's work.
        done, whole = 0.9 * (index + 1) / (len(plan) + 1), 0.9 / (len(plan) + 1)
        task.progress(label, done)
        try:
            if recipe.name not in prepared:
                within = partial(_report_share, task, label, done, whole)
                prepared[recipe.name] = prepare(task, recipe, progress=within)
                tried.notes += prepared[recipe.name].notes
            tried.built[label] = build(
                task,
                prepared[recipe.name],
                name,
                root=root / f"{recipe.name}-{name}",
                parent=baseline.artifact.digest,
                signature=signature,
            )
        except Exception as problem:
            tried.fail(label, precision, name, first_line(problem))
    return tried


def _runtimes_for(recipe: Recipe, wanted: Sequence[str]) -> list[str]:
    """Installed runtimes that really execute the recipe's precision; eager float is the baseline already."""
    installed = plugins.installed("fettle.runtime", RuntimeBase)
    names = list(wanted) or [name for name, runtime in installed.items() if runtime.computes]
    precision = _precision(recipe)
    return [
        name
        for name in names
        if precision in plugins.load("fettle.runtime", name, RuntimeBase).precisions
        and (name, precision) != ("eager", "float")
    ]


def _precision(recipe: Recipe) -> str:
    for spec in reversed(recipe.steps):
        if precision := type(load_step(spec)).precision:
            return precision
    return "float"


def _is_over(task: Task, start: float) -> bool:
    limit_s = task.budget.time_limit_s
    return limit_s is not None and time.monotonic() - start > limit_s


def _report_share(task: Task, label: str, done: float, whole: float, share: float) -> None:
    task.progress(label, done + whole * share * 0.8)
