"""Checks of the binary tensor data extension, where `GET /v2` advertises `binary_tensor_data`; skipped elsewhere.

Source: extension_binary_data.md of triton-inference-server/server. `tritonclient.http` sends inputs as bytes and asks
for all outputs as bytes unless told otherwise. Refusals are 4xx with `{"error": text}`, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from fettle.testing.oip.answers import LENGTH, Answer, infer, read_answer, refusal, same_outputs
from fettle.testing.oip.client import Skipped
from fettle.testing.oip.server import Server
from fettle.testing.oip.tensors import Document, encode, tensor_of, to_bytes, with_input

EXTENSION = "binary_tensor_data"
_OCTETS = "application/octet-stream"


def pack(document: Document, tail: bytes, *, length: str | None = None) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request whose tensors follow its JSON. length: instead of the right one."""
    text = encode(document)
    return text + tail, {"Content-Type": _OCTETS, LENGTH: str(len(text)) if length is None else length}


def binary_request(
    server: Server, *, rows: int = 1, only: Collection[str] | None = None, **more: Any
) -> tuple[Document, bytes]:
    """A good request and the bytes behind it. only: the inputs to send as bytes, by default all."""
    inputs, tail = [], b""
    for spec, array in zip(server.inputs, server.arrays(rows=rows).values(), strict=True):
        entry = tensor_of(spec, array)
        if only is None or spec.name in only:
            content = to_bytes(array)
            del entry["data"]
            entry["parameters"] = {"binary_data_size": len(content)}
            tail += content
        inputs.append(entry)
    return {**more, "inputs": inputs}, tail


def _advertised(server: Server) -> None:
    if EXTENSION not in server.extensions:
        raise Skipped(f"the server does not advertise {EXTENSION}")


def _wanted(server: Server, **binary: bool) -> list[Document]:
    """`outputs` of a request, with `binary_data` for those named."""
    return [
        {"name": spec.name, "parameters": {"binary_data": binary[spec.name]}}
        if spec.name in binary
        else {"name": spec.name}
        for spec in server.outputs
    ]


def _came_as(answer: Answer, names: Collection[str], how: str) -> None:
    found = sorted(answer.binary)
    assert found == sorted(names), (
        f"{how}: the outputs that come as bytes must be {', '.join(sorted(names)) or 'none'}, "
        f"got {', '.join(found) or 'none'}"
    )


# What must be answered


def takes_binary_inputs(server: Server) -> None:
    """Inputs as bytes behind the JSON, in its order, little endian: one row and two are answered as JSON data is."""
    _advertised(server)
    for rows in (1, 2):
        found = infer(server, *pack(*binary_request(server, rows=rows)))
        _came_as(found, (), "where none is asked for")
        rule = f"binary inputs of {rows} rows must be answered as JSON ones"
        same_outputs(server, found, infer(server, server.good(rows=rows)), rule)


def takes_binary_and_json_inputs_together(server: Server) -> None:
    """Each input is as its own parameters say, whichever of them come as bytes."""
    _advertised(server)
    if len(server.inputs) < 2:
        raise Skipped("the model has one input")
    wanted = infer(server, server.good())
    for spec in server.inputs:
        for only in ({spec.name}, {other.name for other in server.inputs} - {spec.name}):
            found = infer(server, *pack(*binary_request(server, only=only)))
            same_outputs(server, found, wanted, "binary and JSON inputs together must be answered as JSON ones")


def gives_binary_outputs_by_request(server: Server) -> None:
    """`binary_data_output` of the request makes every output bytes, for inputs in JSON and in bytes alike."""
    _advertised(server)
    wanted = infer(server, server.good())
    names = [spec.name for spec in server.outputs]
    parameters = {"binary_data_output": True}
    for request in (
        (encode(server.good(parameters=parameters)), None),  # tritonclient: JSON inputs, and no outputs named
        pack(*binary_request(server, parameters=parameters)),
        pack(*binary_request(server, parameters=parameters, outputs=_wanted(server))),
    ):
        found = infer(server, *request)
        _came_as(found, names, "binary_data_output")
        same_outputs(server, found, wanted, "binary outputs must be those of a JSON answer")


