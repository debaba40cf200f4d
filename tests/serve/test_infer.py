"""`/v2/models/NAME/infer` on real servers: shapes, data types, selection, and everything that does not fit."""

import json

import numpy as np
import pytest

JSON = {"content-type": "application/json"}


def infer_body(data, shape, *, name="x", datatype="FP32", **more):
    return {"inputs": [{"name": name, "shape": shape, "datatype": datatype, "data": data}], **more}


# Tensors


def test_infer_nested_and_flat_agree(images):
    rows = np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)
    nested = images.post("/v2/models/tiny/infer", json=infer_body(rows.tolist(), [2, 3, 8, 8])).json()
    flat = images.post("/v2/models/tiny/infer", json=infer_body(rows.ravel().tolist(), [2, 3, 8, 8])).json()
    assert nested == flat
    output = nested["outputs"][0]
    expected = 5 * rows.mean(axis=(2, 3))
    assert (output["name"], output["shape"], output["datatype"]) == ("logits", [2, 3], "FP32")
    np.testing.assert_allclose(np.reshape(output["data"], (2, 3)), expected, rtol=1e-4, atol=1e-5)


def test_infer_by_version_and_with_id(images):
    body = infer_body([0.0] * 192, [1, 3, 8, 8], id="my id ✓", parameters={"a": 1, "b": "x", "c": True})
    response = images.post("/v2/models/tiny/versions/1/infer", json=body).json()
    assert response["id"] == "my id ✓"
    assert (response["model_name"], response["model_version"]) == ("tiny", "1")


def test_no_id_no_echo(images):
    assert "id" not in images.post("/v2/models/tiny/infer", json=infer_body([0.0] * 192, [1, 3, 8, 8])).json()


def test_more_rows_than_a_batch_are_answered_in_pieces(images):
    rows = np.random.default_rng(2).normal(size=(70, 3, 8, 8)).astype(np.float32)
    response = images.post("/v2/models/tiny/infer", json=infer_body(rows.ravel().tolist(), [70, 3, 8, 8]))
    data = np.reshape(response.json()["outputs"][0]["data"], (70, 3))
    np.testing.assert_allclose(data, 5 * rows.mean(axis=(2, 3)), rtol=1e-4, atol=1e-5)


def test_more_rows_than_the_queue_are_413(start, shelf, kit):
    server = start(shelf, max_queue_rows=4, max_batch_rows=4).wait_ready()
    with server.client() as client:
        response = client.post("/v2/models/tiny/infer", json=infer_body([0.0] * 192 * 5, [5, 3, 8, 8]))
    assert "at most 4 rows" in kit.error_of(response, 413)


