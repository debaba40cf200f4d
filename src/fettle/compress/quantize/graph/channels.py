"""Follow the channels that a layer writes to the layers that read them.

Every value of the layer's output is labeled with its channel, and the labels are sent through the operations after
it: what only moves values (reshape, transpose, split, pad, ...) is run on the labels themselves, so that no layout
needs a rule of its own. A channel may be rescaled where each of its values ends in a layer that can undo it, and
passed on the way only operations f with f(s x) = s f(x) for every s > 0.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from fettle.compress.capture import quiet, two_rows
from fettle.compress.quantize.graph.constants import is_constant
from fettle.compress.quantize.graph.fold import FOLDABLE
from fettle.compress.step import Tensors

aten = torch.ops.aten
LAYERS = FOLDABLE
LAYER_NORM = aten.layer_norm.default

_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_MOVERS = (
    aten.flatten.using_ints, aten.transpose.int, aten.permute.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.unsqueeze.default, aten.clone.default, aten.slice.Tensor, aten.select.int, aten.expand.default,
    aten.pad.default, aten.upsample_nearest2d.vec, aten.pixel_shuffle.default, aten.flip.default, aten.repeat.default,
    aten.alias.default, aten.roll.default, aten.split.Tensor, aten.split_with_sizes.default, operator.getitem,
)  # fmt: skip
_HOMOGENEOUS = (
    aten.relu.default, aten.leaky_relu.default, aten.prelu.default, aten.abs.default, aten.neg.default,
)  # fmt: skip
# Windows over the last axes, by how many axes.
_POOLS = {
    aten.max_pool1d.default: 1, aten.avg_pool1d.default: 1, aten.adaptive_avg_pool1d.default: 1,
    aten.max_pool2d.default: 2, aten.avg_pool2d.default: 2, aten.adaptive_avg_pool2d.default: 2,
    aten.max_pool3d.default: 3, aten.avg_pool3d.default: 3, aten.adaptive_avg_pool3d.default: 3,
}  # fmt: skip
_REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
_PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)
# The operand whose rows are summed with weights: attention is linear in its values.
_AVERAGED = {aten.scaled_dot_product_attention.default: 2, aten.matmul.default: 1, aten.bmm.default: 1}

_NOTHING = 0  # the label of a zero, which any scale leaves a zero


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The channels that one layer writes, and who reads them. C: the number of channels.

    source: a convolution, linear layer or layer norm with constant weights that no other layer uses.
    free: (C,) bool: the channels that can be divided by any s > 0 in the source and multiplied by it in the readers.
    readers: reader -> (inputs,) int64: the channel that each of its input columns reads, -1 for one of another layer.
    stops: the operations at which some channel's scale would be lost, in order of execution.
    clips: activation with an upper limit -> (n,) int64: the channels that pass it; only where they were asked for.
    """

    source: Node
    free: torch.Tensor
    readers: dict[Node, torch.Tensor]
    stops: tuple[Node, ...] = ()
    clips: dict[Node, torch.Tensor] = field(default_factory=dict)


def find_streams(
    graph: GraphModule, example: Tensors, *, sources: Iterable[Any], through_clips: bool = False
) -> list[Stream]:
    """The stream of every layer of these ATen operations, in order of execution; those with no reader are left out.

    graph: with batch-norm folded. example: inputs, batch first; the graph runs on it once, for its sizes.
    through_clips: follow channels through ReLU6 and its like, which is exact only where the limit follows the scale.

    >>> from fettle.compress.capture import capture
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.ReLU(), nn.Linear(8, 4))
    >>> x = (torch.ones(2, 3, 2, 2),)
    >>> (stream,) = find_streams(capture(model, x), x, sources=LAYERS)
    >>> stream.free.tolist(), [columns.tolist() for columns in stream.readers.values()]
    ([True, True], [[0, 0, 0, 0, 1, 1, 1, 1]])
    """
    measure = _Measure(graph)
    with quiet(), torch.no_grad():
        measure.run(*(tensor[:2] for tensor in two_rows(example)))
    wanted, owned = set(sources), _owned(graph)
    nodes = list(graph.graph.nodes)
    streams = []
    for index, node in enumerate(nodes):
        if node.target in wanted and is_layer(node, owned):
            trace = _Trace(node, measure, owned, through_clips=through_clips)
            for later in nodes[index + 1 :]:
                trace.visit(later)
            if trace.readers:
                streams.append(trace.stream())
    return streams


