"""Tensors behind the JSON: against an encoder of single elements, against damage, and with tritonclient."""

import json
import struct
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fettle.core.signature import DTYPES, Signature, TensorSpec
from fettle.serve.answer import Answer
from fettle.serve.binary import format_binary, header_bytes_of, parse_binary
from fettle.serve.model import ModelFault
from fettle.serve.protocol import DATATYPES, InferCall, format_infer, parse_infer
from fettle.serve.refusal import Refusal

CODES = {
    "bool": "?", "uint8": "B", "uint16": "H", "uint32": "I", "uint64": "Q", "int8": "b", "int16": "h", "int32": "i",
    "int64": "q", "float16": "e", "float32": "f", "float64": "d",
}  # fmt: skip
MODEL = SimpleNamespace(name="tiny", version=3)


# The reference: one element after the other, least significant byte first.


def packed(array):
    return b"".join(struct.pack("<" + CODES[array.dtype.name], value) for value in array.ravel().tolist())


def unpacked(raw, name, shape):
    step = struct.calcsize("<" + CODES[name])
    values = [struct.unpack("<" + CODES[name], raw[i : i + step])[0] for i in range(0, len(raw), step)]
    return np.array(values, name).reshape(shape)


def spec_of(name, array):
    return TensorSpec(name=name, dtype=array.dtype.name, shape=("batch", *array.shape[1:]))


def signature_of(inputs, outputs=("y", "z")):
    specs = tuple(TensorSpec(name=name, dtype="float32", shape=("batch", 2)) for name in outputs)
    return Signature(inputs=tuple(spec_of(name, array) for name, array in inputs.items()), outputs=specs)


def tensor_of(name, array, *, binary):
    described = {"name": name, "shape": list(array.shape), "datatype": DATATYPES[array.dtype.name]}
    if binary:
        return {**described, "parameters": {"binary_data_size": array.nbytes}}
    return {**described, "data": array.ravel().tolist()}


def request_of(inputs, binary=None, **more):
    """A body and its header's length; binary: names of the inputs behind the JSON, all by default."""
    binary = set(inputs) if binary is None else binary
    tensors = [tensor_of(name, array, binary=name in binary) for name, array in inputs.items()]
    header = json.dumps({"inputs": tensors, **more}).encode()
    return header + b"".join(packed(array) for name, array in inputs.items() if name in binary), len(header)


def elements(dtype, *, finite):
    allowed = {"allow_nan": not finite, "allow_infinity": not finite}
    return allowed if dtype.startswith("float") else None


@st.composite
def some_arrays(draw, *, finite=True):
    """One to three arrays with the same number of rows."""
    rows = draw(st.integers(1, 4))
    arrays = {}
    for name in draw(st.lists(st.sampled_from(["a", "b", "ü"]), min_size=1, unique=True)):
        dtype = draw(st.sampled_from(DTYPES))
        sides = draw(hnp.array_shapes(min_dims=0, max_dims=3, max_side=3))
        arrays[name] = draw(hnp.arrays(dtype, (rows, *sides), elements=elements(dtype, finite=finite)))
    return arrays


def assert_same(call, inputs):
    assert list(call.inputs) == list(inputs)
    for name, array in inputs.items():
        found = call.inputs[name]
        assert (found.dtype, found.shape, found.flags.aligned) == (array.dtype, array.shape, True)
        np.testing.assert_array_equal(found, array)


# Requests


@settings(max_examples=300, deadline=None)
@given(some_arrays(), st.data())
def test_what_is_sent_is_what_arrives(inputs, data):
    binary = data.draw(st.sets(st.sampled_from(sorted(inputs))))
    body, header_bytes = request_of(inputs, binary, id="7")
    call = parse_binary(body, header_bytes=header_bytes, signature=signature_of(inputs))
    assert_same(call, inputs)
    assert (call.rows, call.outputs, call.id) == (len(next(iter(inputs.values()))), ("y", "z"), "7")


