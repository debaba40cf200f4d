"""Thousands of requests that are almost right, to real servers: each is answered or its connection closed.

Seeds are fixed; FETTLE_FUZZ multiplies how many there are, and FETTLE_FUZZ_SEED moves them.
"""

import base64
import contextlib
import gzip
import http.client
import io
import json
import os
import random
import socket
import subprocess
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REQUESTS = 1500 * int(os.environ.get("FETTLE_FUZZ", "1"))
SEED = int(os.environ.get("FETTLE_FUZZ_SEED", "0"))
# What may be answered where the server is well: no 5xx but "not now" and "not in time", which say when to come again.
FINE = {200, 503, 504, *range(400, 500)}
GROWTH_BYTES = 24 * 2**20
ODD = (
    None, True, False, -1, 0, 1, 2, 7, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308,
    5e-324, float("nan"), float("inf"), -float("inf"), "", "x", "NaN", "\ud800", "\udfff\ud800", "\x00", "é" * 300, [],
    {}, [[]], [None], [1, "1"], {"": {}}, [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]], "A" * 5000, [0] * 300,
)  # fmt: skip
TOKENS = (b"NaN", b"Infinity", b"-", b"1e999", b"\\ud800", b"\\u0000", b"[" * 500, b"{" * 500, b'"', b",", b"\xff\xfe",
          b"\xed\xa0\x80", b"0" * 400, b"9" * 400, b"null", b"\r\n", b"\r", b"\n", b"\x00", b"\x80")  # fmt: skip


# The server


class Target:
    """A server process, what a good request to it is, and how large its processes are."""

    def __init__(self, server, good):
        self.server = server
        # A pipe that nobody reads would hold up a server that logs much.
        threading.Thread(target=server.process.stderr.read, daemon=True).start()
        host, port = server.url.removeprefix("http://").split(":")
        self.address = host, int(port)
        self.good = good
        self.expected = self.ask_good()
        self._connection = None

    def ask_good(self):
        status, _, body = self.ask_once(*self.good)
        assert status == 200, body
        return body

    def ask_once(self, path, body, headers):
        with contextlib.closing(http.client.HTTPConnection(*self.address, timeout=20)) as connection:
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def ask(self, path, body, headers):
        """Over one connection as long as the server keeps it; None where it closed it without an answer."""
        for _ in range(2):
            fresh = self._connection is None
            if fresh:
                self._connection = http.client.HTTPConnection(*self.address, timeout=20)
            try:
                self._connection.request("POST", path, body, headers)
                response = self._connection.getresponse()
                found = response.status, dict(response.getheaders()), response.read()
            except (http.client.RemoteDisconnected, ConnectionError):
                self.hang_up()
                if fresh:
                    return None
                continue  # it was closed after the answer before
            if response.will_close:
                self.hang_up()
            return found
        return None

    def hang_up(self):
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def sizes(self):
        """Resident bytes of the front and of each worker, by process id."""
        found = subprocess.run(
            ["pgrep", "-P", str(self.server.process.pid)], capture_output=True, text=True, check=True
        )
        return {pid: resident_bytes(pid) for pid in (self.server.process.pid, *map(int, found.stdout.split()))}


def resident_bytes(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} has no resident memory")


@contextlib.contextmanager
def unharmed(target, warm_up):
    """Whatever happens inside, after a warm-up of its kind: nobody dies, nothing grows, good requests are answered."""
    for _ in range(300):
        warm_up()
    target.hang_up()
    before = target.sizes()
    yield
    target.hang_up()
    after = target.sizes()
    assert set(after) == set(before), "a process was replaced"
    grown = {pid: after[pid] - before[pid] for pid in before}
    assert max(grown.values()) < GROWTH_BYTES, grown
    with target.server.client() as client:
        text = client.get("/metrics").text
    assert "\nfettle_worker_deaths_total 0.0" in text
    assert "\nfettle_requests_in_flight 1.0" in text
    assert "\nfettle_queue_rows 0.0" in text
    assert target.ask_good() == target.expected


