"""Put quantizers into a graph: integer weights, and a quantize/dequantize pair at every placed tensor.

The operations are those of PyTorch's `quantized_decomposed` library, which the ONNX exporter, Inductor and
ExecuTorch all read: a graph that holds them is quantized once and runs in any of the runtimes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # NOTE: only registers the operations; nothing of torch.ao is called
from torch.fx import Node

from fettle.compress.quantize.graph.constants import constant, put_constant
from fettle.compress.quantize.graph.placement import Placement, fused
from fettle.compress.quantize.numerics.affine import Affine, channel_scales, quantize_channels

aten = torch.ops.aten
qdq = torch.ops.quantized_decomposed


def insert_quantizers(graph: torch.fx.GraphModule, placement: Placement, parameters: Mapping[Node, Affine]) -> None:
    """Change the graph in place. `parameters` holds those of every observed tensor."""
    sources = {node: placement.shared.get(node, node) for node in (*placement.hard, *placement.soft)}
    for anchor in placement.anchors:
        operand = anchor.args[0]
        assert isinstance(operand, Node)
        _quantize_weight(graph, anchor, parameters[sources[operand]])
    for node, source in sources.items():
        readers = node.users if node in placement.hard else placement.soft[node]
        _insert_pair(graph, node, parameters[source], list(readers))
    for node in placement.hard:
        _absorb_clip(graph, node, parameters[sources[node]])
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()


def _insert_pair(graph: torch.fx.GraphModule, node: Node, affine: Affine, readers: list[Node]) -> None:
    arguments = (affine.scale, affine.zero_point, affine.lowest, affine.highest, torch.uint8)
    with graph.graph.inserting_after(node):
        quantized = graph.graph.call_function(qdq.quantize_per_tensor.default, (node, *arguments))
    with graph.graph.inserting_after(quantized):
        result = graph.graph.call_function(qdq.dequantize_per_tensor.default, (quantized, *arguments))
    for reader in readers:
        if reader.op != "output":
            reader.replace_input_with(node, result)
    quantized.replace_input_with(result, node)


def _absorb_clip(graph: torch.fx.GraphModule, node: Node, affine: Affine) -> None:
    """A clip before a quantizer that cuts off at least as much does nothing."""
    limits = _limits(node)
    if limits is None:
        return
    low = (affine.lowest - affine.zero_point) * affine.scale
    high = (affine.highest - affine.zero_point) * affine.scale
    # The largest step may lie a rounding error above the limit that it stands for.
    slack = affine.scale * 1e-3
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


def _quantize_weight(graph: torch.fx.GraphModule, anchor: Node, operand: Affine) -> None:
    """Replace weight and bias by int8 and int32 constants with their dequantization.

    The bias has scale s_x · s_w per channel, the accumulator's own, so adding it is exact in every runtime.
    A linear layer becomes a product with the transposed weight: the form the runtimes fuse.
    """
    weight = constant(graph, anchor.args[1])
    scales = channel_scales(weight, axis=0)
    whole = quantize_channels(weight, scales, axis=0)
    bias = constant(graph, anchor.args[2]) if len(anchor.args) > 2 and anchor.args[2] is not None else None
    linear = anchor.target == aten.linear.default
    with graph.graph.inserting_before(anchor):
        wide = linear and _rank(anchor.args[0]) != 2
        weight_node = _dequantized(
            graph, f"{anchor.name}_weight_int8", whole.t() if linear else whole, scales, axis=1 if linear else 0
        )
        bias_node = None
        if bias is not None and wide:
            bias_node = put_constant(graph, f"{anchor.name}_bias", bias)
        elif bias is not None:
            bias_scales = scales * operand.scale
            steps = torch.round(bias.double() / bias_scales.double()).clamp(-(2**31) + 1, 2**31 - 1).to(torch.int32)
            bias_node = _dequantized(graph, f"{anchor.name}_bias_int32", steps, bias_scales, axis=0)
        if linear:
            _replace_linear(graph, anchor, weight_node, bias_node, wide=wide)
    if not linear:
        anchor.args = (anchor.args[0], weight_node, bias_node, *anchor.args[3:])


def _replace_linear(graph: torch.fx.GraphModule, anchor: Node, weight: Node, bias: Node | None, *, wide: bool) -> None:
    """In place, so that the placement's sets keep naming this node."""
    operand = anchor.args[0]
    assert isinstance(operand, Node)
    if not wide and bias is not None:
        anchor.target, anchor.args = aten.addmm.default, (bias, operand, weight)
        return
    if bias is None:
        anchor.target, anchor.args = aten.matmul.default, (operand, weight)
        return
    product = graph.graph.call_function(aten.matmul.default, (operand, weight))
    anchor.target, anchor.args = aten.add.Tensor, (product, bias)


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
