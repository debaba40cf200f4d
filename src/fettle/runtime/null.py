"""An engine that computes nothing: every answer is zeros of the right shape. The whole loop runs on it anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fettle.core.artifact import Artifact
from fettle.core.errors import CorruptArtifact
from fettle.core.files import write_atomic
from fettle.core.runner import Runner, RuntimeBase
from fettle.core.signature import Array, Signature

_FILE, _CONTENT = "null.txt", b"zeros\n"


class Null(RuntimeBase):
    """For trying out everything around a model. Free dimensions other than the batch become 1."""

    precisions: ClassVar[frozenset[str]] = frozenset({"float", "int8"})
    computes: ClassVar[bool] = False

    def export(self, program: Any, directory: Path, signature: Signature) -> None:
        write_atomic(directory / _FILE, _CONTENT)

    def load(self, artifact: Artifact, *, threads: int) -> Runner:
        try:
            content = (artifact.root / _FILE).read_bytes()
        except OSError as problem:
            raise CorruptArtifact(f"{_FILE} cannot be read: {problem}") from None
        if content != _CONTENT:
            raise CorruptArtifact(f"{_FILE} must hold {_CONTENT!r}, got {content[:16]!r}")
        return _Zeros(artifact.manifest.signature)


class _Zeros(Runner):
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        rows = next(iter(inputs.values())).shape[0]
        return {
            spec.name: np.zeros((rows, *(size if isinstance(size, int) else 1 for size in spec.shape[1:])), spec.dtype)
            for spec in self.signature.outputs
        }
