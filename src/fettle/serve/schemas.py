"""JSON Schemas of what the server takes and gives, for one served model each, or for any."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fettle.core.signature import Signature, TensorSpec
from fettle.serve.model import Served
from fettle.serve.protocol import DATATYPES, MAX_RANK

Schema = dict[str, Any]

# An example with more elements than this helps nobody who reads it.
_EXAMPLE_ELEMENTS = 4096
# A picture of one white pixel, as PNG in base64.
_PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg=="
_PARAMETER: Schema = {"type": ["string", "number", "boolean", "null"]}


def object_of(properties: dict[str, Schema], *, optional: tuple[str, ...] = (), closed: bool = False) -> Schema:
    """An object whose properties are required unless `optional` names them; closed: it may have no others.

    >>> object_of({"live": {"type": "boolean"}})
    {'type': 'object', 'properties': {'live': {'type': 'boolean'}}, 'required': ['live']}
    """
    schema: Schema = {"type": "object", "properties": properties}
    required = [name for name in properties if name not in optional]
    if required:
        schema["required"] = required
    if closed:
        schema["additionalProperties"] = False
    return schema


def parameters_with(**known: Schema) -> Schema:
    """The object `parameters` of the protocol: some keys are known, all others are single values."""
    return {"type": "object", "properties": known, "additionalProperties": _PARAMETER}


def infer_request(model: Served | None, *, max_rows: int) -> Schema:
    """The JSON body of `/v2/models/NAME/infer`; of any model where `model` is None.

    The number of values in `data` must be the product of `shape`, which JSON Schema cannot say.
    """
    signature = None if model is None else model.signature
    rows = max_rows if model is not None and model.row_wise else None
    outputs = [] if signature is None else [spec.name for spec in signature.outputs]
    wanted = object_of(
        {
            "name": {"type": "string", **({"enum": outputs} if outputs else {})},
            "parameters": parameters_with(binary_data={"type": "boolean"}),
        },
        optional=("parameters",),
    )
    schema = object_of(
        {
            "id": {"type": ["string", "null"]},
            "parameters": parameters_with(binary_data_output={"type": "boolean"}),
            "inputs": _each([_input(spec, rows) for spec in signature.inputs] if signature else [_any_input()]),
            "outputs": {"type": ["array", "null"], "items": wanted},
        },
        optional=("id", "parameters", "outputs"),
    )
    if signature is None:
        return schema
    schema["properties"]["inputs"] |= {"minItems": len(signature.inputs), "maxItems": len(signature.inputs)}
    example = _example(signature)
    return schema if example is None else {**schema, "examples": [example]}


def infer_response(model: Served | None) -> Schema:
    """The JSON body of an answer of `/v2/models/NAME/infer`."""
    outputs = [_output(None)] if model is None else [_output(spec) for spec in model.signature.outputs]
    return object_of(
        {
            "model_name": {"type": "string", **({"const": model.name} if model else {})},
            "model_version": {"type": "string", **({"examples": [str(model.version)]} if model else {})},
            "id": {"type": "string"},
            "outputs": _each(outputs),
        },
        optional=("id",),
    )


def predict_request(*, max_images: int) -> Schema:
    """The JSON body of `/predict`: one image, or a list of them, in base64."""
    image = {"type": "string", "contentEncoding": "base64", "examples": [_PICTURE]}
    many = {"type": "array", "items": image, "minItems": 1, "maxItems": max_images}
    return {
        "oneOf": [object_of({"image": image}, closed=True), object_of({"images": many}, closed=True)],
        "examples": [{"image": _PICTURE}],
    }


def prediction(model: Served | None) -> Schema:
    """What `/predict` says of one image."""
    classes = () if model is None else model.signature.classes
    number = {"type": "number", "minimum": 0, "maximum": 1}
    return object_of(
        {
            "model": {"type": "string", **({"const": model.name} if model else {})},
            "version": {"type": "integer", **({"examples": [model.version]} if model else {})},
            "request_id": {"type": "string"},
            "class": {"type": ["string", "null"], **({"examples": list(classes[:5])} if classes else {})},
            "index": {"type": "integer", "minimum": 0},
            "confidence": number,
            "probabilities": {"type": "array", "items": number},
        }
    )


def model_metadata(model: Served | None) -> Schema:
    """The body of `/v2/models/NAME`."""
    tensor = object_of(
        {
            "name": {"type": "string"},
            "datatype": {"enum": list(DATATYPES.values())},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": -1}},
        }
    )
    return object_of(
        {
            "name": {"type": "string", **({"const": model.name} if model else {})},
            "versions": {"type": "array", "items": {"type": "string"}},
            "platform": {"type": "string", **({"examples": [f"fettle_{model.runtime}"]} if model else {})},
            "inputs": {"type": "array", "items": tensor},
            "outputs": {"type": "array", "items": tensor},
        }
    )


def _each(items: list[Schema]) -> Schema:
    return {"type": "array", "items": items[0] if len(items) == 1 else {"anyOf": items}}


def _input(spec: TensorSpec, max_rows: int | None) -> Schema:
    return object_of(
        {
            "name": {"const": spec.name},
            "shape": _shape(spec, max_rows),
            "datatype": {"const": DATATYPES[spec.dtype]},
            "parameters": parameters_with(binary_data_size={"type": "integer", "minimum": 0}),
            "data": _data(spec),
        },
        optional=("parameters", "data"),  # a tensor behind the JSON has no data in it
    )


def _any_input() -> Schema:
    side = {"type": "integer", "minimum": 1, "maximum": 2**63 - 1}
    return object_of(
        {
            "name": {"type": "string"},
            "shape": {"type": "array", "items": side, "minItems": 1, "maxItems": MAX_RANK},
            "datatype": {"enum": list(DATATYPES.values())},
            "parameters": parameters_with(binary_data_size={"type": "integer", "minimum": 0}),
            "data": {"type": "array"},
        },
        optional=("parameters", "data"),
    )


def _output(spec: TensorSpec | None) -> Schema:
    """data is missing where the output was wanted as binary: its bytes follow the JSON."""
    side = {"type": "integer", "minimum": 0}
    if spec is None:
        shape: Schema = {"type": "array", "items": side}
    else:
        sides = [side if isinstance(one, str) else {"const": one} for one in spec.shape]
        shape = _sides(sides)
    return object_of(
        {
            "name": {"type": "string"} if spec is None else {"const": spec.name},
            "shape": shape,
            "datatype": {"enum": list(DATATYPES.values())} if spec is None else {"const": DATATYPES[spec.dtype]},
            "parameters": parameters_with(binary_data_size={"type": "integer", "minimum": 0}),
            "data": {"type": "array", "items": {"type": ["number", "boolean"]} if spec is None else element(spec)},
        },
        optional=("parameters", "data"),
    )


def _shape(spec: TensorSpec, max_rows: int | None) -> Schema:
    sides: list[Schema] = []
    for place, side in enumerate(spec.shape):
        if isinstance(side, int):
            sides.append({"const": side})
            continue
        sides.append({"type": "integer", "minimum": 1, "title": side})
        if place == 0 and max_rows is not None:
            sides[0]["maximum"] = max_rows
    return _sides(sides)


def _sides(sides: list[Schema]) -> Schema:
    # An empty prefixItems is not allowed, and a scalar has no side.
    items: Schema = {"prefixItems": sides} if sides else {}
    return {"type": "array", **items, "minItems": len(sides), "maxItems": len(sides)}


def _data(spec: TensorSpec) -> Schema:
    """All values in one list, row by row, or nested as the shape says."""
    flat: Schema = {"type": "array", "items": element(spec), "minItems": 1}
    nested = element(spec)
    for _ in spec.shape:
        nested = {"type": "array", "items": nested, "minItems": 1}
    return flat if len(spec.shape) < 2 else {"anyOf": [flat, nested]}


def element(spec: TensorSpec) -> Schema:
    """One value of a tensor, within the bounds of its type.

    >>> element(TensorSpec(name="x", dtype="uint8", shape=("batch",)))
    {'type': 'integer', 'minimum': 0, 'maximum': 255}
    """
    kind = np.dtype(spec.dtype).kind
    if kind == "b":
        return {"type": "boolean"}
    if kind == "f":
        most = float(np.finfo(spec.dtype).max)
        return {"type": "number", "minimum": -most, "maximum": most}
    bounds = np.iinfo(spec.dtype)
    return {"type": "integer", "minimum": int(bounds.min), "maximum": int(bounds.max)}


def _example(signature: Signature) -> Schema | None:
    """A request of the smallest shape, all zeros; None where even that is large."""
    inputs = []
    for spec in signature.inputs:
        shape = [side if isinstance(side, int) else 1 for side in spec.shape]
        zero: Any = False if spec.dtype == "bool" else 0
        inputs.append(
            {"name": spec.name, "shape": shape, "datatype": DATATYPES[spec.dtype], "data": [zero] * math.prod(shape)}
        )
    return {"inputs": inputs} if sum(len(one["data"]) for one in inputs) <= _EXAMPLE_ELEMENTS else None
