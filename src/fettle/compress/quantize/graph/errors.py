"""How far each layer of a quantized model is from the float model it stands for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fettle.compress.batches import input_batches
from fettle.compress.quantize.graph.lockstep import Moment, run_lockstep
from fettle.compress.quantize.graph.simulate import Simulated
from fettle.compress.quantize.numerics.errors import Deviation, DeviationSum
from fettle.core.errors import DataError, UsageError


def layer_errors(simulated: Simulated, batches: Iterable[Any]) -> dict[str, Deviation]:
    """The error of each layer's output that has gathered up to there, by the layer's name, in order of execution.

    simulated: what `PostTraining`, a correction or training returns. batches: of the model's inputs, as for
    calibration. A layer that is called several times is measured over all calls. Memory does not depend on the number
    of batches. Raises UsageError for a model that is not simulated, DataError for no batch, NaN or infinity.

    >>> import torch
    >>> from fettle.compress.quantize import PostTraining
    >>> from fettle.compress.step import Context
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    >>> x = torch.linspace(-1, 1, 40).reshape(10, 4)
    >>> simulated = PostTraining().apply(model, Context(example=(x,), calibration=[(x,)]))
    >>> errors = layer_errors(simulated, [(x,)])
    >>> list(errors), errors["0"].sqnr_db > 30
    (['0', '2'], True)
    """
    if not isinstance(simulated, Simulated):
        raise UsageError(
            f"layer errors need a simulated model, got {type(simulated).__name__}: apply quantize.post_training first"
        )
    totals: dict[str, DeviationSum] = {}

    def add(moment: Moment) -> None:
        name = moment.layer.layer
        try:
            totals.setdefault(name, DeviationSum()).update(moment.wrote_in_float, moment.wrote)
        except DataError as problem:
            raise DataError(f"the output of layer '{name}': {problem}") from None

    inputs = tuple(node.meta["val"] for node in simulated.graph.nodes if node.op == "placeholder")
    for batch in input_batches(batches, inputs):
        run_lockstep(simulated, batch, add)
    if not totals:
        raise DataError("layer errors need at least one batch, and a model with a layer that is quantized")
    return {name: total.result() for name, total in totals.items()}