BASIC = [0.0] * 192
GOOD = {"name": "x", "shape": [1, 3, 8, 8], "datatype": "FP32", "data": BASIC}


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "inputs"),
        ({"inputs": []}, "inputs must be exactly x"),
        ({"inputs": [{**GOOD, "name": "y"}]}, "must be exactly x"),
        ({"inputs": [GOOD, GOOD]}, "twice"),
        ({"inputs": [GOOD, {**GOOD, "name": "z"}]}, "must be exactly x"),
        ({"inputs": [{**GOOD, "shape": [1, 3, 8, 9]}]}, "needs 216 values"),
        ({"inputs": [{**GOOD, "shape": [1, 3, 64]}]}, "must have shape"),
        ({"inputs": [{**GOOD, "shape": [1, 8, 8, 3]}]}, "must have shape"),
        ({"inputs": [{**GOOD, "shape": []}]}, "shape must be"),
        ({"inputs": [{**GOOD, "shape": [0, 3, 8, 8], "data": []}]}, "shape must be"),
        ({"inputs": [{**GOOD, "shape": [-1, 3, 8, 8]}]}, "shape must be"),
        ({"inputs": [{**GOOD, "shape": [2**62, 2**62, 2**62, 2**62]}]}, "values"),
        ({"inputs": [{**GOOD, "shape": [1] * 17}]}, "shape must be"),
        ({"inputs": [{**GOOD, "shape": [1.5, 3, 8, 8]}]}, "shape"),
        ({"inputs": [{**GOOD, "shape": "1"}]}, "shape"),
        ({"inputs": [{**GOOD, "datatype": "FP64"}]}, "must be float32, got float64"),
        ({"inputs": [{**GOOD, "datatype": "fp32"}]}, "datatype"),
        ({"inputs": [{**GOOD, "datatype": "BYTES"}]}, "datatype"),
        ({"inputs": [{**GOOD, "datatype": 7}]}, "datatype"),
        ({"inputs": [{**GOOD, "data": BASIC[:-1]}]}, "needs 192 values, got 191"),
        ({"inputs": [{**GOOD, "data": [*BASIC, 0.0]}]}, "needs 192 values, got 193"),
        ({"inputs": [{**GOOD, "data": []}]}, "needs 192 values, got 0"),
        ({"inputs": [{**GOOD, "data": {}}]}, "data"),
        ({"inputs": [{**GOOD, "data": "AAAA"}]}, "data"),
        ({"inputs": [{**GOOD, "data": None}]}, "data"),
        ({"inputs": [{**GOOD, "data": [*BASIC[:-1], "1"]}]}, "every value FP32"),
        ({"inputs": [{**GOOD, "data": [*BASIC[:-1], True]}]}, "every value FP32"),
        ({"inputs": [{**GOOD, "data": [*BASIC[:-1], None]}]}, "every value FP32"),
        ({"inputs": [{**GOOD, "data": [*BASIC[:-1], 1e39]}]}, "finite"),
        ({"inputs": [{**GOOD, "data": [BASIC]}]}, "nested"),
        ({"inputs": [{**GOOD, "data": [[[[0.0] * 8] * 8] * 2]}]}, "must have the shape"),
        ({"inputs": [{**GOOD, "data": [[[[0.0] * 8] * 7 + [[0.0] * 7]] * 3]}]}, "ragged"),
        ({"inputs": [{**GOOD, "parameters": {"binary_data_size": 768}}]}, "binary"),
        ({"inputs": [{k: v for k, v in GOOD.items() if k != "data"}]}, "data is missing"),
        ({"inputs": [{k: v for k, v in GOOD.items() if k != "name"}]}, "name"),
        ({"inputs": [GOOD], "outputs": [{"name": "nope"}]}, "unknown output"),
        ({"inputs": [GOOD], "outputs": [{"name": "logits"}, {"name": "logits"}]}, "once"),
        ({"inputs": [GOOD], "outputs": "logits"}, "outputs"),
        ({"inputs": [GOOD], "id": 7}, "id"),
        ({"inputs": GOOD}, "inputs"),
        ({"inputs": [[]]}, "inputs"),
    ],
)
def test_bad_tensors_are_400_with_the_rule(images, body, word, kit):
    assert word in kit.error_of(images.post("/v2/models/tiny/infer", json=body), 400)


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity", "1e400", "nan", "0x1", "01", "1_0", "--1"])
def test_what_json_has_no_number_for(images, token, kit):
    text = json.dumps(infer_body(BASIC, [1, 3, 8, 8])).replace("0.0]", f"{token}]")
    kit.error_of(images.post("/v2/models/tiny/infer", content=text, headers=JSON), 400)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"\xff\xfe", b"[" * 200_000, b'{"inputs":' * 50_000,
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":' + b"[" * 100_000,
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b',"inputs":[]}',
    ],
)  # fmt: skip
def test_broken_and_deep_json_does_not_crash(images, text, kit):
    kit.error_of(images.post("/v2/models/tiny/infer", content=text, headers=JSON), 400)
    assert images.get("/health").status_code == 200


