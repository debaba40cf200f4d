"""Typed and raw tensors: against numpy, and against what the HTTP binary extension reads and writes of the same."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fettle.core.signature import DTYPES, Signature, TensorSpec
from fettle.serve.answer import Answer
from fettle.serve.binary import format_binary, parse_binary
from fettle.serve.protocol import DATATYPES, InferCall
from fettle.serve.refusal import Refusal
from fettle.serve.rpc.messages import ModelInferRequest, ModelInferResponse
from fettle.serve.rpc.tensors import format_grpc, parse_grpc

MODEL = SimpleNamespace(name="tiny", version=3)
TYPED = [dtype for dtype in DTYPES if dtype != "float16"]


def signature_of(inputs, outputs=("y", "z")):
    specs = tuple(TensorSpec(name=n, dtype=a.dtype.name, shape=("batch", *a.shape[1:])) for n, a in inputs.items())
    return Signature(
        inputs=specs, outputs=tuple(TensorSpec(name=name, dtype="float32", shape=("batch", 2)) for name in outputs)
    )


@st.composite
def arrays(draw, dtypes=DTYPES):
    """Some inputs of the same number of rows, finite."""
    rows = draw(st.integers(1, 3))
    found = {}
    for name in draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True)):
        dtype = np.dtype(draw(st.sampled_from(list(dtypes))))
        finite = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
        rest = draw(st.lists(st.integers(1, 3), max_size=2))
        found[name] = draw(hnp.arrays(dtype, (rows, *rest), elements=hnp.from_dtype(dtype, **finite)))
    return found


def http_call(inputs, signature):
    import json

    tensors = [
        {"name": n, "shape": list(a.shape), "datatype": DATATYPES[a.dtype.name],
         "parameters": {"binary_data_size": a.nbytes}}
        for n, a in inputs.items()
    ]  # fmt: skip
    header = json.dumps({"inputs": tensors}).encode()
    body = header + b"".join(array.tobytes() for array in inputs.values())
    return parse_binary(body, header_bytes=len(header), signature=signature)


def same(found, wanted):
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert found[name].flags.aligned
        assert found[name].tobytes() == array.tobytes()
        assert found[name].shape == array.shape


@given(arrays())
def test_raw_tensors_are_read_bit_by_bit_as_over_http(rpc, inputs):
    signature = signature_of(inputs)
    call = parse_grpc(rpc.request_of(inputs, id="a").SerializeToString(), signature)
    same(call.inputs, inputs)
    same(call.inputs, http_call(inputs, signature).inputs)
    assert (call.id, call.outputs, call.binary) == ("a", ("y", "z"), frozenset({"y", "z"}))


@given(arrays(TYPED))
def test_typed_tensors_are_read_bit_by_bit_as_over_http(rpc, inputs):
    signature = signature_of(inputs)
    call = parse_grpc(rpc.request_of(inputs, raw=False).SerializeToString(), signature)
    same(call.inputs, inputs)
    same(call.inputs, http_call(inputs, signature).inputs)
    assert (call.id, call.binary) == (None, frozenset())
    assert call.rows == len(next(iter(inputs.values())))


def call_for(outputs, binary=()):
    return InferCall(inputs={}, outputs=tuple(outputs), rows=1, id="a", binary=frozenset(binary))


@given(arrays(), st.booleans())
def test_answers_carry_the_same_bits_as_over_http(rpc, outputs, spoil):
    for array in outputs.values():
        if spoil and array.dtype.kind == "f":
            array[0] = np.nan
    answer = Answer(outputs=outputs)
    response = ModelInferResponse.FromString(format_grpc(answer, model=MODEL, call=call_for(outputs, outputs)))
    same(rpc.arrays_of(response), outputs)
    body, header_bytes = format_binary(answer, model=MODEL, call=call_for(outputs, outputs))
    assert b"".join(response.raw_output_contents) == body[header_bytes:]
    assert (response.model_name, response.model_version, response.id) == ("tiny", "3", "a")
    if not any(array.dtype == np.float16 for array in outputs.values()):
        typed = ModelInferResponse.FromString(format_grpc(answer, model=MODEL, call=call_for(outputs)))
        assert not typed.raw_output_contents
        for name, array in rpc.arrays_of(typed).items():
            np.testing.assert_array_equal(array, outputs[name])


def test_outputs_are_those_asked_for_in_that_order(rpc):
    inputs = {"a": np.zeros((1, 2), np.float32)}
    call = parse_grpc(rpc.request_of(inputs, outputs=("z", "y")).SerializeToString(), signature_of(inputs))
    assert call.outputs == ("z", "y")
    response = ModelInferResponse.FromString(
        format_grpc(Answer(outputs={"y": inputs["a"], "z": inputs["a"]}), model=MODEL, call=call)
    )
    assert [output.name for output in response.outputs] == ["z", "y"]


def test_a_typed_request_is_answered_raw_where_an_output_has_no_typed_form(rpc):
    inputs = {"a": np.zeros((1, 2), np.float32)}
    half = TensorSpec(name="y", dtype="float16", shape=("batch", 2))
    full = TensorSpec(name="z", dtype="float32", shape=("batch", 2))
    signature = Signature(inputs=signature_of(inputs).inputs, outputs=(half, full))

    def binary_of(**more):
        return parse_grpc(rpc.request_of(inputs, raw=False, **more).SerializeToString(), signature).binary

    assert binary_of() == {"y", "z"}
    assert binary_of(outputs=("z",)) == frozenset()


def test_parameters_that_nobody_knows_change_nothing(rpc):
    inputs = {"a": np.zeros((1, 2), np.float32)}
    message = rpc.request_of(inputs, outputs=("y",))
    message.parameters["priority"].uint64_param = 3
    message.inputs[0].parameters["note"].string_param = "x"
    message.outputs[0].parameters["classification"].int64_param = 2
    assert parse_grpc(message.SerializeToString(), signature_of(inputs)).outputs == ("y",)


def tensor(**fields):
    return {"name": "a", "datatype": "FP32", "shape": [1, 2], **fields}


RAW = [bytes(8)]
BAD = {
    "no inputs": ({"inputs": []}, "inputs must be exactly a"),
    "raw without inputs": ({"inputs": [], "raw_input_contents": RAW}, "one entry for each of 0 inputs, got 1"),
    "too few raw": ({"inputs": [tensor(), tensor(name="b")], "raw_input_contents": RAW}, "each of 2 inputs, got 1"),
    "too many raw": ({"inputs": [tensor()], "raw_input_contents": RAW * 2}, "each of 1 inputs, got 2"),
    "raw and typed": (
        {"inputs": [tensor(contents={"fp32_contents": [1, 2]})], "raw_input_contents": RAW}, "got both",
    ),
    "raw too short": ({"inputs": [tensor()], "raw_input_contents": [bytes(7)]}, "needs 8 bytes, got 7"),
    "raw too long": ({"inputs": [tensor()], "raw_input_contents": [bytes(9)]}, "needs 8 bytes, got 9"),
    "raw empty": ({"inputs": [tensor()], "raw_input_contents": [b""]}, "needs 8 bytes, got 0"),
    "raw infinite": (
        {"inputs": [tensor()], "raw_input_contents": [np.array([1, np.inf], "<f4").tobytes()]}, "must be finite",
    ),
    "typed infinite": ({"inputs": [tensor(contents={"fp32_contents": [1, float("nan")]})]}, "must be finite"),
    "no contents": ({"inputs": [tensor()]}, "contents are missing"),
    "too few values": ({"inputs": [tensor(contents={"fp32_contents": [1]})]}, "needs 2 values, got 1"),
    "too many values": ({"inputs": [tensor(contents={"fp32_contents": [1] * 3})]}, "needs 2 values, got 3"),
    "the wrong list": (
        {"inputs": [tensor(contents={"fp64_contents": [1, 2]})]}, "must be in fp32_contents alone, got fp64_contents",
    ),
    "two lists": (
        {"inputs": [tensor(contents={"fp32_contents": [1, 2], "bytes_contents": [b""]})]}, "in fp32_contents alone",
    ),
    "half typed": ({"inputs": [tensor(datatype="FP16", contents={"fp32_contents": [1, 2]})]}, "FP16 has no typed"),
    "bytes": ({"inputs": [tensor(datatype="BYTES", contents={"bytes_contents": [b"a", b"b"]})]}, "got 'BYTES'"),
    "bf16": ({"inputs": [tensor(datatype="BF16")], "raw_input_contents": [bytes(4)]}, "got 'BF16'"),
    "no datatype": ({"inputs": [tensor(datatype="")], "raw_input_contents": RAW}, "datatype must be one of"),
    "no shape": ({"inputs": [tensor(shape=[])], "raw_input_contents": RAW}, "shape must be 1 to 16"),
    "negative shape": ({"inputs": [tensor(shape=[-1, -2])], "raw_input_contents": RAW}, "positive numbers"),
    "empty shape": ({"inputs": [tensor(shape=[0, 2])], "raw_input_contents": [b""]}, "positive numbers"),
    "a huge shape": ({"inputs": [tensor(shape=[2**62, 2**62])], "raw_input_contents": RAW}, "needs"),
    "another shape": ({"inputs": [tensor(shape=[2, 1])], "raw_input_contents": RAW}, "must have shape"),
    "another type": (
        {"inputs": [tensor(datatype="INT32", contents={"int_contents": [1, 2]})]}, "must be float32, got int32",
    ),
    "out of range": ({"inputs": [tensor(datatype="INT8", contents={"int_contents": [1, 128]})]}, "must be INT8"),
    "an unknown name": ({"inputs": [tensor(name="q")], "raw_input_contents": RAW}, "inputs must be exactly a, got q"),
    "twice": ({"inputs": [tensor(), tensor()], "raw_input_contents": RAW * 2}, "got 'a' twice"),
    "an unknown output": (
        {"inputs": [tensor()], "raw_input_contents": RAW, "outputs": [{"name": "q"}]}, "unknown output 'q'",
    ),
    "an output twice": (
        {"inputs": [tensor()], "raw_input_contents": RAW, "outputs": [{"name": "y"}] * 2}, "asked for once",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_with_the_rule(name):
    fields, reason = BAD[name]
    with pytest.raises(Refusal, match=reason) as caught:
        parse_grpc(ModelInferRequest(**fields).SerializeToString(), signature_of({"a": np.zeros((1, 2), np.float32)}))
    assert caught.value.status == 400


def test_raw_booleans_are_zero_or_one():
    signature = signature_of({"a": np.zeros((1, 2), np.bool_)})
    message = ModelInferRequest(inputs=[tensor(datatype="BOOL")], raw_input_contents=[b"\1\2"])
    with pytest.raises(Refusal, match="BOOL must be bytes of 0 or 1, got 2"):
        parse_grpc(message.SerializeToString(), signature)


@pytest.mark.parametrize("content", [b"\xff", b"\x2a\x05", b"\x0a\x01\xff"], ids=["a key", "a length", "no UTF-8"])
def test_what_is_no_message_is_refused(content):
    with pytest.raises(Refusal, match=r"valid inference\.ModelInferRequest") as caught:
        parse_grpc(content, signature_of({"a": np.zeros((1, 2), np.float32)}))
    assert caught.value.status == 400
