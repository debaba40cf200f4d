"""What each layer's rounding costs the answers, and what giving it back to float costs in time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from fettle.compress.quantize.give_back import GiveBack
from fettle.compress.quantize.graph.lockstep import Moment, affordable_rows, gather, run_lockstep
from fettle.compress.quantize.graph.modules import SimulatedLayer
from fettle.compress.quantize.graph.simulate import Simulated
from fettle.compress.quantize.numerics.errors import tensor_error
from fettle.evaluate.layers import LayerLine
from fettle.evaluate.parity import divergence
from fettle.stages.judge import Judge
from fettle.stages.steps import carry_out
from fettle.stages.task import Task

_ROWS = 128
_DISAGREEING = 300
_LIMIT_DB = 99.0  # JSON holds no infinity

# From names of layers to the model that has them in float.
Lighten = Callable[[Sequence[str]], torch.nn.Module]


def account_for_layers(task: Task, simulated: Simulated) -> tuple[LayerLine, ...]:
    """One line for each layer in integers, from one pass over calibration rows."""
    if not simulated.layers():
        return ()
    inputs = gather(task.calibration_batches(), rows=affordable_rows(simulated, rows=_ROWS))
    lines: dict[str, LayerLine] = {}

    def measure(moment: Moment) -> None:
        layer = moment.layer
        sqnr_db = tensor_error(moment.wrote_in_float, moment.wrote).sqnr_db
        line = LayerLine(
            layer=layer.layer,
            kind="linear" if layer.operation == torch.ops.aten.linear.default else "convolution",
            sqnr_db=max(-_LIMIT_DB, min(sqnr_db, _LIMIT_DB)),
            spread=_spread(layer, moment.read_in_float),
        )
        if layer.layer not in lines or line.sqnr_db < lines[layer.layer].sqnr_db:
            lines[layer.layer] = line

    run_lockstep(simulated, inputs, measure)
    return tuple(lines.values())


def _spread(layer: SimulatedLayer, operand: torch.Tensor) -> float:
    """The largest channel of the input over the median one, by largest magnitude; channels of zeros do not count."""
    axis = operand.ndim - 1 if layer.operation == torch.ops.aten.linear.default else 1
    largest = operand.abs().amax(dim=[index for index in range(operand.ndim) if index != axis])
    largest = largest[largest > 0]
    return float(largest.max() / largest.median()) if len(largest) else 1.0


def lighten(task: Task, simulated: Simulated) -> Lighten:
    """The model with some of its layers in float."""
    return lambda layers: carry_out(task, (GiveBack(layers=tuple(layers)),), simulated, seed=task.seed)


def measure_shares(
    lighten: Lighten,
    judge: Judge,
    lines: Sequence[LayerLine],
    *,
    disagreeing: bool = True,
    proceed: Callable[[float], bool] = lambda share: True,
) -> tuple[LayerLine, ...]:
    """The lines with their share of the divergence, on the rows where float and int8 disagree most, or on the first.

    Rows where they disagree most are those that decide about the metric. But they were picked for the noise that they
    have, and any change of it lessens it there: for the divergence of all rows, ask the first.

    lighten: makes the model with these layers in float.
    proceed: told the share done, says whether to go on; the layers that were not reached keep share None.
    """
    distance = judge.divergence(lighten(()))
    order = np.argsort(-distance, kind="stable") if disagreeing else np.arange(len(distance))
    chosen = np.sort(order[:_DISAGREEING])
    inputs = tuple(column[torch.from_numpy(chosen)] for column in judge.inputs)
    reference = judge.outputs[chosen]
    whole = float(np.sqrt(distance[chosen]).mean())
    found = []
    for index, line in enumerate(lines):
        if whole > 0 and proceed(index / len(lines)):
            answers = judge.answers(lighten((line.layer,)), inputs=inputs)
            left = float(np.sqrt(divergence(reference, answers)).mean())
            line = replace(line, share=1 - left / whole)
        found.append(line)
    return tuple(found)


def rank(lines: Sequence[LayerLine], *, latency_ms: float) -> list[str]:
    """Layers that help, best gain for its measured cost first; what was not measured is taken to cost the average."""
    known = [line.cost_ms for line in lines if line.cost_ms is not None]
    average = sum(known) / len(known) if known else 0.0
    least = 0.02 * latency_ms  # below this a difference of two timings is noise

    def worth(line: LayerLine) -> float:
        cost = average if line.cost_ms is None else line.cost_ms
        return (line.share or 0.0) / max(cost, least, 1e-9)

    helping = [line for line in lines if line.share is not None and line.share > 0]
    return [line.layer for line in sorted(helping, key=worth, reverse=True)]


def with_costs(lines: Sequence[LayerLine], costs_ms: Mapping[str, float]) -> tuple[LayerLine, ...]:
    """The lines with what was measured for them."""
    return tuple(replace(line, cost_ms=costs_ms.get(line.layer, line.cost_ms)) for line in lines)
