"""`fettle quantize`: one recipe as it was asked for, with no search, measured beside the original."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fettle.cli.optimize import print_outcome
from fettle.cli.output import AsJson, progress_bar
from fettle.core import plugins
from fettle.core.codec import nearest
from fettle.core.errors import ProjectError, UsageError
from fettle.core.home import Home
from fettle.core.plugins import missing_extra
from fettle.core.project import Project
from fettle.core.recipe import Budget, Recipe, StepSpec
from fettle.core.runner import RuntimeBase

if TYPE_CHECKING:
    from fettle.evaluate.comparison import Comparison
    from fettle.pipeline import Outcome

# In the order in which they are carried out: the first change the float model, the others the quantized one.
_BEFORE = ("cross_layer_equalization", "smooth_quant")
_AFTER = ("adaround", "bias_correction")
_CORRECTIONS = ", ".join((*_BEFORE, *_AFTER))


class Method(StrEnum):
    """How the model is quantized."""

    STATIC = "static"
    QAT = "qat"
    DYNAMIC = "dynamic"
    WEIGHT_ONLY = "weight-only"
    HALF = "half"


# For each method its step's file, and what candidates made by it are called; {bits} are those of the weights,
# {half} is the type of 16 bits.
_FORMS = {
    Method.STATIC: ("post_training", "int8"),
    Method.QAT: ("qat", "int8 trained"),
    Method.DYNAMIC: ("dynamic", "int8 dynamic"),
    Method.WEIGHT_ONLY: ("weight_only", "int{bits} weights"),
    Method.HALF: ("half", "{half}"),
}
# By the step's name for the type.
_HALVES = {"bfloat16": "bf16", "float16": "fp16"}
_BELONGS = {
    "observer": (Method.STATIC, Method.QAT),
    "weight_bits": (Method.STATIC, Method.QAT),
    "correct": (Method.STATIC,),
    "bits": (Method.WEIGHT_ONLY,),
    "group": (Method.WEIGHT_ONLY,),
    "dtype": (Method.HALF,),
    "epochs": (Method.QAT,),
    "learn_scales": (Method.QAT,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for, under the names of the steps' own fields; None, False or empty where nothing was said.

    Raises UsageError for an option of another method, and for a correction that does not exist.

    >>> Request(method=Method.DYNAMIC, group=64)
    Traceback (most recent call last):
    fettle.core.errors.UsageError: --group belongs to --method weight-only, got --method dynamic: leave one of them out
    """

    method: Method = Method.STATIC
    observer: str | None = None
    weight_bits: int | None = None
    bits: int | None = None
    group: int | None = None
    dtype: str | None = None
    epochs: int | None = None
    learn_scales: bool = False
    correct: tuple[str, ...] = ()
    keep_float: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            methods = _BELONGS.get(field.name, tuple(Method))
            if self.method not in methods and getattr(self, field.name) != field.default:
                raise UsageError(
                    f"--{field.name.replace('_', '-')} belongs to --method {' or '.join(methods)}, got --method "
                    f"{self.method}: leave one of them out"
                )
        for name in self.correct:
            _check_known("--correct", name, (*_BEFORE, *_AFTER))

    @property
    def name(self) -> str:
        """The recipe's name, such as "int4 weights"; with the runtime's it is the label of a candidate."""
        kind = _FORMS[self.method][1].format(
            bits=self.bits or 8, half=_HALVES.get(self.dtype or "bfloat16", self.dtype)
        )
        return kind if self.weight_bits in (None, 8) else f"{kind} with {self.weight_bits}-bit weights"

    def steps(self) -> tuple[StepSpec, ...]:
        """The steps in order. Raises UsageError for a value that a step refuses; imports torch."""
        from fettle.compress.step import Step

        def spec(name: str, **parameters: Any) -> StepSpec:
            step: Step = plugins.load("fettle.compress.quantize", name, Step)(**parameters)
            return step.spec()

        if self.observer is not None:
            _check_known("--observer", self.observer, plugins.names("fettle.compress.quantize.calibrate"))
        own = (*(name for name, methods in _BELONGS.items() if self.method in methods), "keep_float")
        given = {name: getattr(self, name) for name in own if name != "correct" and getattr(self, name) is not None}
        return (
            *(spec(name) for name in _BEFORE if name in self.correct),
            spec(_FORMS[self.method][0], **given),
            *(spec(name) for name in _AFTER if name in self.correct),
        )


