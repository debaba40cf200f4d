"""Let chosen layers of a quantized model compute in float again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.fx import Node

from fettle.compress.quantize.graph.constants import put_parameter
from fettle.compress.quantize.graph.modules import SimulatedLayer
from fettle.compress.quantize.graph.placement import FOLLOWERS, MOVERS
from fettle.compress.quantize.graph.simulate import Simulated, simulated_copy
from fettle.compress.step import Context, Step
from fettle.core.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveBack(Step):
    """The named layers read what was not rounded, with the weights and biases they were trained with.

    What they write is rounded where another layer reads it in integers, as before. Corrections of these layers are
    undone with their rounding; so this step goes before the corrections, which then see what is really deployed.

    layers: names of layers that run in integers.

    Needs a model that PostTraining made: raises UsageError for another, and for a name that no integer layer has.

    >>> import torch
    >>> from fettle.compress.quantize import PostTraining
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    >>> context = Context(example=(torch.zeros(2, 4),), calibration=[(torch.eye(4),)])
    >>> quantized = PostTraining().apply(model, context)
    >>> [layer.layer for layer in GiveBack(layers=("0",)).apply(quantized, context).layers().values()]
    ['2']
    """

    shrinks: ClassVar[frozenset[str]] = frozenset()
    follows: ClassVar[str] = "quantize.post_training"

    layers: tuple[str, ...] = ()

    def apply(self, model: nn.Module, context: Context) -> Simulated:
        simulated = simulated_copy(model, self.step_name())
        known = {layer.layer for layer in simulated.layers().values()}
        for name in self.layers:
            if name not in known:
                raise UsageError(f"no layer in integers is called '{name}'. There are: {', '.join(sorted(known))}")
        for node, layer in simulated.layers().items():
            if layer.layer in self.layers:
                _release(simulated, node, layer)
        _drop_idle(simulated)
        simulated.graph.eliminate_dead_code()
        simulated.body.delete_all_unused_submodules()
        simulated.body.recompile()
        for name in self.layers:
            context.note(f"{name}: runs in float again")
        return simulated


def _drop_idle(simulated: Simulated) -> None:
    """Remove the quantizers that no integer layer needs any more: what leads to a float layer alone is not rounded."""
    layers, quantizers = simulated.layers(), simulated.quantizers()
    integer: set[Node] = set()  # computed in integers, on the way to a layer that runs in them
    for node in reversed(simulated.graph.nodes):
        reads = any(user in layers or user in integer for user in node.users)
        if reads and (node in quantizers or node.target in FOLLOWERS or node.target in MOVERS):
            integer.add(node)
    for node in quantizers:
        if node not in integer:
            source = node.args[0]
            assert isinstance(source, Node)
            node.replace_all_uses_with(source)
            simulated.graph.erase_node(node)


def _release(simulated: Simulated, node: Node, layer: SimulatedLayer) -> None:
    quantizer = node.args[0]
    assert isinstance(quantizer, Node)
    with simulated.graph.inserting_before(node):
        weight = put_parameter(simulated.body, f"{node.name}_weight", layer.weight)
        bias = None if layer.bias is None else put_parameter(simulated.body, f"{node.name}_bias", layer.bias)
        arguments = (quantizer.args[0], weight, bias, *layer.settings)
        result = simulated.graph.call_function(layer.operation, arguments)
    result.meta.update(node.meta)
    node.replace_all_uses_with(result)
    simulated.graph.erase_node(node)
