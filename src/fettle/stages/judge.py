"""How far a quantized model's answers are from the float model's, and whether another's are nearer."""

from __future__ import annotations

import numpy as np
import torch

from fettle.compress.capture import quiet
from fettle.compress.step import Tensors
from fettle.core.signature import Array
from fettle.evaluate.parity import divergence
from fettle.stages.task import Task, as_tensors, outputs_of

_ROWS = 1000
_BATCH = 125
# What is tried is kept where it wins at least this share, and more than chance would: else the recipe stays shorter.
_LEAST_GAIN = 0.02
_LEAST_T = 2.0


class Judge:
    """How far a model's answers are from the float model's, row by row, on the first validation rows."""

    def __init__(self, task: Task, *, rows: int = _ROWS) -> None:
        self.inputs = as_tensors(task.leading_rows(rows))
        self.outputs = self.answers(task.program.module(check_guards=False))

    def answers(self, model: torch.nn.Module, *, inputs: Tensors | None = None) -> Array:
        """The model's first output for every row, or for these."""
        batches = zip(*(torch.split(column, _BATCH) for column in inputs or self.inputs), strict=True)
        with torch.no_grad(), quiet():
            return np.concatenate([outputs_of(model(*batch)) for batch in batches])

    def divergence(self, model: torch.nn.Module) -> Array:
        """(n,) float64, see `parity.divergence`."""
        return divergence(self.outputs, self.answers(model))


def helps(old: Array, new: Array) -> bool:
    """Whether the mean divergence falls by two percent or more, and the rows agree on it (paired, t > 2).

    Compared as roots: a few rows far off would decide alone.
    """
    before, after = np.sqrt(old), np.sqrt(new)
    gain = before - after
    error = float(gain.std()) / max(len(gain), 1) ** 0.5
    return bool(float(gain.mean()) > max(_LEAST_GAIN * float(before.mean()), _LEAST_T * error))
