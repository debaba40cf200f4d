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
from fettle.runtime._onnx_bound import Bound
from fettle.runtime._pinned import pinned_memory

_ALWAYS = frozenset({"float", "int8", "int8-weights", "int4-weights", "int8-dynamic"})
_CUDA = "CUDAExecutionProvider"
_CUDA_OPTIONS = {
    # A server meets a new shape with each size of a batch. This takes what cuDNN proposes at once; EXHAUSTIVE, the
    # default, thinks about each shape for longer, and DEFAULT is cuDNN's slow last resort (onnxruntime#22705).
    "cudnn_conv_algo_search": "HEURISTIC",
    # The default doubles what is held each time that it grows, and workers share the GPU's memory.
    "arena_extend_strategy": "kSameAsRequested",
    # The default; a stream of their own lets copies race with kernels for memory (onnxruntime#4829).
    "do_copy_in_default_stream": "1",
}


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
    return [(_CUDA, {"device_id": number, **_CUDA_OPTIONS}), "CPUExecutionProvider"]


class OnnxRuntime(RuntimeBase):
    """Reads `model.onnx`; int8 as QDQ, which it fuses into integer kernels, and few-bit linear layers.

    On a GPU inputs and outputs lie in page-locked memory. All of that but CUDA itself is tested on a CPU; on a GPU it
    has never run: no machine had one.
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
        on_gpu = len(providers) > 1
        if on_gpu:
            onnxruntime.preload_dlls()  # CUDA and cuDNN of the nvidia-* packages, which it does not look for itself
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as problem:
            raise CorruptArtifact(f"ONNX Runtime refuses model.onnx: {str(problem).splitlines()[0]}") from None
        if on_gpu and session.get_providers()[0] != _CUDA:  # it goes on without, and only warns
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
        if on_gpu:
            return Bound(session, signature, pinned_memory(gpu_number(wanted_device()) or 0))
        return _Session(session, signature)


class _Session(Runner):
    def __init__(self, session: onnxruntime.InferenceSession, signature: Signature) -> None:
        super().__init__(signature)
        self._session = session
        self._names = [spec.name for spec in signature.outputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(self._names, self._session.run(self._names, dict(inputs)), strict=True))