@settings(max_examples=100, deadline=None)
@given(some_arrays(), st.integers(0, 9))
def test_a_part_of_a_larger_buffer_does_as_well(inputs, offset):
    body, header_bytes = request_of(inputs)
    part = memoryview(bytes(offset) + body)[offset:]
    assert_same(parse_binary(part, header_bytes=header_bytes, signature=signature_of(inputs)), inputs)


@pytest.mark.parametrize("padding", range(9))
def test_aligned_tensors_are_views_and_others_copies(padding):
    array = np.arange(6, dtype=np.float64).reshape(3, 2)
    body, header_bytes = request_of({"x": array}, id="i" * padding)
    found = parse_binary(body, header_bytes=header_bytes, signature=signature_of({"x": array})).inputs["x"]
    whole = np.frombuffer(body, np.uint8)
    aligned = (whole.ctypes.data + header_bytes) % 8 == 0
    assert np.shares_memory(found, whole) == aligned
    np.testing.assert_array_equal(found, array)


def test_white_space_may_fill_the_header():
    array = np.ones((1, 2), np.float32)
    body, header_bytes = request_of({"x": array})
    body = body[:header_bytes] + b" \n\t " + body[header_bytes:]
    assert_same(parse_binary(body, header_bytes=header_bytes + 4, signature=signature_of({"x": array})), {"x": array})


X = np.ones((1, 2), np.float32)


@pytest.mark.parametrize(
    ("more", "binary"),
    [
        ({}, set()),
        ({"parameters": {"binary_data_output": True}}, {"y", "z"}),
        ({"parameters": {"binary_data_output": False}}, set()),
        ({"outputs": [{"name": "z", "parameters": {"binary_data": True}}]}, {"z"}),
        ({"outputs": [{"name": "z"}, {"name": "y", "parameters": {"binary_data": True}}]}, {"y"}),
        ({"outputs": [{"name": "z"}], "parameters": {"binary_data_output": True}}, {"z"}),
        (
            {
                "outputs": [{"name": "z", "parameters": {"binary_data": False}}, {"name": "y"}],
                "parameters": {"binary_data_output": True},
            },
            {"y"},
        ),
        ({"outputs": [], "parameters": {"binary_data_output": True}}, {"y", "z"}),
    ],
)
@pytest.mark.parametrize("in_json", [False, True])
def test_which_outputs_are_wanted_as_binary(more, binary, in_json):
    body, header_bytes = request_of({"x": X}, set() if in_json else {"x"}, **more)
    signature = signature_of({"x": X})
    call = parse_binary(body, header_bytes=header_bytes, signature=signature)
    assert call.binary == binary
    if in_json:
        assert parse_infer(body, signature).binary == binary


@pytest.mark.parametrize("value", [1, 0, "true", None, 1.0])
@pytest.mark.parametrize("place", ["output", "request"])
def test_wishes_must_be_true_or_false(value, place):
    if place == "output":
        more = {"outputs": [{"name": "y", "parameters": {"binary_data": value}}]}
    else:
        more = {"parameters": {"binary_data_output": value}}
    refused(*request_of({"x": X}, **more), word="true or false")


# Raw requests


@settings(max_examples=200, deadline=None)
@given(some_arrays())
def test_raw_requests_hold_whole_rows(inputs):
    name, array = next(iter(inputs.items()))
    call = parse_binary(packed(array), header_bytes=0, signature=signature_of({name: array}))
    assert_same(call, {name: array})
    assert (call.rows, call.outputs, call.binary, call.id) == (len(array), ("y", "z"), {"y", "z"}, None)


def raw_signature(shape, dtype="float32"):
    spec = TensorSpec(name="x", dtype=dtype, shape=shape)
    return Signature(inputs=(spec,), outputs=(TensorSpec(name="y", dtype="float32", shape=("n",)),))


@pytest.mark.parametrize(
    ("shape", "count", "found"),
    [
        (("n", 2), 6, (3, 2)), (("n",), 5, (5,)), ((2, 3), 6, (2, 3)), ((2, "n"), 6, (2, 3)),
        ((2, "n", 3), 6, (2, 1, 3)), (("n", 2, "m"), 6, (1, 2, 3)), (("n", "m"), 4, (1, 4)),
    ],
)  # fmt: skip
def test_raw_shapes_are_deduced(shape, count, found):
    raw = struct.pack(f"<{count}f", *range(count))
    array = parse_binary(raw, header_bytes=0, signature=raw_signature(shape)).inputs["x"]
    np.testing.assert_array_equal(array, np.arange(count, dtype=np.float32).reshape(found))


