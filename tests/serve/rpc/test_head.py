"""What the server reads of a request: the same as protobuf, and never more than a few steps."""

import contextlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fettle.serve.refusal import Refusal
from fettle.serve.rpc.head import Head, head_of
from fettle.serve.rpc.messages import ModelInferRequest

texts = st.text(max_size=12)
tensors = st.fixed_dictionaries(
    {},
    optional={
        "name": texts,
        "datatype": st.sampled_from(["FP32", "x"]),
        "shape": st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(1, 300), max_size=5),
    },
)


@st.composite
def requests(draw):
    message = ModelInferRequest(model_name=draw(texts), model_version=draw(texts), id=draw(texts))
    for number, tensor in enumerate(draw(st.lists(tensors, max_size=3))):
        added = message.inputs.add(**tensor)
        added.parameters[f"p{number}"].int64_param = -number
        added.contents.fp32_contents.extend([1.0] * number)
    for _ in range(draw(st.integers(0, 2))):
        message.outputs.add(name=draw(texts)).parameters["classification"].bool_param = True
    message.parameters["timeout"].double_param = 0.5
    message.raw_input_contents.extend(draw(st.lists(st.binary(max_size=20), max_size=2)))
    return message


def expected(message, content):
    shapes = [list(tensor.shape) for tensor in message.inputs]
    side = shapes[0][0] if shapes and shapes[0] and shapes[0][0] > 0 else 1
    return Head(message.model_name, message.model_version, max(1, min(side, len(content))))


@given(requests())
def test_the_head_is_what_protobuf_reads(message):
    content = message.SerializeToString()
    assert head_of(content) == expected(message, content)


@given(st.lists(requests(), min_size=2, max_size=3))
def test_of_a_message_in_several_parts_the_last_name_counts(parts):
    content = b"".join(part.SerializeToString() for part in parts)
    message = ModelInferRequest.FromString(content)
    found = head_of(content)
    assert (found.model, found.version) == (message.model_name, message.model_version)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(requests(), st.data())
def test_a_damaged_message_is_refused_or_read(message, data):
    content = bytearray(message.SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(Refusal):
        assert 1 <= head_of(content).rows <= max(1, len(content))


def unpacked(side):
    """A message whose shape is written without packing, as old writers do."""
    return b"\x0a\x01m" + b"\x2a\x04" + bytes([0x18, side, 0x18, 9])


def test_a_shape_that_is_not_packed_is_read_too():
    assert ModelInferRequest.FromString(unpacked(5)).inputs[0].shape == [5, 9]
    assert head_of(unpacked(5)).rows == 5


def field(number, content):
    """A field of bytes, whatever they are."""
    size, octets = len(content), [number << 3 | 2]
    while size > 127:
        octets.append(size & 127 | 128)
        size >>= 7
    return bytes([*octets, size]) + content


HOSTILE = {
    "empty inputs": (field(5, b"") * 2_000_000, "at most 2048 fields"),
    "a shape without end": (field(5, field(3, b"\x01" * 10_000_000)), "a longer one"),
    "parameters": (field(4, b"") * 2_000_000, "at most 2048 fields"),
    "parameters of an input": (field(5, field(4, b"") * 2_000_000), "at most 2048 fields"),
    "parameters of an output": (field(6, field(2, b"") * 2_000_000), "at most 2048 fields"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_message_that_would_keep_protobuf_busy_is_refused_after_few_steps(name):
    content, reason = HOSTILE[name]
    with pytest.raises(Refusal, match=reason) as caught:
        head_of(content)
    assert caught.value.status == 400


def test_large_tensors_are_stepped_over():
    message = ModelInferRequest(model_name="m", raw_input_contents=[bytes(2_000_000)])
    message.inputs.add(name="x", shape=[3, 4])
    assert head_of(message.SerializeToString()).rows == 3
