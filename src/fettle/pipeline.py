"""The one file that knows the order of the stages: capture, compress, measure, choose, register, report.

    model -> recipe -> artifact -> report -> version

Each stage is a room of its own and calls none of the others; they exchange the values of `fettle.core`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from fettle.core.codec import nearest
from fettle.core.errors import CaptureError, DataError, ProjectError, UsageError
from fettle.core.home import Home
from fettle.core.machine import describe_hardware, describe_versions
from fettle.core.names import check_name
from fettle.core.project import Project
from fettle.core.recipe import Budget, Recipe
from fettle.core.signature import ImagePreprocess
from fettle.evaluate.choose import choose, describe, describe_precision, describe_slack, shortfall
from fettle.evaluate.comparison import Comparison, SplitUse
from fettle.evaluate.html import write_html
from fettle.evaluate.pareto import front_of
from fettle.registry import Registry
from fettle.stages.folder import run_folder
from fettle.stages.measure import Trial, final, measure
from fettle.stages.task import Misfit, Progress, Sources, Task, make_task
from fettle.stages.trials import BASELINE, Tried, try_all

# Where a project writes down what `optimize` takes as an argument.
_KEYS = {
    "model": "model.build",
    "example": "model.example",
    "metric": "task.metric",
    "classes": "task.classes",
    "image": "preprocess.image",
    "seed": "budget.seed",
}


class Wishes(TypedDict, total=False):
    """The optional keywords of `optimize`; see there."""

    name: str
    classes: tuple[str, ...]
    image: ImagePreprocess | None
    seed: int
    threads: int
    batch: int
    runtimes: tuple[str, ...]
    recipes: tuple[Recipe, ...]
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
    return one. Choices are made on validation; test is read at the end, for the final figures; train calibrates, and
    teaches the steps that train.
    metric: a known name, or a function of (outputs, targets) arrays where higher is better.

    name: in the registry ("model"). classes: names in order. image: how the server turns an image into the input.
    seed (0). threads: for every runtime (1). batch: rows per timed call (1). runtimes: names, empty for all installed.
    recipes: what to try besides the untouched model, empty for what fettle thinks of.
    home: the state folder ($FETTLE_HOME, else .fettle). register: False leaves the registry alone.
    progress: called with (what is done now, share of it from 0 to 1).

    There is always a best: the untouched model is a candidate, and where the floor is missed the best found is
    returned with `met_floor` False. Raises CaptureError, DataError or UsageError, nearly all before any long work, and
    RegistryError where another run of this name is at work in this home.
    """
    _refuse_unknown(wishes)
    home = Home(Path(found).absolute()) if (found := wishes.get("home")) else Home.default()
    name = check_name(wishes.get("name", "model"), what="the model's name")
    with run_folder(home, name) as root:
        task = make_task(
            model,
            example,
            Sources(validation=validation, train=train, test=test),
            metric=metric,
            classes=tuple(wishes.get("classes", ())),
            image=wishes.get("image"),
            name=name,
            budget=budget or Budget(),
            seed=wishes.get("seed", 0),
            threads=wishes.get("threads", 1),
            batch=wishes.get("batch", 1),
            progress=wishes.get("progress", _silent),
            checkpoints=root / "checkpoints",
        )
        tried = try_all(task, root, runtimes=wishes.get("runtimes", ()), recipes=wishes.get("recipes", ()))
        return _conclude(task, tried, home, root, register=wishes.get("register", True))


def _conclude(task: Task, tried: Tried, home: Home, root: Path, *, register: bool) -> Outcome:
    """Measure what was built side by side, choose, register, report."""
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
    finals = final(task, best, baseline, runners)
    if register:
        number = _register(home, task.name, *finals)
        digest = best.artifact.digest
        trials = [_numbered(trial, digest, number) for trial in trials]
        finals = _numbered(finals[0], digest, number), _numbered(finals[1], digest, number)
    comparison = _compare(task, finals, trials, tried, report=root / "report.html")
    write_html(comparison, root / "report.html")
    on_front = {candidate.digest for candidate in comparison.front}
    return Outcome(
        best=finals[0],
        baseline=finals[1],
        candidates=tuple(trials),
        front=tuple(trial for trial in trials if trial.artifact.digest in on_front),
        comparison=comparison,
        report=root / "report.html",
    )