@pytest.mark.parametrize(
    ("shape", "size", "word"),
    [
        (("n", 2), 0, "multiple of 8 bytes, got 0"), (("n", 2), 4, "multiple of 8"), (("n", 2), 23, "multiple of 8"),
        ((2, 2), 15, "must have 16 bytes"), ((2, 2), 32, "must have 16 bytes"), ((2, 2), 0, "must have 16 bytes"),
        (("n", 0), 8, "multiple of 0"), (("n", 2, "m"), 12, "multiple of 8"), (("n", "m", "k"), 8, "free dimension"),
        ((2, "m", "k"), 8, "free dimension"), (("n", "n"), 16, "must be one size"), ((), 4, "shape must be"),
        ((1,) * 17, 4, "shape must be"),
    ],
)  # fmt: skip
def test_raw_requests_that_fit_no_shape(shape, size, word):
    refused(bytes(size), 0, word=word, signature=raw_signature(shape))


def test_raw_requests_are_for_models_of_one_input():
    refused(bytes(16), 0, word="one input, this one has 2", signature=signature_of({"a": X, "b": X}))


# Everything else


def refused(body, header_bytes, *, word="", signature=None):
    with pytest.raises(Refusal) as caught:
        parse_binary(body, header_bytes=header_bytes, signature=signature or signature_of({"x": X}))
    assert caught.value.status == 400
    assert word in caught.value.message
    assert len(caught.value.message) < 1000


