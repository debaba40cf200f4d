"""Every path that is no inference: health, metadata, metrics, request ids, unknown paths, the access log."""

import re

import pytest

# Health and metadata


@pytest.mark.parametrize("path", ["/health/live", "/v2/health/live"])
def test_live(images, path):
    assert images.get(path).json() == {"live": True}


@pytest.mark.parametrize("path", ["/health/ready", "/v2/health/ready"])
def test_ready(images, path):
    response = images.get(path)
    assert response.status_code == 200
    assert response.json() == {"live": True, "ready": True}


def test_health_says_state_and_version(images):
    body = images.get("/health").json()
    assert (body["status"], body["version"], body["model"], body["problem"]) == ("ready", 1, "tiny", None)


@pytest.mark.parametrize("path", ["/v2", "/v2/"])
def test_server_metadata(images, path):
    body = images.get(path).json()
    assert body["name"] == "fettle"
    assert isinstance(body["extensions"], list)
    assert body["version"]


@pytest.mark.parametrize("path", ["/v2/models/tiny", "/v2/models/tiny/versions/1"])
def test_model_metadata(images, path):
    assert images.get(path).json() == {
        "name": "tiny",
        "versions": ["1"],
        "platform": "fettle_onnxfile",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3, 8, 8]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}],
    }


@pytest.mark.parametrize("path", ["/v2/models/tiny/ready", "/v2/models/tiny/versions/1/ready"])
def test_model_ready(images, path):
    assert images.get(path).json() == {"name": "tiny", "ready": True}


def test_head_answers_like_get_without_a_body(images):
    response = images.head("/health")
    assert response.status_code == 200
    assert response.content == b""


def test_metrics_count(images):
    images.get("/health")
    images.post("/predict", content=b"x", headers={"content-type": "image/png"})
    text = images.get("/metrics").text
    for name in (
        'fettle_requests_total{code="200",route="/health"}', 'fettle_requests_total{code="400",route="/predict"}',
        "fettle_request_seconds_bucket", "fettle_queue_seconds_count", "fettle_batch_rows_sum",
        "fettle_inference_seconds_count", "fettle_requests_in_flight 1.0", "fettle_requests_shed_total",
        "fettle_observations_dropped_total", 'fettle_switches_total{result="ok"} 1.0', "fettle_ready 1.0",
        'version="1"',
    ):  # fmt: skip
        assert name in text


# Paths and methods


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 404), ("/nope", 404), ("/v2/models", 404), ("/v2/models/", 404), ("/v2/models/other", 404),
        ("/v2/models/other/infer", 404), ("/v2/models/tiny/nope", 404), ("/v2/models/tiny/versions", 404),
        ("/v2/models/tiny/versions/2", 404), ("/v2/models/tiny/versions/x/ready", 404),
        ("/v2/models/tiny/versions/1/infer/more", 404), ("/v2/models/%2e%2e/tiny", 404), ("/" + "a" * 5000, 404),
        ("/predict", 405), ("/v2/models/tiny/infer", 405),
    ],
)  # fmt: skip
def test_paths_that_do_not_answer_get(images, path, status, kit):
    assert len(kit.error_of(images.get(path), status)) < 300


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/health", "GET, HEAD"), ("DELETE", "/v2", "GET, HEAD"), ("PUT", "/predict", "POST"),
        ("PATCH", "/v2/models/tiny", "GET, HEAD"), ("OPTIONS", "/predict", "POST"),
        ("GET", "/v2/models/tiny/infer", "POST"),
    ],
)  # fmt: skip
def test_405_names_what_is_allowed(images, method, path, allow, kit):
    response = images.request(method, path)
    kit.error_of(response, 405)
    assert response.headers["allow"] == allow


def test_unknown_version_is_404_for_infer(images, kit):
    error = kit.error_of(images.post("/v2/models/tiny/versions/9/infer", json={}), 404)
    assert "9" in error
    assert "answers as 1" in error


# Request ids


@pytest.mark.parametrize("given", ["abc", "A.b_c:d-1", "x" * 128])
def test_a_valid_request_id_is_kept(images, given):
    assert images.get("/health", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "has space", "x" * 129, 'quote"', "{json}"])
def test_an_invalid_request_id_is_replaced(images, given):
    made = images.get("/health", headers={"x-request-id": given}).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", made)


def test_errors_have_a_request_id_too(images):
    assert images.get("/nope", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"


def test_startup_is_told_apart_from_readiness(images):
    assert images.get("/health/startup").json() == {"live": True, "started": True}


def test_metrics_tell_what_each_version_has_in_hand(images):
    assert 'fettle_model_in_flight{model="tiny",version="1"} 0.0' in images.get("/metrics").text
