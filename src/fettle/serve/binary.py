"""The binary tensor data extension of the Open Inference Protocol: JSON, and behind it tensors as they lie in memory.

A body is the JSON of `protocol.py`, whose length the header Inference-Header-Content-Length tells, followed by the
elements of each binary tensor in the order of the JSON: little endian, row-major, without gaps, BOOL as bytes of 0 or
1. Each input is either JSON or binary, and so is each output. The bytes say nothing of themselves, so everything that
the JSON claims about them is compared with what is there before a single byte is touched, and all must be claimed.

What the protocol leaves open: NaN and infinity are refused in inputs, as in JSON, because the signature takes finite
numbers only; in binary outputs they pass, because there they can be told. BF16 and BYTES have no signature here.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec
import numpy as np

from fettle.core.signature import Array, Signature, TensorSpec
from fettle.serve.answer import Answer
from fettle.serve.model import Served
from fettle.serve.protocol import (
    DATATYPES,
    InferCall,
    InputJson,
    RequestJson,
    call_of,
    decode,
    json_array,
    json_tensor,
    layout_of,
    response_head,
)
from fettle.serve.refusal import Refusal, quote

_LENGTH = re.compile(r"[0-9]{1,18}")


def header_bytes_of(value: str) -> int:
    """The length of the JSON, from the value of Inference-Header-Content-Length. Raises Refusal 400.

    >>> header_bytes_of("310")
    310
    """
    if not _LENGTH.fullmatch(value):
        raise Refusal(400, f"Inference-Header-Content-Length must be a number of bytes, got {quote(value)}")
    return int(value)


def parse_binary(body: bytes | memoryview, *, header_bytes: int, signature: Signature) -> InferCall:
    """The arrays in a request with Inference-Header-Content-Length. Raises Refusal 400, before anything is allocated.

    body: after decompression; it must not change as long as the call lives, because inputs are read-only views of it
        where they lie aligned in memory, and copies where not.
    header_bytes: of the JSON; 0 for a raw request, which is one tensor and no JSON: the signature's only input. Its
        shape is the signature's with one free dimension, which the size decides, so any whole number of rows fits.
        A second free dimension is deduced where the first one is the batch, then 1: that is how Triton reads all raw
        requests. All outputs of a raw request are wanted as binary.

    >>> x = TensorSpec(name="x", dtype="uint8", shape=("batch", 2))
    >>> signature = Signature(inputs=(x,), outputs=(x,))
    >>> header = b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"UINT8","parameters":{"binary_data_size":2}}]}'
    >>> parse_binary(header + bytes([7, 8]), header_bytes=len(header), signature=signature).inputs["x"]
    array([[7, 8]], dtype=uint8)
    >>> call = parse_binary(bytes([1, 2, 3, 4]), header_bytes=0, signature=signature)
    >>> call.rows, sorted(call.binary)
    (2, ['x'])
    """
    content = memoryview(body)
    if not 0 <= header_bytes <= len(content):
        raise Refusal(
            400, f"Inference-Header-Content-Length must be 0 to the body's {len(content)} bytes, got {header_bytes}"
        )
    if header_bytes:
        request: RequestJson = decode(content[:header_bytes], RequestJson)
    else:
        request = _unsaid(signature, len(content))
    tail = _Tail(content[header_bytes:])
    call = call_of(request, tail.read, signature)
    if tail.left:
        raise Refusal(400, f"all bytes behind the JSON must belong to an input, got {tail.left} more")
    return call


class _Tail:
    """What follows the JSON; each binary input takes its part, in order."""

    def __init__(self, content: memoryview) -> None:
        self._content = content

    @property
    def left(self) -> int:
        """Bytes that nobody has taken."""
        return len(self._content)

    def read(self, tensor: InputJson) -> Array:
        """The input, from here or from its JSON. Raises Refusal 400."""
        if "binary_data_size" not in tensor.parameters:
            return json_array(tensor)
        where = f"input {quote(tensor.name)}"
        if memoryview(tensor.data).nbytes:
            raise Refusal(400, f"{where}: must have either data or binary_data_size, got both")
        dtype, shape = layout_of(tensor)
        size = tensor.parameters["binary_data_size"]
        if type(size) is not int or size < 0:  # True is an int to isinstance
            raise Refusal(400, f"{where}: binary_data_size must be a whole number of bytes, got {quote(size)}")
        needed = math.prod(shape) * dtype.itemsize
        if size != needed:
            given = f"got binary_data_size {quote(size)}"
            raise Refusal(400, f"{where}: shape {shape} of {tensor.datatype} needs {needed} bytes, {given}")
        if size > self.left:
            raise Refusal(400, f"{where}: binary_data_size is {size}, but only {self.left} bytes are left of the body")
        part, self._content = self._content[:size], self._content[size:]
        return array_of(part, dtype, shape, where)


def array_of(part: memoryview, dtype: np.dtype[Any], shape: list[int], where: str) -> Array:
    """The elements as they lie in memory, as an array of this shape: read-only where it is a view. Raises Refusal 400.

    >>> array_of(memoryview(bytes([1, 0])), np.dtype("uint16"), [1], "input 'x'")
    array([1], dtype=uint16)
    """
    if dtype.kind == "b":
        octets = np.frombuffer(part, np.uint8)
        if (highest := int(octets.max())) > 1:
            raise Refusal(400, f"{where}: BOOL must be bytes of 0 or 1, got {highest}")
        return octets.view(np.bool_).reshape(shape)
    array = np.frombuffer(part, dtype.newbyteorder("<")).reshape(shape)
    # The JSON in front may have any length, and engines read aligned memory only.
    return array if array.flags.aligned and array.dtype.isnative else array.astype(dtype)


def _unsaid(signature: Signature, size: int) -> RequestJson:
    """The JSON that a raw request of this many bytes spares itself. Raises Refusal 400."""
    if len(signature.inputs) != 1:
        count = len(signature.inputs)
        raise Refusal(400, f"a raw binary request needs a model of one input, this one has {count}: send JSON before")
    (spec,) = signature.inputs
    tensor = InputJson(
        name=spec.name,
        shape=_deduced(spec, size),
        datatype=DATATYPES[spec.dtype],
        parameters={"binary_data_size": size},
    )
    return RequestJson(inputs=[tensor], parameters={"binary_data_output": True})


def _deduced(spec: TensorSpec, size: int) -> list[int]:
    free = [index for index, side in enumerate(spec.shape) if isinstance(side, str)]
    if len(free) > (2 if free[:1] == [0] else 1):
        raise Refusal(
            400,
            f"a raw binary request has one free dimension besides the batch, not {list(spec.shape)}: send JSON before",
        )
    shape = [side if isinstance(side, int) else 1 for side in spec.shape]
    step = math.prod(shape) * np.dtype(spec.dtype).itemsize
    if free:
        shape[free[-1]] = size // step if step else 0
    if not size or math.prod(shape) * np.dtype(spec.dtype).itemsize != size:
        whole = "a multiple of " if free else ""
        raise Refusal(400, f"a raw binary request for this model must have {whole}{step} bytes, got {size}")
    return shape


def format_binary(answer: Answer, *, model: Served, call: InferCall) -> tuple[bytes, int]:
    """The body of the response, and how many bytes of it are JSON: its Inference-Header-Content-Length.

    Where no output is wanted as binary the JSON is all, as `format_infer` gives it, and needs no such header.
    Raises ModelFault for NaN or infinity in an output that is wanted as JSON; as binary they pass.
    """
    outputs: list[dict[str, Any]] = []
    parts: list[bytes | memoryview] = [b""]
    for name in call.outputs:
        array = answer.outputs[name]
        if name not in call.binary:
            outputs.append(json_tensor(name, array))
            continue
        outputs.append(
            {
                "name": name,
                "shape": list(array.shape),
                "datatype": DATATYPES[array.dtype.name],
                "parameters": {"binary_data_size": array.nbytes},
            }
        )
        parts.append(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
    header = msgspec.json.encode({**response_head(model, call), "outputs": outputs})
    parts[0] = header
    return b"".join(parts), len(header)


class _AnswerJson(msgspec.Struct):
    outputs: list[InputJson]


def outputs_in(content: bytes, *, header_bytes: int) -> dict[str, Array]:
    """The tensors of an answer, as `format_binary` and `format_infer` write them. Raises Refusal where it is none.

    >>> tensor = b'{"name": "y", "shape": [2], "datatype": "UINT8", "parameters": {"binary_data_size": 2}}'
    >>> head = b'{"outputs": [' + tensor + b"]}"
    >>> outputs_in(head + bytes([1, 2]), header_bytes=len(head))
    {'y': array([1, 2], dtype=uint8)}
    """
    whole = memoryview(content)
    end = header_bytes or len(whole)
    tail = _Tail(whole[end:])
    return {tensor.name: tail.read(tensor) for tensor in decode(whole[:end], _AnswerJson).outputs}