def check_answer(status, headers, body, why):
    """The one form of every error, and answers that can be read."""
    headers = {name.lower(): value for name, value in headers.items()}
    assert status in FINE, (status, body, why)
    if status != 200:
        assert headers["content-type"] == "application/json", why
        error = json.loads(body)
        assert set(error) == {"error"}, (error, why)
        assert isinstance(error["error"], str), why
        assert error["error"], why
        assert "Traceback" not in error["error"], (error, why)
        return
    length = int(headers.get("inference-header-content-length", len(body)))
    if headers["content-type"] in ("application/json", "application/octet-stream"):
        json.loads(body[:length])


# Changes


def odd_json(rng, value, depth=0):
    """The value with one thing changed somewhere inside."""
    inner = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inner or (depth and rng.random() < 0.25):
        return rng.choice(ODD)
    key = rng.choice(inner)
    changed = dict(value) if isinstance(value, dict) else list(value)
    match rng.randrange(8):
        case 0:
            del changed[key]
        case 1 if isinstance(changed, list):
            changed.insert(key, changed[key])
        case 1:
            changed[rng.choice(["extra", "", "name", "shape"])] = rng.choice(ODD)
        case _:
            changed[key] = odd_json(rng, changed[key], depth + 1)
    return changed


def odd_bytes(rng, content, at_most=4):
    """The bytes with some flipped, cut, doubled, dropped, or put in."""
    content = bytearray(content)
    for _ in range(rng.randint(1, at_most)):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(7):
            case 0 | 1 if content:
                content[at % len(content)] = rng.randrange(256)
            case 2:
                content[at:at] = rng.choice(TOKENS)
            case 3:
                del content[at : at + rng.choice((1, 2, 8, 64))]
            case 4:
                content[at:at] = content[at : at + rng.choice((1, 8, 64, 512))]
            case 5 if rng.random() < 0.3:
                del content[at:]
            case _ if content:
                content[at % len(content)] ^= 1 << rng.randrange(8)
    return bytes(content)


def doubled_key(rng, text):
    """A JSON object with one of its pairs given twice."""
    at = rng.choice([index for index, one in enumerate(text) if one == ord("{")] or [0])
    return text[: at + 1] + b'"name":"x","inputs":[],"shape":[1,2],' + text[at + 1 :]


def packed(rng, body, headers):
    """The body compressed, mostly rightly."""
    coding, content = rng.choice([("gzip", gzip.compress(body, 1)), ("deflate", zlib.compress(body, 1)), ("br", body)])
    if rng.random() < 0.4:
        content = odd_bytes(rng, content, 2)
    return content, {**headers, "content-encoding": coding}


# Tensors


TYPES = {"b": ("BOOL", "?"), "u8": ("UINT8", "u1"), "u64": ("UINT64", "<u8"), "i8": ("INT8", "i1"),
         "i64": ("INT64", "<i8"), "f16": ("FP16", "<f2"), "f32": ("FP32", "<f4"), "f64": ("FP64", "<f8"),
         "wide": ("FP32", "<f4")}  # fmt: skip


def tensors(rng):
    """A good request for the echo model: some inputs as JSON, some behind it."""
    rows, width = rng.randint(1, 3), rng.randint(1, 4)
    inputs, parts = [], []
    for name, (datatype, dtype) in TYPES.items():
        shape = [rows, 2, width] if name == "wide" else [rows, 2]
        array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
        tensor = {"name": name, "shape": shape, "datatype": datatype}
        if rng.random() < 0.6:
            tensor["parameters"] = {"binary_data_size": array.nbytes}
            parts.append(array.tobytes())
        else:
            tensor["data"] = array.ravel().tolist()
        inputs.append(tensor)
    request = {"id": "a", "inputs": inputs}
    if rng.random() < 0.5:
        request["parameters"] = {"binary_data_output": rng.random() < 0.5}
    if rng.random() < 0.5:
        request["outputs"] = [{"name": "out_wide", "parameters": {"binary_data": rng.random() < 0.7}}]
    return request, b"".join(parts)


