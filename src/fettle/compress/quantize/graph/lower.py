"""From simulated quantization to integers: int8 weights, int32 biases, a quantize/dequantize pair at every quantizer.

The operations are those of PyTorch's `quantized_decomposed` library, which the ONNX exporter, Inductor and
ExecuTorch all read: a graph that holds them is quantized once and runs in any of the runtimes.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # NOTE: only registers the operations; nothing of torch.ao is called
from torch.fx import Node

from fettle.compress.capture import quiet
from fettle.compress.quantize.graph.constants import drop_unused, put_constant
from fettle.compress.quantize.graph.modules import ActivationQuantizer, SimulatedLayer
from fettle.compress.quantize.graph.placement import fused
from fettle.compress.quantize.numerics.grid import Grid
from fettle.compress.quantize.numerics.integer import scale_with_room

aten = torch.ops.aten
qdq = torch.ops.quantized_decomposed


def lower(body: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A new graph of ATen and `quantized_decomposed` operations; the given one stays as it is."""
    with quiet():  # torch warns of its own way to copy a tree of inputs
        graph = copy.deepcopy(body)
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    modules = {node: graph.get_submodule(str(node.target)) for node in calls}
    for node, module in modules.items():
        if isinstance(module, SimulatedLayer):
            operand = node.args[0]
            assert isinstance(operand, Node)
            source = modules[operand]
            assert isinstance(source, ActivationQuantizer)
            _lower_layer(graph, node, module, source.grid)
    for node, module in modules.items():
        if isinstance(module, ActivationQuantizer):
            _lower_quantizer(graph, node, module.grid)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    drop_unused(graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def _lower_quantizer(graph: torch.fx.GraphModule, node: Node, grid: Grid) -> None:
    source = node.args[0]
    assert isinstance(source, Node)
    scheme = grid.scheme
    arguments = (float(grid.scale), int(grid.zero_point), scheme.lowest, scheme.highest, scheme.dtype)
    with graph.graph.inserting_before(node):
        quantized = graph.graph.call_function(qdq.quantize_per_tensor.default, (source, *arguments))
        result = graph.graph.call_function(qdq.dequantize_per_tensor.default, (quantized, *arguments))
    result.meta.update(node.meta)
    node.replace_all_uses_with(result)
    graph.graph.erase_node(node)
    _absorb_clip(graph, source, grid)


def _absorb_clip(graph: torch.fx.GraphModule, node: Node, grid: Grid) -> None:
    """A clip before a quantizer that cuts off at least as much does nothing."""
    limits = _limits(node)
    if limits is None:
        return
    low, high = grid.ends
    # The largest step may lie a rounding error above the limit that it stands for.
    slack = float(grid.scale) * 1e-3
    if low < limits[0] - slack or high > limits[1] + slack:
        return
    source = node.args[0]
    assert isinstance(source, Node)
    if len(node.users) == 1 and fused(source) is node:
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)


def _limits(clip: Node) -> tuple[float, float] | None:
    """Where a clip cuts off, or None for any other node, and for limits that are tensors or computed."""
    if clip.target == aten.relu.default:
        return 0.0, math.inf
    if clip.target == aten.relu6.default:
        return 0.0, 6.0
    if clip.target not in (aten.hardtanh.default, aten.clamp.default) or clip.kwargs:
        return None
    low, high = (-1.0, 1.0) if clip.target == aten.hardtanh.default else (-math.inf, math.inf)
    ends: list[Any] = [low, high]
    for position, end in enumerate(clip.args[1:]):
        ends[position] = ends[position] if end is None else end
    return (ends[0], ends[1]) if all(isinstance(end, int | float) for end in ends) else None


def _lower_layer(graph: torch.fx.GraphModule, node: Node, layer: SimulatedLayer, operand: Grid) -> None:
    """Replace the call by the operation on int8 and int32 constants with their dequantization.

    The bias has scale s_x · s_w per channel, the accumulator's own, so adding it is exact in every runtime.
    A linear layer becomes a product with the transposed weight: the form the runtimes fuse.
    """
    whole, scales, bias = _fit_bias(layer, operand)
    name = str(node.target).removeprefix("layer_")
    linear = layer.operation == aten.linear.default
    wide = linear and _rank(node.args[0]) != 2
    with graph.graph.inserting_before(node):
        weight_node = _dequantized(
            graph, f"{name}_weight_int8", whole.t() if linear else whole, scales, axis=1 if linear else 0
        )
        bias_node = None
        if bias is not None and wide:
            bias_node = put_constant(graph, f"{name}_bias", bias)
        elif bias is not None:
            bias_scales = scales * operand.scale
            steps = torch.round(bias.double() / bias_scales.double()).to(torch.int32)
            bias_node = _dequantized(graph, f"{name}_bias_int32", steps, bias_scales, axis=0)
        if linear:
            result = _linear(graph, node.args[0], weight_node, bias_node, wide=wide)
        else:
            arguments = (node.args[0], weight_node, bias_node, *layer.settings)
            result = graph.graph.call_function(layer.operation, arguments)
    result.meta.update(node.meta)
    node.replace_all_uses_with(result)
    graph.graph.erase_node(node)


def _fit_bias(layer: SimulatedLayer, operand: Grid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Integer weight, its scales, and the float bias, which must be an int32 of step s_x · s_w."""
    whole, bias = layer.deployed()
    scales = layer.scales.detach()
    if bias is None:
        return whole, scales, None
    coarse = scale_with_room(scales, bias, operand.scale).to(torch.float32)
    shape = [-1, *[1] * (whole.ndim - 1)]
    smaller = torch.round(whole.double() * (scales.double() / coarse.double()).reshape(shape)).to(whole.dtype)
    return torch.where((coarse > scales).reshape(shape), smaller, whole), coarse, bias


def _linear(graph: torch.fx.GraphModule, operand: Any, weight: Node, bias: Node | None, *, wide: bool) -> Node:
    if not wide and bias is not None:
        return graph.graph.call_function(aten.addmm.default, (bias, operand, weight))
    product = graph.graph.call_function(aten.matmul.default, (operand, weight))
    return product if bias is None else graph.graph.call_function(aten.add.Tensor, (product, bias))


def _rank(node: object) -> int:
    assert isinstance(node, Node)
    return int(node.meta["val"].ndim)


def _dequantized(graph: torch.fx.GraphModule, name: str, whole: torch.Tensor, scales: torch.Tensor, axis: int) -> Node:
    """A constant of integers followed by its dequantization per channel, symmetric."""
    limits = torch.iinfo(whole.dtype)
    integers = put_constant(graph, name, whole)
    scale = put_constant(graph, f"{name}_scale", scales.to(torch.float32))
    zero = put_constant(graph, f"{name}_zero", torch.zeros_like(scales, dtype=whole.dtype))
    return graph.graph.call_function(
        qdq.dequantize_per_channel.default, (integers, scale, zero, axis, limits.min, limits.max, whole.dtype)
    )
