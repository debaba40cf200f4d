"""ONNX Runtime on the CPU, or on a GPU where its build for CUDA is installed and FETTLE_DEVICE asks for one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime

from fettle.core.artifact import Artifact
from fettle.core.errors import CorruptArtifact, UsageError
from fettle.core.runner import Runner, RuntimeBase
from fettle.core.signature import Array, Signature
from fettle.runtime._device import VARIABLE, ByMachine, exact_weight_bits, gpu_number, wanted_device

_ALWAYS = frozenset({"float", "int8", "int8-weights", "int4-weights", "int8-dynamic"})
_CUDA = "CUDAExecutionProvider"


def _halves() -> frozenset[str]:
    """float16 on a GPU. On a CPU it computes float16 models in float32, at float's time, and refuses bfloat16."""
    on_gpu = wanted_device() != "cpu" and _CUDA in onnxruntime.get_available_providers()
    return frozenset({"fp16"} if on_gpu else ())


def _providers() -> list[Any]:
    """What runs the graph, the first first. Raises UsageError where the device that is asked for cannot."""
    number = gpu_number(wanted_device())
    if number is None:
        return ["CPUExecutionProvider"]
    if _CUDA not in onnxruntime.get_available_providers():
        raise UsageError(
            f"{VARIABLE} asks for {wanted_device()}, and this build of ONNX Runtime has only "
            f"{', '.join(onnxruntime.get_available_providers())}: pip install onnxruntime-gpu in its place, or unset "
            f"{VARIABLE}"
        )
    return [(_CUDA, {"device_id": number}), "CPUExecutionProvider"]


class OnnxRuntime(RuntimeBase):
    """Reads `model.onnx`; int8 as QDQ, which it fuses into integer kernels, and few-bit linear layers.

    The path for GPUs has never run: no machine had one.
    """

    precisions = ByMachine(_ALWAYS, _halves)

    @classmethod
    def weight_bits(cls) -> int:
        return exact_weight_bits()

    def export(self, program: Any, directory: Path, signature: Signature) -> None:
        from fettle.runtime._onnx import export_onnx  # torch is needed to export, never to serve

        export_onnx(program, directory, signature)

    def load(self, artifact: Artifact, *, threads: int) -> Runner:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads that spin between requests would take the other workers' cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = artifact.root / "model.onnx"
        providers = _providers()
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as problem:
            raise CorruptArtifact(f"ONNX Runtime refuses model.onnx: {str(problem).splitlines()[0]}") from None
        if len(providers) > 1 and session.get_providers()[0] != _CUDA:  # it goes on without, and only warns
            raise UsageError(
                f"{VARIABLE} asks for {wanted_device()}, and ONNX Runtime cannot use it: check CUDA and cuDNN, "
                f"or unset {VARIABLE}"
            )
        signature = artifact.manifest.signature
        for kind, specs, found in (
            ("inputs", signature.inputs, session.get_inputs()),
            ("outputs", signature.outputs, session.get_outputs()),
        ):
            wanted, names = [spec.name for spec in specs], [item.name for item in found]
            if sorted(wanted) != sorted(names):
                raise CorruptArtifact(f"model.onnx must have the {kind} {', '.join(wanted)}, got {', '.join(names)}")
        return _Session(session, signature)


class _Session(Runner):
    def __init__(self, session: onnxruntime.InferenceSession, signature: Signature) -> None:
        super().__init__(signature)
        self._session = session
        self._names = [spec.name for spec in signature.outputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(self._names, self._session.run(self._names, dict(inputs)), strict=True))
