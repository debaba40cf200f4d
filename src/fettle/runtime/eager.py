"""PyTorch itself, from a graph in JSON and weights in safetensors: what every other runtime must agree with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch._export.serde import schema, serialize
from torch.export.passes import move_to_device_pass

from fettle.core.artifact import Artifact
from fettle.core.errors import CorruptArtifact, ExportError, ForeignArtifact, UsageError
from fettle.core.files import write_atomic
from fettle.core.runner import Runner, RuntimeBase
from fettle.core.signature import Array, Signature
from fettle.runtime._device import VARIABLE, ByMachine, gpu_number, wanted_device

_GRAPH, _WEIGHTS = "graph.json", "weights.safetensors"
# torch resolves a target by getattr from its own module, a size by sympy, which evaluates text, and a container by
# importing the module it names. A graph from elsewhere must reach none of these: only operations, and only
# arithmetic on free sizes.
_OPERATION = re.compile(r"torch\.ops\.(aten|quantized_decomposed|prims)\.(\w+)\.(\w+)")
_SCALAR = re.compile(
    r"_operator\.(add|sub|mul|floordiv|mod|getitem|neg|eq|ne|ge|gt|le|lt|and_|or_)"
    r"|torch\.sym_(int|float|max|min|not|ite|sum)|math\.(ceil|floor|trunc)"
)
# No power, and no "**": sympy would try to write 9**9**9**9 out.
_EXPRESSION = re.compile(
    r"(?:\b(?:[su]\d+|\d+|Add|Mul|FloorDiv|CleanDiv|PythonMod|Mod|Max|Min|int_oo|True|False|Integer|Symbol"
    r"|Eq|Ne|Ge|Gt|Le|Lt|Equality|Unequality|GreaterThan|StrictGreaterThan|LessThan|StrictLessThan"
    r"|positive|nonnegative|integer)\b|'[su]\d+'|\*(?!\*)|[-+/(),= ])*"
)
_EXPRESSION_LIMIT = 1000
_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict")


# Without one of these torch multiplies 16-bit numbers in software.
_BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # the last on Arm


def half_precisions() -> frozenset[str]:
    """The 16-bit precisions that torch really computes in, on the device that is asked for."""
    number = gpu_number(wanted_device())
    if number is None:
        flags = torch.cpu.get_capabilities()
        return frozenset({"bf16"} if any(flags.get(flag) for flag in _BFLOAT16_FLAGS) else ())
    if not torch.cuda.is_available():
        return frozenset()
    return frozenset({"fp16", "bf16"} if torch.cuda.is_bf16_supported(including_emulation=False) else {"fp16"})


class Eager(RuntimeBase):
    """Float, and 16 bits where the device has them: integers would be simulated here, and that is never timed.

    Runs on the device that FETTLE_DEVICE names, the CPU where it is not set. On a GPU a call includes both copies.
    The path for GPUs has never run: no machine had one.
    """

    precisions = ByMachine(frozenset({"float"}), half_precisions)

    def export(self, program: torch.export.ExportedProgram, directory: Path, signature: Signature) -> None:
        write_program(program, directory)

    def load(self, artifact: Artifact, *, threads: int) -> Runner:
        device = torch_device()
        module = move_to(read_program(artifact), device).module(check_guards=False)
        return _Module(module, artifact.manifest.signature, threads, device)


def torch_device() -> torch.device:
    """The device that is asked for. Raises UsageError where torch does not see it."""
    number = gpu_number(wanted_device())
    if number is None:
        return torch.device("cpu")
    if number >= torch.cuda.device_count():
        raise UsageError(
            f"{VARIABLE} asks for {wanted_device()}, and torch sees {torch.cuda.device_count()} GPUs: install a build "
            f"of torch for CUDA and its driver, or unset {VARIABLE}"
        )
    return torch.device("cuda", number)


def move_to(program: torch.export.ExportedProgram, device: torch.device) -> torch.export.ExportedProgram:
    """The program with its tensors on the device; on the CPU they are already."""
    return program if device.type == "cpu" else move_to_device_pass(program, device)


def write_program(program: torch.export.ExportedProgram, directory: Path) -> None:
    """The graph as JSON, the tensors as safetensors. Raises ExportError."""
    try:
        serializer = serialize.ExportedProgramSerializer()
        graph = serializer.serialize(program).exported_program
        plain = serialize._dataclass_to_dict(graph)  # type: ignore[no-untyped-call]
        data = without_notes(json.loads(json.dumps(plain, cls=serialize.EnumEncoder)))
        refuse_foreign(data)
    except Exception as problem:
        raise ExportError(f"the graph cannot be written as JSON: {problem}") from problem
    text = json.dumps(data, sort_keys=True)
    write_atomic(directory / _GRAPH, text.encode())
    tensors = {
        f"{'parameter' if isinstance(value, torch.nn.Parameter) else 'buffer'}:{name}": value
        for name, value in program.state_dict.items()
    }
    tensors |= {f"constant:{name}": value for name, value in program.constants.items()}
    # Cloned: two names for one tensor are allowed in a model but not in the file.
    safetensors.torch.save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, directory / _WEIGHTS)


def read_program(artifact: Artifact) -> torch.export.ExportedProgram:
    """What `write_program` wrote. Raises CorruptArtifact, and ForeignArtifact for a graph of more than operations."""
    try:
        data = json.loads((artifact.root / _GRAPH).read_bytes())
        tensors = safetensors.torch.load_file(artifact.root / _WEIGHTS)
    except Exception as problem:
        raise CorruptArtifact(f"the model files cannot be read: {problem}") from None
    try:
        refuse_foreign(data)
    except RecursionError:
        raise ForeignArtifact("a graph may not be nested this deep") from None
    state: dict[str, torch.Tensor] = {}
    constants: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        kind, _, key = name.partition(":")
        if kind == "constant":
            constants[key] = tensor
        else:
            state[key] = torch.nn.Parameter(tensor, requires_grad=False) if kind == "parameter" else tensor
    try:
        graph = serialize._dict_to_dataclass(schema.ExportedProgram, data)  # type: ignore[no-untyped-call]
        deserializer = serialize.ExportedProgramDeserializer()
        program: torch.export.ExportedProgram = deserializer.deserialize(graph, state, constants, None)
    except Exception as problem:
        raise CorruptArtifact(f"torch refuses the graph: {type(problem).__name__}: {problem}") from None
    _check_weights(program)
    return program


def _check_weights(program: torch.export.ExportedProgram) -> None:
    """Raise CorruptArtifact where a weight is not of the shape that the graph was written for: torch does not look."""
    placeholders = (node for node in program.graph.nodes if node.op == "placeholder")
    for spec, node in zip(program.graph_signature.input_specs, placeholders, strict=True):
        held, wanted = program.state_dict.get(spec.target or ""), node.meta.get("val")
        if held is not None and wanted is not None and (held.shape, held.dtype) != (wanted.shape, wanted.dtype):
            raise CorruptArtifact(
                f"weight {spec.target} must be {wanted.dtype} of shape {list(wanted.shape)}, "
                f"got {held.dtype} of {list(held.shape)}"
            )


def without_notes(data: Any) -> Any:
    """The graph without what torch notes about each node: source lines, paths and addresses, other in each process.

    Guards go too: Python text that checks sizes, which the signature does.

    >>> without_notes({"guards_code": ["L['x']"], "nodes": [{"target": "t", "metadata": {"stack_trace": "/home/me"}}]})
    {'guards_code': [], 'nodes': [{'target': 't', 'metadata': {}}]}
    """
    if isinstance(data, list):
        return [without_notes(item) for item in data]
    if not isinstance(data, dict):
        return data
    # A tensor may be called "metadata" too; only a node has a target.
    empty: dict[str, Any] = {"metadata": {}} if isinstance(data.get("target"), str) else {}
    empty |= {"guards_code": []} if isinstance(data.get("guards_code"), list) else {}
    return {key: empty[key] if key in empty else without_notes(value) for key, value in data.items()}


def refuse_foreign(data: Any) -> None:
    """Raise ForeignArtifact for a graph that names anything but operations and arithmetic on sizes.

    >>> refuse_foreign({"target": "torch.os.system"})
    Traceback (most recent call last):
    fettle.core.errors.ForeignArtifact: a graph may only name ATen operations, got 'torch.os.system'
    """
    if data != without_notes(data):
        raise ForeignArtifact("a graph may hold no guards and no notes on its nodes, got some")
    for key, text in _texts(data):
        if key == "target" and not _is_operation(text):
            raise ForeignArtifact(f"a graph may only name ATen operations, got {text[:80]!r}")
        if key == "expr_str" and not _is_arithmetic(text):
            raise ForeignArtifact(f"a size may only be arithmetic on free sizes, got {text[:80]!r}")
        if key in ("in_spec", "out_spec") and not _is_plain_container(text):
            raise ForeignArtifact(f"a graph may only take and give nested tuples, lists and dicts, got {text[:80]!r}")


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


def _is_operation(target: str) -> bool:
    """Arithmetic on scalars, or an operation of torch that takes no file name: aten::from_file and aten::save do."""
    match = _OPERATION.fullmatch(target)
    if match is None:
        return _SCALAR.fullmatch(target) is not None
    library, name, overload = match.groups()
    operation = getattr(getattr(getattr(torch.ops, library), name, None), overload, None)
    if not isinstance(operation, torch._ops.OpOverload):
        return False
    return all(argument.name != "filename" for argument in operation._schema.arguments)


def _is_arithmetic(text: str) -> bool:
    return len(text) <= _EXPRESSION_LIMIT and _EXPRESSION.fullmatch(text) is not None


def _is_plain_container(text: Any) -> bool:
    """Whether a serialized tree, "[version, {type, context, children_spec}]", names only built-in containers."""
    try:
        _, tree = json.loads(text)
        waiting = [tree]
        while waiting:
            node = waiting.pop()
            keys = json.loads(node["context"] or "null")
            plain = keys is None or (isinstance(keys, list) and all(isinstance(key, str | int) for key in keys))
            if node["type"] not in _CONTAINERS or not plain:
                return False
            waiting.extend(node["children_spec"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    return True


class _Module(Runner):
    def __init__(self, module: torch.nn.Module, signature: Signature, threads: int, device: torch.device) -> None:
        super().__init__(signature)
        self._module, self._threads, self._device = module, threads, device

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            # Copied only where torch cannot take the memory as it is: read-only, or with negative strides.
            arrays = (np.require(inputs[spec.name], requirements=["C", "W"]) for spec in self.signature.inputs)
            result = self._module(*(torch.from_numpy(array).to(self._device) for array in arrays))
        values = torch.utils._pytree.tree_leaves(result)
        return {spec.name: value.cpu().numpy() for spec, value in zip(self.signature.outputs, values, strict=True)}
