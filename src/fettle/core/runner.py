"""What a runtime must do: export a captured model into a folder, and load it as a runner on numpy arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fettle.core.signature import Array, Signature

if TYPE_CHECKING:
    from fettle.core.artifact import Artifact


class Runner(ABC):
    """A loaded model. Safe to call from several threads."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature

    @abstractmethod
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Named arrays in, named arrays out. Inputs are taken as already checked."""

    def empty(self, name: str, shape: tuple[int, ...]) -> Array:
        """An array, not filled, for the input of that name: in memory that `run` need not copy it from."""
        return np.empty(shape, self.input_dtype(name))

    def input_dtype(self, name: str) -> str:
        """The data type of the input of that name."""
        return next(spec.dtype for spec in self.signature.inputs if spec.name == name)

    def __call__(self, *inputs: Array) -> Any:
        """Arrays in the signature's order; one array out, or a tuple where the model has several outputs.

        Raises InvalidInput for arrays that do not fit the signature.
        """
        named = {spec.name: array for spec, array in zip(self.signature.inputs, inputs, strict=False)}
        if len(inputs) == len(self.signature.inputs):
            self.signature.check(named)
        else:
            self.signature.check({f"argument {i}": array for i, array in enumerate(inputs)})
        outputs = self.run(named)
        values = tuple(outputs[spec.name] for spec in self.signature.outputs)
        return values[0] if len(values) == 1 else values


class RuntimeBase(ABC):
    """One engine, as a plug-in in `fettle.runtime`.

    precisions: what it really executes at that precision, never a simulation.
    computes: False for an engine that only pretends, so that nobody compares its answers.
    by_default: False for an engine that is tried only where it is named: one that takes long to load.
    wide_sums: whether it adds a layer's result to another tensor before it rounds the sum, in one kernel.
    """

    precisions: ClassVar[frozenset[str]]
    computes: ClassVar[bool] = True
    by_default: ClassVar[bool] = True
    wide_sums: ClassVar[bool] = False

    @classmethod
    def weight_bits(cls) -> int:
        """The most bits that a weight may have for the engine's sums of int8 products to be exact on this machine."""
        return 8

    @abstractmethod
    def export(self, program: Any, directory: Path, signature: Signature) -> None:
        """Write the model files of a `torch.export.ExportedProgram` into the directory.

        The program's inputs and outputs are in the order of the signature, and are to be named as it says.
        Raises ExportError.
        """

    @abstractmethod
    def load(self, artifact: Artifact, *, threads: int) -> Runner:
        """Load a verified artifact. Raises CorruptArtifact where the engine refuses the files."""