GOOD = {"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
RAW = struct.pack("<2f", 1, 2)


def sized(size):
    return {"inputs": [{**GOOD, "parameters": {"binary_data_size": size}}]}


@pytest.mark.parametrize(
    ("header", "tail", "word"),
    [
        (sized(-8), RAW, "whole number"), (sized(8.0), RAW, "whole number"), (sized(8.5), RAW, "whole number"),
        (sized("8"), RAW, "whole number"), (sized(True), RAW, "whole number"), (sized(None), RAW, "whole number"),
        (sized(2**63), RAW, "needs 8 bytes"), (sized(10**4200), RAW, "needs 8 bytes"), (sized([8]), RAW, "JSON as"),
        (sized(7), RAW, "needs 8 bytes"), (sized(9), RAW + b"x", "needs 8 bytes"), (sized(0), b"", "needs 8 bytes"),
        (sized(8), b"", "0 bytes are left"), (sized(8), RAW[:-1], "7 bytes are left"),
        (sized(8), RAW + b"xy", "2 more"),
        ({"inputs": [{**GOOD, "data": [1, 2]}]}, RAW, "got both"),
        ({"inputs": [{**GOOD, "data": None}]}, RAW, "got both"),
        ({"inputs": [{**GOOD, "parameters": {}}]}, RAW, "data is missing"),
        ({"inputs": [{**GOOD, "parameters": {}, "data": [1, 2]}]}, RAW, "8 more"),
        ({"inputs": [GOOD, GOOD]}, RAW * 2, "twice"),
        ({"inputs": [GOOD, {**GOOD, "name": "z"}]}, RAW * 2, "must be exactly x, got x, z"),
        ({"inputs": [{**GOOD, "name": "z"}]}, RAW, "must be exactly x"), ({"inputs": []}, b"", "must be exactly x"),
        ({"inputs": []}, RAW, "must be exactly x"),
        ({"inputs": [{**GOOD, "shape": [2, 2]}]}, RAW, "needs 16 bytes"),
        ({"inputs": [{**GOOD, "shape": [2]}]}, RAW, "must have shape"),
        ({"inputs": [{**GOOD, "shape": [2, 1]}]}, RAW, "must have shape"),
        ({"inputs": [{**GOOD, "shape": [0, 2]}]}, RAW, "shape must be"),
        ({"inputs": [{**GOOD, "shape": [-1, -2]}]}, RAW, "shape must be"),
        ({"inputs": [{**GOOD, "shape": []}]}, RAW, "shape must be"),
        ({"inputs": [{**GOOD, "shape": [1] * 17}]}, RAW, "shape must be"),
        ({"inputs": [{**GOOD, "shape": [2**62] * 4 + [8]}]}, RAW, "needs"),
        ({"inputs": [{**GOOD, "shape": [2**32, 2**31 + 2]}]}, RAW, "needs"),
        ({"inputs": [{**GOOD, "shape": [10**4200] * 2}]}, RAW, "63 bits"),
        ({"inputs": [{**GOOD, "shape": [10**4200] * 2, "parameters": {}, "data": [1, 2]}]}, b"", "63 bits"),
        ({"inputs": [{**GOOD, "datatype": "INT64", "shape": [1, 1]}]}, RAW, "must be float32, got int64"),
        ({"inputs": [{**GOOD, "datatype": "BYTES"}]}, RAW, "numbers only"),
        ({"inputs": [{**GOOD, "datatype": "BF16"}]}, RAW, "numpy has no such type"),
        ({"inputs": [GOOD], "outputs": [{"name": "nope"}]}, RAW, "unknown output"),
        ({"inputs": [GOOD], "outputs": [{"name": "y"}, {"name": "y"}]}, RAW, "once"),
        ([], b"", "JSON as documented"), ({"inputs": [[]]}, RAW, "JSON as documented"),
    ],
)  # fmt: skip
def test_claims_that_do_not_hold(header, tail, word):
    text = json.dumps(header).encode()
    refused(text + tail, len(text), word=word)


@pytest.mark.parametrize("header_bytes", [-1, -(2**70), 10**6, 2**63, 2**70])
def test_headers_outside_of_the_body(header_bytes):
    refused(json.dumps(sized(8)).encode() + RAW, header_bytes, word="Inference-Header-Content-Length must be 0 to")


@pytest.mark.parametrize("move", [-1, 1, 8])
def test_headers_of_the_wrong_length(move):
    text = json.dumps(sized(8)).encode()
    refused(text + RAW, len(text) + move, word="JSON as documented")


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 200_000, b'{"inputs":' * 50_000, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b',"inputs":[]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":' + b"[" * 100_000, b"\xff\xfe", b" ", b"{",
    ],
)  # fmt: skip
def test_broken_and_deep_headers(text):
    refused(text + RAW, len(text))


@pytest.mark.parametrize("octet", [2, 7, 128, 255])
def test_booleans_are_zero_or_one(octet):
    array = np.array([[True, False, True]])
    body, header_bytes = request_of({"x": array})
    refused(body[:-1] + bytes([octet]), header_bytes, word=f"got {octet}", signature=signature_of({"x": array}))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_inputs_are_finite_as_in_json(dtype, value):
    array = np.array([[1, value]], dtype)
    refused(*request_of({"x": array}), word="must be finite", signature=signature_of({"x": array}))
    refused(packed(array), 0, word="must be finite", signature=signature_of({"x": array}))


def test_rows_of_all_inputs_must_agree():
    inputs = {"a": X, "b": np.ones((3, 2), np.uint8)}
    refused(*request_of(inputs), word="must be one size", signature=signature_of(inputs))


@pytest.mark.parametrize("shape", [[2**40], [2**20, 2**20], [2**62, 2**62]])
@pytest.mark.parametrize("size", [2**42, 2**126, 8])
def test_claims_cost_no_memory(shape, size):
    text = json.dumps({"inputs": [{**GOOD, "shape": shape, "parameters": {"binary_data_size": size}}]}).encode()
    tracemalloc.start()
    try:
        refused(text + RAW, len(text))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**18


@pytest.mark.parametrize("value", ["", "-1", "+1", "1.0", "1e3", " 1", "0x10", "1_0", "ten", "٣", "9" * 19, "1, 1"])
def test_header_values_that_are_no_length(value):
    with pytest.raises(Refusal) as caught:
        header_bytes_of(value)
    assert caught.value.status == 400


