"""Does the engine compute what was simulated? Every export is compared on real rows, and a difference is traced."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.fx import GraphModule, Node

from fettle.compress.capture import as_deployed, capture, export_program, layer_of, quiet
from fettle.compress.step import Tensors
from fettle.core.artifact import Artifact, Manifest
from fettle.core.errors import ExportError
from fettle.core.recipe import Recipe
from fettle.core.report import Measurement
from fettle.core.runner import Runner, RuntimeBase
from fettle.core.signature import Array, Signature, TensorSpec
from fettle.evaluate.parity import compare_outputs
from fettle.stages.task import as_tensors

ROWS = 64
# Least signal to noise, in dB, of an engine's answers against the simulation in torch. Float differs in the order of
# sums only. An integer engine may round a tie the other way, or add before it rounds where it was told to round first.
# In 16 bits an engine fuses what torch computes one by one, and rounds at fewer places.
BOUNDS_DB: Mapping[str, float] = {"float": 60.0, "fp16": 40.0, "bf16": 25.0, "int8": 20.0}
_OTHER_DB = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """What is to be checked: an engine, the precision it runs at, its model, and the original that this is for."""

    runtime: RuntimeBase
    precision: str
    model: torch.nn.Module
    original: torch.nn.Module
    example: Tensors
    threads: int


def check_numerics(deployed: Deployed, runner: Runner, inputs: Mapping[str, Array]) -> Measurement:
    """The signal to noise ratio of the engine's outputs against the simulation's, in dB: that of the worst one.

    inputs: rows by input name, in the signature's order. Raises ExportError where it is below the bound for the
    precision, naming the layer where the difference starts; unless quantization itself has put more noise into the
    answers than that, which makes as much of one step more or less.
    """
    bound = BOUNDS_DB.get(deployed.precision, _OTHER_DB)
    tensors = as_tensors(inputs.values())
    expected, found = _outputs(deployed.model, tensors), list(runner.run(inputs).values())
    ratios = [_ratio_db(want, have) for want, have in zip(expected, found, strict=True)]
    ratio = min(ratios)
    if ratio < bound and not _is_lost_in_noise(deployed, tensors, expected, found):
        layer = find_start(deployed, runner.signature, inputs, bound=bound)
        raise ExportError(
            f"the engine must answer as the simulation does, to {bound:.0f} dB in {deployed.precision}, got "
            f"{ratio:.1f} dB on {len(tensors[0])} validation rows; the difference starts at {layer}"
        )
    return Measurement(
        name="numerics.sqnr",
        value=min(ratio, 200.0),
        unit="dB",
        direction="higher",
        n=len(tensors[0]),
        data="validation",
        note="the engine's answers against the simulation's in torch",
    )


def _outputs(model: torch.nn.Module, inputs: Tensors) -> list[torch.Tensor]:
    with torch.no_grad(), quiet():
        return torch.utils._pytree.tree_leaves(model(*inputs))


def _is_lost_in_noise(deployed: Deployed, inputs: Tensors, expected: list[torch.Tensor], found: list[Array]) -> bool:
    """Whether in each output the simulation is farther from the original than the engine is from the simulation."""
    if not all(np.isfinite(array).all() for array in found) or deployed.precision == "float":
        return False
    originals = _outputs(deployed.original, inputs)
    noises = [(exact - want).double().square().sum() for exact, want in zip(originals, expected, strict=True)]
    errors = [
        np.square((have - want.numpy()).astype(np.float64)).sum() for want, have in zip(expected, found, strict=True)
    ]
    return all(bool(error <= noise) for error, noise in zip(errors, noises, strict=True))


def find_start(deployed: Deployed, signature: Signature, inputs: Mapping[str, Array], *, bound: float) -> str:
    """The first layer whose output differs by more than the bound, by bisection over the graph cut off at it.

    Once an output differs, what is computed from it differs: some ten exports find the place among a thousand.
    """
    model = as_deployed(deployed.model)
    graph = model if isinstance(model, GraphModule) else capture(model, deployed.example)
    points = [node for node in graph.graph.nodes if _is_point(node)]
    low, high = 0, len(points) - 1  # the last is known to differ
    while low < high:
        middle = (low + high) // 2
        if _differs(deployed, _cut(graph, points[middle]), signature, inputs, bound=bound):
            high = middle
        else:
            low = middle + 1
    return f"{layer_of(points[low])} ({points[low].target})" if points else "the outputs"


def _is_point(node: Node) -> bool:
    """A float tensor with a row for each input row, computed by the graph."""
    value = node.meta.get("val")
    return (
        node.op == "call_function"
        and isinstance(value, torch.Tensor)
        and value.dtype == torch.float32
        and value.ndim > 0
        and not isinstance(value.shape[0], int)
    )


def _cut(graph: GraphModule, node: Node) -> GraphModule:
    """The graph up to this node, which becomes the output."""
    with quiet():
        shorter = copy.deepcopy(graph)
    nodes = {each.name: each for each in shorter.graph.nodes}
    output = next(each for each in reversed(shorter.graph.nodes) if each.op == "output")
    output.args = (nodes[node.name],)
    shorter.graph.set_codegen(torch.fx.graph.CodeGen())
    shorter.graph.eliminate_dead_code()
    return GraphModule(shorter, shorter.graph)


def _differs(
    deployed: Deployed, graph: GraphModule, signature: Signature, inputs: Mapping[str, Array], *, bound: float
) -> bool:
    """Whether the engine answers this part of the model otherwise than torch; one that it refuses is not blamed."""
    tensors = as_tensors(inputs.values())
    with torch.no_grad(), quiet():
        expected = graph(*tensors)
    shape = ("batch", *(f"size_{index}" for index in range(1, expected.ndim)))
    output = TensorSpec(name="part", dtype="float32", shape=shape)
    part = replace(signature, outputs=(output,), classes=(), activation="none")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        try:
            deployed.runtime.export(export_program(graph, deployed.example), root, part)
            manifest = Manifest(
                runtime="", precision=deployed.precision, signature=part, files=(), recipe=Recipe(name="part")
            )
            runner = deployed.runtime.load(Artifact(digest="", manifest=manifest, root=root), threads=deployed.threads)
            found = runner.run(inputs)["part"]
        except Exception:
            return False
    return _ratio_db(expected, found) < bound


def _ratio_db(expected: torch.Tensor, found: Array) -> float:
    reference = expected.numpy()
    if reference.shape != found.shape or np.isnan(found).any() or (np.isinf(found) != np.isinf(reference)).any():
        return -math.inf
    return compare_outputs(reference, found, classification=False).sqnr_db