def odd_tensors(rng):
    request, tail = tensors(rng)
    kind = rng.randrange(10)
    if kind < 4:
        request = odd_json(rng, request)
    text = json.dumps(request, separators=rng.choice([(",", ":"), (", ", " : ")])).encode()
    if kind == 4:
        text = odd_bytes(rng, text)
    elif kind == 5:
        text = doubled_key(rng, text)
    elif kind == 6:
        tail = rng.choice([tail[:-1], tail + b"x", b"", tail * 2, odd_bytes(rng, tail or b"x")])
    length = str(len(text))
    if kind == 7:
        length = str(rng.choice([0, 1, len(text) - 1, len(text) + 1, len(text) + len(tail), 2**40, 10**30, -1, "x", "",
                                 "1e3", " 5", "0x10", "+5", "5, 5"]))  # fmt: skip
    body, headers = text + tail, {"inference-header-content-length": length, "x-request-id": "f"}
    if kind == 8:
        body, headers = packed(rng, body, headers)
    if kind == 9:
        headers[rng.choice(["content-type", "accept-encoding", "x-request-timeout-ms", "x-request-id"])] = rng.choice(
            ["", "x", "1", "gzip;q=9", "application/json", "99999999999", "a" * 200]
        )
    return "/v2/models/tiny/infer", body, headers


@pytest.fixture
def echo_target(start, tmp_path, kit):
    kit.echo_artifact(tmp_path / "1")
    (tmp_path / "current").write_text("1")
    request, tail = tensors(random.Random(1))
    text = json.dumps(request).encode()
    good = (
        "/v2/models/tiny/infer",
        text + tail,
        {"inference-header-content-length": str(len(text)), "x-request-id": "g"},
    )
    return lambda **options: Target(start(tmp_path, process=True, **options).wait_ready(), good)


def statuses_of(target, make):
    """Ask what `make` makes, many times: each is answered, in the form of all answers, and nothing is harmed."""
    rng = random.Random(SEED)
    statuses = set()
    with unharmed(target, lambda: target.ask(*make(rng))):
        for number in range(REQUESTS):
            request = make(rng)
            answer = target.ask(*request)
            assert answer is not None, (number, request)
            check_answer(*answer, (number, request))
            statuses.add(answer[0])
    return statuses


def test_no_tensor_request_harms_the_server(echo_target):
    assert {200, 400} <= statuses_of(echo_target(), odd_tensors)


# Images


