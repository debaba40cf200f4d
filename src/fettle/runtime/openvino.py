"""OpenVINO on the CPU."""

from __future__ import annotations

import functools
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
from fettle.runtime._device import ByMachine, exact_weight_bits

# A kernel chosen for one batch size beats the one for any size by a fifth at batch 1. Few sizes have one, so that a
# server can warm them all: a compilation in the middle of traffic stalls every request behind it.
_FIXED_SIZES = frozenset({1, 2, 4, 8, 16, 32})
# Linear layers whose weights alone are integers in the file: the engine rounds what they read, group by group.
_STORED = frozenset({"int8-weights", "int4-weights", "int8-dynamic"})
_SMALLEST_GROUP, _LARGEST_GROUP = 32, 128
# By precision, what the plug-in for the CPU calls the ability, and what asks for it.
_HALVES = {"bf16": ("BF16", "bf16"), "fp16": ("FP16", "f16")}


@functools.cache
def _halves() -> frozenset[str]:
    """The 16-bit types that this CPU multiplies in, as the plug-in knows it."""
    abilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return frozenset(precision for precision, (ability, _) in _HALVES.items() if ability in abilities)


class OpenVino(RuntimeBase):
    """Reads the same `model.onnx` as ONNX Runtime; 16 bits where the CPU multiplies in them.

    A model in 16 bits is answered on any CPU: where it has no such instructions, in float32 and slower.
    """

    precisions = ByMachine(frozenset({"float", "int8", *_STORED}), _halves)
    wide_sums: ClassVar[bool] = True

    @classmethod
    def weight_bits(cls) -> int:
        return exact_weight_bits()

    def export(self, program: Any, directory: Path, signature: Signature) -> None:
        from fettle.runtime._onnx import export_onnx  # torch is needed to export, never to serve

        export_onnx(program, directory, signature, runtime="openvino")

    def load(self, artifact: Artifact, *, threads: int) -> Runner:
        try:
            core = openvino.Core()
            model = core.read_model(artifact.root / "model.onnx")
            more: dict[str, Any] = {}
            precision = artifact.manifest.precision
            if precision in _HALVES:
                more["INFERENCE_PRECISION_HINT"] = _HALVES[precision][1]
            if precision in _STORED:
                more["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = activation_group(model)
            runner = _Compiled(core, model, artifact.manifest.signature, threads, more)
        except Exception as problem:
            raise CorruptArtifact(f"OpenVINO refuses model.onnx: {_reason(problem)}") from None
        return runner


def _reason(problem: Exception) -> str:
    """Its sentence, which comes after the places in its source that it was raised from.

    >>> _reason(RuntimeError("Exception from src/core.cpp:84:\\nNo operation DFT\\n"))
    'No operation DFT'
    """
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (told or lines or [type(problem).__name__])[0]


def activation_group(model: Any) -> int:
    """How many values of a row share a scale when they are rounded: at most what every layer's weights allow.

    A group larger than one of a layer's weights, or no divisor of its row, would leave that layer in float. 0 stands
    for no rounding.
    """
    rows = [_weights_per_scale(node) for node in model.get_ops() if node.get_type_name() == "MatMul"]
    groups = [min(count & -count, _LARGEST_GROUP) for count in rows if count is not None]
    return min((group for group in groups if group >= _SMALLEST_GROUP), default=0)


def _weights_per_scale(product: Any) -> int | None:
    """Of a product with a constant of integers, how many of its weights in a row share a scale; None for any other."""
    node = product.input_value(1).get_node()
    while node.get_type_name() in ("Convert", "Subtract", "Multiply", "Reshape", "Transpose"):
        node = node.input_value(0).get_node()
    kind = node.get_element_type().get_type_name() if node.get_type_name() == "Constant" else ""
    if kind not in ("i4", "u4", "i8", "u8"):
        return None
    shape = list(node.get_output_shape(0))
    return int(shape[2]) if len(shape) == 3 else int(product.input_value(0).get_partial_shape()[-1].get_length())


class _Compiled(Runner):
    """One compiled model for each small power of two, when it is first seen; one of free size for all other batches.

    A request object holds its own buffers, so each thread has its own.
    """

    def __init__(self, core: Any, model: Any, signature: Signature, threads: int, more: Mapping[str, Any]) -> None:
        super().__init__(signature)
        self._core, self._model = core, model
        self._config = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            # Unset, the engine computes in bfloat16 where the CPU has it: another answer than was measured.
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,
            **more,
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
        self._count = len(request.model_outputs)
        static = all(port.get_partial_shape().is_static for port in request.model_outputs)
        self._outputs = [request.get_output_tensor(i).data for i in range(self._count)] if static else None

    def __call__(self, arrays: list[Array]) -> list[Array]:
        if self._outputs is None or any(a.shape != b.shape for a, b in zip(arrays, self._inputs, strict=True)):
            # Another dimension is free as well.
            self._request.infer([np.ascontiguousarray(array) for array in arrays], share_outputs=True)
            return [self._request.get_output_tensor(i).data.copy() for i in range(self._count)]
        for array, buffer in zip(arrays, self._inputs, strict=True):
            buffer[...] = array
        self._request.infer(share_outputs=True)
        return [output.copy() for output in self._outputs]
