"""Where the quantizers go: which tensors become uint8, and which operations read them.

Three kinds of operation matter. *Anchors* (convolution, linear) are what integer arithmetic makes fast. *Followers*
(add, concat, pooling, ...) run in integers when everything they read already is. *Movers* (reshape, transpose, pad
with zeros, max-pool, ...) only move values, so their output shares the parameters of their input. All the rest stays
float and is named with its reason.

A tensor is quantized *hard* when every reader takes the quantized value (the output of a convolution or a follower:
runtimes fuse the requantization into the kernel), and *soft* when only the anchors do (the input of a linear layer
after a layer norm, whose residual branch keeps the float value). A *gate*, the small factor that scales the channels of
a large tensor, is rounded as it comes from float, so that the product with it stays in integers.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from fettle.compress.capture import is_named, layer_of
from fettle.compress.quantize.graph.constants import is_constant
from fettle.compress.quantize.graph.small import small_layers

aten = torch.ops.aten

CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv1d.padding, aten.conv2d.padding)
ANCHORS = (*CONVOLUTIONS, aten.linear.default)
# Activations that only cut off: an engine fuses one with the layer before it, whose output is then rounded once.
CLIPS = (aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default)
FOLLOWERS = (
    *CLIPS, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.cat.default, aten.sigmoid.default,
    aten.hardsigmoid.default, aten.hardswish.default, aten.silu.default, aten.leaky_relu.default, aten.mean.dim,
    aten.avg_pool1d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
)  # fmt: skip
MOVERS = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.transpose.int,
    aten.permute.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.clone.default,
    aten.slice.Tensor, aten.select.int, aten.expand.default, aten.pad.default, aten.max_pool1d.default,
    aten.max_pool2d.default, aten.upsample_nearest2d.vec, aten.pixel_shuffle.default, aten.flip.default,
    aten.repeat.default, aten.amax.default, aten.alias.default,
)  # fmt: skip
_BINARY = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)
# Float operations whose integer form would matter for speed; the others (comparisons, shapes) are not worth a line.
_HEAVY = {
    aten.scaled_dot_product_attention.default: "attention",
    aten.matmul.default: "matrix product",
    aten.mm.default: "matrix product",
    aten.addmm.default: "matrix product",
    aten.bmm.default: "matrix product",
    aten.baddbmm.default: "matrix product",
    aten.einsum.default: "Einstein sum",
    aten.bilinear.default: "bilinear layer",
    aten.layer_norm.default: "layer norm",
    aten.group_norm.default: "group norm",
    aten.instance_norm.default: "instance norm",
    aten._native_batch_norm_legit_no_training.default: "batch-norm with no layer to fold into",
    aten.softmax.int: "softmax",
    aten.gelu.default: "GELU",
    aten.conv_transpose1d.default: "transposed convolution",
    aten.conv_transpose2d.input: "transposed convolution",
    aten.conv_transpose3d.input: "transposed convolution",
    aten.conv3d.default: "three-dimensional convolution",
    aten.conv3d.padding: "three-dimensional convolution",
    aten.rnn_tanh.input: "RNN",
    aten.rnn_relu.input: "RNN",
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

    Dictionaries stand for sets, whose order would differ from run to run, and the written file with it.
    """

    anchors: list[Node] = field(default_factory=list)
    hard: dict[Node, None] = field(default_factory=dict)
    soft: dict[Node, dict[Node, None]] = field(default_factory=dict)
    shared: dict[Node, Node] = field(default_factory=dict)
    left_float: tuple[str, ...] = ()

    @property
    def observed(self) -> list[Node]:
        """The tensors whose range must be calibrated."""
        return [node for node in (*self.hard, *self.soft) if node not in self.shared]


def place(graph: torch.fx.GraphModule, *, keep_float: Collection[str] = (), small_share: float = 0.0) -> Placement:
    """Decide for a graph with batch-norm already folded.

    keep_float: names of layers to leave alone. small_share: see `small_layers`, which stay float as well.
    """
    nodes = list(graph.graph.nodes)
    against = _reasons(nodes, keep_float, small_share)
    anchors = {node: None for node, reason in against.items() if reason is None}
    integer, gates = _integer_domain(nodes, set(anchors))
    placement = Placement(anchors=list(anchors))
    for node in nodes:
        follows = node in integer and (node.target in CONVOLUTIONS or node.target in FOLLOWERS)
        # A linear layer writes float, for a residual branch; but with a clip after it engines fuse only integers.
        if follows or (node in anchors and fused(node) is not node):
            _quantize_output(placement, node)
    for node in nodes:
        if node in anchors:
            _quantize_operand(placement, node.args[0], node, integer)
        elif node in integer and node.target in FOLLOWERS and node not in gates and not _is_fused(node, integer):
            for operand in tensor_operands(node):
                _quantize_operand(placement, operand, node, integer)
    placement.left_float = tuple(_left_float(nodes, against))
    return placement


