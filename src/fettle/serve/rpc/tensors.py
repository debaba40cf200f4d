"""ModelInferRequest to arrays and an answer to ModelInferResponse: the part of a worker.

Tensors come all typed, in `contents` of each input, or all raw, in `raw_input_contents` in the order of the inputs: as
they lie in memory, little endian and row-major, BOOL as bytes of 0 or 1. The answer comes as the request came, raw for
a request without any tensor too; FP16 has no typed form, so an answer with FP16 in it is raw.

The rules are those of `protocol.py` and `binary.py`: exact sizes, exact ranges, finite inputs; NaN and infinity pass in
outputs, because here they can be told. Parameters that nobody knows are ignored, as there.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fettle.core.signature import Array, Signature
from fettle.serve.answer import Answer
from fettle.serve.binary import array_of
from fettle.serve.model import Served
from fettle.serve.protocol import DATATYPES, InferCall, InputJson, RequestJson, WantedJson, call_of, layout_of
from fettle.serve.refusal import Refusal, quote
from fettle.serve.rpc import messages

# Which list of InferTensorContents has the values of a data type: several share one of wider numbers.
_LISTS = {
    "bool": "bool_contents", "int8": "int_contents", "int16": "int_contents", "int32": "int_contents",
    "int64": "int64_contents", "uint8": "uint_contents", "uint16": "uint_contents", "uint32": "uint_contents",
    "uint64": "uint64_contents", "float32": "fp32_contents", "float64": "fp64_contents",
}  # fmt: skip
_WIDE = {"int_contents": np.int32, "uint_contents": np.uint32}


def parse_grpc(content: bytes | memoryview, signature: Signature) -> InferCall:
    """The arrays in a serialized ModelInferRequest. Raises Refusal 400."""
    message = messages.parse(messages.ModelInferRequest, content)
    raw = list(message.raw_input_contents)
    if raw and len(raw) != len(message.inputs):
        count = len(message.inputs)
        raise Refusal(400, f"raw_input_contents must have one entry for each of {count} inputs, got {len(raw)}")
    given = iter(zip(message.inputs, raw if raw else [None] * len(message.inputs), strict=True))

    def read(tensor: InputJson) -> Array:
        found, octets = next(given)
        return _typed(tensor, found.contents) if octets is None else _raw(tensor, found, octets)

    request = RequestJson(
        inputs=[
            InputJson(name=tensor.name, shape=list(tensor.shape), datatype=tensor.datatype) for tensor in message.inputs
        ],
        id=message.id or None,
        outputs=[WantedJson(name=wanted.name) for wanted in message.outputs],
    )
    call = call_of(request, read, signature)
    names = frozenset(call.outputs)
    return InferCall(
        inputs=call.inputs,
        outputs=call.outputs,
        rows=call.rows,
        id=call.id,
        binary=names if raw or _halves(signature, names) else frozenset(),
    )


def _halves(signature: Signature, names: frozenset[str]) -> bool:
    return any(spec.dtype == "float16" for spec in signature.outputs if spec.name in names)


def _raw(tensor: InputJson, found: Any, octets: bytes) -> Array:
    where = f"input {quote(tensor.name)}"
    if found.contents.ByteSize():
        raise Refusal(400, f"{where}: tensors must be all in contents or all in raw_input_contents, got both")
    dtype, shape = layout_of(tensor)
    needed = math.prod(shape) * dtype.itemsize
    if len(octets) != needed:
        given = f"got {len(octets)} in raw_input_contents"
        raise Refusal(400, f"{where}: shape {shape} of {tensor.datatype} needs {needed} bytes, {given}")
    return array_of(memoryview(octets), dtype, shape, where)


def _typed(tensor: InputJson, contents: Any) -> Array:
    where = f"input {quote(tensor.name)}"
    dtype, shape = layout_of(tensor)
    name = _LISTS.get(dtype.name)
    if name is None:
        raise Refusal(400, f"{where}: {tensor.datatype} has no typed contents: send raw_input_contents")
    lists = [field.name for field, _ in contents.ListFields()]
    if not lists:
        raise Refusal(400, f"{where}: contents are missing")
    if lists != [name]:
        raise Refusal(400, f"{where}: contents of {tensor.datatype} must be in {name} alone, got {', '.join(lists)}")
    values = np.array(getattr(contents, name), _WIDE.get(name, dtype))
    if values.size != math.prod(shape):
        raise Refusal(400, f"{where}: shape {shape} needs {math.prod(shape)} values, got {values.size}")
    array = values.astype(dtype, copy=False)
    if array.dtype != values.dtype and (array != values).any():
        raise Refusal(400, f"{where}: every value must be {tensor.datatype}")
    return array.reshape(shape)


def format_grpc(answer: Answer, *, model: Served, call: InferCall) -> bytes:
    """The serialized ModelInferResponse."""
    response = messages.ModelInferResponse(model_name=model.name, model_version=str(model.version), id=call.id or "")
    for name in call.outputs:
        array = answer.outputs[name]
        output = response.outputs.add(name=name, datatype=DATATYPES[array.dtype.name], shape=array.shape)
        if name in call.binary:
            response.raw_output_contents.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        else:
            getattr(output.contents, _LISTS[array.dtype.name]).extend(array.ravel().tolist())
    return bytes(response.SerializeToString())
