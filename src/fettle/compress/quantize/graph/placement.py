"""Where the quantizers go: which tensors become uint8, and which operations read them.

Three kinds of operation matter. *Anchors* (convolution, linear) are what integer arithmetic makes fast. *Followers*
(add, concat, pooling, ...) run in integers when everything they read already is. *Movers* (reshape, transpose, pad
with zeros, max-pool, ...) only move values, so their output shares the parameters of their input. All the rest stays
float and is named with its reason.

A tensor is quantized *hard* when every reader takes the quantized value (the output of a convolution or a follower:
runtimes fuse the requantization into the kernel), and *soft* when only the anchors do (the input of a linear layer
after a layer norm, whose residual branch keeps the float value).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from fettle.compress.capture import layer_of
from fettle.compress.quantize.graph.constants import is_constant

aten = torch.ops.aten

CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv1d.padding, aten.conv2d.padding)
ANCHORS = (*CONVOLUTIONS, aten.linear.default)
FOLLOWERS = (
    aten.add.Tensor, aten.mul.Tensor, aten.cat.default, aten.relu.default, aten.hardtanh.default, aten.sigmoid.default,
    aten.hardsigmoid.default, aten.hardswish.default, aten.silu.default, aten.leaky_relu.default, aten.mean.dim,
    aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool1d.default,
)  # fmt: skip
MOVERS = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.transpose.int,
    aten.permute.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.clone.default,
    aten.slice.Tensor, aten.select.int, aten.expand.default, aten.pad.default, aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.adaptive_max_pool2d.default, aten.upsample_nearest2d.vec, aten.alias.default,
)  # fmt: skip
# Float operations whose integer form would matter for speed; the others (comparisons, shapes) are not worth a line.
_HEAVY = {
    aten.scaled_dot_product_attention.default: "attention",
    aten.matmul.default: "matrix product of two activations",
    aten.bmm.default: "matrix product of two activations",
    aten.layer_norm.default: "layer norm",
    aten.group_norm.default: "group norm",
    aten._native_batch_norm_legit_no_training.default: "batch-norm with no layer to fold into",
    aten.softmax.int: "softmax",
    aten.gelu.default: "GELU",
    aten.conv_transpose2d.input: "transposed convolution",
    aten.conv3d.default: "three-dimensional convolution",
    aten.lstm.input: "LSTM",
    aten.gru.input: "GRU",
    aten.embedding.default: "embedding look-up",
}


@dataclass(slots=True)
class Placement:
    """The decision.

    anchors: layers to run in integers.
    hard: tensors quantized for all readers; soft: tensor -> the readers that take the quantized value.
    shared: mover -> the tensor whose parameters it shares; every key is itself in `hard` or `soft`.
    left_float: one sentence for each layer that stays float.
    """

    anchors: list[Node] = field(default_factory=list)
    hard: set[Node] = field(default_factory=set)
    soft: dict[Node, set[Node]] = field(default_factory=dict)
    shared: dict[Node, Node] = field(default_factory=dict)
    left_float: tuple[str, ...] = ()

    @property
    def observed(self) -> list[Node]:
        """The tensors whose range must be calibrated."""
        return [node for node in (*self.hard, *self.soft) if node not in self.shared]


def place(graph: torch.fx.GraphModule, *, keep_float: Iterable[str] = ()) -> Placement:
    """Decide for a graph with batch-norm already folded. `keep_float` names layers to leave alone."""
    kept = set(keep_float)
    nodes = list(graph.graph.nodes)
    anchors = [node for node in nodes if node.target in ANCHORS and reason_against(node, kept) is None]
    integer = _integer_domain(nodes, set(anchors))
    placement = Placement(anchors=anchors)
    for node in nodes:
        if node in integer and (node.target in CONVOLUTIONS or node.target in FOLLOWERS):
            _quantize_output(placement, node)
    for node in nodes:
        if node in integer and node.target in FOLLOWERS:
            for operand in tensor_operands(node):
                _quantize_operand(placement, operand, node, integer)
        elif node in placement.anchors:
            _quantize_operand(placement, node.args[0], node, integer)
    placement.left_float = tuple(_left_float(nodes, set(anchors), kept))
    return placement


def tensor_operands(node: Node) -> list[Node]:
    """The tensors a follower reads, constants included."""
    first = node.args[0]
    if isinstance(first, list | tuple):
        return [item for item in first if isinstance(item, Node)]
    return [item for item in node.args[:2] if isinstance(item, Node) and isinstance(item.meta.get("val"), torch.Tensor)]


def reason_against(node: Node, kept: set[str] = frozenset()) -> str | None:  # type: ignore[assignment]
    """Why this anchor cannot run in integers, or None."""
    if layer_of(node) in kept:
        return "kept in float on request"
    weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
    if not is_constant(weight) or not (bias is None or is_constant(bias)):
        return "its weight is computed while the model runs"
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.dtype != torch.float32:
        return f"it computes in {str(value.dtype).removeprefix('torch.')}"
    return None


def fused_relu(node: Node) -> Node:
    """The ReLU that alone reads this node, else the node: nothing is quantized between the two."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target == aten.relu.default else node