def is_layer(node: Node, owned: set[Node]) -> bool:
    """Whether the weight and bias of a convolution, linear layer or layer norm are constants, the weight its own."""
    at = weight_position(node)
    weight, bias = (node.args[index] if len(node.args) > index else None for index in (at, at + 1))
    if node.kwargs or not isinstance(weight, Node) or weight not in owned:
        return False
    # A layer norm over several axes has no channels.
    plain = node.target != LAYER_NORM or weight.meta["val"].ndim == 1
    return plain and (bias is None or is_constant(bias))


def weight_position(layer: Node) -> int:
    """Which argument of a layer is its weight; its bias is the next."""
    return 2 if layer.target == LAYER_NORM else 1


def channel_axis(layer: Node) -> int:
    """Where a layer's channels lie in what it reads and writes, counted from the end: -3 for a 2-D convolution."""
    if layer.target == LAYER_NORM:
        return -1
    weight = layer.args[1]
    assert isinstance(weight, Node)
    return 1 - int(weight.meta["val"].ndim)


def _owned(graph: GraphModule) -> set[Node]:
    """The parameters that one layer alone reads: to rescale a shared one would be to store it twice."""
    nodes = [node for node in graph.graph.nodes if is_constant(node)]
    targets = [node.target for node in nodes]
    return {node for node in nodes if len(node.users) == 1 and targets.count(node.target) == 1}


