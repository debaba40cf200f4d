"""Bodies that are too large, too slow or broken, and connections that are half open."""

import json
import socket
import time

import pytest

JSON = {"content-type": "application/json"}


def infer_body(data, shape, *, name="x", datatype="FP32", **more):
    return {"inputs": [{"name": name, "shape": shape, "datatype": datatype, "data": data}], **more}


BASIC = [0.0] * 192


@pytest.mark.parametrize("path", ["/predict", "/v2/models/tiny/infer"])
@pytest.mark.parametrize("chunked", [False, True])
def test_100_mb_are_refused_at_once(images, path, chunked, kit):
    sent = 0

    def chunks():
        nonlocal sent
        for _ in range(1600):
            sent += 65536
            yield b"x" * 65536

    headers = {**JSON} if chunked else {**JSON, "content-length": str(1600 * 65536)}
    started = time.monotonic()
    response = images.post(path, content=chunks(), headers=headers)
    assert "2000000 bytes" in kit.error_of(response, 413)
    assert time.monotonic() - started < 5


def test_a_declared_length_is_refused_before_the_body_is_sent(images):
    host, port = images.base_url.host, images.base_url.port
    with socket.create_connection((host, port), timeout=5) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_post_without_a_length_is_411(images):
    with socket.create_connection((images.base_url.host, images.base_url.port), timeout=5) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 411 ")


@pytest.mark.parametrize("path", ["/predict", "/v2/models/tiny/infer"])
def test_a_body_at_the_limit_is_read(images, path, kit):
    kit.error_of(images.post(path, content=b" " * 2_000_000, headers=JSON), 400)
    kit.error_of(images.post(path, content=b" " * 2_000_001, headers=JSON), 413)


def test_chunked_bodies_are_read(images):
    text = json.dumps(infer_body(BASIC, [1, 3, 8, 8])).encode()
    pieces = (text[i : i + 100] for i in range(0, len(text), 100))
    assert images.post("/v2/models/tiny/infer", content=pieces, headers=JSON).status_code == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"GET /" + b"a" * 500_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(500)) + b"\r\n",
    ],
)
def test_broken_http_is_4xx(images, request_bytes):
    with socket.create_connection((images.base_url.host, images.base_url.port), timeout=5) as connection:
        connection.sendall(request_bytes)
        assert connection.recv(4096).startswith(b"HTTP/1.1 4")


def test_a_slow_body_is_408(start, shelf):
    server = start(shelf, body_timeout_s=0.2).wait_ready()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nab")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
    with server.client() as client:
        assert client.get("/health").status_code == 200


def test_a_half_sent_header_is_closed(start, shelf):
    server = start(shelf, idle_timeout_s=0.2).wait_ready()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHo")
        assert connection.recv(4096) == b""


def test_a_client_that_goes_away_harms_nobody(images):
    for _ in range(20):
        with socket.create_connection((images.base_url.host, images.base_url.port), timeout=5) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nab")
    assert images.get("/health").status_code == 200