def test_tensors_may_be_binary_both_ways(images):
    x = np.full((2, 3, 8, 8), 0.5, np.float32)
    tensor = {"name": "x", "shape": [2, 3, 8, 8], "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"inference-header-content-length": str(len(head))}
    response = images.post("/v2/models/tiny/infer", content=head + x.tobytes(), headers=headers)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/octet-stream"
    split = int(response.headers["inference-header-content-length"])
    assert json.loads(response.content[:split])["outputs"][0]["parameters"] == {"binary_data_size": 24}
    np.testing.assert_allclose(np.frombuffer(response.content[split:], np.float32), [2.5] * 6, rtol=1e-6)


def test_a_raw_request_is_its_tensor_alone(images):
    x = np.full((1, 3, 8, 8), 0.5, np.float32)
    response = images.post(
        "/v2/models/tiny/infer", content=x.tobytes(), headers={"inference-header-content-length": "0"}
    )
    assert response.content.endswith(np.full(3, 2.5, np.float32).tobytes())


@pytest.mark.parametrize("length", ["-1", "21", "x", "\xb2", "1" * 30, ""])
def test_a_bad_header_length_is_400(images, kit, length):
    headers = {"inference-header-content-length": length.encode("latin-1")}
    kit.error_of(images.post("/v2/models/tiny/infer", content=b"x" * 20, headers=headers), 400)


def test_pickles_are_refused(images, kit):
    headers = {"content-type": "application/x-pickle"}
    kit.error_of(images.post("/v2/models/tiny/infer", content=b"\x80\x04.", headers=headers), 415)


# Data types

VALUES = {
    "b": ("BOOL", [True, False]), "u8": ("UINT8", [0, 255]), "u64": ("UINT64", [0, 2**64 - 1]),
    "i8": ("INT8", [-128, 127]), "i64": ("INT64", [-(2**63), 2**63 - 1]), "f16": ("FP16", [0.5, -2.0]),
    "f32": ("FP32", [1.5, 3]), "f64": ("FP64", [1e300, -0.1]),
}  # fmt: skip


def echo_body(**changed):
    inputs = []
    for name, (datatype, data) in {**VALUES, **changed}.items():
        inputs.append({"name": name, "shape": [1, 2], "datatype": datatype, "data": data})
    inputs.append({"name": "wide", "shape": [1, 2, 3], "datatype": "FP32", "data": [[[1, 2, 3], [4, 5, 6]]]})
    return {"inputs": inputs}


def test_every_data_type_goes_through(echo):
    response = echo.post("/v2/models/echo/infer", json=echo_body())
    assert response.status_code == 200, response.text
    found = {output["name"]: output for output in response.json()["outputs"]}
    for name, (datatype, data) in VALUES.items():
        assert found[f"out_{name}"]["datatype"] == datatype
        assert found[f"out_{name}"]["data"] == data
    assert found["out_wide"]["shape"] == [1, 2, 3]


def test_outputs_are_selected_in_order(echo):
    body = echo_body() | {"outputs": [{"name": "out_i8"}, {"name": "out_b", "parameters": {"classification": 1}}]}
    names = [output["name"] for output in echo.post("/v2/models/echo/infer", json=body).json()["outputs"]]
    assert names == ["out_i8", "out_b"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("b", [0, 1]), ("b", ["true", "false"]), ("u8", [0, 256]), ("u8", [-1, 0]), ("u8", [1.5, 0]), ("u8", [True, 0]),
        ("u64", [2**64, 0]), ("u64", [-1, 0]), ("i8", [128, 0]), ("i8", [-129, 0]), ("i64", [2**63, 0]),
        ("i64", [10**30, 0]), ("f16", [70000, 0]), ("f32", [1e39, 0]), ("f64", ["1", 0]), ("i8", [1.0, 2.5]),
    ],
)  # fmt: skip
def test_values_must_fit_their_type(echo, name, data, kit):
    datatype = VALUES[name][0]
    kit.error_of(echo.post("/v2/models/echo/infer", json=echo_body(**{name: (datatype, data)})), 400)


def test_rows_of_all_inputs_must_agree(echo, kit):
    body = echo_body()
    body["inputs"][0] |= {"shape": [2, 2], "data": [True] * 4}
    assert "must be one size" in kit.error_of(echo.post("/v2/models/echo/infer", json=body), 400)


# The model's own failures


def test_nan_answers_are_a_clear_error(images, kit):
    row = [777.0] * 192
    assert "NaN" in kit.error_of(images.post("/v2/models/tiny/infer", json=infer_body(row, [1, 3, 8, 8])), 500)


def test_an_exception_in_the_engine_tells_nothing(images, kit):
    error = kit.error_of(images.post("/v2/models/tiny/infer", json=infer_body([666.0] * 192, [1, 3, 8, 8])), 500)
    assert "secret" not in error
    assert images.get("/health").status_code == 200


def test_a_fixed_batch_model_answers_whole_requests_only(start, tmp_path, kit):
    kit.fixed_artifact(tmp_path / "1")
    (tmp_path / "current").write_text("1")
    server = start(kit.Shelf(tmp_path)).wait_ready()
    with server.client() as client:
        good = client.post("/v2/models/tiny/infer", json=infer_body([1, 2, 3, 4, 5, 6], [2, 3])).json()
        assert good["outputs"] == [{"name": "y", "shape": [2], "datatype": "FP32", "data": [6.0, 15.0]}]
        kit.error_of(client.post("/v2/models/tiny/infer", json=infer_body([1, 2, 3], [1, 3])), 400)
        kit.error_of(client.post("/predict", json={"image": "aGk="}), 422)
