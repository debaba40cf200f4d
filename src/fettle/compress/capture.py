"""From an nn.Module to one flat graph of ATen operations with a free batch dimension, by torch.export.

The graph is functional (no in-place operation is left) and names, for each node, the layer it came from. Layers
that share one ReLU module, `F.relu`, `+=` and attention are all ordinary nodes in it: nothing is matched by module.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.export import Dim, ExportedProgram, export

from fettle.compress.step import Tensors
from fettle.core.errors import CaptureError, DataError


def capture(model: torch.nn.Module, example: Tensors) -> torch.fx.GraphModule:
    """The model as a functional graph in evaluation mode; the given model is left as it was.

    example: inputs, batch first; dimension 0 of each becomes free.
    Raises DataError for inputs that are no tensors, CaptureError where torch.export cannot follow the code.

    >>> graph = capture(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()), (torch.ones(1, 3),))
    >>> graph(torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """
    module = export_program(model, example).module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    return module


def export_program(model: torch.nn.Module, example: Tensors) -> ExportedProgram:
    """The model as an ExportedProgram of functional ATen operations. Raises as `capture` does."""
    inputs = two_rows(example)
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
    stack = node.meta.get("nn_module_stack") or {}
    names = [path for path, _ in stack.values() if path and not path.startswith("_empty")]
    return str(names[-1]) if names else node.name


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
