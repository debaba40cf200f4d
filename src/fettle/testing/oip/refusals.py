"""Checks of requests that must be refused: each is 4xx with `{"error": text}`, and the server goes on.

Sources: $inference_error_response of inference_rest.md ("an HTTP error status (typically 400)", a body that "must
contain" the error), the schema inference_request of open_inference_rest.yaml, RFC 8259 for JSON, RFC 9110 15.5: 4xx is
for mistakes of the client. A value of another kind is the one exception: tensor_data allows numbers, texts and booleans
whatever the data type, so a server may convert them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fettle.testing.oip.answers import error_of, refusal, still_answers
from fettle.testing.oip.client import Skipped
from fettle.testing.oip.server import Server
from fettle.testing.oip.tensors import DATATYPES, Spec, encode, with_input

_UNKNOWN = "oip-check-no-such-name"
_DEPTH = 100_000


def refuses_a_wrong_datatype(server: Server) -> None:
    """Each input has the data type of the metadata; other names, and names that are none, are refused."""
    for index, spec in enumerate(server.inputs):
        good = server.good()
        other = "FP64" if spec.datatype == "INT64" else "INT64"
        zeros = [0] * len(good["inputs"][index]["data"])  # good values of the other type
        _refused(server, with_input(good, index, datatype=other, data=zeros), f"{other} for {spec.datatype}")
        for datatype in ("FP33", spec.datatype.lower(), ""):
            _refused(server, with_input(good, index, datatype=datatype), f"datatype {datatype!r}")


def refuses_a_wrong_shape(server: Server) -> None:
    """The shape is that of the metadata, and its dimensions are integers from 0 ("unsigned 64-bit")."""
    for index, spec in enumerate(server.inputs):
        good = server.good()
        shape = good["inputs"][index]["shape"]
        for wrong in _wrong_shapes(spec, shape):
            # The data fits the wrong shape where it can: the shape alone is what is wrong.
            data = _data_for(spec, wrong, good["inputs"][index]["data"])
            _refused(server, with_input(good, index, shape=wrong, data=data), f"shape {wrong} for {list(spec.shape)}")


def _wrong_shapes(spec: Spec, shape: list[int]) -> list[list[Any]]:
    wrong: list[list[Any]] = [[1, *shape], [-1, *shape[1:]], [1.5, *shape[1:]], ["1", *shape[1:]]]
    if shape:
        wrong.append([2**62] * len(shape))
    for axis, size in enumerate(spec.shape):
        if size != -1:
            wrong.append([*shape[:axis], size + 1, *shape[axis + 1 :]])
    return wrong


def _data_for(spec: Spec, shape: list[Any], data: list[Any]) -> list[Any]:
    if not data or not all(isinstance(size, int) and 0 < size < 2**20 for size in shape):
        return data
    return [data[0]] * int(np.prod(shape))


def refuses_a_wrong_number_of_values(server: Server) -> None:
    """The product of the shape is the number of values: one less, one more and none at all are refused."""
    for index in range(len(server.inputs)):
        data = server.good()["inputs"][index]["data"]
        for wrong in (data[:-1], [*data, data[0]], [*data, *data], []):
            what = f"{len(wrong)} values for {len(data)}"
            _refused(server, with_input(server.good(), index, data=wrong), what)


def refuses_ragged_data(server: Server) -> None:
    """Nested data whose last row is cut short is refused, and not filled up."""
    index = next((number for number, spec in enumerate(server.inputs) if len(spec.shape) > 1), None)
    if index is None:
        raise Skipped("no input has two dimensions")
    data = server.good(rows=2)["inputs"][index]["data"]
    half = len(data) // 2
    _refused(server, with_input(server.good(rows=2), index, data=[data[:half], data[half:-1]]), "ragged data")


def refuses_a_missing_input(server: Server) -> None:
    """Every input of the metadata is given, under its own name."""
    good = server.good()
    _refused(server, {**good, "inputs": []}, "a request without an input")
    _refused(server, {key: value for key, value in good.items() if key != "inputs"}, "a request without inputs")
    for index, spec in enumerate(server.inputs):
        others = good["inputs"][:index] + good["inputs"][index + 1 :]
        _refused(server, {**good, "inputs": others}, f"a request without the input {spec.name}")
        _refused(server, with_input(good, index, name=_UNKNOWN), f"the input {spec.name} under another name")


def refuses_an_input_given_twice(server: Server) -> None:
    """Two tensors of one name leave open which is meant."""
    good = server.good()
    for each in good["inputs"]:
        _refused(server, {**good, "inputs": [*good["inputs"], each]}, f"the input {each['name']} given twice")


def refuses_an_unknown_output(server: Server) -> None:
    """An output that the model does not have is refused, alone and beside one that it has."""
    for names in ([_UNKNOWN], [server.outputs[0].name, _UNKNOWN]):
        _refused(server, server.good(outputs=[{"name": name} for name in names]), "an unknown output")


def refuses_fields_of_a_wrong_type(server: Server) -> None:
    """The JSON types of inference_request: texts, lists and objects are what the schema says."""
    good = server.good()
    wrong: list[tuple[str, Any]] = [
        ("a list as request", [good]),
        ("an object as inputs", {**good, "inputs": good["inputs"][0]}),
        ("a list as input", {**good, "inputs": [[]]}),
        ("a number as id", {**good, "id": 7}),
        ("a text as outputs", {**good, "outputs": server.outputs[0].name}),
        ("a number as output", {**good, "outputs": [7]}),
    ]
    fields: list[tuple[str, Any]] = [
        ("name", 7), ("name", ...), ("datatype", 7), ("datatype", ...), ("shape", "1"), ("shape", 1), ("shape", ...),
        ("data", {}), ("data", "AAAA"), ("data", None), ("data", 1), ("data", ...),
    ]  # fmt: skip
    wrong += [(f"{field} {_called(value)}", with_input(good, **{field: value})) for field, value in fields]
    for what, request in wrong:
        _refused(server, request, what)


def _called(value: object) -> str:
    return "missing" if value is ... else repr(value)


def refuses_values_that_are_none(server: Server) -> None:
    """`tensor_data` is made of numbers, texts and booleans: null and objects are no values of any type."""
    for index in range(len(server.inputs)):
        data = server.good()["inputs"][index]["data"]
        nothing: tuple[object, ...] = (None, {})
        for value in nothing:
            _refused(server, with_input(server.good(), index, data=[*data[:-1], value]), f"{value!r} as a value")


def answers_or_refuses_odd_values(server: Server) -> None:
    """A value of another kind is taken with a 200 or refused with a 4xx, as the server decides; it never fails."""
    for index, spec in enumerate(server.inputs):
        data = server.good()["inputs"][index]["data"]
        for value in _odd_values(spec):
            reply = server.infer(with_input(server.good(), index, data=[*data[:-1], value]))
            what = f"{value!r} as {spec.datatype}"
            assert reply.status == 200 or 400 <= reply.status < 500, (
                f"{what} must be answered with 200 or refused with 4xx, got {reply}"
            )
            if reply.status != 200:
                error_of(reply, what)
    still_answers(server, "odd values")


def _odd_values(spec: Spec) -> tuple[Any, ...]:
    if spec.datatype == "BYTES":
        return 7, True
    if spec.is_float or spec.datatype == "BOOL":
        return "1", "x", True, 2
    limits = np.iinfo(np.dtype(DATATYPES[spec.datatype]))
    return "1", True, 1.5, int(limits.max) + 1, int(limits.min) - 1, 10**30


def refuses_nan_and_infinity(server: Server) -> None:
    """NaN, Infinity and -Infinity are not JSON (RFC 8259 6), although Python writes and reads them."""
    index = server.first_float()
    size = len(server.good()["inputs"][index]["data"])
    marked = encode(with_input(server.good(), index, data=["mark"] + [0] * (size - 1)))
    for text in (b"NaN", b"Infinity", b"-Infinity"):
        refusal(server.infer(marked.replace(b'"mark"', text)), f"{text.decode()} as a value")


def refuses_what_is_not_json(server: Server) -> None:
    """A body that is no JSON text, or one with something behind it, is refused."""
    good = encode(server.good())
    for text in (b"{", b"inputs", b"\xff\xfe{}", good[:-1], good + b"}", good + good, b"{'inputs': []}", b"null", b"7"):
        refusal(server.infer(text), f"the body {text[:20]!r}")
    still_answers(server, "bodies that are not JSON")


def refuses_an_empty_body(server: Server) -> None:
    """A request without a body is refused, with a content type or without."""
    refusal(server.infer(b""), "an empty body")
    refusal(server.request("POST", server.path("/infer")), "an empty body without a content type")


def refuses_deep_nesting(server: Server) -> None:
    """A parser that calls itself for each bracket must end before its stack does: refused, and the server lives."""
    marked = encode(with_input(server.good(), data="mark"))
    deep = b"[" * _DEPTH
    closed = deep + b"]" * _DEPTH
    bodies = [marked.replace(b'"mark"', part) for part in (deep, closed)]
    bodies += [deep, b'{"inputs":' * _DEPTH, b'{"a":' + closed + b"," + b'"inputs":[]}']
    for body in bodies:
        refusal(server.infer(body), f"nesting {_DEPTH} deep")
    still_answers(server, "deep nesting")


def _refused(server: Server, request: object, what: str) -> None:
    refusal(server.infer(encode(request)), what)


CHECKS: tuple[Callable[[Server], None], ...] = (
    refuses_a_wrong_datatype,
    refuses_a_wrong_shape,
    refuses_a_wrong_number_of_values,
    refuses_ragged_data,
    refuses_a_missing_input,
    refuses_an_input_given_twice,
    refuses_an_unknown_output,
    refuses_fields_of_a_wrong_type,
    refuses_values_that_are_none,
    answers_or_refuses_odd_values,
    refuses_nan_and_infinity,
    refuses_what_is_not_json,
    refuses_an_empty_body,
    refuses_deep_nesting,
)
