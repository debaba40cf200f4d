"""Shift each bias by the mean error that rounding leaves in its layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fettle.compress.batches import input_batches
from fettle.compress.quantize.graph.lockstep import Moment, affordable_rows, gather, run_lockstep
from fettle.compress.quantize.graph.modules import SimulatedLayer
from fettle.compress.quantize.graph.simulate import Simulated, simulated_copy
from fettle.compress.step import Context, Step
from fettle.core.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasCorrection(Step):
    """b ← b − E[ỹ − y], channel by channel, layer after layer: each sees the errors that those before it left.

    y: the float model's output of the layer; ỹ: the simulated one's, both over the same calibration rows. Rounding to
    the nearest is unbiased only on average; where a channel's weights round up more than down, every answer shifts.

    rows: calibration rows that are averaged over; fewer where the largest tensor of the model would not fit 256 MiB.

    Needs a model that PostTraining made: raises UsageError for another, DataError without calibration data. Nagel et
    al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2, the empirical form.

    >>> from fettle.compress.quantize import PostTraining
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> context = Context(example=(x[:2],), calibration=[(x,)])
    >>> corrected = BiasCorrection().apply(PostTraining().apply(model, context), context)
    >>> bool((corrected(x) - model(x)).mean(dim=0).abs().max() < 1e-3)
    True
    """

    shrinks: ClassVar[frozenset[str]] = frozenset()
    follows: ClassVar[str] = "quantize.post_training"

    rows: int = 512

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise UsageError(f"rows must be at least 1, got {self.rows}")

    def apply(self, model: nn.Module, context: Context) -> Simulated:
        simulated = simulated_copy(model, self.step_name())
        inputs = gather(
            input_batches(context.calibration, context.example), rows=affordable_rows(simulated, rows=self.rows)
        )
        count = max(len(simulated.layers()), 1)
        seen: set[SimulatedLayer] = set()

        def correct(moment: Moment) -> torch.Tensor | None:
            if moment.layer in seen:  # called twice: the first call decided
                return None
            seen.add(moment.layer)
            context.progress(len(seen) / count)
            error, laid_out = moment.mean_error()
            moment.layer.shift_bias(-error)
            return moment.wrote - laid_out

        run_lockstep(simulated, inputs, correct)
        context.progress(1.0)
        return simulated
