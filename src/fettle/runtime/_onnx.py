"""Writing ONNX, shared by the runtimes that read it. The only file of this package that imports torch's exporter."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch

from fettle.core.errors import ExportError

FILE = "model.onnx"


def write_onnx(program: torch.export.ExportedProgram, path: Path, *, inputs: list[str], outputs: list[str]) -> None:
    """Write the program with these tensor names and a free batch dimension. Raises ExportError."""
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)  # it warns that torchvision is absent, which concerns nobody here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            onnx = torch.onnx.export(program, dynamo=True, verbose=False, input_names=inputs, output_names=outputs)
            assert onnx is not None
            onnx.save(path, external_data=False)
    except Exception as problem:
        first = next((line for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        raise ExportError(f"the model cannot be written as ONNX: {first}") from problem
    finally:
        noisy.setLevel(level)
