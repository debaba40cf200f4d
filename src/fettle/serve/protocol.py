"""The Open Inference Protocol v2, REST JSON: from bytes to checked arrays, and back.

Knows nothing of HTTP beyond the status of a Refusal, so that another transport can use the same values. Strict where
the protocol is vague: a number must fit its data type exactly, nested data must have the declared shape, and NaN or
infinity, which JSON does not have, are refused in requests and in answers. Tensors outside of the JSON are in
`binary.py`, which shares the checks below.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from fettle.core.errors import InvalidInput
from fettle.core.signature import Array, Signature, TensorSpec
from fettle.serve.answer import Answer
from fettle.serve.model import ModelFault, Served
from fettle.serve.refusal import Refusal, quote

MAX_RANK = 16
_MAX_SIDE = 2**63 - 1
DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8",
    "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip
_DTYPES = {datatype: dtype for dtype, datatype in DATATYPES.items()}
# What the protocol has and numpy has not, so that no signature can ask for it.
_ABSENT = {
    "BYTES": "models here take numbers only",
    "BF16": "numpy has no such type: send FP32 or FP16, as the model's metadata says",
}
_KINDS: dict[str, type] = {"b": bool, "i": int, "u": int, "f": float}

# Names and sizes are checked by hand after decoding, for messages that say the rule.
_Parameters = dict[str, str | int | float | bool | None]


class InputJson(msgspec.Struct):
    """One input as the JSON describes it, nothing checked yet but the types."""

    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = msgspec.Raw()
    parameters: _Parameters = {}


class WantedJson(msgspec.Struct):
    """One output that is asked for, nothing checked yet but the types."""

    name: str
    parameters: _Parameters = {}


class RequestJson(msgspec.Struct):
    """The JSON of a request, nothing checked yet but the types."""

    inputs: list[InputJson]
    id: str | None = None
    parameters: _Parameters = {}
    outputs: list[WantedJson] | None = None


class _FlatInput(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: list[float]
    parameters: _Parameters = {}


class _FlatRequest(msgspec.Struct):
    """As most clients write it: read in one go, where `RequestJson` has its data read a second time."""

    inputs: list[_FlatInput]
    id: str | None = None
    parameters: _Parameters = {}
    outputs: list[WantedJson] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InferCall:
    """One checked request.

    outputs: the names asked for, in order; binary: those of them that are wanted as raw bytes behind the JSON.
    id: to be echoed where one was given.
    """

    inputs: dict[str, Array]
    outputs: tuple[str, ...]
    rows: int
    id: str | None
    binary: frozenset[str] = frozenset()

    @property
    def shape(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """What two requests must share to run as one batch: all dimensions but the first."""
        return tuple((name, array.shape[1:]) for name, array in sorted(self.inputs.items()))


def parse_infer(body: bytes | memoryview, signature: Signature) -> InferCall:
    """The arrays in the body of `POST /v2/models/NAME/infer`. Raises Refusal 400."""
    flat = _flat_floats(body, signature)
    if flat is not None:
        return call_of(flat, _flat_array, signature)
    return call_of(decode(body, RequestJson), json_array, signature)


def _flat_floats(body: bytes | memoryview, signature: Signature) -> _FlatRequest | None:
    """The request where all data is flat and of floats, None where it is not, or is wrong: the general way says how."""
    if not all(spec.dtype.startswith("float") for spec in signature.inputs):
        return None
    try:
        request: _FlatRequest = _decoder_of(_FlatRequest).decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    plain = all(
        _DTYPES.get(tensor.datatype, "").startswith("float") and "binary_data_size" not in tensor.parameters
        for tensor in request.inputs
    )
    return request if plain else None


def call_of(request: RequestJson | _FlatRequest, read: Callable[[Any], Array], signature: Signature) -> InferCall:
    """The request with its inputs as `read` finds them, each once and as the signature says. Raises Refusal 400."""
    arrays: dict[str, Array] = {}
    for tensor in request.inputs:
        if tensor.name in arrays:
            raise Refusal(400, f"each input must be given once, got {quote(tensor.name)} twice")
        arrays[tensor.name] = read(tensor)
    try:
        rows = signature.check(arrays)
    except InvalidInput as problem:
        raise Refusal(400, str(problem)[:500]) from None
    names = _wanted(request, signature)
    return InferCall(inputs=arrays, outputs=names, rows=rows, id=request.id, binary=_binary(request, names))


@functools.cache
def _decoder_of(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def decode(body: bytes | memoryview, kind: Any) -> Any:
    """The JSON text as that type. Raises Refusal 400, for deep nesting too."""
    if not body:
        raise Refusal(400, "the body must be JSON, got an empty one")
    try:
        return _decoder_of(kind).decode(body)
    except RecursionError:
        raise Refusal(400, "the body must be JSON of moderate depth, got one nested too deeply") from None
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as problem:
        raise Refusal(400, f"the body must be JSON as documented: {str(problem)[:200]}") from None


def _wanted(request: RequestJson | _FlatRequest, signature: Signature) -> tuple[str, ...]:
    known = tuple(spec.name for spec in signature.outputs)
    if not request.outputs:
        return known
    names = tuple(wanted.name for wanted in request.outputs)
    for name in names:
        if name not in known:
            raise Refusal(400, f"unknown output {quote(name)}; this model has {', '.join(known)}")
    if len(set(names)) != len(names):
        raise Refusal(400, "each output may be asked for once")
    return names


def _binary(request: RequestJson | _FlatRequest, names: tuple[str, ...]) -> frozenset[str]:
    """What an output says of itself goes before what the request says of all."""
    every = _flag(request.parameters, "binary_data_output", False)
    own = {wanted.name: wanted.parameters for wanted in request.outputs or ()}
    return frozenset(name for name in names if _flag(own.get(name, {}), "binary_data", every))


def _flag(parameters: _Parameters, key: str, default: bool) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise Refusal(400, f"parameter {key} must be true or false, got {quote(value)}")
    return value


def layout_of(tensor: InputJson | _FlatInput) -> tuple[np.dtype[Any], list[int]]:
    """The data type and the shape that an input declares. Raises Refusal 400.

    >>> layout_of(InputJson(name="x", shape=[5, 2], datatype="FP32"))
    (dtype('float32'), [5, 2])
    """
    where = f"input {quote(tensor.name)}"
    dtype = _DTYPES.get(tensor.datatype)
    if dtype is None:
        why = f" ({_ABSENT[tensor.datatype]})" if tensor.datatype in _ABSENT else ""
        allowed = ", ".join(_DTYPES)
        raise Refusal(400, f"{where}: datatype must be one of {allowed}, got {quote(tensor.datatype)}{why}")
    shape = tensor.shape
    # Python prints no product of thousands of digits; and no array has such a side.
    if not 1 <= len(shape) <= MAX_RANK or min(shape) < 1 or max(shape) > _MAX_SIDE:
        raise Refusal(400, f"{where}: shape must be 1 to {MAX_RANK} positive numbers of 63 bits, got {quote(shape)}")
    return np.dtype(dtype), shape


def json_array(tensor: InputJson) -> Array:
    """The tensor's data, nested or flat, as an array of exactly its shape and data type. Raises Refusal 400.

    >>> json_array(InputJson(name="x", shape=[1, 2], datatype="UINT8", data=msgspec.Raw(b"[[1, 255]]")))
    array([[  1, 255]], dtype=uint8)
    """
    where = f"input {quote(tensor.name)}"
    dtype, shape = layout_of(tensor)
    if "binary_data_size" in tensor.parameters:
        raise Refusal(
            400, f"{where}: a binary tensor needs the header Inference-Header-Content-Length, the length of the JSON"
        )
    text = memoryview(tensor.data)
    if not text.nbytes:
        raise Refusal(400, f"{where}: data is missing")
    nested = len(shape) > 1 and _is_nested(text)
    try:
        values = _decoder(len(shape) if nested else 1, _KINDS[dtype.kind]).decode(text)
        with np.errstate(over="ignore"):  # a number too large becomes infinity, which the signature refuses
            array = np.array(values, dtype=dtype)
    except (msgspec.MsgspecError, OverflowError, RecursionError):
        form = f"nested as its shape {shape} says" if nested else "a list"
        raise Refusal(400, f"{where}: data must be {form}, every value {tensor.datatype} and finite") from None
    except ValueError:
        raise Refusal(400, f"{where}: nested data must have the shape {shape}, got a ragged one") from None
    if nested and list(array.shape) != shape:
        raise Refusal(400, f"{where}: nested data must have the shape {shape}, got {list(array.shape)}")
    return _shaped(array, shape, where)


def _flat_array(tensor: _FlatInput) -> Array:
    dtype, shape = layout_of(tensor)
    with np.errstate(over="ignore"):
        array = np.fromiter(tensor.data, dtype, len(tensor.data))
    return _shaped(array, shape, f"input {quote(tensor.name)}")


def _shaped(array: Array, shape: list[int], where: str) -> Array:
    if array.size != math.prod(shape):
        raise Refusal(400, f"{where}: shape {shape} needs {math.prod(shape)} values, got {array.size}")
    return array.reshape(shape)


def _is_nested(text: memoryview) -> bool:
    """True where the first element of this JSON list is itself a list."""
    return bytes(text[:256]).lstrip(b" \t\r\n")[1:].lstrip(b" \t\r\n").startswith(b"[")


@functools.lru_cache(maxsize=128)
def _decoder(depth: int, kind: type) -> msgspec.json.Decoder[Any]:
    wanted: Any = kind
    for _ in range(depth):
        wanted = list[wanted]
    return msgspec.json.Decoder(wanted)


def format_infer(answer: Answer, *, model: Served, call: InferCall) -> bytes:
    """The body of the response. Raises ModelFault for NaN or infinity, which JSON cannot carry."""
    response = response_head(model, call)
    response["outputs"] = [json_tensor(name, answer.outputs[name]) for name in call.outputs]
    return msgspec.json.encode(response)


def response_head(model: Served, call: InferCall) -> dict[str, Any]:
    """What every response says before its outputs."""
    head: dict[str, Any] = {"model_name": model.name, "model_version": str(model.version)}
    if call.id is not None:
        head["id"] = call.id
    return head


def json_tensor(name: str, array: Array) -> dict[str, Any]:
    """An output with its data as JSON. Raises ModelFault for NaN or infinity, which JSON cannot carry.

    >>> json_tensor("y", np.array([[1, 2]], np.uint8))
    {'name': 'y', 'shape': [1, 2], 'datatype': 'UINT8', 'data': [1, 2]}
    """
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ModelFault(f"the model answered NaN or infinity in output '{name}', which JSON cannot carry")
    return {
        "name": name,
        "shape": list(array.shape),
        "datatype": DATATYPES[array.dtype.name],
        "data": array.ravel().tolist(),
    }


def describe(model: Served, *, versions: Iterable[int]) -> dict[str, Any]:
    """The model's metadata: free dimensions are -1. versions: all that answer."""
    return {
        "name": model.name,
        "versions": [str(version) for version in versions],
        "platform": f"fettle_{model.runtime}",
        "inputs": [_spec(spec) for spec in model.signature.inputs],
        "outputs": [_spec(spec) for spec in model.signature.outputs],
    }


def _spec(spec: TensorSpec) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else -1 for size in spec.shape]
    return {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": shape}
