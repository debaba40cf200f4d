"""Fold batch-norm into the convolution or linear layer before it: y = γ (Wx + b − μ) / √(σ² + ε) + β."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch

from fettle.compress.quantize.graph.constants import constant, is_constant, put_constant

aten = torch.ops.aten
FOLDABLE = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
)  # fmt: skip
_BATCH_NORM = aten._native_batch_norm_legit_no_training.default


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoldedNorm:
    """A batch-norm and the layer it was folded into, both as they were before.

    weight: (C, ...); bias: (C,) or None. gamma, beta, mean, variance: (C,); epsilon is added to the variance.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    gamma: torch.Tensor
    beta: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    epsilon: float

    def folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias (C,) of the one layer that computes both: W g and (b − μ) g + β, g = γ / √(σ² + ε)."""
        gain = self.gamma / torch.sqrt(self.variance + self.epsilon)
        start = torch.zeros_like(self.mean) if self.bias is None else self.bias
        weight = self.weight * gain.reshape(-1, *[1] * (self.weight.ndim - 1))
        return weight, (start - self.mean) * gain + self.beta


def fold_batch_norm(graph: torch.fx.GraphModule) -> dict[torch.fx.Node, FoldedNorm]:
    """Fold in place wherever the layer's only reader is the batch-norm; return what each such layer took in.

    A batch-norm after anything else stays as it is. Dropout, which export leaves as a copy, is removed.
    """
    folded: dict[torch.fx.Node, FoldedNorm] = {}
    for node in list(graph.graph.nodes):
        if node.target == _BATCH_NORM and _is_foldable(node):
            layer = node.args[0]
            folded[layer] = _fold_one(graph, node)
        elif node.target == aten.clone.default and not node.kwargs:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return folded


def _is_foldable(norm: torch.fx.Node) -> bool:
    layer = norm.args[0]
    assert isinstance(layer, torch.fx.Node)
    return (
        layer.target in FOLDABLE
        and len(layer.users) == 1
        and is_constant(layer.args[1])
        and (len(layer.args) < 3 or layer.args[2] is None or is_constant(layer.args[2]))
        # A linear layer over tokens puts its channels last, and batch-norm takes dimension 1 for them.
        and not (layer.target == aten.linear.default and layer.meta["val"].ndim != 2)
        and all(user.target is operator.getitem and user.args[1] == 0 for user in norm.users)
    )


def _fold_one(graph: torch.fx.GraphModule, norm: torch.fx.Node) -> FoldedNorm:
    layer, gamma, beta, mean, variance = norm.args[:5]
    assert isinstance(layer, torch.fx.Node)
    center = constant(graph, mean)
    found = FoldedNorm(
        weight=constant(graph, layer.args[1]),
        bias=constant(graph, layer.args[2]) if len(layer.args) > 2 and layer.args[2] is not None else None,
        gamma=constant(graph, gamma) if gamma is not None else torch.ones_like(center),
        beta=constant(graph, beta) if beta is not None else torch.zeros_like(center),
        mean=center,
        variance=constant(graph, variance),
        epsilon=float(norm.args[6]),  # type: ignore[arg-type]
    )
    weight, bias = found.folded()
    with graph.graph.inserting_before(layer):
        new_weight = put_constant(graph, f"{layer.name}_weight", weight)
        new_bias = put_constant(graph, f"{layer.name}_bias", bias)
    layer.args = (layer.args[0], new_weight, new_bias, *layer.args[3:])
    for user in list(norm.users):
        user.replace_all_uses_with(layer)
        graph.graph.erase_node(user)
    graph.graph.erase_node(norm)
    return found