def _integer_domain(nodes: list[Node], anchors: set[Node]) -> set[Node]:
    """Nodes whose value exists in integers: convolutions, and what follows them toward another integer reader."""
    capable: set[Node] = set()
    for node in nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            continue
        if node.op == "placeholder" or (node in anchors and node.target in CONVOLUTIONS):
            capable.add(node)
        elif node.target in MOVERS and node.args[0] in capable and _keeps_range(node):
            capable.add(node)
        elif node.target in FOLLOWERS:
            operands = tensor_operands(node)
            scalar = node.target in (aten.add.Tensor, aten.mul.Tensor) and len(operands) < 2
            if operands and not scalar and all(operand in capable for operand in operands):
                capable.add(node)
    wanted: set[Node] = set()
    for node in reversed(nodes):
        if any(user in wanted if user.target not in ANCHORS else user in anchors for user in node.users):
            wanted.add(node) if node.op != "call_function" or node in capable else None
    return {node for node in capable if node in wanted or (node in anchors and not _feeds_output_only(node))}


def _keeps_range(node: Node) -> bool:
    """A pad with a constant may bring in a value outside the tensor's range, unless it is zero."""
    if node.target != aten.pad.default:
        return True
    mode, value = (*node.args[2:], *("constant", None)[len(node.args) - 2 :])
    return mode != "constant" or value in (None, 0)


def _feeds_output_only(node: Node) -> bool:
    return all(user.op == "output" for user in fused_relu(node).users)


def _quantize_output(placement: Placement, node: Node) -> None:
    """A convolution or follower writes integers, after the ReLU that it is fused with."""
    last = fused_relu(node)
    if not all(user.op == "output" for user in last.users):
        placement.hard.add(last)


def _quantize_operand(placement: Placement, operand: object, reader: Node, integer: set[Node]) -> None:
    """The reader takes this operand in integers; a mover in between shares the parameters of its source."""
    if not isinstance(operand, Node) or operand in placement.hard:
        return
    if operand.target == aten.relu.default and fused_relu(operand.args[0]) is operand and operand.args[0] in integer:  # type: ignore[arg-type]
        return  # the pair is one operation; its output was placed already
    if isinstance(reader.target, object) and reader.target == aten.relu.default and fused_relu(operand) is reader:
        return
    if operand.target in MOVERS and operand in integer:
        source = operand.args[0]
        assert isinstance(source, Node)
        _quantize_operand(placement, source, operand, integer)
        if source in placement.hard or operand in placement.soft.get(source, ()):
            placement.shared[operand] = placement.shared.get(source, source)
    placement.soft.setdefault(operand, set()).add(reader)


def _left_float(nodes: list[Node], anchors: set[Node], kept: set[str]) -> list[str]:
    sentences = []
    for node in nodes:
        if node.target in ANCHORS and node not in anchors:
            kind = "linear layer" if node.target == aten.linear.default else "convolution"
            sentences.append(f"{layer_of(node)}: {kind} stays float: {reason_against(node, kept)}")
        elif node.target in _HEAVY:
            sentences.append(f"{layer_of(node)}: {_HEAVY[node.target]} stays float: no integer form here")
    return list(dict.fromkeys(sentences))
