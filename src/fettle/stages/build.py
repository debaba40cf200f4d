"""From a task and a recipe to sealed artifacts, one for each runtime that executes the precision."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fettle.compress.capture import export_program
from fettle.core import plugins
from fettle.core.artifact import Artifact, Manifest
from fettle.core.data import Inputs
from fettle.core.errors import DataError, ExportError, FettleError
from fettle.core.machine import describe_hardware, describe_versions
from fettle.core.recipe import Recipe
from fettle.core.report import Measurement
from fettle.core.runner import Runner, RuntimeBase
from fettle.core.signature import Array, Signature
from fettle.core.statistics import input_statistics
from fettle.evaluate.metric import measure_metric
from fettle.stages.numerics import ROWS, Deployed, check_numerics
from fettle.stages.steps import carry_out, check_order, load_step, precision_of
from fettle.stages.task import Task

_GOLDEN_ROWS = 8
_REFERENCE_ROWS = 5000
# Another CPU, or another batch size, may round an int8 step the other way; float differs by accumulation order only.
_FLOAT_TOLERANCE, _TOLERANCE = 1e-3, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A sealed artifact with what it answered on the validation split, and how near that is to the simulation."""

    artifact: Artifact
    runner: Runner
    metric: Measurement
    outputs: Array
    numerics: tuple[Measurement, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A recipe carried out on the model, before any runtime: model, its program, and what the steps had to say."""

    recipe: Recipe
    precision: str
    model: torch.nn.Module
    program: torch.export.ExportedProgram
    notes: tuple[str, ...]

    @classmethod
    def of(cls, task: Task, recipe: Recipe, model: torch.nn.Module, *, notes: tuple[str, ...]) -> Prepared:
        """The recipe with the model that its steps made. Raises ExportError where they quantized nothing."""
        precision = precision_of([load_step(spec) for spec in recipe.steps])
        program = export_program(model, task.example)
        if "int" in precision and not any(_on_integers(node) for node in program.graph.nodes):
            why = f": {notes[0]}" if notes else ""
            raise ExportError(f"a recipe for {precision} must find something to quantize, got a model in float{why}")
        return cls(recipe=recipe, precision=precision, model=model, program=program, notes=notes)


def _on_integers(node: torch.fx.Node) -> bool:
    return getattr(node.target, "namespace", "") in ("quantized_decomposed", "fettle")


def prepare(task: Task, recipe: Recipe, *, progress: Callable[[float], None] = lambda share: None) -> Prepared:
    """Apply the recipe's steps in order; `progress` is told the share that is done. Raises what they raise."""
    if not recipe.steps:
        same = task.program.module(check_guards=False)
        return Prepared(recipe=recipe, precision="float", model=same, program=task.program, notes=())
    notes: list[str] = []
    steps = [load_step(spec) for spec in recipe.steps]
    check_order(steps)
    model = carry_out(task, steps, task.model, seed=recipe.seed, note=notes.append, progress=progress)
    return Prepared.of(task, recipe, model, notes=tuple(notes))


def build(task: Task, prepared: Prepared, runtime_name: str, *, root: Path, parent: str, signature: Signature) -> Built:
    """Export, load, run over the validation split, seal. Raises ExportError, CorruptArtifact, DataError."""
    runtime = _runtime(runtime_name)
    unsealed, runner = deploy(task, prepared, runtime_name, root=root, signature=signature)
    manifest = replace(unsealed.manifest, provenance=_provenance(task, prepared, parent))
    metric, outputs = measure_metric(partial(answer, runner), task.validation, task.metric, seed=task.seed)
    numerics: tuple[Measurement, ...] = ()
    if runtime.computes:
        deployed = Deployed(
            runtime=runtime,
            precision=prepared.precision,
            model=prepared.model,
            original=task.program.module(check_guards=False),
            example=task.example,
            threads=task.threads,
        )
        numerics = (check_numerics(deployed, runner, first_rows(task, ROWS)),)
    golden = _golden(task, runner)
    largest = max(
        (float(np.abs(v).max(initial=0.0)) for k, v in golden.items() if k.startswith("output:")), default=1.0
    )
    tolerance = (_FLOAT_TOLERANCE if prepared.precision == "float" else _TOLERANCE) * max(largest, 1.0)
    artifact = Artifact.seal(
        root, replace(manifest, tolerance=tolerance), golden=golden, reference=_reference(task, signature, outputs)
    )
    return Built(artifact=artifact, runner=runner, metric=metric, outputs=outputs, numerics=numerics)


def deploy(
    task: Task, prepared: Prepared, runtime_name: str, *, root: Path, signature: Signature
) -> tuple[Artifact, Runner]:
    """Export and load, no more: not sealed, for its golden outputs will be its own answers, so it must run first."""
    runtime = _runtime(runtime_name)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    runtime.export(prepared.program, root, signature)
    manifest = Manifest(
        runtime=runtime_name,
        precision=prepared.precision,
        signature=signature,
        files=(),
        recipe=prepared.recipe,
        left_float=prepared.notes,
    )
    artifact = Artifact(digest="", manifest=manifest, root=root)
    return artifact, runtime.load(artifact, threads=task.threads)


def _runtime(name: str) -> RuntimeBase:
    return plugins.load("fettle.runtime", name, RuntimeBase)()


def answer(runner: Runner, inputs: Inputs) -> Any:
    """What the runner makes of one batch. Raises DataError where it breaks on inputs that fit its signature."""
    try:
        # torch takes neither mirrored nor read-only memory; only such an array is copied here.
        return runner(*(np.require(array, requirements=["C", "W"]) for array in inputs))
    except FettleError:
        raise
    except Exception as problem:
        lines = str(problem).strip().splitlines() or ["no message"]
        shapes = ", ".join(f"{array.dtype.name} {list(array.shape)}" for array in inputs)
        raise DataError(
            f"the model must answer every batch, and on inputs {shapes} it raised {type(problem).__name__}: {lines[0]}"
        ) from problem


def first_rows(task: Task, rows: int) -> dict[str, Array]:
    """The first rows of the validation split, repeated where it has fewer, by input name."""
    found = task.leading_rows(rows)
    wanted = np.arange(rows) % len(found[0])
    return {spec.name: array[wanted] for spec, array in zip(task.signature.inputs, found, strict=True)}


def _golden(task: Task, runner: Runner) -> dict[str, Array]:
    inputs = first_rows(task, _GOLDEN_ROWS)
    outputs = runner.run(inputs)
    named = {f"input:{name}": array for name, array in inputs.items()}
    return named | {f"output:{name}": np.array(array) for name, array in outputs.items()}


def _reference(task: Task, signature: Signature, outputs: Array) -> dict[str, Array] | None:
    """What the monitor will compare with; None where the outputs are no class probabilities."""
    if outputs.ndim != 2 or outputs.dtype.kind != "f":
        return None
    if signature.activation == "none" and not _sums_to_one(outputs):
        return None
    statistics: list[Array] = []
    for inputs, _ in task.validation:
        statistics.append(input_statistics(inputs[0]))
        if sum(map(len, statistics)) >= _REFERENCE_ROWS:
            break
    probabilities = signature.probabilities(outputs[:_REFERENCE_ROWS]).astype(np.float32)
    return {"probabilities": probabilities, "statistics": np.concatenate(statistics)[: len(probabilities)]}


def _sums_to_one(outputs: Array) -> bool:
    inside = bool((outputs >= -1e-6).all() and (outputs <= 1 + 1e-6).all())
    return inside and bool(np.allclose(outputs.sum(axis=1), 1.0, atol=1e-3))


def with_activation(signature: Signature, outputs: Array, *, classification: bool) -> Signature:
    """Softmax is for the server to apply where a classifier's outputs are scores, not yet probabilities."""
    scores = classification and outputs.ndim == 2 and outputs.dtype.kind == "f" and not _sums_to_one(outputs)
    return replace(signature, activation="softmax" if scores else "none")


def _provenance(task: Task, prepared: Prepared, parent: str) -> dict[str, Any]:
    known = {
        "recipe": prepared.recipe.digest,
        "data.validation": task.validation.digest,
        "hardware": describe_hardware(),
        "seed": str(task.seed),
        "threads": str(task.threads),
    }
    if prepared.recipe.steps:
        known["data.calibration"] = task.calibration.digest
    if parent:
        known["parent"] = parent
    return known | {f"version.{package}": version for package, version in describe_versions().items()}