def _compare(
    task: Task, finals: tuple[Trial, Trial], trials: Sequence[Trial], tried: Tried, *, report: Path
) -> Comparison:
    best, baseline = (trial.candidate for trial in finals)
    missed = shortfall(best, task.budget, baseline)
    candidates = tuple(trial.candidate for trial in trials)
    original = next(candidate for candidate in candidates if candidate.label == BASELINE)
    picked = next(candidate for candidate in candidates if candidate.is_same(best))
    sentences = (
        *describe(best, baseline, missed=missed),
        describe_slack(picked, choose(candidates, replace(task.budget, slack=0.0), original)),
        describe_precision(candidates),
    )
    return Comparison(
        name=task.name,
        met_floor=missed is None,
        sentences=tuple(sentence for sentence in sentences if sentence),
        best=best,
        baseline=baseline,
        candidates=(*candidates, *tried.failed),
        front=tuple(front_of(candidates)),
        floor=task.budget.floor(original.metric.value),
        left_float=tried.notes,
        decisions=tried.decisions,
        layers=tried.layers,
        splits=_splits(task),
        hardware=describe_hardware(),
        versions=tuple(f"{package} {version}" for package, version in describe_versions().items()),
        report=str(report),
    )


def optimize_project(
    project: Project,
    *,
    home: Home,
    progress: Progress | None = None,
    threads: int = 1,
    recipes: tuple[Recipe, ...] = (),
    runtimes: tuple[str, ...] = (),
) -> Outcome:
    """The same for a `fettle.toml`.

    Raises ProjectError naming file and key for what is wrong there; what `optimize` raises names the file.
    """
    file = project.file
    validation = _loader(project, "data.validation", file.data.validation)
    train = _loader(project, "data.train", file.data.train)
    test = _loader(project, "data.test", file.data.test)
    metric: Any = file.task.metric
    if ":" in metric:
        metric = project.resolve("task.metric", metric)
    with _naming(project):
        return optimize(
            project.call("model.build", file.model.build),
            project.call("model.example", file.model.example),
            validation=validation,
            train=train,
            test=test,
            metric=metric,
            budget=Budget(
                max_drop=file.budget.max_drop,
                min_metric=file.budget.min_metric,
                minimize=file.budget.minimize,
                time_limit=file.budget.time_limit,
                slack=file.budget.slack,
            ),
            name=file.name,
            classes=file.task.classes,
            image=file.preprocess.image,
            seed=file.budget.seed,
            threads=threads,
            recipes=recipes,
            runtimes=runtimes,
            home=home.root,
            progress=progress or _silent,
        )


def _loader(project: Project, key: str, reference: str | None) -> Callable[[], Any] | None:
    """A function that calls the user's for each pass; a wrong name is an error now, before the model is built."""
    if reference is None:
        return None
    project.resolve(key, reference)
    return lambda: project.call(key, reference)


@contextmanager
def _naming(project: Project) -> Iterator[None]:
    """Put the file, and the key where one is to blame, in front of what is wrong with a project."""
    try:
        yield
    except ProjectError:
        raise
    except UsageError as problem:
        argument = problem.argument if isinstance(problem, Misfit) else ""
        key = f"{_KEYS[argument]}: " if argument in _KEYS else ""
        raise ProjectError(f"{project.path}: {key}{problem}") from problem
    except CaptureError as problem:
        raise CaptureError(f"{project.path}: model.build: {problem}") from problem
    except DataError as problem:
        raise DataError(f"{project.path}: {problem}") from problem


def _refuse_unknown(wishes: Wishes) -> None:
    known = list(Wishes.__annotations__)
    for key in wishes:
        if key not in known:
            raise UsageError(f"optimize: unknown keyword '{key}'{nearest(key, known)}")


def _register(home: Home, name: str, best: Trial, baseline: Trial) -> int:
    is_original = best.artifact.digest == baseline.artifact.digest
    reports = (best.report,) if is_original else (best.report, baseline.report)
    return Registry(home).put(name, best.artifact, reports=reports, reason="fettle optimize").version


def _numbered(trial: Trial, digest: str, version: int) -> Trial:
    """The trial with its version, where it is the one that was registered."""
    if trial.artifact.digest != digest:
        return trial
    return replace(trial, candidate=replace(trial.candidate, version=version))


def _splits(task: Task) -> tuple[SplitUse, ...]:
    used = [
        SplitUse(name="validation", rows=task.validation.rows, digest=task.validation.digest, purpose="every choice")
    ]
    if task.calibration is task.validation:
        used[0] = replace(used[0], purpose="every choice, and the ranges of int8")
    else:
        used.append(
            SplitUse(
                name="train", rows=task.calibration.rows, digest=task.calibration.digest, purpose="the ranges of int8"
            )
        )
    if task.test is not None:
        used.append(SplitUse(name="test", rows=task.test.rows, digest=task.test.digest, purpose="final figures, once"))
    return tuple(used)


def _silent(what: str, share: float) -> None:
    """No progress is shown."""