def gives_binary_outputs_by_name(server: Server) -> None:
    """`binary_data` of one output makes that one bytes, and leaves the others JSON."""
    _advertised(server)
    wanted = infer(server, server.good())
    for spec in server.outputs:
        found = infer(server, server.good(outputs=_wanted(server, **{spec.name: True})))
        _came_as(found, (spec.name,), f"binary_data of {spec.name}")
        same_outputs(server, found, wanted, "an output must be the same in bytes and in JSON")


def lets_an_output_override_the_request(server: Server) -> None:
    """`binary_data` of an output is stronger than `binary_data_output` of the request, either way."""
    _advertised(server)
    names = {spec.name for spec in server.outputs}
    for name in names:
        for default in (True, False):
            outputs = _wanted(server, **{name: not default})
            found = infer(server, server.good(outputs=outputs, parameters={"binary_data_output": default}))
            expected = names - {name} if default else {name}
            _came_as(found, expected, f"binary_data_output {default} and binary_data {not default} of {name}")


def says_where_the_json_ends(server: Server) -> None:
    """An answer with bytes has Inference-Header-Content-Length, Content-Length of the whole, and its own type."""
    _advertised(server)
    reply = server.infer(server.good(parameters={"binary_data_output": True}))
    assert reply.header(LENGTH), f"an answer with binary outputs must have the header {LENGTH}, got {reply}"
    length = reply.header("content-length")
    assert length in ("", str(len(reply.body))), f"Content-Length must be {len(reply.body)}, got {length}"
    kind = reply.header("content-type")
    assert kind == _OCTETS, f"an answer with binary outputs must be {_OCTETS}, got {kind or 'no content type'}"
    read_answer(server, reply)


def takes_a_body_of_bytes_alone(server: Server) -> None:
    """Inference-Header-Content-Length 0: the body is the one input, one row of it, and every output comes as bytes."""
    _advertised(server)
    if len(server.inputs) > 1:
        raise Skipped("the model has more than one input")
    (spec,) = server.inputs
    # Which of two free dimensions is the batch cannot be seen from outside.
    if spec.datatype == "BYTES" or spec.shape.count(-1) > 1:
        raise Skipped("only an input of numbers with at most one free dimension can be sent so")
    body = to_bytes(server.arrays()[spec.name])
    found = infer(server, body, {"Content-Type": _OCTETS, LENGTH: "0"})
    _came_as(found, [output.name for output in server.outputs], "a body without JSON")
    same_outputs(server, found, infer(server, server.good()), "a body of bytes alone must be answered as JSON data is")


# What must be refused


def refuses_a_wrong_json_length(server: Server) -> None:
    """Beyond the body, inside the JSON, behind it, negative, huge, or no number: refused, and the server goes on."""
    _advertised(server)
    document, tail = binary_request(server)
    size = len(encode(document))
    whole = size + len(tail)
    for length in (whole + 1, size - 1, size + 1, 1, -1, 2**31, 2**32 + size, 2**63, 2**64 + size, 10**30):
        _refused(server, document, tail, f"{LENGTH} {length} for {size}", length=str(length))
    for text in ("x", f"{size}x", f"{size}.0", f"0x{size:x}", f"{size}, {size + 1}"):
        _refused(server, document, tail, f"{LENGTH} {text!r}", length=text)
    _still_answers(server, "wrong lengths of the JSON")


def refuses_a_wrong_binary_size(server: Server) -> None:
    """`binary_data_size` must be that of shape and data type, a number, and in sum the bytes that are there."""
    _advertised(server)
    document, tail = binary_request(server)
    for index, entry in enumerate(document["inputs"]):
        size = entry["parameters"]["binary_data_size"]
        for wrong in (
            size - 1,
            size + 1,
            0,
            -1,
            -size,
            2**31,
            2**63,
            2**64 + size,
            10**30,
            size + 0.5,
            str(size),
            None,
        ):
            parameters = {"binary_data_size": wrong}
            changed = with_input(document, index, parameters=parameters)
            _refused(server, changed, tail, f"binary_data_size {wrong!r} for {size}")
    _still_answers(server, "wrong binary sizes")


