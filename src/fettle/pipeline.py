"""The one file that knows the order of the stages: capture, compress, measure, choose, register, report.

    model -> recipe -> artifact -> report -> version

Each stage is a room of its own and calls none of the others; they exchange the values of `fettle.core`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from fettle.core.home import Home
from fettle.core.machine import describe_hardware, describe_versions
from fettle.core.names import check_name
from fettle.core.project import Project
from fettle.core.recipe import Budget
from fettle.core.signature import ImagePreprocess
from fettle.evaluate.choose import choose, describe, describe_precision, shortfall
from fettle.evaluate.comparison import Comparison, SplitUse
from fettle.evaluate.html import write_html
from fettle.evaluate.pareto import front_of
from fettle.registry import Registry
from fettle.stages.measure import Trial, final, measure
from fettle.stages.task import Progress, Sources, Task, make_task
from fettle.stages.trials import BASELINE, try_all


class Wishes(TypedDict, total=False):
    """The optional keywords of `optimize`; see there."""

    name: str
    classes: tuple[str, ...]
    image: ImagePreprocess | None
    seed: int
    threads: int
    batch: int
    runtimes: tuple[str, ...]
    home: Path | str | None
    register: bool
    progress: Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What `optimize` found. `best` and `baseline` are measured on the test split where there is one.

    candidates: all that could be built and timed, on the validation split; front: the Pareto-optimal ones of metric,
    latency and size. report: path of `report.html`. comparison: the same as one value, with the sentences.
    """

    best: Trial
    baseline: Trial
    candidates: tuple[Trial, ...]
    front: tuple[Trial, ...]
    comparison: Comparison
    report: Path

    @property
    def met_floor(self) -> bool:
        """Whether the best keeps the budget."""
        return self.comparison.met_floor

    def to_json(self) -> dict[str, Any]:
        """What `fettle optimize --json` prints."""
        return self.comparison.to_json()


def optimize(
    model: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    *,
    validation: Any,
    train: Any = None,
    test: Any = None,
    metric: str | Callable[..., float] = "accuracy",
    budget: Budget | None = None,
    **wishes: Unpack[Wishes],
) -> Outcome:
    """Find the best form of a trained model under a budget, register it, and write the report.

    example: inputs, batch first. train, validation, test: iterables of (inputs, targets) batches, or callables that
    return one. Choices are made on validation; test is read once, for the final figures; train only calibrates.
    metric: a known name, or a function of (outputs, targets) arrays where higher is better.

    name: in the registry ("model"). classes: names in order. image: how the server turns an image into the input.
    seed (0). threads: for every runtime (1). batch: rows per timed call (1). runtimes: names, empty for all installed.
    home: the state folder ($FETTLE_HOME, else .fettle). register: False leaves the registry alone.
    progress: called with (what is done now, share of it from 0 to 1).

    There is always a best: the untouched model is a candidate, and where the floor is missed the best found is
    returned with `met_floor` False. Raises CaptureError, DataError or UsageError before any long work.
    """
    home = Home(Path(found).absolute()) if (found := wishes.get("home")) else Home.default()
    name = check_name(wishes.get("name", "model"), what="the model's name")
    task = make_task(
        model,
        example,
        Sources(validation=validation, train=train, test=test),
        metric=metric,
        classes=wishes.get("classes", ()),
        image=wishes.get("image"),
        name=name,
        budget=budget or Budget(),
        seed=wishes.get("seed", 0),
        threads=wishes.get("threads", 1),
        batch=wishes.get("batch", 1),
        progress=wishes.get("progress", _silent),
    )
    root = home.runs / name
    tried = try_all(task, root, runtimes=wishes.get("runtimes", ()))
    task.progress("latency, side by side", 0.9)
    trials, failures = measure(task, tried.built, baseline=BASELINE)
    for label, reason in failures.items():
        manifest = tried.built[label].artifact.manifest
        tried.fail(label, manifest.precision, manifest.runtime, reason)
    baseline = next(trial for trial in trials if trial.candidate.label == BASELINE)
    picked = choose([trial.candidate for trial in trials], task.budget, baseline.candidate)
    best = next(trial for trial in trials if trial.candidate.label == picked.label)
    task.progress("final figures", 0.95)
    runners = {label: entry.runner for label, entry in tried.built.items()}
    best_final, baseline_final = final(task, best, baseline, runners)
    if wishes.get("register", True):
        best_final = _register(home, name, best_final, baseline_final)
        trials = [replace(t, candidate=replace(t.candidate, version=best_final.version))
                  if t.artifact.digest == best_final.artifact.digest else t for t in trials]  # fmt: skip
    missed = shortfall(best_final.candidate, task.budget, baseline_final.candidate)
    candidates = tuple(trial.candidate for trial in trials)
    comparison = Comparison(
        name=name,
        met_floor=missed is None,
        sentences=tuple(
            sentence
            for sentence in (
                *describe(best_final.candidate, baseline_final.candidate, missed=missed),
                describe_precision(candidates),
            )
            if sentence
        ),
        best=best_final.candidate,
        baseline=baseline_final.candidate,
        candidates=(*candidates, *tried.failed),
        front=tuple(front_of(candidates)),
        floor=task.budget.floor(baseline.candidate.metric.value),
        left_float=tried.notes,
        splits=_splits(task),
        hardware=describe_hardware(),
        versions=tuple(f"{package} {version}" for package, version in describe_versions().items()),
        report=str(root / "report.html"),
    )
    write_html(comparison, root / "report.html")
    on_front = {candidate.digest for candidate in comparison.front}
    return Outcome(
        best=best_final,
        baseline=baseline_final,
        candidates=tuple(trials),
        front=tuple(trial for trial in trials if trial.artifact.digest in on_front),
        comparison=comparison,
        report=root / "report.html",
    )


