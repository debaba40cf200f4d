"""Parsing and formatting of the Open Inference Protocol, as properties."""

import json
import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fettle.core.signature import DTYPES, Signature, TensorSpec
from fettle.serve.protocol import DATATYPES, RequestJson, call_of, decode, json_array, parse_infer
from fettle.serve.refusal import Refusal


def signature_of(array):
    spec = TensorSpec(name="x", dtype=array.dtype.name, shape=("batch", *array.shape[1:]))
    return Signature(inputs=(spec,), outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 2)),))


def body_of(array, data):
    tensor = {"name": "x", "shape": list(array.shape), "datatype": DATATYPES[array.dtype.name], "data": data}
    return msgspec.json.encode({"inputs": [tensor]})


def any_array():
    shapes = hnp.array_shapes(min_dims=1, max_dims=4, max_side=4)
    finite = {"allow_nan": False, "allow_infinity": False}
    return st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, shapes, elements=finite if dtype.startswith("float") else None)
    )


def test_every_data_type_has_a_name():
    assert set(DATATYPES) == set(DTYPES)


@settings(max_examples=300, deadline=None)
@given(any_array(), st.booleans())
def test_what_is_sent_is_what_arrives(array, nested):
    call = parse_infer(body_of(array, array.tolist() if nested else array.ravel().tolist()), signature_of(array))
    assert call.rows == len(array)
    assert call.inputs["x"].dtype == array.dtype
    np.testing.assert_array_equal(call.inputs["x"], array)


@settings(max_examples=200, deadline=None)
@given(any_array(), hnp.array_shapes(min_dims=1, max_dims=4, max_side=5))
def test_another_shape_is_refused_or_reads_the_same_numbers(array, shape):
    body = json.loads(body_of(array, array.ravel().tolist()))
    body["inputs"][0]["shape"] = list(shape)
    if shape == array.shape:
        return
    with pytest.raises(Refusal) as caught:
        parse_infer(json.dumps(body).encode(), signature_of(array))
    fits = math.prod(shape) == array.size and shape[1:] == array.shape[1:]
    assert not fits
    assert caught.value.status == 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["name", "shape", "data", "x"]), inner),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(json_values)
def test_any_json_as_data_is_read_or_400(data):
    array = np.zeros((2, 2), np.float32)
    body = json.dumps({"inputs": [{"name": "x", "shape": [2, 2], "datatype": "FP32", "data": data}]}).encode()
    try:
        status = parse_infer(body, signature_of(array)).rows
    except Refusal as refusal:
        status = refusal.status
    assert status in (2, 400)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_read_or_400(body):
    with pytest.raises(Refusal) as caught:
        parse_infer(body, signature_of(np.zeros((2, 2), np.float32)))
    assert caught.value.status == 400


@pytest.mark.parametrize("space", ["", " ", "\n\t ", " " * 200])
def test_white_space_does_not_hide_nesting(space):
    text = f'{{"inputs":[{{"name":"x","shape":[2,2],"datatype":"FP32","data":{space}[{space}[1,2],[3,4]]}}]}}'
    call = parse_infer(text.encode(), signature_of(np.zeros((2, 2), np.float32)))
    np.testing.assert_array_equal(call.inputs["x"], [[1, 2], [3, 4]])


def test_rows_are_the_first_dimension_and_the_key_is_the_rest():
    array = np.zeros((5, 2, 3), np.float32)
    call = parse_infer(body_of(array, array.ravel().tolist()), signature_of(array))
    assert (call.rows, call.shape, call.outputs, call.id) == (5, (("x", (2, 3)),), ("y",), None)


def outcome_of(call):
    """What a parser made of a body: the tensors to the last bit, or the refusal."""
    try:
        found = call()
    except Refusal as refusal:
        return refusal.status, refusal.message
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in found.inputs.items()}, found


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**20), 10**20), min_size=1, max_size=6),
    st.sampled_from(["float16", "float32", "float64"]),
    st.sampled_from(["FP16", "FP32", "FP64", "INT32", "FP8"]),
    st.integers(1, 4),
    st.sampled_from(["", "[", "]", "null", '"x"', "true"]),
)
def test_a_flat_list_of_floats_is_read_as_the_general_way_reads_it(values, dtype, datatype, rows, extra):
    signature = Signature(
        inputs=(TensorSpec(name="x", dtype=dtype, shape=("batch",)),),
        outputs=(TensorSpec(name="y", dtype=dtype, shape=("batch",)),),
    )
    data = json.dumps(values)[:-1] + (f", {extra}]" if extra else "]")
    body = f'{{"inputs": [{{"name": "x", "shape": [{rows}], "datatype": "{datatype}", "data": {data}}}]}}'.encode()
    fast = outcome_of(lambda: parse_infer(body, signature))
    general = outcome_of(lambda: call_of(decode(body, RequestJson), json_array, signature))
    assert fast[0] == general[0]
