"""Fold batch-norm into the convolution or linear layer before it: y = γ (Wx + b − μ) / √(σ² + ε) + β."""

from __future__ import annotations

import operator

import torch

from fettle.compress.quantize.graph.constants import constant, is_constant, put_constant

aten = torch.ops.aten
FOLDABLE = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
)  # fmt: skip
_BATCH_NORM = aten._native_batch_norm_legit_no_training.default


def fold_batch_norm(graph: torch.fx.GraphModule) -> int:
    """Fold in place wherever the layer's only reader is the batch-norm; return how many were folded.

    A batch-norm after anything else stays as it is. Dropout, which export leaves as a copy, is removed.
    """
    folded = 0
    for node in list(graph.graph.nodes):
        if node.target == _BATCH_NORM and _fold_one(graph, node):
            folded += 1
        elif node.target == aten.clone.default and not node.kwargs:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return folded


def _fold_one(graph: torch.fx.GraphModule, norm: torch.fx.Node) -> bool:
    layer, gamma, beta, mean, variance = norm.args[:5]
    epsilon = float(norm.args[6])  # type: ignore[arg-type]
    users = list(norm.users)
    assert isinstance(layer, torch.fx.Node)
    if (
        layer.target not in FOLDABLE
        or len(layer.users) != 1
        or not is_constant(layer.args[1])
        or not (len(layer.args) < 3 or layer.args[2] is None or is_constant(layer.args[2]))
        or any(user.target is not operator.getitem or user.args[1] != 0 for user in users)
    ):
        return False
    weight = constant(graph, layer.args[1])
    bias = constant(graph, layer.args[2]) if len(layer.args) > 2 and layer.args[2] is not None else None
    center, spread = constant(graph, mean), torch.sqrt(constant(graph, variance) + epsilon)
    gain = (constant(graph, gamma) if gamma is not None else torch.ones_like(center)) / spread
    shift = constant(graph, beta) if beta is not None else torch.zeros_like(center)
    start = bias if bias is not None else torch.zeros_like(center)
    with graph.graph.inserting_before(layer):
        new_weight = put_constant(graph, f"{layer.name}_weight", weight * gain.reshape(-1, *[1] * (weight.ndim - 1)))
        new_bias = put_constant(graph, f"{layer.name}_bias", (start - center) * gain + shift)
    layer.args = (layer.args[0], new_weight, new_bias, *layer.args[3:])
    for user in users:
        user.replace_all_uses_with(layer)
        graph.graph.erase_node(user)
    graph.graph.erase_node(norm)
    return True