def optimize_project(project: Project, *, home: Home, progress: Progress | None = None, threads: int = 1) -> Outcome:
    """The same for a `fettle.toml`. Raises ProjectError naming file and key for what is wrong there."""
    file = project.file
    loaders = {
        key: None if reference is None else (lambda key=key, ref=reference: project.call(f"data.{key}", ref))
        for key, reference in (
            ("validation", file.data.validation),
            ("train", file.data.train),
            ("test", file.data.test),
        )
    }
    for key, reference in (("validation", file.data.validation), ("train", file.data.train), ("test", file.data.test)):
        if reference is not None:
            project.resolve(f"data.{key}", reference)
    metric: Any = file.task.metric
    if ":" in metric:
        metric = project.resolve("task.metric", metric)
    return optimize(
        project.call("model.build", file.model.build),
        project.call("model.example", file.model.example),
        validation=loaders["validation"],
        train=loaders["train"],
        test=loaders["test"],
        metric=metric,
        budget=Budget(
            max_drop=file.budget.max_drop,
            min_metric=file.budget.min_metric,
            minimize=file.budget.minimize,
            time_limit=file.budget.time_limit,
        ),
        name=file.name,
        classes=file.task.classes,
        image=file.preprocess.image,
        seed=file.budget.seed,
        threads=threads,
        home=home.root,
        progress=progress or _silent,
    )


def _register(home: Home, name: str, best: Trial, baseline: Trial) -> Trial:
    version = Registry(home).put(
        name,
        best.artifact,
        reports=(best.report, baseline.report) if best.artifact.digest != baseline.artifact.digest else (best.report,),
        reason="fettle optimize",
    )
    return replace(best, candidate=replace(best.candidate, version=version.version))


def _splits(task: Task) -> tuple[SplitUse, ...]:
    used = [
        SplitUse(name="validation", rows=task.validation.rows, digest=task.validation.digest, purpose="every choice"),
        SplitUse(name="calibration", rows=task.calibration.rows, digest=task.calibration.digest, purpose="ranges"),
    ]
    if task.test is not None:
        used.append(SplitUse(name="test", rows=task.test.rows, digest=task.test.digest, purpose="final figures, once"))
    return tuple(used)


def _silent(what: str, share: float) -> None:
    """No progress is shown."""