def picture(rng, kind, **options):
    pixels = np.random.default_rng(rng.randrange(9)).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def odd_pictures(rng):
    kind, options = rng.choice([("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("BMP", {})])
    images = [picture(rng, kind, **options) for _ in range(rng.randint(1, 3))]
    spoil = rng.randrange(6)
    if spoil < 3:
        images[0] = odd_bytes(rng, images[0], 8)
    form = rng.choice(["raw", "json", "form"])
    if form == "raw":
        body, headers = images[0], {"content-type": rng.choice(["image/png", "image/jpeg", "image/x"])}
    elif form == "json":
        texts = [base64.b64encode(image).decode() for image in images]
        request = {"image": texts[0]} if len(texts) == 1 else {"images": texts}
        if spoil == 3:
            request = odd_json(rng, request)
        body, headers = json.dumps(request).encode(), {"content-type": "application/json"}
    else:
        head = '--b\r\nContent-Disposition: form-data; name="i"; filename="i"\r\n\r\n'
        body = b"".join(head.encode() + image + b"\r\n" for image in images) + b"--b--\r\n"
        headers = {"content-type": "multipart/form-data; boundary=b"}
    if spoil == 4:
        body = odd_bytes(rng, body)
    elif spoil == 5:
        body, headers = packed(rng, body, headers)
    return "/predict", body, {**headers, "x-request-id": "f"}


@pytest.fixture
def image_target(start, shelf):
    good = "/predict", picture(random.Random(1), "JPEG"), {"content-type": "image/jpeg", "x-request-id": "g"}
    return lambda **options: Target(start(shelf.root, process=True, **options).wait_ready(), good)


def test_no_image_request_harms_the_server(image_target):
    assert {200, 400} <= statuses_of(image_target(), odd_pictures)


# Bytes on the wire


def chunks(rng, body):
    """In chunks, as they may be, or nearly."""
    parts = []
    while body:
        size = rng.randint(1, 60)
        part, body = body[:size], body[size:]
        extension = rng.choice([b"", b"", b";a=b", b";a"])
        parts.append(b"%x%s\r\n%s\r\n" % (len(part), extension, part))
    return b"".join(
        [*parts, rng.choice([b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\nx: y\r\n\r\n", b"00\r\n\r\n", b"-1\r\n\r\n"])]
    )


def whole_request(rng, good):
    """A good request as bytes."""
    match rng.randrange(4):
        case 0:
            path = rng.choice(["/health", "/v2", "/metrics", "/v2/models/tiny", "/nowhere", "/v2/models/%ff/infer"])
            return b"GET %s HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n" % path.encode()
        case 1:
            head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n"
            return head % good[0].encode() + chunks(rng, good[1])
        case _:
            head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n"
            return head % (good[0].encode(), len(good[1])) + good[1]


LINES = (b"Host: y", b"Content-Length: 5", b"Content-Length: 0", b"Content-Length: -1", b"Content-Length: 99999999999",
         b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: identity",
         b"Connection: close", b"Connection: upgrade", b"Upgrade: h2c", b"Expect: 100-continue", b"Expect: x",
         b" folded", b": none", b"X: " + b"a" * 20_000, b"X Y: z", b"Content-Encoding: gzip", b"Content-Length: +5",
         b"\x00: a", b"X: \xff", b"Inference-Header-Content-Length: 3")  # fmt: skip


def odd_wire(rng, good):
    """Some requests in a row, of which one is odd."""
    requests = [whole_request(rng, good) for _ in range(rng.randint(1, 4))]
    number = rng.randrange(len(requests))
    head, _, body = requests[number].partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    match rng.randrange(6):
        case 0:
            lines.insert(rng.randint(0, len(lines)), rng.choice(LINES))
        case 1:
            first = odd_bytes(rng, first, 2)
        case 2:
            lines = [b"\r\n".join(lines) and odd_bytes(rng, b"\r\n".join(lines), 3)]
        case 3:
            lines += [b"X-%d: y" % index for index in range(rng.choice((1, 99, 101, 300)))]
        case 4:
            body = odd_bytes(rng, body or b"x", 3)
        case 5:
            first = first.replace(b"HTTP/1.1", rng.choice([b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"", b"http/1.1"]))
    requests[number] = rng.choice([b"\r\n", b"\r\n", b"\r\n", b"\n"]).join([first, *lines, b"", b""]) + body
    return b"".join(requests)


def talk(address, sent):
    """All that the server says before it closes. No more is sent: it need not wait for any."""
    with socket.create_connection(address, timeout=20) as connection:
        received = bytearray()
        with contextlib.suppress(ConnectionError):  # it may close before it has read everything
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(65536):
                received += data
        return bytes(received)


def check_stream(received, why):
    """One whole answer after another."""
    while received:
        head, blank, rest = received.partition(b"\r\n\r\n")
        assert blank, (received, why)
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(first.split(" ")[1])
        if status == 100:
            received = rest
            continue
        headers = dict(line.lower().split(": ", 1) for line in lines)
        length = int(headers["content-length"])
        assert len(rest) >= length, (received, why)
        check_answer(status, headers, rest[:length], why)
        received = rest[length:]


def test_no_bytes_on_the_wire_harm_the_server(image_target):
    target = image_target(header_timeout_s=2.0, body_timeout_s=2.0)
    rng = random.Random(SEED)
    answered = 0
    with unharmed(target, lambda: talk(target.address, odd_wire(rng, target.good))):
        for number in range(REQUESTS):
            sent = odd_wire(rng, target.good)
            received = talk(target.address, sent)
            check_stream(received, (number, sent))
            answered += bool(received)
    assert answered > REQUESTS * 0.8
