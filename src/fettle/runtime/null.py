"""An engine that computes nothing: every answer is zeros of the right shape. The whole loop runs on it anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fettle.core.artifact import Artifact
from fettle.core.runner import Runner, RuntimeBase
from fettle.core.signature import Array, Signature


class Null(RuntimeBase):
    """For trying out everything around a model. Free dimensions other than the batch become 1."""

    precisions: ClassVar[frozenset[str]] = frozenset({"float", "int8"})
    computes: ClassVar[bool] = False

    def export(self, program: Any, directory: Path, signature: Signature) -> None:
        (directory / "null.txt").write_text("zeros\n")

    def load(self, artifact: Artifact, *, threads: int) -> Runner:
        return _Zeros(artifact.manifest.signature)


class _Zeros(Runner):
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        rows = next(iter(inputs.values())).shape[0]
        return {
            spec.name: np.zeros((rows, *(size if isinstance(size, int) else 1 for size in spec.shape[1:])), spec.dtype)
            for spec in self.signature.outputs
        }
