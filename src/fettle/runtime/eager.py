"""PyTorch itself, from a graph in JSON and weights in safetensors: the reference every other runtime must agree with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch._export.serde import schema, serialize

from fettle.core.artifact import Artifact
from fettle.core.errors import CorruptArtifact, ExportError, ForeignArtifact
from fettle.core.files import write_atomic
from fettle.core.runner import Runner, RuntimeBase
from fettle.core.signature import Array, Signature

_GRAPH, _WEIGHTS = "graph.json", "weights.safetensors"
# torch resolves a target by getattr from its own module and a shape by sympy, which evaluates text. A graph from
# elsewhere must reach neither: only operations, and only arithmetic on free sizes.
_TARGET = re.compile(
    r"torch\.ops\.(aten|quantized_decomposed|prims)\.\w+\.\w+|_operator\.(add|sub|mul|floordiv|mod|getitem|neg|eq|ne|ge|gt|le|lt)"
    r"|torch\.sym_(int|float|max|min|not|ite|sum)|math\.(ceil|floor|trunc)"
)
_EXPRESSION = re.compile(r"(?:\b(?:[su]\d+|\d+|FloorDiv|Mod|Max|Min|int_oo|True|False|Integer|Symbol|positive|integer)\b|'[su]\d+'|[-+*/(),= ])*")


class Eager(RuntimeBase):
    """Float only: quantized graphs would be simulated here, and a simulation is never timed."""

    precisions: ClassVar[frozenset[str]] = frozenset({"float"})

    def export(self, program: torch.export.ExportedProgram, directory: Path, signature: Signature) -> None:
        try:
            serializer = serialize.ExportedProgramSerializer()
            graph = serializer.serialize(program).exported_program
            text = json.dumps(serialize._dataclass_to_dict(graph), cls=serialize.EnumEncoder, sort_keys=True)
        except Exception as problem:
            raise ExportError(f"the graph cannot be written as JSON: {problem}") from problem
        write_atomic(directory / _GRAPH, text.encode())
        tensors = {f"state:{name}": value for name, value in program.state_dict.items()}
        tensors |= {f"constant:{name}": value for name, value in program.constants.items()}
        # Cloned: two names for one tensor are allowed in a model but not in the file.
        safetensors.torch.save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, directory / _WEIGHTS)

    def load(self, artifact: Artifact, *, threads: int) -> Runner:
        try:
            data = json.loads((artifact.root / _GRAPH).read_bytes())
            tensors = safetensors.torch.load_file(artifact.root / _WEIGHTS)
        except Exception as problem:
            raise CorruptArtifact(f"the model files cannot be read: {problem}") from None
        refuse_foreign(data)
        held: dict[str, dict[str, Any]] = {"state": {}, "constant": {}}
        for name, tensor in tensors.items():
            kind, _, key = name.partition(":")
            held.get(kind, {})[key] = tensor
        try:
            graph = serialize._dict_to_dataclass(schema.ExportedProgram, data)
            deserializer = serialize.ExportedProgramDeserializer()
            program = deserializer.deserialize(graph, held["state"], held["constant"], None)
        except Exception as problem:
            raise CorruptArtifact(f"torch refuses the graph: {type(problem).__name__}: {problem}") from None
        module = program.module(check_guards=False)
        return _Module(module, artifact.manifest.signature, threads)


def refuse_foreign(data: Any) -> None:
    """Raise ForeignArtifact for a graph that names anything but operations and arithmetic on sizes.

    >>> refuse_foreign({"target": "torch.os.system"})
    Traceback (most recent call last):
    fettle.core.errors.ForeignArtifact: a graph may only name ATen operations, got 'torch.os.system'
    """
    for key, text in _texts(data):
        if key == "target" and not _TARGET.fullmatch(text):
            raise ForeignArtifact(f"a graph may only name ATen operations, got {text[:80]!r}")
        if key == "expr_str" and not _EXPRESSION.fullmatch(text):
            raise ForeignArtifact(f"a size may only be arithmetic on free sizes, got {text[:80]!r}")


def _texts(data: Any) -> Iterator[tuple[str, str]]:
    if isinstance(data, dict):
        for key, value in data.items():
            if isinstance(value, str):
                yield key, value
            else:
                yield from _texts(value)
    elif isinstance(data, list):
        for item in data:
            yield from _texts(item)


class _Module(Runner):
    def __init__(self, module: torch.nn.Module, signature: Signature, threads: int) -> None:
        super().__init__(signature)
        self._module, self._threads = module, threads

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            result = self._module(*(torch.from_numpy(inputs[spec.name]) for spec in self.signature.inputs))
        values = torch.utils._pytree.tree_leaves(result)
        return {spec.name: value.numpy() for spec, value in zip(self.signature.outputs, values, strict=True)}