class _Measure(Interpreter):
    """Runs the graph once and keeps the shape of each tensor and the value of all that is no tensor."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.shapes: dict[Node, torch.Size] = {}
        self.scalars: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.shapes[n] = value.shape
        elif isinstance(value, int | float | bool):
            self.scalars[n] = value
        return value


class _Trace:
    """One layer's labels on their way: 1 to C for its channels, C + 1 for values of others, 0 for zeros.

    Labels that reach a place from which no scale can be undone are stopped: their channels keep their scale.
    """

    def __init__(self, source: Node, measure: _Measure, owned: set[Node], *, through_clips: bool) -> None:
        self.source, self.measure, self.owned, self.through_clips = source, measure, owned, through_clips
        axis, shape = channel_axis(source), measure.shapes[source]
        self.count = shape[axis]
        names = torch.arange(1.0, self.count + 1).reshape(-1, *[1] * (-axis - 1))
        self.labels: dict[Node, Any] = {source: names.expand(shape).contiguous()}
        self.stopped = torch.zeros(self.count + 2, dtype=torch.bool)
        self.readers: dict[Node, torch.Tensor] = {}
        self.stops: dict[Node, None] = {}
        self.clips: dict[Node, torch.Tensor] = {}

    def stream(self) -> Stream:
        """What was found, after the last operation."""
        free = ~self.stopped[1:-1]
        read = torch.zeros_like(free)
        for columns in self.readers.values():
            read[columns[columns >= 0]] = True
        return Stream(
            source=self.source,
            free=free & read,
            readers=self.readers,
            stops=tuple(self.stops),
            clips=self.clips,
        )

    def visit(self, node: Node) -> None:
        """Take the labels through one operation, if it reads any."""
        carried = [operand for operand in node.all_input_nodes if operand in self.labels]
        if not carried or node.target == aten.sym_size.int:
            return
        if node.target in LAYERS and carried == [node.args[0]] and is_layer(node, self.owned):
            self.readers[node] = self._columns(node, self.labels[carried[0]])
            return
        passed = self._pass(node, carried)
        if passed is not None:
            self.labels[node] = passed
            return
        for operand in carried:
            self._stop(node, self.labels[operand])

    def _columns(self, reader: Node, labels: torch.Tensor) -> torch.Tensor:
        """The channel of each input column of a layer, -1 for zeros and values of others."""
        axis = labels.ndim + channel_axis(reader)
        found = self._agree(reader, labels, [at for at in range(labels.ndim) if at != axis])
        columns = found.flatten().long() - 1
        return torch.where(columns < self.count, columns, -1)

    def _pass(self, node: Node, carried: list[Node]) -> Any:
        """The labels of the node's output, or None where a scale would not pass."""
        target, first = node.target, node.args[0]
        if isinstance(first, Node) and carried == [first]:
            labels = self.labels[first]
            if target in (*_MOVERS, *_VIEWS):
                return self._move(node)
            if target in _HOMOGENEOUS:
                return labels
            if target in _POOLS:
                return self._spread(node, self._agree(node, labels, list(range(-_POOLS[target], 0))))
            if target in _REDUCTIONS and not node.kwargs:
                return self._reduce(node, labels)
            if self.through_clips and upper_limit(node) is not None:
                self.clips[node] = labels.unique().long() - 1
                return labels
        if target == aten.cat.default:
            return self._concatenate(node)
        if target in _PRODUCTS and len(carried) == 1:
            # A square grows by the square of a scale, and a divisor's scale divides.
            linear = list(node.args).count(carried[0]) == 1 and (target == aten.mul.Tensor or carried == [first])
            return self._spread(node, self.labels[carried[0]]) if linear else None
        averaged = node.args[_AVERAGED[target]] if target in _AVERAGED else None
        return self._average(node, averaged) if isinstance(averaged, Node) and averaged in self.labels else None

    def _move(self, node: Node) -> Any:
        """The operation itself, on labels."""
        if node.target == aten.pad.default and _pads_a_value(node):
            return None
        operation: Callable[..., Any] = aten.reshape.default if node.target in _VIEWS else node.target  # type: ignore[assignment]
        first, *rest = node.args
        settings: Any = torch.fx.map_arg(tuple(rest), self.measure.scalars.__getitem__)
        return operation(self.labels[first], *settings, **node.kwargs)  # type: ignore[index]

    def _reduce(self, node: Node, labels: torch.Tensor) -> torch.Tensor | None:
        axes: Any = node.args[1] if len(node.args) > 1 else None
        if not axes:
            return None
        found = self._agree(node, labels, list(axes))
        return found.reshape(self.measure.shapes[node])

    def _concatenate(self, node: Node) -> torch.Tensor:
        """Beside values of others, which keep their scale."""
        parts: Any = node.args[0]
        foreign = self.count + 1.0
        labels = [
            self.labels[part] if part in self.labels else torch.full(self.measure.shapes[part], foreign)
            for part in parts
        ]
        return aten.cat.default(labels, *node.args[1:])  # type: ignore[no-any-return]

    def _average(self, node: Node, averaged: Node) -> torch.Tensor | None:
        """Weighted sums over the rows, axis -2, where each row holds the same channels; the weights keep theirs."""
        shape, labels = self.measure.shapes[node], self.labels[averaged]
        if labels.ndim < 3 or (*labels.shape[:-2], labels.shape[-1]) != (*shape[:-2], shape[-1]):
            return None
        for weights in node.all_input_nodes:
            if weights is not averaged and weights in self.labels:
                self._stop(node, self.labels[weights])
        # A tensor attended by itself is weights and values at once.
        if [*node.args].count(averaged) > 1:
            return None
        return self._spread(node, self._agree(node, labels, [-2]))

    def _spread(self, node: Node, labels: torch.Tensor) -> torch.Tensor:
        """Labels repeated to the shape of the output, along the axes where they do not differ."""
        shape = self.measure.shapes[node]
        return labels.expand(shape).contiguous()

    def _agree(self, node: Node, labels: torch.Tensor, axes: list[int]) -> torch.Tensor:
        """One label for all places along the axes, kept with size 1; channels mixed with others are stopped."""
        highest = labels.amax(dim=axes, keepdim=True)
        lowest = torch.where(labels == _NOTHING, torch.inf, labels).amin(dim=axes, keepdim=True)
        mixed = lowest < highest
        if mixed.any():
            self._stop(node, labels[mixed.expand_as(labels)])
        return highest

    def _stop(self, node: Node, labels: Any) -> None:
        for part in labels if isinstance(labels, list | tuple) else [labels]:
            found = part.unique().long()
            self.stopped[found] = True
            if ((found > 0) & (found <= self.count)).any():
                self.stops[node] = None


def upper_limit(node: Node) -> float | None:
    """Where an activation that starts at zero cuts off above, such as 6 for ReLU6; None for any other operation."""
    if node.target == aten.relu6.default:
        return 6.0
    if node.target not in (aten.hardtanh.default, aten.clamp.default) or node.kwargs or len(node.args) != 3:
        return None
    low, high = node.args[1:]
    return float(high) if low == 0 and isinstance(high, int | float) and high > 0 else None


def _pads_a_value(node: Node) -> bool:
    """Whether a pad brings in a value that is not zero; reflection and replication only move values."""
    mode = node.args[2] if len(node.args) > 2 else "constant"
    value = node.args[3] if len(node.args) > 3 else 0.0
    return bool(node.kwargs) or (mode == "constant" and value not in (None, 0))
