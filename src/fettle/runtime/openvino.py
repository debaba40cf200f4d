"""OpenVINO on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import openvino

from fettle.core.artifact import Artifact
from fettle.core.errors import CorruptArtifact
from fettle.core.runner import Runner, RuntimeBase
from fettle.core.signature import Array, Signature

# A kernel chosen for one batch size beats the one for any size by a fifth at batch 1. Few sizes have one, so that a
# server can warm them all: a compilation in the middle of traffic stalls every request behind it.
_FIXED_SIZES = frozenset({1, 2, 4, 8, 16, 32})


class OpenVino(RuntimeBase):
    """Reads the same `model.onnx` as ONNX Runtime."""

    precisions: ClassVar[frozenset[str]] = frozenset({"float", "int8"})

    def export(self, program: Any, directory: Path, signature: Signature) -> None:
        from fettle.runtime._onnx import export_onnx  # torch is needed to export, never to serve

        export_onnx(program, directory, signature)

    def load(self, artifact: Artifact, *, threads: int) -> Runner:
        try:
            core = openvino.Core()
            model = core.read_model(artifact.root / "model.onnx")
            runner = _Compiled(core, model, artifact.manifest.signature, threads)
        except Exception as problem:
            first = next((line for line in str(problem).splitlines() if line.strip()), "")
            raise CorruptArtifact(f"OpenVINO refuses model.onnx: {first}") from None
        return runner


class _Compiled(Runner):
    """One compiled model for each small power of two, when it is first seen; one of free size for all other batches.

    A request object holds its own buffers, so each thread has its own.
    """

    def __init__(self, core: Any, model: Any, signature: Signature, threads: int) -> None:
        super().__init__(signature)
        self._core, self._model = core, model
        self._config = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            # Unset, the engine computes in bfloat16 where the CPU has it: another answer than was measured.
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,
        }
        self._names = [spec.name for spec in signature.outputs]
        self._lock = threading.Lock()
        self._free = core.compile_model(model, "CPU", self._config)
        self._fixed: dict[int, Any] = {}
        self._local = threading.local()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        rows = next(iter(inputs.values())).shape[0]
        slots: dict[int, _Slot | None] = self._local.__dict__.setdefault("slots", {})
        if rows not in slots:
            compiled = self._fixed_size(rows)
            slots[rows] = _Slot(compiled.create_infer_request()) if compiled is not None else None
        slot = slots[rows]
        arrays = [inputs[spec.name] for spec in self.signature.inputs]
        if slot is not None:
            return dict(zip(self._names, slot(arrays), strict=True))
        results = self._free.create_infer_request().infer([np.ascontiguousarray(array) for array in arrays])
        return dict(zip(self._names, results.to_tuple(), strict=True))

    def _fixed_size(self, rows: int) -> Any | None:
        """The model compiled for this batch size, or None where it has none of its own."""
        if rows not in _FIXED_SIZES:
            return None
        with self._lock:
            if rows not in self._fixed:
                model = self._model.clone()
                shapes = {}
                for port in model.inputs:
                    shape = port.get_partial_shape()
                    shape[0] = rows
                    shapes[port] = shape
                model.reshape(shapes)
                self._fixed[rows] = self._core.compile_model(model, "CPU", self._config)
            return self._fixed[rows]


class _Slot:
    """One request with the views of its buffers at hand: copying rows in costs less than binding an array."""

    def __init__(self, request: Any) -> None:
        self._request = request
        self._inputs = [request.get_input_tensor(i).data for i in range(len(request.model_inputs))]
        self._static = all(port.get_partial_shape().is_static for port in request.model_outputs)

    def __call__(self, arrays: list[Array]) -> list[Array]:
        if self._static and all(a.shape == b.shape for a, b in zip(arrays, self._inputs, strict=True)):
            for array, buffer in zip(arrays, self._inputs, strict=True):
                buffer[...] = array
            self._request.infer()
        else:  # another dimension is free as well
            self._request.infer([np.ascontiguousarray(array) for array in arrays])
        return [self._request.get_output_tensor(i).data.copy() for i in range(len(self._request.model_outputs))]