def _reasons(nodes: list[Node], kept: Collection[str], small_share: float) -> dict[Node, str | None]:
    """For each convolution and linear layer why it stays float, None where it does not."""
    against = {node: reason_against(node, kept) for node in nodes if node.target in ANCHORS}
    able = [node for node, reason in against.items() if reason is None]
    reason = f"it does at most {100 * small_share:g} % of the work, less than to convert what it reads"
    return against | dict.fromkeys(small_layers(able, share=small_share), reason)


def tensor_operands(node: Node) -> list[Node]:
    """The tensors a follower reads, constants included."""
    first = node.args[0]
    if isinstance(first, list | tuple):
        return [item for item in first if isinstance(item, Node)]
    return [item for item in node.args[:2] if isinstance(item, Node) and isinstance(item.meta.get("val"), torch.Tensor)]


def reason_against(node: Node, kept: Collection[str] = ()) -> str | None:
    """Why this anchor cannot run in integers, or None."""
    if is_named(node, kept):
        return "kept in float on request"
    weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
    if not is_constant(weight) or not (bias is None or is_constant(bias)):
        return "its weight is computed while the model runs"
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.dtype != torch.float32:
        return f"it computes in {str(value.dtype).removeprefix('torch.')}"
    return None


def fused(node: Node) -> Node:
    """The clip that alone reads this node, else the node: nothing is quantized between the two."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in CLIPS else node


def _is_fused(clip: Node, integer: set[Node]) -> bool:
    """Whether this is a clip that an integer operation before it takes along."""
    source = clip.args[0]
    return isinstance(source, Node) and fused(source) is clip and source in integer and source.target not in MOVERS


def _integer_domain(nodes: list[Node], anchors: set[Node]) -> tuple[set[Node], set[Node]]:
    """Nodes whose value exists in integers: convolutions, and what follows them toward another integer reader.

    And of these the gates, which are computed in float.
    """
    capable, gates = set[Node](), set[Node]()
    for node in nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            continue
        starts = node.op == "placeholder" or (node in anchors and node.target in CONVOLUTIONS)
        if starts or (node.target in MOVERS and node.args[0] in capable and _keeps_range(node)):
            capable.add(node)
        elif node.target in FOLLOWERS:
            operands = tensor_operands(node)
            gates |= (found := _gates(node, operands, capable))
            capable |= found
            scalar = node.target in _BINARY and len(operands) < 2
            if operands and not scalar and all(operand in capable for operand in operands):
                capable.add(node)
    wanted: set[Node] = set()
    for node in reversed(nodes):
        read = any(user in anchors or (user in wanted and user.target not in ANCHORS) for user in node.users)
        if read and node in capable:
            wanted.add(node)
    return wanted | {node for node in anchors if node in capable and not _feeds_output_only(node)}, gates


def _gates(product: Node, operands: list[Node], capable: set[Node]) -> set[Node]:
    """The operand of a product that is computed in float, where the other is in integers and larger."""
    if product.target != aten.mul.Tensor or len(operands) != 2 or sum(node in capable for node in operands) != 1:
        return set()
    gate, scaled = sorted(operands, key=lambda node: node in capable)
    plain = gate.target in FOLLOWERS and not any(is_constant(node) for node in gate.all_input_nodes)
    small = plain and _row_size(gate) * 4 <= _row_size(scaled)
    return {gate} if small and gate.meta["val"].dtype == torch.float32 else set()


def _row_size(node: Node) -> int:
    """Values of a row; a free size counts for one."""
    return math.prod(size for size in node.meta["val"].shape[1:] if isinstance(size, int))


def _keeps_range(node: Node) -> bool:
    """A pad with a constant may bring in a value outside the tensor's range, unless it is zero."""
    if node.target != aten.pad.default:
        return True
    mode = node.args[2] if len(node.args) > 2 else "constant"
    value = node.args[3] if len(node.args) > 3 else 0.0
    return mode != "constant" or value in (None, 0)


def _feeds_output_only(node: Node) -> bool:
    return all(user.op == "output" for user in fused(node).users)


def _quantize_output(placement: Placement, node: Node) -> None:
    """A convolution or follower writes integers, after the clip that it is fused with."""
    if not _feeds_output_only(node):
        placement.hard[fused(node)] = None


def _quantize_operand(placement: Placement, operand: object, reader: Node, integer: set[Node]) -> None:
    """The reader takes this operand in integers; a mover in between shares the parameters of its source."""
    if not isinstance(operand, Node) or operand in placement.hard:
        return
    if operand.target in MOVERS and operand in integer:
        source = operand.args[0]
        assert isinstance(source, Node)
        _quantize_operand(placement, source, operand, integer)
        placement.shared[operand] = placement.shared.get(source, source)
    placement.soft.setdefault(operand, {})[reader] = None


def _left_float(nodes: list[Node], against: dict[Node, str | None]) -> list[str]:
    sentences = []
    for node in nodes:
        if against.get(node) is not None:
            kind = "linear layer" if node.target == aten.linear.default else "convolution"
            sentences.append(f"{layer_of(node)}: {kind} stays float: {against[node]}")
        elif node.target in _HEAVY:
            sentences.append(f"{layer_of(node)}: {_HEAVY[node.target]} stays float: no integer form here")
    return list(dict.fromkeys(sentences))
