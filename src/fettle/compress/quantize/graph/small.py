"""Layers too small to be worth rounding: a gate's, a head's. To convert what they read costs more than they do."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.fx import Node

# More than a tenth of the weights in float would show in the size of the file.
_LARGEST_WEIGHT_SHARE = 0.1


def small_layers(layers: list[Node], *, share: float) -> set[Node]:
    """Of these convolutions and linear layers those that read one position a row and do little of the work.

    share: of all the multiplications that the layers do for a row, what a small one does at most. Small layers that
    together hold more than a tenth of the weights are not small: none is returned.

    >>> from fettle.compress.capture import capture
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 2)
    ... )
    >>> graph = capture(model, (torch.ones(2, 3, 16, 16),))
    >>> both = [node for node in graph.graph.nodes if node.name in ("conv2d", "linear")]
    >>> [node.name for node in small_layers(both, share=0.01)]
    ['linear']
    """
    if not layers:
        return set()
    inputs = next(node for node in layers[0].graph.nodes if node.op == "placeholder")
    rows = _as_captured(inputs.meta["val"].shape[0])
    positions = {layer: _positions(layer, rows) for layer in layers}
    limit = share * sum(positions[layer] * _weights(layer) for layer in layers)
    small = {layer for layer in layers if positions[layer] == 1 and _weights(layer) <= limit}
    held = sum(_weights(layer) for layer in small)
    return small if held <= _LARGEST_WEIGHT_SHARE * sum(map(_weights, layers)) else set()


def work_shares(layers: Mapping[Node, tuple[str, torch.Tensor]]) -> dict[str, float]:
    """Of all the multiplications that these layers do for a row, the share of each, by its name.

    layers: the node of each, with its name and its weight.
    """
    work: dict[str, float] = {}
    for node, (name, weight) in layers.items():
        values = math.prod(map(_as_captured, node.meta["val"].shape))
        work[name] = work.get(name, 0.0) + values * weight.numel() / weight.shape[0]
    whole = sum(work.values())
    return {name: value / whole for name, value in work.items()}


def _weights(layer: Node) -> int:
    weight = layer.args[1]
    assert isinstance(weight, Node)
    return int(weight.meta["val"].numel())


def _positions(layer: Node, rows: int) -> int:
    """At how many places of a row the layer's weights are used."""
    value = layer.meta["val"]
    channels = value.shape[-1] if layer.target == torch.ops.aten.linear.default else value.shape[1]
    # Where a batch is folded into another axis, as in attention, only the count of all values tells.
    return math.prod(map(_as_captured, value.shape)) // (_as_captured(channels) * rows)


def _as_captured(size: int | torch.SymInt) -> int:
    """A free size as it was while the graph was captured; asking for its value would fix it."""
    return size if isinstance(size, int) else int(size.node.hint)
