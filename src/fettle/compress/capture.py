"""From an nn.Module to one flat graph of ATen operations with a free batch dimension, by torch.export.

The graph is functional (no in-place operation is left) and names, for each node, the layer it came from. Layers
that share one ReLU module, `F.relu`, `+=` and attention are all ordinary nodes in it: nothing is matched by module.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import Dim, ExportedProgram, export

from fettle.compress.step import Tensors
from fettle.core.errors import CaptureError, DataError, UsageError

_CAPTURED = "fettle.captured"
aten = torch.ops.aten
# Operations that multiply with a weight, and where they take it.
_WEIGHTED = {
    aten.linear.default: 1, aten.matmul.default: 1, aten.mm.default: 1, aten.addmm.default: 2,
    aten.conv1d.default: 1, aten.conv2d.default: 1, aten.conv3d.default: 1,
    aten.conv1d.padding: 1, aten.conv2d.padding: 1, aten.conv3d.padding: 1,
}  # fmt: skip


def capture(model: torch.nn.Module, example: Tensors) -> torch.fx.GraphModule:
    """The model as a functional graph in evaluation mode; the given model is left as it was.

    What this function returned before is copied, not exported again.

    example: inputs, batch first; dimension 0 of each becomes free.
    Raises DataError for inputs that are no tensors, CaptureError where torch.export cannot follow the code.

    >>> graph = capture(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()), (torch.ones(1, 3),))
    >>> graph(torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """
    if isinstance(model, torch.fx.GraphModule) and model.meta.get(_CAPTURED):
        with quiet():  # torch warns of its own way to copy a tree of inputs
            return copy.deepcopy(model)
    module = export_program(model, example).module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    _name_by_weights(module)
    module.meta[_CAPTURED] = True
    return module


def export_program(model: torch.nn.Module, example: Tensors) -> ExportedProgram:
    """The model as an ExportedProgram of functional ATen operations. Raises as `capture` does.

    A model that is trained or corrected in another form than it runs in is taken as it runs.
    """
    inputs = two_rows(example)
    model = as_deployed(model)
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with quiet(), torch.no_grad():
            batch = Dim("batch")
            program = (
                export(model, inputs, dynamic_shapes=(tuple({0: batch} for _ in inputs),), strict=False)
                if _takes_varargs(model)
                else export(model, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
            )
            functional: ExportedProgram = program.run_decompositions({})
            return functional
    except Exception as problem:
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else ""
        raise CaptureError(
            f"torch.export could not capture {type(model).__name__}: {type(problem).__name__}: {first}. "
            "Control flow on tensor values and shapes fixed to one batch size are the usual causes; "
            "run torch.export.export on the model with a free batch dimension to see the line."
        ) from problem
    finally:
        for module in training:
            module.training = True


def as_deployed(model: torch.nn.Module) -> torch.nn.Module:
    """What is exported for a model: a simulation has a method `lowered` that gives it, any other is it."""
    lowered = getattr(model, "lowered", None)
    return lowered() if callable(lowered) else model


def _name_by_weights(graph: torch.fx.GraphModule) -> None:
    """A product with a parameter that no module of its own calls goes by the parameter's name.

    So the two projections of attention are "attention.in_proj" and "attention.out_proj", and `x @ self.mix` is "mix".
    """
    for node in graph.graph.nodes:
        place = _WEIGHTED.get(node.target)
        weight = _parameter(node.args[place]) if place is not None else None
        if weight is None:
            continue
        name = weight.partition(".parametrizations.")[0].removesuffix(".weight").removesuffix("_weight")
        stack = node.meta.get("nn_module_stack") or {}
        outer = _path(stack)
        if name.startswith(f"{outer}.") or (not outer and name != "weight"):
            node.meta["nn_module_stack"] = {**stack, name: (name, "")}


def _parameter(operand: object) -> str | None:
    """The parameter that a weight is, or is a part or a transpose of; None for what is computed in another way."""
    while isinstance(operand, torch.fx.Node) and operand.op == "call_function":
        sources = operand.all_input_nodes
        operand = sources[0] if len(sources) == 1 else None
    return str(operand.target) if isinstance(operand, torch.fx.Node) and operand.op == "get_attr" else None


def _takes_varargs(model: torch.nn.Module) -> bool:
    """Whether forward is `forward(self, *args)`, whose dynamic shapes must be nested once more."""
    code = getattr(model.forward, "__code__", None)
    return bool(code is not None and code.co_flags & 0x04 and code.co_argcount <= 1)


def two_rows(example: Tensors) -> Tensors:
    """The example with at least two rows: torch.export would freeze a batch size of one."""
    if not isinstance(example, tuple) or not example:
        raise DataError(f"example inputs must be a non-empty tuple of tensors, got {type(example).__name__}")
    for index, tensor in enumerate(example):
        if not isinstance(tensor, torch.Tensor) or tensor.ndim == 0 or tensor.shape[0] == 0:
            got = f"shape {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise DataError(f"example input {index} must be a tensor with at least one row, got {got}")
    if len({tensor.shape[0] for tensor in example}) > 1:
        raise DataError(f"example inputs must share dimension 0, got {[list(t.shape) for t in example]}")
    if example[0].shape[0] > 1:
        return example
    return tuple(torch.cat([tensor, tensor]) for tensor in example)


def layer_of(node: torch.fx.Node) -> str:
    """The layer a node came from, such as "layer1.0.conv1", or the node's own name where torch did not keep it."""
    return _path(node.meta.get("nn_module_stack") or {}) or node.name


def _path(stack: Mapping[str, tuple[str, Any]]) -> str:
    """The innermost module of a call stack, "" for the model itself."""
    return next((path for path, _ in reversed(list(stack.values())) if path and not path.startswith("_empty")), "")


def is_named(node: torch.fx.Node, names: Collection[str]) -> bool:
    """Whether the layer a node came from, or a module around it, is among the names."""
    layer = layer_of(node)
    return any(layer == name or layer.startswith(f"{name}.") for name in names)


def check_layer_names(layers: Iterable[torch.fx.Node], names: Collection[str]) -> None:
    """Raise UsageError for a name in `keep_float` that is no layer of these nor a module around one.

    One string in place of several is refused too.
    """
    if isinstance(names, str):
        raise UsageError(f"keep_float must be a tuple of names, got the string '{names}': write ('{names}',)")
    nodes = list(layers)
    for name in names:
        if not any(is_named(node, (name,)) for node in nodes):
            known = ", ".join(sorted({layer_of(node) for node in nodes})) or "none"
            raise UsageError(f"keep_float names nothing that would be quantized: '{name}'. Layers: {known}")


@contextmanager
def quiet() -> Iterator[None]:
    """torch's exporter warns of its own deprecations, and attention hides in an opaque fast path: neither is wanted."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
