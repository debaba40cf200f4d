"""Choose for each weight whether it rounds up or down by what that does to the layer's output on calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fettle.compress.batches import input_batches
from fettle.compress.quantize.graph.lockstep import Moment, affordable_rows, gather, run_lockstep
from fettle.compress.quantize.graph.modules import SimulatedLayer
from fettle.compress.quantize.graph.simulate import Simulated, simulated_copy
from fettle.compress.quantize.numerics.rounding import round_jointly
from fettle.compress.step import Context, Step
from fettle.core.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaRound(Step):
    """Adaptive rounding: minimize E‖(ŵ − w) x‖² over ŵ that round w up or down, layer after layer.

    x: what the layer reads in the quantized model. Its second moments about its mean are gathered over the
    calibration rows, the rounding is found by `round_jointly`, and the mean of what is left goes into the bias, where
    it costs nothing. A layer of more than `width_limit` weights an output keeps rounding to nearest, with a note.

    rows: calibration rows; fewer where the largest tensor of the model would not fit 256 MiB.

    Needs a model that PostTraining made: raises UsageError for another, DataError without calibration data. Nagel et
    al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization".

    >>> from fettle.compress.quantize import PostTraining
    >>> with torch.random.fork_rng(devices=[]):
    ...     _ = torch.manual_seed(0)
    ...     model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    ...     x = torch.randn(256, 4) @ torch.randn(4, 16)
    >>> context = Context(example=(x[:2],), calibration=[(x,)])
    >>> coarse = PostTraining(weight_bits=3).apply(model, context)
    >>> def error(quantized):
    ...     return torch.nn.functional.mse_loss(quantized(x), model(x)).item()
    >>> error(AdaRound().apply(coarse, context)) < 0.7 * error(coarse)
    True
    """

    shrinks: ClassVar[frozenset[str]] = frozenset()
    follows: ClassVar[str] = "quantize.post_training"

    rows: int = 256
    width_limit: int = 4608

    def __post_init__(self) -> None:
        for name in ("rows", "width_limit"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")

    def apply(self, model: nn.Module, context: Context) -> Simulated:
        simulated = simulated_copy(model, self.step_name())
        inputs = gather(
            input_batches(context.calibration, context.example), rows=affordable_rows(simulated, rows=self.rows)
        )
        count = max(len(simulated.layers()), 1)
        seen: dict[nn.Parameter, SimulatedLayer] = {}

        def adapt(moment: Moment) -> torch.Tensor | None:
            layer = moment.layer
            if layer.weight in seen:  # used twice: the first use decided
                layer.integers = seen[layer.weight].integers
                return None
            seen[layer.weight] = layer
            context.progress(len(seen) / count)
            if (width := layer.weight[0].numel()) > self.width_limit:
                context.note(
                    f"{layer.layer}: weights are rounded to nearest: {width} for each output are more than "
                    f"width_limit, {self.width_limit}"
                )
                return None
            _round_weight(layer, moment.read)
            wrote: torch.Tensor = layer(moment.read)
            error, laid_out = moment.mean_error(wrote)
            layer.shift_bias(-error)
            return wrote - laid_out

        run_lockstep(simulated, inputs, adapt)
        context.progress(1.0)
        return simulated


def _round_weight(layer: SimulatedLayer, operand: torch.Tensor) -> None:
    flat = layer.weight.flatten(1)  # (C, K)
    whole = round_jointly(flat, layer.scales, second_moments(layer, operand), highest=layer.highest)
    layer.integers = whole.reshape(layer.weight.shape)


def second_moments(layer: SimulatedLayer, operand: torch.Tensor, *, chunk_rows: int = 16) -> torch.Tensor:
    """(G, K, K): for each group of the layer, E[x xᵀ] − E[x] E[x]ᵀ over all rows and positions; float64.

    x: (K,) the values that meet one output's weights. A convolution's are found by the convolution itself, with the
    unit vectors for weights: its stride, padding and dilation need no second implementation.
    """
    width = layer.weight[0].numel()
    linear = layer.operation == torch.ops.aten.linear.default
    groups = 1 if linear or len(layer.settings) < 4 else int(layer.settings[3])
    second = torch.zeros(groups, width, width, dtype=torch.float64)
    total, count = torch.zeros(groups, width, dtype=torch.float64), 0
    units = torch.eye(width).reshape(width, *layer.weight.shape[1:]).repeat(groups, *[1] * (layer.weight.ndim - 1))
    for rows in torch.split(operand, chunk_rows):
        if linear:
            patches = rows.reshape(1, -1, width)
        else:
            found = layer.compute(rows, units, None).flatten(2)  # (n, G K, positions)
            patches = found.reshape(len(rows), groups, width, -1).permute(1, 0, 3, 2).reshape(groups, -1, width)
        second += patches.transpose(1, 2) @ patches
        total += patches.sum(dim=1)
        count += patches.shape[1]
    mean = total / count
    return second / count - mean[:, :, None] * mean[:, None, :]