def test_header_values():
    assert [header_bytes_of(value) for value in ("0", "17", "007", "9" * 18)] == [0, 17, 7, 10**18 - 1]


# Damage: whatever arrives, it is read or 400


def is_read_or_400(body, header_bytes, signature):
    try:
        call = parse_binary(body, header_bytes=header_bytes, signature=signature)
    except Refusal as refusal:
        if refusal.status != 400:
            raise
        return
    assert isinstance(call, InferCall)
    assert signature.check(call.inputs) == call.rows
    assert set(call.binary) <= set(call.outputs) <= {"y", "z"}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(-5, 205))
def test_any_bytes_are_read_or_400(body, header_bytes):
    is_read_or_400(body, header_bytes, signature_of({"x": X}))
    is_read_or_400(body, 0, signature_of({"x": X}))


@settings(max_examples=500, deadline=None)
@given(some_arrays(), st.data())
def test_any_damage_is_read_or_400(inputs, data):
    body, header_bytes = request_of(inputs, parameters={"binary_data_output": True})
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(damaged)))
        match data.draw(st.sampled_from(["set", "insert", "cut", "move"])):
            case "set":
                damaged[position : position + 1] = data.draw(st.binary(min_size=1, max_size=1))
            case "insert":
                damaged[position:position] = data.draw(st.binary(min_size=1, max_size=4))
            case "cut":
                del damaged[position : position + data.draw(st.integers(1, 20))]
            case "move":
                header_bytes += data.draw(st.integers(-3, 3))
    is_read_or_400(bytes(damaged), header_bytes, signature_of(inputs))


def paths(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*path, key))


