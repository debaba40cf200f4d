"""Quantization simulated in float: the form in which a model is corrected, trained and judged before it is lowered.

A *simulated layer* is a convolution or linear layer that rounds its weight to a few bits each time it runs. An
*activation quantizer* rounds a tensor to a grid and leaves it float. `graph/lower.py` turns both into integers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import Node

from fettle.compress.capture import layer_of, quiet
from fettle.compress.quantize.graph.constants import constant
from fettle.compress.quantize.graph.lower import lower
from fettle.compress.quantize.graph.modules import ActivationQuantizer, SimulatedLayer
from fettle.compress.quantize.graph.placement import Placement
from fettle.compress.quantize.numerics.grid import Grid
from fettle.core.errors import UsageError

M = TypeVar("M", bound=nn.Module)


class Simulated(nn.Module):
    """A captured graph with simulated layers and activation quantizers in it.

    Same inputs and outputs as the model it came from. Steps correct or train it; `lowered` gives what is deployed.
    """

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__()
        # Anew: the module that torch.export returns refuses train() and eval().
        self.body = torch.fx.GraphModule(graph, graph.graph)

    def __deepcopy__(self, memo: dict[int, Any]) -> Simulated:
        with quiet():  # torch warns of its own way to copy a tree of inputs
            return Simulated(copy.deepcopy(self.body, memo))

    @property
    def graph(self) -> torch.fx.Graph:
        """Its operations."""
        return self.body.graph

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.body(*inputs)

    def layers(self) -> dict[Node, SimulatedLayer]:
        """The layers that run in integers, in order of execution."""
        return self._called(SimulatedLayer)

    def quantizers(self) -> dict[Node, ActivationQuantizer]:
        """Where tensors are rounded, in order of execution. Tensors that share a grid share the quantizer."""
        return self._called(ActivationQuantizer)

    def _called(self, kind: type[M]) -> dict[Node, M]:
        called = {node: self.body.get_submodule(str(node.target)) for node in self.graph.nodes if _is_call(node)}
        return {node: module for node, module in called.items() if isinstance(module, kind)}

    def uncorrected(self) -> Simulated:
        """A copy whose weights round to nearest, with the biases that were trained."""
        copied = copy.deepcopy(self)
        for layer in copied.layers().values():
            layer.integers = layer.shift = None
        return copied

    def lowered(self) -> torch.fx.GraphModule:
        """The same computation on integers; this model stays as it is."""
        return lower(self.body)


def simulated_copy(model: nn.Module, step: str) -> Simulated:
    """A copy that a step may change. Raises UsageError for a model that is not quantized yet."""
    if not isinstance(model, Simulated):
        raise UsageError(
            f"{step} corrects a quantized model, got {type(model).__name__}: put quantize.post_training before it"
        )
    return copy.deepcopy(model)


def simulate(
    graph: torch.fx.GraphModule, placement: Placement, parameters: Mapping[Node, Grid], *, weight_bits: int = 8
) -> Simulated:
    """Put layers and quantizers where the placement says; the graph is used up.

    parameters: the grid of every observed tensor. Raises DataError for a weight that is not finite.
    """
    weights: dict[str, nn.Parameter] = {}
    for anchor in placement.anchors:
        _simulate_layer(graph, anchor, weights).set_bits(weight_bits)
    quantizers = {
        node: ActivationQuantizer(grid, layer=layer_of(node) if node.op != "placeholder" else f"input {node.name}")
        for node, grid in parameters.items()
    }
    for node in (*placement.hard, *placement.soft):
        readers = placement.soft.get(node) if node not in placement.hard else node.users
        _insert_quantizer(graph, node, quantizers, placement.shared.get(node, node), list(readers or ()))
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    return Simulated(graph)


def _simulate_layer(graph: torch.fx.GraphModule, anchor: Node, weights: dict[str, nn.Parameter]) -> SimulatedLayer:
    """In place, so that the placement keeps naming this node. Layers with one weight keep one."""
    _, weight, *rest = anchor.args
    bias = rest[0] if rest else None
    values: list[nn.Parameter | None] = []
    for node in (weight, bias):
        if isinstance(node, Node):
            fresh = nn.Parameter(constant(graph, node).clone(), requires_grad=False)
            values.append(weights.setdefault(str(node.target), fresh))
        else:
            values.append(None)
    assert values[0] is not None
    module = SimulatedLayer(
        layer=layer_of(anchor),
        operation=anchor.target,
        settings=tuple(rest[1:]),
        weight=values[0],
        bias=values[1],
    )
    name = f"layer_{anchor.name}"
    graph.add_submodule(name, module)
    anchor.op, anchor.target, anchor.args, anchor.kwargs = "call_module", name, (anchor.args[0],), {}
    return module


def _insert_quantizer(
    graph: torch.fx.GraphModule,
    node: Node,
    quantizers: Mapping[Node, ActivationQuantizer],
    source: Node,
    readers: list[Node],
) -> None:
    name = f"quantizer_{source.name}"
    if not hasattr(graph, name):
        graph.add_submodule(name, quantizers[source])
    with graph.graph.inserting_after(node):
        rounded = graph.graph.call_module(name, (node,))
    rounded.meta.update(node.meta)
    for reader in readers:
        if reader.op != "output":
            reader.replace_input_with(node, rounded)


def _is_call(node: Node) -> bool:
    return node.op == "call_module"
