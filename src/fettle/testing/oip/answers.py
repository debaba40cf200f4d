"""What an answer must be: rules that checks share. Each raises AssertionError with the rule and what was got."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fettle.testing.oip.client import Reply, Skipped, parse_json, short
from fettle.testing.oip.server import Server
from fettle.testing.oip.tensors import (
    DATATYPES,
    Array,
    Document,
    Spec,
    array_from_bytes,
    array_from_json,
    differs,
    is_integer,
    is_shape,
    is_text,
)

LENGTH = "Inference-Header-Content-Length"


@dataclass(frozen=True, slots=True)
class Answer:
    """A good answer to an inference request. binary: names of the outputs whose data came as bytes."""

    document: Document
    arrays: dict[str, Array] = field(default_factory=dict)
    binary: frozenset[str] = frozenset()


def success(reply: Reply) -> Any:
    """The JSON of an answer with status 200, and no other: clients count 201 or 204 as an error (tritonclient)."""
    assert reply.status == 200, f"{reply.asked} must be answered with exactly 200, got {reply}"
    return reply.json()


def refusal(reply: Reply, what: str, *, also: int = 400) -> str:
    """The message of an error that is the client's: 4xx and `{"error": text}` (inference_rest.md, RFC 9110 15.5).

    also: another status that will do.
    """
    assert 400 <= reply.status < 500 or reply.status == also, f"{what} must be refused with 4xx, got {reply}"
    return error_of(reply, what)


def error_of(reply: Reply, what: str) -> str:
    """The text of `{"error": text}`."""
    try:
        document = reply.json()
    except AssertionError:
        document = None
    error = document.get("error") if isinstance(document, dict) else None
    assert is_text(error), f'{what} must be refused with {{"error": text}}, got {reply}'
    return error


def infer(
    server: Server,
    body: bytes | Document,
    headers: Mapping[str, str] | None = None,
    *,
    version: str | None = None,
) -> Answer:
    """The answer to a request that must be answered."""
    return read_answer(server, server.infer(body, headers, version=version))


def read_answer(server: Server, reply: Reply) -> Answer:
    """A good answer, held to inference_response of open_inference_rest.yaml and to the model's metadata."""
    assert reply.status == 200, f"a good request must be answered with exactly 200, got {reply}"
    document, rest = _split(reply)
    assert document.get("model_name") == server.model, (
        f"model_name must be {server.model!r}, got {short(document.get('model_name'))}"
    )
    listed = document.get("outputs")
    assert isinstance(listed, list), f"an answer must have a list of outputs, got {short(document)}"
    arrays, binary = {}, set()
    known = {spec.name: spec for spec in server.outputs}
    for output in listed:
        name = output.get("name") if isinstance(output, dict) else None
        assert name in known, f"each output must be one of {', '.join(known)}, got {short(output)}"
        assert name not in arrays, f"output {name} must come once, got it twice"
        arrays[name], used = _read_output(output, known[name], rest)
        if used is not None:
            binary.add(name)
            rest = rest[used:]
    assert not rest, f"the outputs' binary sizes must add up to the body, got {len(rest)} bytes more"
    return Answer(document, arrays, frozenset(binary))


def _split(reply: Reply) -> tuple[Document, bytes]:
    """The JSON part of a body and the bytes behind it."""
    length = reply.header(LENGTH)
    end = len(reply.body)
    if length:
        end = int(length) if length.isdecimal() else -1
        assert 0 <= end <= len(reply.body), (
            f"{LENGTH} must be 0 to {len(reply.body)}, the length of the body, got {short(length)}"
        )
    document = parse_json(reply.body[:end], where=f"the answer to {reply.asked}")
    assert isinstance(document, dict), f"an answer must be a JSON object, got {reply}"
    return document, reply.body[end:]


def _read_output(output: Document, spec: Spec, rest: bytes) -> tuple[Array, int | None]:
    """The tensor, and how many bytes it took from the rest, None where it was JSON."""
    where = f"output {spec.name}"
    assert output.get("datatype") == spec.datatype, (
        f"{where}: datatype must be that of the metadata, {spec.datatype}, got {short(output.get('datatype'))}"
    )
    if spec.datatype not in DATATYPES:
        raise Skipped(f"{where} is {spec.datatype}, which this suite cannot read")
    shape = output.get("shape")
    assert is_shape(shape), f"{where}: shape must be a list of integers from 0, got {short(shape)}"
    fits = len(shape) == len(spec.shape) and all(
        want in (-1, size) for size, want in zip(shape, spec.shape, strict=True)
    )
    assert fits, f"{where}: shape must be that of the metadata, {list(spec.shape)}, got {shape}"
    parameters = output.get("parameters")
    if not isinstance(parameters, dict) or "binary_data_size" not in parameters:
        assert "data" in output, f"{where}: data is missing"
        return array_from_json(output["data"], spec.datatype, shape, where=where), None
    size = parameters["binary_data_size"]
    rule = f"{where}: binary_data_size must be 0 to {len(rest)}, the bytes that are left, got {short(size)}"
    assert is_integer(size), rule
    assert 0 <= size <= len(rest), rule
    assert "data" not in output, f"{where}: must have data or binary_data_size, got both"
    return array_from_bytes(rest[:size], spec.datatype, shape, where=where), size


def same_outputs(server: Server, found: Answer, wanted: Answer, rule: str) -> None:
    """Both answers have the same outputs with the same values."""
    assert set(found.arrays) == set(wanted.arrays), (
        f"{rule}, got the outputs {sorted(found.arrays)} and {sorted(wanted.arrays)}"
    )
    for name, array in wanted.arrays.items():
        same_values(server, name, found.arrays[name], array, rule)


def same_values(server: Server, name: str, found: Array, wanted: Array, rule: str) -> None:
    """Two tensors of this output are equal; floats may differ a little."""
    datatype = next(spec.datatype for spec in server.outputs if spec.name == name)
    difference = differs(found, wanted, datatype)
    assert not difference, f"{rule}, got {difference} of output {name}"


def still_answers(server: Server, after: str) -> None:
    """A good request is answered, whatever came before."""
    reply = server.infer(server.good())
    assert reply.status == 200, f"after {after} a good request must be answered, got {reply}"
