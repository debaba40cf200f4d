"""Tensors of the protocol: made up from a model's metadata, written as JSON or bytes, read back, compared."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from fettle.testing.oip.client import Skipped, short

Array = npt.NDArray[Any]
Document = dict[str, Any]

DATATYPES: dict[str, npt.DTypeLike] = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "BYTES": "O",
}  # fmt: skip
# Known to the protocol's gRPC half and to Triton; there is no way to write it in JSON, nor a type of numpy.
_BINARY_ONLY = "BF16"
_LENGTH_BYTES = 4
_TOLERANCE = {"FP16": 1e-2, "FP32": 1e-4, "FP64": 1e-4}


@dataclass(frozen=True, slots=True)
class Spec:
    """One tensor of a model's metadata. -1 stands for a free dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        """FP16, FP32 or FP64."""
        return self.datatype.startswith("FP")

    @property
    def has_rows(self) -> bool:
        """The first dimension is free: it may be a batch."""
        return self.shape[:1] == (-1,)

    def sized(self, *, rows: int, free: int) -> tuple[int, ...]:
        """The shape with every free dimension filled in: the first with `rows`, others with `free`.

        >>> Spec("x", "FP32", (-1, 3, -1)).sized(rows=2, free=5)
        (2, 3, 5)
        """
        filled = [free if size == -1 else size for size in self.shape]
        return (rows, *filled[1:]) if self.has_rows else tuple(filled)


def read_specs(document: object, part: str) -> tuple[Spec, ...]:
    """`inputs` or `outputs` of a model's metadata. Raises AssertionError where they are not as the protocol says.

    Source: $metadata_tensor of inference_rest.md, metadata_tensor of open_inference_rest.yaml.
    """
    listed = document.get(part) if isinstance(document, dict) else None
    rule = f"metadata must list {part}, got {short(document)}"
    assert isinstance(listed, list), rule
    assert listed, rule
    specs = tuple(_read_spec(each, part) for each in listed)
    names = [spec.name for spec in specs]
    assert len(set(names)) == len(names), f"{part} of the metadata must have different names, got {names}"
    return specs


def _read_spec(each: object, part: str) -> Spec:
    rule = f"each of the metadata's {part} must be an object of name, datatype and shape, got {short(each)}"
    assert isinstance(each, dict), rule
    name, datatype, shape = each.get("name"), each.get("datatype"), each.get("shape")
    assert is_text(name), rule
    known = (*DATATYPES, _BINARY_ONLY)
    assert datatype in known, f"{name}: datatype must be one of {', '.join(known)}, got {short(datatype)}"
    assert is_shape(shape, least=-1), (
        f"{name}: shape must be a list of integers with -1 for free dimensions, got {short(shape)}"
    )
    return Spec(name, str(datatype), tuple(shape))


def is_text(value: object) -> TypeGuard[str]:
    """A JSON string that is not empty."""
    return isinstance(value, str) and value != ""


