"""torch's compiler: the eager runtime's files, made into machine code where they are loaded."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from fettle.core.artifact import Artifact
from fettle.core.errors import CorruptArtifact, MissingExtra
from fettle.core.runner import Runner, RuntimeBase
from fettle.core.signature import Array, Signature
from fettle.runtime._device import ByMachine, exact_weight_bits, gpu_number, wanted_device
from fettle.runtime._operations import with_kernels
from fettle.runtime.eager import half_precisions, move_to, read_program, torch_device, write_program

_X86 = ("x86_64", "amd64")
_COMPILERS = ("g++", "clang++", "c++")


def machine_precisions() -> frozenset[str]:
    """16 bits as for the eager runtime; int8-dynamic where oneDNN multiplies integers, which is on a CPU of x86."""
    on_x86 = gpu_number(wanted_device()) is None and platform.machine().lower() in _X86
    dynamic = on_x86 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return half_precisions() | ({"int8-dynamic"} if dynamic else set())


class Inductor(RuntimeBase):
    """AOTInductor with frozen weights: fused C++ loops on a CPU, Triton kernels on a GPU (that path has never run).

    An artifact holds the graph and the weights as the eager runtime writes them, behind the same wall, and never the
    compiled library: to load one that came in an artifact would be to run foreign code. So each load compiles, for 5
    to 30 s, and needs a C++ compiler: CXX, g++ or clang++. Too long to be tried unasked: `by_default` is False.
    """

    precisions = ByMachine(frozenset({"float"}), machine_precisions)
    by_default: ClassVar[bool] = False

    @classmethod
    def weight_bits(cls) -> int:
        return exact_weight_bits()

    def export(self, program: torch.export.ExportedProgram, directory: Path, signature: Signature) -> None:
        write_program(with_kernels(program, "inductor"), directory)

    def load(self, artifact: Artifact, *, threads: int) -> Runner:
        """Raises MissingExtra without a compiler, CorruptArtifact where torch cannot compile the graph."""
        device = torch_device()
        require_compiler()
        program = read_program(artifact)
        program.example_inputs = _example(artifact.manifest.signature), {}
        program = move_to(program, device)
        with tempfile.TemporaryDirectory(prefix="fettle-inductor-") as folder:
            try:
                compiled = _compile(program, Path(folder) / "model.pt2")
            except Exception as problem:
                lines = str(problem).strip().splitlines() or ["no message"]
                raise CorruptArtifact(f"torch cannot compile the graph: {type(problem).__name__}: {lines[0]}") from None
        return _Compiled(compiled, artifact.manifest.signature, threads=threads, device=device)


def require_compiler() -> str:
    """The path of the C++ compiler. Raises MissingExtra."""
    asked = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, (asked,) if asked else _COMPILERS)), None)
    if found is None:
        wanted = f"CXX names {asked}, which is not there" if asked else f"found none of {', '.join(_COMPILERS)}"
        raise MissingExtra(f"runtime 'inductor' needs a C++ compiler, {wanted}: apt-get install g++, or set CXX")
    return found


def _compile(program: torch.export.ExportedProgram, path: Path) -> Any:
    """What runs the program; the file may go once it is loaded."""
    # Freezing lays the weights out for the CPU's kernels; it wants no gradients.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own deprecations
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={"freezing": True}
        )
        return torch._inductor.aoti_load_package(package)


def _example(signature: Signature) -> tuple[torch.Tensor, ...]:
    """Inputs of the right shapes: the compiler reads types and devices from them, and leaves free sizes free."""
    shapes = [tuple(2 if isinstance(size, str) else size for size in spec.shape) for spec in signature.inputs]
    arrays = (np.zeros(shape, spec.dtype) for shape, spec in zip(shapes, signature.inputs, strict=True))
    return tuple(map(torch.from_numpy, arrays))


class _Compiled(Runner):
    """One call at a time: the library keeps one set of buffers."""

    def __init__(self, compiled: Any, signature: Signature, *, threads: int, device: torch.device) -> None:
        super().__init__(signature)
        self._compiled, self._threads, self._device = compiled, threads, device
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        arrays = (np.require(inputs[spec.name], requirements=["C", "W"]) for spec in self.signature.inputs)
        tensors = [torch.from_numpy(array).to(self._device) for array in arrays]
        with self._lock, torch.inference_mode():
            if torch.get_num_threads() != self._threads:
                torch.set_num_threads(self._threads)
            result = self._compiled(*tensors)
        values = torch.utils._pytree.tree_leaves(result)
        return {spec.name: value.cpu().numpy() for spec, value in zip(self.signature.outputs, values, strict=True)}
