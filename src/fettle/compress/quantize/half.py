"""Weights stored, and layers computed, in 16 bits: half the file, and no calibration."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fettle.compress.capture import capture, check_layer_names, is_named, layer_of
from fettle.compress.quantize.graph.constants import constant, drop_unused, is_constant, put_constant
from fettle.compress.quantize.graph.prepare import prepare
from fettle.compress.step import Context, Step
from fettle.core.errors import DataError, UsageError

aten = torch.ops.aten
# Sums of many products, which processors with 16-bit instructions add up in float32 and round once; and a table's
# rows, which are only chosen.
_LAYERS = frozenset({
    aten.linear.default, aten.addmm.default, aten.mm.default, aten.bmm.default, aten.matmul.default,
    aten.scaled_dot_product_attention.default, aten.embedding.default,
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
})  # fmt: skip
# What chooses or moves values is exact in any type. A sum of two rounds once more, and saves three conversions.
_PASSING = frozenset({
    aten.relu.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default, aten.neg.default,
    aten.leaky_relu.default, aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default,
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int,
    aten.t.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default,
    aten.slice.Tensor, aten.select.int, aten.cat.default, aten.constant_pad_nd.default, aten.clone.default,
    aten.pad.default, aten._unsafe_view.default, aten.unbind.int, aten.split.Tensor, aten.chunk.default,
    aten.split_with_sizes.default,
    aten.add.Tensor, aten.sub.Tensor,
})  # fmt: skip
_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Half(Step):
    """Convolutions, linear layers, attention and tables in 16 bits, weights too; all else in float32.

    dtype: "bfloat16", a float32 without the last 16 bits of its fraction: three decimal digits, any range; or
        "float16": four digits, up to 65504.
    keep_float: layers that stay float32, by name; a module's name stands for all layers in it.

    Values stay in 16 bits from layer to layer through what only chooses or moves them, such as a ReLU, and through
    the sum of two that both are; norms, activations such as GELU, means and sums with a float32 tensor are computed
    in float32. Conversions are part of the graph: torch computes what is deployed. Inputs and outputs stay float32.

    Worth its while only where the processor multiplies in 16 bits: AVX-512 BF16, AMX, GPUs; elsewhere no runtime
    offers it. Layers whose weights float16 cannot hold stay float32, with a note. Needs no data. Raises CaptureError,
    UsageError for a layer name that the model does not have, DataError for NaN or infinity in a weight. Kalamkar et
    al. 2019, "A Study of BFLOAT16 for Deep Learning Training"; Micikevicius et al. 2018, "Mixed Precision Training",
    for the division into two kinds of operations.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)).eval()
    >>> x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    >>> small = Half().apply(model, Context(example=(x[:2],)))
    >>> small(x).dtype, bool((small(x) - model(x)).abs().max() < 0.02)
    (torch.float32, True)
    >>> {str(value.dtype) for value in small.state_dict().values()}
    {'torch.bfloat16'}
    """

    shrinks: ClassVar[frozenset[str]] = frozenset({"convolution", "linear"})

    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    keep_float: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in _TYPES:
            raise UsageError(f'dtype must be "bfloat16" or "float16", got "{self.dtype}"')

    @property
    def precision(self) -> str:  # type: ignore[override]  # it follows from a field
        """ "bf16" or "fp16"."""
        return _PRECISIONS[self.dtype]

    def apply(self, model: nn.Module, context: Context) -> GraphModule:
        graph = capture(model, context.example)
        prepare(graph, copies=False)
        check_layer_names([node for node in graph.graph.nodes if node.op == "call_function"], self.keep_float)
        halving = _Halving(graph=graph, dtype=_TYPES[self.dtype])
        nodes = list(graph.graph.nodes)
        for index, node in enumerate(nodes):
            reason = halving.reason_against(node, self.keep_float)
            if reason is not None and node.target in _LAYERS:
                context.note(f"{layer_of(node)}: stays float: {reason}")
            halving.visit(node, keep=reason is not None)
            context.progress((index + 1) / len(nodes))
        if not halving.half:
            context.note("nothing is computed in 16 bits: the model has no layer of a kind that can be")
        graph.graph.eliminate_dead_code()
        graph.graph.lint()
        graph.recompile()
        drop_unused(graph)
        return graph


@dataclass(slots=True, kw_only=True)
class _Halving:
    """Visits the nodes in order; what a node reads is converted to the type that it computes in.

    half: nodes whose values are in 16 bits; converted: a conversion made before, by what is converted and to what.
    """

    graph: GraphModule
    dtype: torch.dtype
    half: set[Node] = field(default_factory=set)
    converted: dict[tuple[str, torch.dtype], Node] = field(default_factory=dict)

    def visit(self, node: Node, *, keep: bool) -> None:
        """Put the node into 16 bits where it can be, and convert what it reads; `keep` leaves it in float32."""
        if node.op not in ("call_function", "output"):
            return
        if node.target is operator.getitem:
            narrow = node.args[0] in self.half
        else:
            narrow = not keep and self._can_be_half(node)
            self._convert_operands(node, self.dtype if narrow else torch.float32)
        if narrow:
            self.half.add(node)
            _note_type(node, self.dtype)

    def reason_against(self, node: Node, keep_float: tuple[str, ...]) -> str | None:
        """Why this node must stay in float32 where others of its kind need not, or None."""
        if node.op != "call_function":
            return None
        if is_named(node, keep_float):
            return "on request"
        largest = torch.finfo(self.dtype).max
        for weight in filter(is_constant, node.all_input_nodes if node.target in _LAYERS else ()):
            value = constant(self.graph, weight)
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise DataError(f"a weight to be rounded must be finite, got NaN or infinity in {layer_of(node)}")
            if value.is_floating_point() and value.numel() and value.abs().max() > largest:
                return f"its largest weight, {value.abs().max():.3g}, is beyond {largest:.6g}"
        return None

    def _can_be_half(self, node: Node) -> bool:
        operands = [each for each in node.all_input_nodes if _is_floating(each)]
        if any(each.meta["val"].dtype not in (torch.float32, self.dtype) for each in operands):
            return False
        if node.target in _LAYERS:
            return bool(operands)
        # A constant may come along, or be all there is, as in a tied weight transposed: it is stored in 16 bits then.
        narrow = all(each in self.half or is_constant(each) for each in operands)
        return node.target in _PASSING and bool(operands) and narrow

    def _convert_operands(self, node: Node, dtype: torch.dtype) -> None:
        for operand in node.all_input_nodes:
            if not _is_floating(operand) or operand.meta["val"].dtype not in (torch.float32, self.dtype):
                continue
            if (self.dtype if operand in self.half else torch.float32) != dtype:
                node.replace_input_with(operand, self._conversion(operand, dtype))

    def _conversion(self, operand: Node, dtype: torch.dtype) -> Node:
        stored = is_constant(operand)
        key = (f"{operand.op} {operand.target if stored else operand.name}", dtype)
        if key not in self.converted:
            if stored:
                with self.graph.graph.inserting_before(operand):
                    made = put_constant(self.graph, f"{operand.name}_half", constant(self.graph, operand).to(dtype))
            else:
                with self.graph.graph.inserting_after(operand):
                    made = self.graph.graph.call_function(aten._to_copy.default, (operand,), {"dtype": dtype})
                made.meta = dict(operand.meta)
                _note_type(made, dtype)
            self.converted[key] = made
        return self.converted[key]


def _is_floating(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _note_type(node: Node, dtype: torch.dtype) -> None:
    """Who looks for float32 values in the graph later reads the type from there."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        node.meta["val"] = value.to(dtype)