def is_integer(value: object) -> TypeGuard[int]:
    """A JSON number without a fraction, and not true or false, which Python counts as integers."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_shape(value: object, *, least: int = 0) -> TypeGuard[list[int]]:
    """A list of integers, none below the least."""
    return isinstance(value, list) and all(is_integer(size) and size >= least for size in value)


def sample(spec: Spec, *, rows: int = 1, free: int = 1, seed: int = 0) -> Array:
    """Values that the model should take: exact in every data type, small, the same each time. Raises Skipped.

    Integers are 0 or 1, since an index or a mask may take no more; strings are "0" or "1".
    """
    if spec.datatype not in DATATYPES:
        raise Skipped(f"input {spec.name} is {spec.datatype}, which this suite cannot make")
    shape = spec.sized(rows=rows, free=free)
    rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    if spec.is_float:
        return (rng.integers(-16, 17, shape) / 8).astype(DATATYPES[spec.datatype])
    whole = np.asarray(rng.integers(0, 2, shape))
    if spec.datatype == "BYTES":
        return np.array([b"%d" % value for value in whole.flat] + [None], dtype=object)[:-1].reshape(shape)
    return whole.astype(DATATYPES[spec.datatype])


# JSON


def flat(array: Array) -> list[Any]:
    """The elements in row-major order, as JSON has them."""
    values = array.ravel().tolist()
    return [value.decode() for value in values] if array.dtype == object else values


def nested(array: Array) -> list[Any]:
    """The elements in lists of lists, as the shape says."""
    return np.array([*flat(array), None], dtype=object)[:-1].reshape(array.shape).tolist()  # type: ignore[no-any-return]


def tensor_of(spec: Spec, array: Array) -> Document:
    """One input of a request, flat."""
    return {"name": spec.name, "shape": list(array.shape), "datatype": spec.datatype, "data": flat(array)}


def request_of(specs: Iterable[Spec], arrays: Mapping[str, Array], **more: Any) -> Document:
    """An inference request object with flat data. more: id, outputs, parameters."""
    return {**more, "inputs": [tensor_of(spec, arrays[spec.name]) for spec in specs]}


def with_input(request: Document, index: int = 0, **fields: Any) -> Document:
    """The request with some fields of one input replaced; ... takes a field out.

    >>> with_input({"inputs": [{"name": "x", "data": [1]}]}, name="y", data=...)
    {'inputs': [{'name': 'y'}]}
    """
    inputs = list(request["inputs"])
    inputs[index] = {key: value for key, value in {**inputs[index], **fields}.items() if value is not ...}
    return {**request, "inputs": inputs}


def encode(request: object) -> bytes:
    """As JSON text."""
    return json.dumps(request, allow_nan=False).encode()


def array_from_json(data: object, datatype: str, shape: Sequence[int], *, where: str) -> Array:
    """The data of an output, nested or flat, held to its data type and shape. Raises AssertionError."""
    assert isinstance(data, list), f"{where}: data must be a list, got {short(data)}"
    values = list(_leaves(data))
    size = math.prod(shape)
    assert len(values) == size, f"{where}: shape {list(shape)} needs {size} values, got {len(values)}"
    for value in values:
        assert _fits(value, datatype), f"{where}: every value must be {datatype}, got {short(value)}"
    if datatype == "BYTES":
        values = [value.encode() for value in values]
    # The None keeps numpy from looking into a list that holds one value, or none.
    whole = np.array([*values, None], dtype=object)[:-1]
    return whole.astype(DATATYPES[datatype]).reshape(tuple(shape))


def _leaves(data: list[Any]) -> Iterable[Any]:
    waiting = [iter(data)]
    while waiting:
        for value in waiting[-1]:
            if isinstance(value, list):
                waiting.append(iter(value))
                break
            yield value
        else:
            waiting.pop()


def _fits(value: object, datatype: str) -> bool:
    if datatype == "BYTES":
        return isinstance(value, str)
    if datatype == "BOOL":
        return isinstance(value, bool)
    if datatype.startswith("FP"):
        return isinstance(value, int | float) and not isinstance(value, bool)
    limits = np.iinfo(np.dtype(DATATYPES[datatype]))
    return is_integer(value) and int(limits.min) <= value <= int(limits.max)


# Bytes


def to_bytes(array: Array) -> bytes:
    """Little endian, row-major; each BYTES element after its length (extension_binary_data.md).

    >>> to_bytes(np.array([b"ab", b""], dtype=object))
    b'\\x02\\x00\\x00\\x00ab\\x00\\x00\\x00\\x00'
    """
    if array.dtype == object:
        return b"".join(len(value).to_bytes(_LENGTH_BYTES, "little") + value for value in array.flat)
    return array.tobytes()


def array_from_bytes(content: bytes, datatype: str, shape: Sequence[int], *, where: str) -> Array:
    """The reverse of `to_bytes`. Raises AssertionError where the size is not that of the shape."""
    size = math.prod(shape)
    if datatype == "BYTES":
        values = _strings(content, where=where)
        assert len(values) == size, f"{where}: shape {list(shape)} needs {size} strings, got {len(values)}"
        return np.array([*values, None], dtype=object)[:-1].reshape(tuple(shape))
    dtype = np.dtype(DATATYPES[datatype])
    wanted = size * dtype.itemsize
    assert len(content) == wanted, f"{where}: {datatype} of {list(shape)} needs {wanted} bytes, got {len(content)}"
    return np.frombuffer(content, dtype).reshape(tuple(shape))


def _strings(content: bytes, *, where: str) -> list[bytes]:
    values, start = [], 0
    while start < len(content):
        begin = start + _LENGTH_BYTES
        end = begin + int.from_bytes(content[start:begin], "little")
        assert max(begin, end) <= len(content), f"{where}: a string must not be longer than its tensor"
        values.append(content[begin:end])
        start = end
    return values


def differs(found: Array, wanted: Array, datatype: str) -> str:
    """What differs between two tensors in a few words, "" where nothing does. Floats may differ a little.

    >>> differs(np.array([1.0, 3.0]), np.array([1.0, 2.0]), "FP32")
    'values 3.0 and 2.0 at position 1'
    """
    if found.shape != wanted.shape:
        return f"shapes {list(found.shape)} and {list(wanted.shape)}"
    if datatype in _TOLERANCE:
        limit = _TOLERANCE[datatype]
        one, other = found.astype(np.float64), wanted.astype(np.float64)
        same = np.isclose(one, other, rtol=limit, atol=limit, equal_nan=True).ravel()
    else:
        same = np.asarray(found == wanted, dtype=bool).ravel()
    if same.all():
        return ""
    position = int(np.argmin(same))
    return f"values {found.ravel()[position]} and {wanted.ravel()[position]} at position {position}"