odd = (
    st.none() | st.booleans() | st.integers(-10, 10) | st.integers() | st.sampled_from([2**31, 2**63, 2**64, 10**4250])
    | st.floats() | st.text(max_size=5) | st.sampled_from(["x", "y", "FP32", "BYTES", "BF16"])
    | st.lists(st.integers(-1, 9), max_size=4)
    | st.dictionaries(st.sampled_from(["binary_data_size", "name"]), st.integers())
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(some_arrays(), st.data())
def test_any_other_header_is_read_or_400(inputs, data):
    body, header_bytes = request_of(inputs, outputs=[{"name": "y", "parameters": {"binary_data": True}}])
    header, tail = json.loads(body[:header_bytes]), body[header_bytes:]
    for _ in range(data.draw(st.integers(1, 2))):
        *parents, last = data.draw(st.sampled_from([path for path in paths(header) if path]))
        place = header
        for key in parents:
            place = place[key]
        place[last] = data.draw(odd)
    text = json.dumps(header).encode()
    is_read_or_400(text + tail, len(text), signature_of(inputs))


# Answers


def call_for(outputs, binary, id=None):
    return InferCall(inputs={}, outputs=tuple(outputs), rows=1, id=id, binary=frozenset(binary))


@settings(max_examples=300, deadline=None)
@given(some_arrays(finite=False), st.data())
def test_answers_arrive_as_they_were(outputs, data):
    finite = {name for name, array in outputs.items() if array.dtype.kind != "f" or np.isfinite(array).all()}
    binary = data.draw(st.sets(st.sampled_from(sorted(outputs)))) | (set(outputs) - finite)
    body, header_bytes = format_binary(Answer(outputs=outputs), model=MODEL, call=call_for(outputs, binary, id="7"))
    response, tail = json.loads(body[:header_bytes]), body[header_bytes:]
    assert (response["id"], response["model_name"], response["model_version"]) == ("7", "tiny", "3")
    assert [output["name"] for output in response["outputs"]] == list(outputs)
    for output in response["outputs"]:
        array = outputs[output["name"]]
        assert (output["shape"], output["datatype"]) == (list(array.shape), DATATYPES[array.dtype.name])
        assert ("data" in output) != (output["name"] in binary)
        if output["name"] in binary:
            size = output["parameters"]["binary_data_size"]
            found, tail = unpacked(tail[:size], array.dtype.name, array.shape), tail[size:]
        else:
            found = np.array(output["data"], array.dtype).reshape(array.shape)
        np.testing.assert_array_equal(found, array)
    assert not tail


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_json_cannot_carry_goes_as_binary_only(value):
    answer = Answer(outputs={"y": np.array([[value]], np.float32)})
    body, header_bytes = format_binary(answer, model=MODEL, call=call_for(["y"], ["y"]))
    np.testing.assert_array_equal(unpacked(body[header_bytes:], "float32", (1, 1)), [[value]])
    with pytest.raises(ModelFault, match="NaN"):
        format_binary(answer, model=MODEL, call=call_for(["y"], []))


def test_without_binary_outputs_it_is_the_json_answer():
    answer = Answer(outputs={"y": np.ones((2, 2), np.float32)})
    call = call_for(["y"], [], id="é")
    body, header_bytes = format_binary(answer, model=MODEL, call=call)
    assert body == format_infer(answer, model=MODEL, call=call)
    assert header_bytes == len(body)


def test_strides_and_empty_and_foreign_order_do_not_show():
    base = np.arange(12, dtype=np.int16).reshape(3, 4)
    outputs = {"a": base.T, "b": base[::-1, ::2], "c": base.astype(">i2"), "d": np.zeros((0, 2), np.int16)}
    body, header_bytes = format_binary(Answer(outputs=outputs), model=MODEL, call=call_for(outputs, outputs))
    expected = b"".join(packed(np.ascontiguousarray(array)) for array in outputs.values())
    assert body[header_bytes:] == expected


# The client that most people use


@pytest.fixture
def triton():
    return pytest.importorskip("tritonclient.http")


def triton_input(triton, name, array, *, binary=True):
    tensor = triton.InferInput(name, list(array.shape), DATATYPES[array.dtype.name])
    return tensor.set_data_from_numpy(array, binary_data=binary)


def every_dtype():
    rng = np.random.default_rng(0)
    return {dtype: (rng.random((2, 3)) * 2 - (dtype[0] in "fi")).astype(dtype) for dtype in DTYPES}


@pytest.mark.parametrize("outputs", [None, {"y": True}, {"z": False, "y": True}, {"y": False}])
@pytest.mark.parametrize("binary", ["all", "half", "none"])
def test_tritonclient_is_understood(triton, outputs, binary):
    arrays = every_dtype()
    inputs = [
        triton_input(triton, name, array, binary=binary == "all" or (binary == "half" and index % 2 == 0))
        for index, (name, array) in enumerate(arrays.items())
    ]
    wanted = outputs and [triton.InferRequestedOutput(name, binary_data=flag) for name, flag in outputs.items()]
    body, header_bytes = triton.InferenceServerClient.generate_request_body(inputs, wanted, request_id="a")
    signature = signature_of(arrays)
    if header_bytes is None:
        call = parse_infer(body, signature)
    else:
        call = parse_binary(body, header_bytes=header_bytes, signature=signature)
    assert_same(call, arrays)
    assert (call.rows, call.id) == (2, "a")
    # Without outputs it wants all of them, as binary.
    assert call.outputs == (tuple(outputs) if outputs else ("y", "z"))
    assert call.binary == ({name for name, flag in outputs.items() if flag} if outputs else {"y", "z"})


@pytest.mark.parametrize("encoding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", ["all", "half", "none"])
def test_tritonclient_understands(triton, binary, encoding):
    from fettle.serve.compression import compress

    arrays = every_dtype()
    names = set(arrays) if binary == "all" else set(list(arrays)[::2]) if binary == "half" else set()
    body, header_bytes = format_binary(Answer(outputs=arrays), model=MODEL, call=call_for(arrays, names, id="a"))
    if encoding:
        body, chosen = compress(body, encoding)
        assert chosen == encoding
    result = triton.InferenceServerClient.parse_response_body(
        body, header_length=header_bytes, content_encoding=encoding
    )
    assert result.get_response()["id"] == "a"
    for name, array in arrays.items():
        found = result.as_numpy(name)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
