"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import onnxruntime

from fettle.core.artifact import Artifact
from fettle.core.errors import CorruptArtifact
from fettle.core.runner import Runner, RuntimeBase
from fettle.core.signature import Array, Signature


class OnnxRuntime(RuntimeBase):
    """Reads `model.onnx`; int8 as QDQ, which it fuses into integer kernels."""

    precisions: ClassVar[frozenset[str]] = frozenset({"float", "int8"})

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
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as problem:
            raise CorruptArtifact(f"ONNX Runtime refuses model.onnx: {str(problem).splitlines()[0]}") from None
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