def refuses_bytes_that_do_not_fit_the_shape(server: Server) -> None:
    """Size and bytes may agree with each other and still not be those of the shape."""
    _advertised(server)
    document, tail = binary_request(server)
    last = len(document["inputs"]) - 1
    size = document["inputs"][last]["parameters"]["binary_data_size"]
    for change in (-size, -1, 1, 8):
        content = tail + bytes(change) if change > 0 else tail[:change]
        changed = with_input(document, last, parameters={"binary_data_size": size + change})
        _refused(server, changed, content, f"{size + change} bytes where the shape needs {size}")


def refuses_leftover_bytes(server: Server) -> None:
    """Bytes that belong to no tensor."""
    _advertised(server)
    document, tail = binary_request(server)
    for extra in (b"\x00", b"{}", bytes(4096)):
        _refused(server, document, tail + extra, f"{len(extra)} bytes that belong to no tensor")


def refuses_missing_bytes(server: Server) -> None:
    """Fewer bytes than the sizes say are not filled up."""
    _advertised(server)
    document, tail = binary_request(server)
    for kept in (0, len(tail) - 1):
        _refused(server, document, tail[:kept], f"{kept} bytes where {len(tail)} are announced")
    _still_answers(server, "missing bytes")


def refuses_data_and_bytes_at_once(server: Server) -> None:
    """An input has `data` or `binary_data_size`: with both it is open which is meant."""
    _advertised(server)
    document, tail = binary_request(server)
    for index, entry in enumerate(server.good()["inputs"]):
        _refused(server, with_input(document, index, data=entry["data"]), tail, "data and binary_data_size at once")


def refuses_an_announced_size_without_the_header(server: Server) -> None:
    """Without Inference-Header-Content-Length the whole body is JSON, and no bytes can be behind it."""
    _advertised(server)
    document, tail = binary_request(server)
    text = encode(document)
    refusal(server.infer(text + tail), f"a body of JSON and bytes without {LENGTH}")
    refusal(server.infer(text), "binary_data_size without bytes")


def refuses_broken_strings(server: Server) -> None:
    """A BYTES element may not be longer than its tensor, nor its length be cut (4 bytes, then the element)."""
    _advertised(server)
    index = next((number for number, spec in enumerate(server.inputs) if spec.datatype == "BYTES"), None)
    if index is None:
        raise Skipped("no input is BYTES")
    only = {server.inputs[index].name}
    document, tail = binary_request(server, only=only)
    for content in (b"\xff\xff\xff\xff" + tail[4:], b"\xff\xff\xff\x7f" + tail[4:], tail[:3], b"\x02" + tail[1:]):
        changed = with_input(document, index, parameters={"binary_data_size": len(content)})
        _refused(server, changed, content, f"the string {content[:8]!r}")
    _still_answers(server, "broken strings")


def _refused(server: Server, document: Document, tail: bytes, what: str, *, length: str | None = None) -> None:
    refusal(server.infer(*pack(document, tail, length=length)), what)


def _still_answers(server: Server, after: str) -> None:
    reply = server.infer(*pack(*binary_request(server)))
    assert reply.status == 200, f"after {after} a good binary request must be answered, got {reply}"


CHECKS: tuple[Callable[[Server], None], ...] = (
    takes_binary_inputs,
    takes_binary_and_json_inputs_together,
    gives_binary_outputs_by_request,
    gives_binary_outputs_by_name,
    lets_an_output_override_the_request,
    says_where_the_json_ends,
    takes_a_body_of_bytes_alone,
    refuses_a_wrong_json_length,
    refuses_a_wrong_binary_size,
    refuses_bytes_that_do_not_fit_the_shape,
    refuses_leftover_bytes,
    refuses_missing_bytes,
    refuses_data_and_bytes_at_once,
    refuses_an_announced_size_without_the_header,
    refuses_broken_strings,
)
