"""Writing ONNX, shared by the runtimes that read it. The only file of this package that imports torch's exporter."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from fettle.core.errors import ExportError
from fettle.core.signature import Signature
from fettle.runtime._onnx_integers import suit_integer_kernels
from fettle.runtime._operations import with_kernels

FILE = "model.onnx"


def export_onnx(
    program: torch.export.ExportedProgram, directory: Path, signature: Signature, *, runtime: str = "onnxruntime"
) -> None:
    """What `export` of a runtime that reads ONNX does: `model.onnx` with the signature's names. Raises ExportError."""
    inputs, outputs = ([spec.name for spec in specs] for specs in (signature.inputs, signature.outputs))
    write_onnx(program, directory / FILE, inputs=inputs, outputs=outputs, runtime=runtime)


def write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    *,
    inputs: list[str],
    outputs: list[str],
    runtime: str = "onnxruntime",
) -> None:
    """Write the program with these tensor names and a free batch dimension. Raises ExportError.

    runtime: whose kernels stand for fettle's own operations, a key of `KERNELS`; a program without any is written
    the same for all.
    """
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)  # it warns that torchvision is absent, which concerns nobody here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = with_kernels(program, runtime)
            onnx = torch.onnx.export(program, dynamo=True, verbose=False, input_names=inputs, output_names=outputs)
            assert onnx is not None
            _forget_sources(onnx.model)
            if runtime == "onnxruntime":
                suit_integer_kernels(onnx.model.graph)
            onnx.save(path, external_data=False)
    except Exception as problem:
        first = next((line for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        raise ExportError(f"the model cannot be written as ONNX: {first}") from problem
    finally:
        noisy.setLevel(level)


def _forget_sources(model: Any) -> None:
    """Drop what the exporter notes at each node: paths and lines of the user's code, other on every machine.

    It is also two thirds of a small model's file.
    """
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        values = [*graph.inputs, *getattr(graph, "initializers", {}).values()]
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            values.extend(node.outputs)
        for value in values:
            value.metadata_props.clear()
