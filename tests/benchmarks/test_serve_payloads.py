import base64
import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture
def payloads() -> ModuleType:
    return importlib.import_module("serve_peers.payloads")


ROWS = np.random.default_rng(0).normal(size=(3, 3, 2, 2)).astype(np.float32)
JPEGS = [b"one", b"two", b"three"]
DIALECTS = ("plain", "litserve", "mlserver", "bentoml")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_sends_the_same_images_and_the_same_floats(payloads: ModuleType, dialect: str) -> None:
    asked = getattr(payloads, dialect)(payloads.Images(JPEGS, ROWS))
    texts = [base64.b64encode(jpeg).decode() for jpeg in JPEGS]
    for text, body in zip(texts, asked["image"].bodies, strict=True):
        assert text in body.decode()
    for row, body in zip(ROWS, asked["json"].bodies, strict=True):
        request = json.loads(body)
        given = request["rows"] if "rows" in request else request["inputs"][0]["data"]
        assert np.array_equal(np.array(given, np.float32).ravel(), row.ravel())
    assert ("binary" in asked) is (dialect in ("plain", "litserve"))


def test_a_binary_request_is_json_of_the_length_its_header_tells_and_then_floats(payloads: ModuleType) -> None:
    payload = payloads.plain(payloads.Images(JPEGS, ROWS))["binary"]
    end = int(payload.headers[payloads.LENGTH_HEADER])
    for row, body in zip(ROWS, payload.bodies, strict=True):
        head = json.loads(body[:end])
        assert head["inputs"][0]["parameters"]["binary_data_size"] == len(body) - end
        assert np.array_equal(np.frombuffer(body[end:], "<f4"), row.ravel())


def test_a_request_is_whole_http_with_further_headers(payloads: ModuleType) -> None:
    payload = payloads.plain(payloads.Images(JPEGS, ROWS))["image"]
    head, _, body = payload.requests({"X-More": "1"})[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /predict HTTP/1.1\r\nHost: localhost\r\n")
    assert b"\r\nX-More: 1\r\n" in head
    assert head.endswith(f"Content-Length: {len(body)}".encode())
    assert body == payload.bodies[0]


def test_bodies_are_written_as_they_are_read(payloads: ModuleType, tmp_path: Path) -> None:
    compute = importlib.import_module("serve_peers.compute")
    payload = payloads.plain(payloads.Images(JPEGS, ROWS))["binary"]
    payload.write(tmp_path / "bodies")
    assert tuple(compute.bodies_in(tmp_path / "bodies")) == payload.bodies


@pytest.mark.parametrize(
    ("body", "tolerance", "right"),
    [
        (b'{"probabilities": [0.25, 0.75]}', 0.0, True),
        (b'[{"probabilities": [0.25, 0.75]}]', 0.0, True),
        (b'{"probabilities": [0.25, 0.7500000000000001]}', 0.0, False),
        (b'{"probabilities": [0.25, 0.7500000000000001]}', 1e-9, True),
        (b'{"probabilities": [0.75, 0.25]}', 1.0, False),
        (b'{"probabilities": [0.25, 0.75, 0]}', 1.0, False),
        (b"{}", 1.0, False),
        (b"[]", 1.0, False),
        (b"nonsense", 1.0, False),
    ],
)
def test_an_answer_is_right_to_the_last_bit_or_within_the_tolerance(
    payloads: ModuleType, body: bytes, tolerance: float, right: bool
) -> None:
    expected = np.array([[0.5, 0.5], [0.25, 0.75]])
    assert payloads.judge_by(expected, payloads.read_prediction, tolerance=tolerance)(1, body) is right


@pytest.mark.parametrize("extra", [b"", b"more"])
def test_a_binary_answer_with_bytes_too_many_is_wrong(payloads: ModuleType, extra: bytes) -> None:
    head = b'{"model_name":"m","outputs":[{"name":"y","parameters":{"binary_data_size":8}}]}'
    body = head + np.array([1.5, 2], "<f4").tobytes() + extra
    assert payloads.judge_by(np.array([[1.5, 2.0]]), payloads.read_binary)(0, body) is (not extra)


@pytest.mark.parametrize("module", ["payloads", "open_loop"])
def test_docstrings_are_true(module: str) -> None:
    doctest = importlib.import_module("doctest")
    assert doctest.testmod(importlib.import_module(f"serve_peers.{module}")).failed == 0
