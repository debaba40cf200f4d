"""A version that is loaded, proven against its golden outputs, and warm: the only thing that may answer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fettle.core.artifact import Artifact
from fettle.core.errors import ArtifactError
from fettle.core.machine import adds_products_in_16_bits
from fettle.core.runner import Runner
from fettle.core.signature import Array, Signature


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Served:
    """One version that answers, without what runs it: all that the server itself needs to know.

    row_wise: every input and output begins with the same free dimension, so requests may share a batch.
    classifies: the first output is float of shape (rows, classes), so answers have a class and are logged.
    """

    name: str
    version: int
    digest: str
    runtime: str
    precision: str
    signature: Signature
    row_wise: bool
    classifies: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedModel(Served):
    """One version, ready to run."""

    runner: Runner


class ModelFault(Exception):
    """The model itself answered something impossible; the message is for the log and the client."""


def served_of(name: str, version: int, artifact: Artifact) -> Served:
    """What the artifact says of itself. Raises ArtifactError where it declares what cannot be."""
    check_image(artifact.manifest.signature)
    return Served(**_facts(name, version, artifact))


def load_model(
    name: str, version: int, artifact: Artifact, *, threads: int, max_batch_rows: int
) -> tuple[LoadedModel, list[tuple[int, float]]]:
    """Load, compare with the golden outputs, warm up; the model, and (rows, seconds) of the warm-up's batches.

    Raises ArtifactError (or what the runtime raises) if unfit.
    """
    check_image(artifact.manifest.signature)
    model = LoadedModel(**_facts(name, version, artifact), runner=artifact.load(threads=threads))
    golden = artifact.golden()
    check_golden(model, golden, tolerance=artifact.manifest.tolerance)
    return model, warm_up(model, golden, max_batch_rows=max_batch_rows)


def _facts(name: str, version: int, artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "name": name,
        "version": version,
        "digest": artifact.digest,
        "runtime": manifest.runtime,
        "precision": manifest.precision,
        "signature": manifest.signature,
        "row_wise": is_row_wise(manifest.signature),
        "classifies": is_classifier(manifest.signature),
    }


def is_row_wise(signature: Signature) -> bool:
    """True where all inputs and outputs share a free first dimension."""
    first = {spec.shape[0] if spec.shape else 0 for spec in (*signature.inputs, *signature.outputs)}
    return len(first) == 1 and isinstance(first.pop(), str)


def is_classifier(signature: Signature) -> bool:
    """True where the first output can be read as one row of class scores for each input row."""
    first = signature.outputs[0]
    return first.dtype.startswith("float") and len(first.shape) == 2 and isinstance(first.shape[0], str)


def check_image(signature: Signature) -> None:
    """Raise ArtifactError where image preprocessing is declared that does not fit the input."""
    if signature.image is None:
        return
    spec = signature.inputs[0]
    have = spec.shape[1:]
    fits = len(have) == 3 and all(
        isinstance(h, str) or h == w for h, w in zip(have, signature.image.shape, strict=True)
    )
    if len(signature.inputs) != 1 or spec.dtype != "float32" or not fits or not is_row_wise(signature):
        raise ArtifactError(
            f"image preprocessing gives one float32 input of shape ['batch', {str(list(signature.image.shape))[1:]}, "
            f"but input '{spec.name}' is {spec.dtype} of shape {list(spec.shape)}: declare the preprocessing it needs"
        )


def run(model: LoadedModel, inputs: Mapping[str, Array], *, max_batch_rows: int) -> dict[str, Array]:
    """Run checked inputs, in pieces of at most `max_batch_rows`. Raises ModelFault for outputs of the wrong shape."""
    rows = len(next(iter(inputs.values())))
    if not model.row_wise or rows <= max_batch_rows:
        return _run_once(model, inputs, rows)
    pieces = [
        _run_once(model, {name: array[start : start + max_batch_rows] for name, array in inputs.items()}, None)
        for start in range(0, rows, max_batch_rows)
    ]
    return {spec.name: np.concatenate([piece[spec.name] for piece in pieces]) for spec in model.signature.outputs}


def _run_once(model: LoadedModel, inputs: Mapping[str, Array], rows: int | None) -> dict[str, Array]:
    rows = len(next(iter(inputs.values()))) if rows is None else rows
    outputs = model.runner.run(inputs)
    for spec in model.signature.outputs:
        array = outputs.get(spec.name)
        if array is None:
            raise ModelFault(f"the model gave no output '{spec.name}'")
        if array.dtype.name != spec.dtype or array.ndim != len(spec.shape):
            raise ModelFault(f"output '{spec.name}' is not {spec.dtype} of shape {list(spec.shape)}, as declared")
        if model.row_wise and len(array) != rows:
            raise ModelFault(f"output '{spec.name}' must have one row for each of the {rows} inputs, got {len(array)}")
    return outputs


def check_golden(model: LoadedModel, golden: Mapping[str, Array], *, tolerance: float) -> None:
    """Raise ArtifactError unless the model gives its golden outputs: all rows together, and the first one alone.

    max |answer - golden| <= tolerance, elementwise, for every output.
    """
    inputs = {spec.name: golden.get(f"input:{spec.name}") for spec in model.signature.inputs}
    expected = {spec.name: golden.get(f"output:{spec.name}") for spec in model.signature.outputs}
    if any(array is None for array in (*inputs.values(), *expected.values())):
        raise ArtifactError("the artifact has no golden tensors for every input and output: build it again")
    given = {name: array for name, array in inputs.items() if array is not None}
    rows = model.signature.check(given)
    _compare(model, given, {name: array for name, array in expected.items() if array is not None}, tolerance)
    if model.row_wise and rows > 1:
        first = {name: array[:1] for name, array in given.items()}
        _compare(model, first, {name: array[:1] for name, array in expected.items() if array is not None}, tolerance)


def _compare(model: LoadedModel, inputs: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float) -> None:
    try:
        outputs = _run_once(model, inputs, None)
    except ModelFault as problem:
        raise ArtifactError(f"golden check failed: {problem}") from None
    for name, want in expected.items():
        have = outputs[name]
        if have.shape != want.shape:
            raise ArtifactError(
                f"golden output '{name}' has shape {list(want.shape)}, the model gives {list(have.shape)}"
            )
        with np.errstate(invalid="ignore"):
            difference = float(np.max(np.abs(have.astype(np.float64) - want.astype(np.float64)), initial=0.0))
        if not difference <= tolerance:  # NaN is a mismatch too
            raise ArtifactError(
                f"golden output '{name}' differs by {difference:.3g}, allowed are {tolerance:.3g}: "
                f"this model does not answer here as it did where it was measured{_excuse(model)}"
            )


def _excuse(model: LoadedModel) -> str:
    """What this machine lacks that the one where the model was measured may have had."""
    if not model.precision.startswith("int8") or not adds_products_in_16_bits():
        return ""
    return ", perhaps on a CPU with VNNI: without, int8 kernels overflow with weights of 8 bits, so optimize it here"


def warm_up(model: LoadedModel, golden: Mapping[str, Array], *, max_batch_rows: int) -> list[tuple[int, float]]:
    """Run each power of two and the largest batch, so that no request pays for memory or lazy compilation.

    Returns (rows, seconds) of the second run of each size.
    """
    if not model.row_wise:
        return []
    inputs = {spec.name: golden[f"input:{spec.name}"] for spec in model.signature.inputs}
    measured = []
    for rows in sorted({max_batch_rows, *(2**power for power in range(max_batch_rows.bit_length()))}):
        batch = {name: np.resize(array, (rows, *array.shape[1:])) for name, array in inputs.items()}
        _run_once(model, batch, None)
        started = time.perf_counter()
        _run_once(model, batch, None)
        measured.append((rows, time.perf_counter() - started))
    return measured