def quantize(
    project: Annotated[Path, typer.Argument(help="fettle.toml, or its folder.")] = Path("fettle.toml"),
    method: Annotated[Method, typer.Option(help="What is rounded, and when.")] = Method.STATIC,
    observer: Annotated[str | None, typer.Option(help="static, qat: how an activation's range is found.")] = None,
    weight_bits: Annotated[int | None, typer.Option(help="static, qat: 2 to 8.")] = None,
    correct: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"static: {_CORRECTIONS}; repeatable.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="weight-only: 8 or 4.")] = None,
    group: Annotated[int | None, typer.Option(help="weight-only: weights that share a scale.")] = None,
    dtype: Annotated[str | None, typer.Option(help="half: bfloat16 or float16.")] = None,
    epochs: Annotated[int | None, typer.Option(help="qat: of training.")] = None,
    learn_scales: Annotated[bool, typer.Option("--learn-scales", help="qat: train the step sizes too.")] = False,
    keep_float: Annotated[list[str] | None, typer.Option(metavar="LAYER", help="Stays float; repeatable.")] = None,
    runtime: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this one; repeatable.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every runtime.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Quantize the model as told, measure it beside the original, register the best, write report.html.

    No search: `fettle optimize` finds corrections, and layers to keep in float, by itself. Exit code 1 where what was
    asked for cannot be built or misses the accuracy floor: the best that was measured is registered all the same.
    """
    request = Request(
        method=method,
        observer=observer,
        weight_bits=weight_bits,
        bits=bits,
        group=group,
        dtype=dtype,
        epochs=epochs,
        learn_scales=learn_scales,
        correct=tuple(name.replace("-", "_") for name in correct or ()),
        keep_float=tuple(keep_float or ()),
    )
    opened = Project.open(project)
    if method is Method.QAT and opened.file.data.train is None:
        raise ProjectError(f"{opened.path}: data.train must be named, --method qat trains on it")
    outcome = _carry_out(request, opened, tuple(dict.fromkeys(runtime or ())), threads=threads)
    print_outcome(outcome, as_json=as_json)
    reason = shortfall_of(request.name, outcome.comparison, opened.file.budget)
    if reason is None and not outcome.met_floor:
        reason = outcome.comparison.sentences[0]
    if reason is not None:
        typer.echo(f"fettle: {reason}", err=True)
        raise typer.Exit(1)
    if not outcome.best.candidate.steps:
        typer.echo(f"{request.name} was built, and {outcome.best.candidate.label} is better and registered", err=True)


def _carry_out(request: Request, project: Project, runtimes: tuple[str, ...], *, threads: int) -> Outcome:
    try:
        from fettle.pipeline import optimize_project
    except ModuleNotFoundError as problem:
        raise missing_extra("fettle quantize", problem) from None
    budget = Budget(**{field.name: getattr(project.file.budget, field.name) for field in dataclasses.fields(Budget)})
    recipe = Recipe(name=request.name, steps=request.steps(), budget=budget, seed=project.file.budget.seed)
    check_runtimes(recipe, runtimes)
    # A project that prints while it trains must not break the JSON.
    with redirect_stdout(sys.stderr), progress_bar() as progress:
        return optimize_project(
            project,
            home=Home.default(),
            progress=progress,
            threads=threads,
            recipes=(recipe,),
            runtimes=runtimes,
        )


def check_runtimes(recipe: Recipe, wanted: Sequence[str]) -> None:
    """Refuse before any work what could only be left out silently.

    wanted: names; empty for all that are installed. Raises UsageError for one that does not exist or does not execute
    the recipe's precision, and where none does; MissingExtra for one that is not installed.
    """
    from fettle.stages.steps import load_step, precision_of

    precision = precision_of([load_step(spec) for spec in recipe.steps])
    installed = plugins.installed("fettle.runtime", RuntimeBase)
    tried = {name: found for name, found in installed.items() if found.computes and found.by_default}
    able = [name for name, found in tried.items() if precision in found.precisions]
    for name in wanted:
        if precision not in plugins.load("fettle.runtime", name, RuntimeBase).precisions:
            can = f"of those installed, {', '.join(able) or 'none'} can"
            raise UsageError(f"--runtime must name one that executes {precision}, got '{name}': {can}")
    if not wanted and not able:
        raise UsageError(f"no installed runtime executes {precision}: `fettle doctor` tells which are missing")


def shortfall_of(name: str, comparison: Comparison, budget: Budget) -> str | None:
    """None where a candidate of the recipe keeps the floor on validation rows; else why each of them does not."""
    reasons = []
    for candidate in comparison.candidates:
        if not candidate.label.startswith(f"{name} in "):
            continue
        missing = candidate.failure or candidate.report.check(budget, baseline=comparison.original.report)
        if missing is None:
            return None
        reasons.append(f"{candidate.label}: {missing}")
    return f"{name} cannot be used under this budget: {'; '.join(reasons)}"


def _check_known(option: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise UsageError(f"{option} '{name}' is unknown{nearest(name, [*known])}")
