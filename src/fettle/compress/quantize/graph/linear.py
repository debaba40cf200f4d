"""Replace the linear layers of a captured graph, one by one, and say of each that stays float why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fettle.compress.capture import capture, check_layer_names, is_named, layer_of
from fettle.compress.quantize.graph.constants import constant, drop_unused, is_constant, put_constant
from fettle.compress.quantize.graph.prepare import prepare
from fettle.compress.step import Context
from fettle.core.errors import DataError

aten = torch.ops.aten
_CONVOLUTIONS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.conv3d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a linear layer becomes.

    operation: called with the layer's input, the stored tensors, its bias or None, and `settings`.
    store: the tensors that take the place of a weight (N, K) float32, by a name for each.
    reason_against: of a weight (N, K), why it stays float, or None.
    """

    operation: torch._ops.OpOverload
    store: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    reason_against: Callable[[torch.Tensor], str | None]
    settings: tuple[int, ...] = ()


def replace_linear_layers(
    model: torch.nn.Module, context: Context, form: Form, *, keep_float: tuple[str, ...] = ()
) -> GraphModule:
    """The model captured, batch-norm folded, and every linear layer that can be in its new form.

    A product with a constant matrix counts as a linear layer. One weight read by several layers is stored once. What
    stays float is told through `context.note`. Raises CaptureError, UsageError for a name in `keep_float` that no
    layer has, DataError for NaN or infinity in a weight.
    """
    graph = capture(model, context.example)
    prepare(graph)
    layers = [node for node in graph.graph.nodes if node.target == aten.linear.default]
    check_layer_names(layers, keep_float)
    stored: dict[str, tuple[Node, ...]] = {}
    replaced = 0
    for index, layer in enumerate(layers):
        reason = _reason_against(graph, layer, form, keep_float)
        if reason is None:
            _replace(graph, layer, form, stored)
            replaced += 1
        else:
            context.note(f"{layer_of(layer)}: linear layer stays float: {reason}")
        context.progress((index + 1) / len(layers))
    convolutions = [layer_of(node) for node in graph.graph.nodes if node.target in _CONVOLUTIONS]
    if convolutions:
        context.note(
            f"{len(convolutions)} convolutions stay float, from {convolutions[0]} to {convolutions[-1]}: "
            "only linear layers have a kernel for such weights"
        )
    if replaced == 0:
        context.note("nothing was quantized: no linear layer with constant weights is large enough")
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    drop_unused(graph)
    return graph


def _reason_against(graph: GraphModule, layer: Node, form: Form, keep_float: tuple[str, ...]) -> str | None:
    if is_named(layer, keep_float):
        return "kept in float on request"
    if not is_constant(layer.args[1]):
        return "its weight is computed while the model runs"
    weight = constant(graph, layer.args[1])
    if weight.dtype != torch.float32:
        return f"it computes in {str(weight.dtype).removeprefix('torch.')}"
    if not torch.isfinite(weight).all():
        raise DataError(f"a weight to be quantized must be finite, got NaN or infinity in {layer_of(layer)}")
    return form.reason_against(weight)


def _replace(graph: GraphModule, layer: Node, form: Form, stored: dict[str, tuple[Node, ...]]) -> None:
    source = layer.args[1]
    assert isinstance(source, Node)
    key = str(source.target)
    if key not in stored:
        with graph.graph.inserting_before(layer):
            stored[key] = tuple(
                put_constant(graph, f"{layer.name}_{name}", value)
                for name, value in form.store(constant(graph, source)).items()
            )
    bias = layer.args[2] if len(layer.args) > 2 else None
    # In place, so that the name of the layer it came from stays with the node.
    layer.target, layer.args = form.operation, (layer.args[0], *stored[key], bias, *form.settings)
