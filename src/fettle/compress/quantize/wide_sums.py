"""Add a layer's result before it is rounded, where the engine can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.fx import Node

from fettle.compress.quantize.graph.modules import SimulatedLayer
from fettle.compress.quantize.graph.simulate import Simulated, simulated_copy
from fettle.compress.step import Context, Step

_ADD = torch.ops.aten.add.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class WideSums(Step):
    """In y = f(x) + x, round x and y but not f(x): a residual block loses a third of its rounding noise.

    An engine that fuses the addition into the layer computes it on the wide accumulator anyway; OpenVINO does. One that
    does not would run the layer in float: ONNX Runtime does, so its recipes go without this step. Where both sides of a
    sum are layers, the one that runs last is left unrounded.

    Needs a model that PostTraining made: raises UsageError for another.

    >>> from fettle.compress.quantize import PostTraining
    >>> from fettle.testing.models import CASES
    >>> case = CASES["residual"]
    >>> context = Context(example=case.data(rows=2), calibration=[case.data(rows=32)])
    >>> narrow = PostTraining().apply(case.build(), context)
    >>> len(narrow.quantizers()) - len(WideSums().apply(narrow, context).quantizers())
    1
    """

    shrinks: ClassVar[frozenset[str]] = frozenset()
    follows: ClassVar[str] = "quantize.post_training"

    def apply(self, model: nn.Module, context: Context) -> Simulated:
        simulated = simulated_copy(model, self.step_name())
        order = {node: index for index, node in enumerate(simulated.graph.nodes)}
        layers, quantizers = simulated.layers(), simulated.quantizers()
        for node in [node for node in simulated.graph.nodes if node.target == _ADD]:
            narrow = [operand for operand in node.args[:2] if _is_rounded_for_sums(operand, layers, quantizers)]
            if narrow:
                last = max(narrow, key=lambda operand: order[operand])
                last.replace_all_uses_with(last.args[0])
                simulated.graph.erase_node(last)
        simulated.body.delete_all_unused_submodules()
        simulated.body.recompile()
        return simulated


def _is_rounded_for_sums(operand: object, layers: dict[Node, SimulatedLayer], quantizers: object) -> bool:
    """Whether this is a quantizer right after a layer, that only additions read, and that is still in the graph."""
    if not isinstance(operand, Node) or operand not in quantizers:  # type: ignore[operator]
        return False
    return operand.args[0] in layers and all(user.target == _ADD for user in operand.users)
