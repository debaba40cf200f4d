"""What other model servers were broken by, tried on ours: one test for each lesson that concerns a server.

The server is a process of its own, with both ports; what it and its workers allocate is read from the kernel. Where
a CVE is named it is the one that taught the lesson.
"""

import contextlib
import http.client
import json
import os
import pickle
import socket
import struct
import time
import zlib
from pathlib import Path

import msgspec
import pytest

from fettle.core.errors import UsageError
from fettle.serve import wire
from fettle.serve.key_file import add_key
from fettle.serve.keys import new_key
from fettle.serve.listener import bind
from fettle.serve.options import ServeOptions

JSON = "application/json"
INFER = "/v2/models/tiny/infer"
ADMIN = "/v2/repository"
HALF_MINUTE_S = 30
MIB = 2**20
POSTS = [
    ("public", INFER), ("public", "/v2/models/tiny/versions/1/infer"), ("public", "/predict"),
    ("public", "/predict/tiny"), ("admin", f"{ADMIN}/index"), ("admin", f"{ADMIN}/models/tiny/load"),
    ("admin", f"{ADMIN}/models/tiny/unload"),
]  # fmt: skip


class Target:
    """The server under attack, spoken to by raw requests, so that no client mends what is sent."""

    def __init__(self, process, ports, key):
        self.process, self.ports, self.key = process, ports, key

    def send(self, port, method, path, body=b"", **headers):
        """Status and content; the answer must come within half a minute, and in our form where it is an error."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[port], timeout=HALF_MINUTE_S)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_accept_encoding=True)
            sent = {"content-type": JSON, "x-api-key": self.key, "content-length": str(len(body))}
            for name, value in {**sent, **{n.replace("_", "-"): v for n, v in headers.items()}}.items():
                connection.putheader(name, value)
            connection.endheaders()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # answered before all was sent
                connection.send(body)
            response = connection.getresponse()
            return response.status, response.read()

    def refuses(self, port, path, body=b"", *, status=(400,), method="POST", **headers):
        """The message of an error, which must be one of these, and tell nothing of the inside."""
        found, content = self.send(port, method, path, body, **headers)
        assert found in status, (found, content[:300])
        message = json.loads(content)["error"]
        for inside in ("Traceback", ".py", "/tmp", "/srv", "site-packages", "object at 0x", "shm", "secret", self.key):
            assert inside not in message
        assert len(message) < 700
        return message

    def raw(self, data, port="public"):
        """What comes back for these bytes, until the server closes the connection."""
        with socket.create_connection(("127.0.0.1", self.ports[port]), timeout=HALF_MINUTE_S) as plain:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                plain.sendall(data)
                plain.shutdown(socket.SHUT_WR)
            found = b""
            with contextlib.suppress(ConnectionResetError):
                while part := plain.recv(65536):
                    found += part
            return found

    @property
    def pids(self):
        main = self.process.process.pid
        tasks = Path(f"/proc/{main}/task").glob("*/children")
        return [main, *(int(pid) for task in tasks for pid in task.read_text().split())]

    @contextlib.contextmanager
    def memory_below(self, limit_mib):
        """No process may, at any moment, have so much more memory than before."""
        before = {pid: _memory(pid, "VmRSS") for pid in self.pids}
        for pid in before:
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        yield
        grown = {pid: (_memory(pid, "VmHWM") - kib) / 1024 for pid, kib in before.items()}
        assert max(grown.values()) < limit_mib, grown

    def is_well(self):
        assert self.process.process.poll() is None
        status, metrics = self.send("public", "GET", "/metrics")
        assert status == 200
        assert b"fettle_worker_deaths_total 0.0" in metrics
        assert self.send("public", "GET", "/health/ready")[0] == 200


def _memory(pid, name):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


@pytest.fixture(scope="module")
def server(kit, shelf_root, tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    key, text = new_key("attacker", models="*", actions=["infer", "read", "admin"])
    add_key(path, key)
    with bind("127.0.0.1", 0) as free:
        admin = free.getsockname()[1]
    process = kit.Process(shelf_root, keys=path, admin_port=admin).wait_ready()
    yield Target(process, {"public": int(process.url.rsplit(":", 1)[1]), "admin": admin}, text)
    process.signal()
    process.process.communicate(timeout=HALF_MINUTE_S)  # its log has the tracebacks of the failures that were provoked
    assert process.process.returncode == 0


@pytest.fixture
def target(server):
    yield server
    server.is_well()


def tensor(**changes):
    one = {"name": "x", "shape": [1, 3, 8, 8], "datatype": "FP32", "data": [0.0] * 192, **changes}
    return json.dumps({"inputs": [one]}).encode()


class Exploit:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# Code from data


@pytest.mark.parametrize(("port", "path"), POSTS)
def test_pickles_are_refused_on_every_port(target, tmp_path, port, path):
    """CVE-2024-2912, CVE-2025-27520, CVE-2025-32375 (BentoML): request bodies were unpickled."""
    trap = tmp_path / "unpickled"
    kinds = ("application/vnd.bentoml+pickle", "application/x-pickle", "application/python-pickle", JSON, "text/plain")
    for kind in (*kinds, "application/octet-stream", "multipart/form-data; boundary=x", "image/png"):
        for content in (pickle.dumps(Exploit(trap)), pickle.dumps(Exploit(trap), protocol=0)):
            target.refuses(port, path, content, status=(400, 415), content_type=kind)
    assert not trap.exists()


def test_the_wire_between_our_own_processes_takes_its_messages_and_nothing_else(tmp_path):
    """CVE-2025-32375 (BentoML), and the ZMQ servers that copied `recv_pyobj`: pickle between processes."""
    trap = tmp_path / "unpickled"
    for read in (wire.order_of, wire.report_of):
        for content in (pickle.dumps(Exploit(trap)), b"", b"\x81\xa4type\xa4Evil", msgspec.msgpack.encode(["Work"])):
            with pytest.raises(msgspec.MsgspecError):
                read(content)
    with pytest.raises(ValueError, match="at most"):
        list(wire.Frames().feed(struct.pack("<II", 2**32 - 1, 2**32 - 1)))
    assert not trap.exists()


# Addresses and paths from clients


def test_no_address_that_a_client_sends_is_ever_fetched(target, kit):
    """CVE-2025-54381 (BentoML): a URL in a file field made the server fetch it. CVE-2023-43654 (TorchServe): models."""
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.setblocking(False)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/metadata"
        for body in ({"image": url}, {"images": [url]}, {"image": {"url": url}}, {"url": url}, {"image_url": url}):
            target.refuses("public", "/predict", json.dumps(body).encode(), status=(400,))
        for part in (
            'form-data; name="image"', 'form-data; name="image"; filename="x.png"',
            f'form-data; name="image"; filename="{url}"',
        ):  # fmt: skip
            form = f"--b\r\nContent-Disposition: {part}\r\n\r\n{url}\r\n--b--\r\n".encode()
            target.refuses("public", "/predict", form, content_type="multipart/form-data; boundary=b")
        target.refuses("public", "/predict", url.encode(), content_type="image/png")
        for changes in ({"data": url}, {"data": [url]}, {"data": {"url": url}}):
            target.refuses("public", INFER, tensor(**changes))
        for parameters in ({"url": url}, {"config": url}, {"file:x": url}):
            body = json.dumps({"parameters": parameters}).encode()
            target.refuses("admin", f"{ADMIN}/models/tiny/load", body)
        target.refuses("admin", f"{ADMIN}/models/{url}/load", status=(400, 404))
        with pytest.raises(BlockingIOError):
            trap.accept()


NAMES = [
    "..", "../tiny", "%2e%2e", "%2e%2e%2ftiny", "%252e%252e%252ftiny", "..%5ctiny", "..\\tiny", "tiny%00", "%00",
    "tiny%2f..",    "/etc/passwd", "%2fetc%2fpasswd", "file:%2f%2f%2fetc%2fpasswd", "C:%5cWindows", "tiny%0a",
    "%c0%ae%c0%ae", "~",
    "tiny%20",    "a" * 5000, "%ff%fe", "tiny;a", "TINY", "{model}", "$(id)", "%24%28id%29", "`id`",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:24])
def test_a_model_is_named_and_never_a_path(target, name):
    """CVE-2023-1177, CVE-2023-2780, CVE-2023-6831, CVE-2024-1560, CVE-2026-2614 (MLflow): five rounds of `..`;
    CVE-2026-0596: a name that reached a shell."""
    for port, method, path in (
        ("public", "GET", "/v2/models/{}"), ("public", "GET", "/v2/models/{}/ready"),
        ("public", "POST", "/v2/models/{}/infer"), ("public", "GET", "/v2/models/{}/versions/1"),
        ("public", "POST", "/predict/{}"), ("public", "GET", "/v2/models/tiny/versions/{}"),
        ("admin", "POST", ADMIN + "/models/{}/load"), ("admin", "POST", ADMIN + "/models/{}/unload"),
    ):  # fmt: skip
        message = target.refuses(port, path.format(name), method=method, status=(400, 404))
        assert "root:" not in message


# Denial of service


def test_no_boundary_part_or_header_of_a_form_takes_long(target):
    """CVE-2024-9056 (BentoML): characters behind a multipart boundary kept the server busy for ever."""
    form = "multipart/form-data; boundary=b"
    head = b'Content-Disposition: form-data; name="i"; filename="i"'
    started = time.monotonic()
    for body in (
        b"--b" + b"-" * 8 * MIB, b"--b" * 4 * MIB, b"\r\n--b" * 2 * MIB, b"--b\r\n" * 2 * MIB, b"-" * 8 * MIB,
        b"--b\r\n" + head + b"\r\n\r\nx\r\n" + b"--b\r\n" + b"a: b\r\n" * MIB, b"--b\r\n" + b"a" * 8 * MIB,
        (b"--b\r\n" + head + b"\r\n\r\nx\r\n") * 100_000 + b"--b--",
        b"--b\r\n" + b'; name="' * MIB + b"\r\n\r\n\r\n--b--",
    ):  # fmt: skip
        target.refuses("public", "/predict", body, status=(400, 413), content_type=form)
    for boundary in ("", "=", '"', "a" * 71, "b" * 9000, "b\x0b", '"' + " " * 60 + '"', ";" * 5000, "é"):
        target.refuses("public", "/predict", b"--b--", content_type=f"multipart/form-data; boundary={boundary}")
    assert time.monotonic() - started < 2 * HALF_MINUTE_S


def test_chunks_and_headers_of_any_size_are_refused_or_bounded(target):
    """CVE-2025-23310, CVE-2025-23311 (Triton): chunks and headers were laid on the stack, however many."""
    line = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nX-API-Key: {target.key}\r\n".encode()
    chunked = line + b"Transfer-Encoding: chunked\r\n\r\n"
    for data, status in (
        (chunked + b"FFFFFFFFFFFFFFFFF\r\nx", b"400"),
        (chunked + b"-1\r\nx", b"400"), (chunked + b"0x10\r\nx", b"400"), (chunked + b"zz\r\n", b"400"),
        (chunked + b"1000001\r\n" + b"x" * (16 * MIB + 2), b"413"),
        (chunked + b"1\r\nxx\r\n0\r\n\r\n", b"400"), (chunked + b"0\r\n" + b"a: b\r\n" * 100_000, b"431"),
        (line + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
        (line + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", b"400"),
        (line + b"Content-Length: -1\r\n\r\n", b"400"),
        (line + b"Content-Length: 99999999999999999999\r\n\r\n", b"400"),
        (line + b"A: " + b"a" * MIB, b"431"), (line + b"A: b\r\n" * 10_000 + b"\r\n", b"431"),
        (b"POST /" + b"a" * MIB, b"431"), (b"A" * MIB, b"400"),
    ):  # fmt: skip
        answer = target.raw(data)
        assert answer.startswith(b"HTTP/1.1 " + status), (data[:200], answer[:200])
        assert b'{"error":"' in answer


def _chunked(target):
    fields = ("Host: x", f"X-API-Key: {target.key}", "Connection: close", "Transfer-Encoding: chunked")
    return "\r\n".join((f"POST {INFER} HTTP/1.1", *fields, "", "")).encode()


def test_a_body_in_chunks_of_one_byte_takes_no_more_memory_than_in_one_piece(target):
    """CVE-2025-23310 (Triton), the same lesson on the heap: a million pieces must not cost a million objects."""
    body = tensor().ljust(MIB)
    head = _chunked(target)
    with target.memory_below(24):
        answer = target.raw(head + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


def test_trailers_change_nothing_that_the_header_decided(target):
    """CVE-2025-23311 (Triton): what comes behind the chunks is input too."""
    body = tensor()
    head = _chunked(target)
    trailer = b"0\r\nContent-Encoding: gzip\r\nInference-Header-Content-Length: 3\r\nX-API-Key: x\r\n\r\n"
    assert target.raw(head + b"%x\r\n%s\r\n" % (len(body), body) + trailer).startswith(b"HTTP/1.1 200")


def test_a_payload_too_large_is_refused_and_the_server_lives(target):
    """CVE-2025-33201 (Triton): a huge payload ended the server."""
    with target.memory_below(64):
        for port, path in POSTS:
            target.refuses(port, path, bytes(17 * MIB), status=(413,))
            target.refuses(port, path, status=(413,), content_length=str(2**40))


HUGE = [
    [2**31, 2**31], [2**62, 2**62, 4], [10**9], [1, 3, 8, 10**9], [1] * 1000, [-1, 3, 8, 8], [0, 3, 8, 8], [2**63],
    [10**30],    [-(2**63)], [1, 3, 8, 2**61], [], [1.5], [True], [2**32, 3, 8, 8], [1000000, 3, 8, 8],
]  # fmt: skip


def test_no_shape_makes_the_server_allocate(target):
    """CVE-2025-33201 (Triton): sizes must be checked as a product, and before anything is allocated."""
    with target.memory_below(32):
        for shape in HUGE:
            target.refuses("public", INFER, tensor(shape=shape, data=[0]))
            for size in (4, 0, -1, 2**40, 2**63, 10**30):
                one = {"name": "x", "shape": shape, "datatype": "FP32", "parameters": {"binary_data_size": size}}
                header = json.dumps({"inputs": [one]}).encode()
                length = {"inference_header_content_length": str(len(header))}
                target.refuses("public", INFER, header + bytes(4), **length)


def test_compressed_bombs_end_at_the_limit(target):
    """CVE-2025-33201 (Triton): the limit is of what comes out, not of what is sent."""
    for coding, bits in (("gzip", 31), ("deflate", 15), ("deflate", -15)):
        packer = zlib.compressobj(9, zlib.DEFLATED, bits)
        bomb = b"".join(packer.compress(bytes(16 * MIB)) for _ in range(32)) + packer.flush()
        assert len(bomb) < MIB
        with target.memory_below(64):
            for path in (INFER, "/predict"):
                target.refuses("public", path, bomb, status=(413,), content_encoding=coding)
    target.refuses("public", INFER, b"x", status=(415,), content_encoding="gzip, gzip")
    target.refuses("public", INFER, b"x", status=(415,), content_encoding=", ".join(["gzip"] * 1000))


def _png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(MIB))) + chunk(b"IEND", b"")
    )


def _resized(picture, marker, offset, layout, *sides):
    """The picture with other dimensions in its header."""
    content = bytearray(picture)
    struct.pack_into(layout, content, content.index(marker) + offset, *sides)
    return bytes(content)


def test_image_bombs_are_refused_from_their_header(target, kit):
    """CVE-2025-33201 (Triton), for images: a kilobyte can claim four gigapixels."""
    jpeg = kit.picture(kind="JPEG")
    bombs = [
        _png(65535, 65535), _png(2**31 - 1, 2**31 - 1), _png(2**31 - 1, 1), _png(1, 2**31 - 1), _png(25_000_001, 1),
        _resized(jpeg, b"\xff\xc0", 5, ">HH", 65500, 65500),
        _resized(kit.picture(kind="BMP"), b"BM", 18, "<ii", 60000, 60000),
    ]  # fmt: skip
    with target.memory_below(32):
        for bomb in bombs:
            target.refuses("public", "/predict", bomb, status=(400, 413), content_type="image/png")


def test_many_images_in_one_body_are_counted_before_they_cost(target):
    """CVE-2025-33201 (Triton): five million empty images fit into the largest body."""
    body = b'{"images": [' + b",".join([b'""'] * 5_000_000) + b"]}"
    with target.memory_below(160):  # the body twice, and one pointer for each text
        target.refuses("public", "/predict", body, status=(413,))


@pytest.mark.parametrize(("port", "path"), POSTS)
def test_deep_json_is_refused_and_no_process_ends(target, port, path):
    """CVE-2025-33201 (Triton): nested brackets must not reach the end of the stack."""
    deep = b"[" * 100_000
    for body in (
        deep, deep + b"]" * 100_000, b'{"a":' * 100_000, b'{"inputs":' + deep, b'{"parameters":' + deep,
        tensor().replace(b'"data": [', b'"data": ' + deep), b'{"x":' + deep + b"]" * 100_000 + b"}", b"[" * 8 * MIB,
        b'{"parameters": {"a": ' + deep + b"]" * 100_000 + b"}}", b'{"image":' + deep, b'{"images":[' + deep,
    ):  # fmt: skip
        target.refuses(port, path, body)
    if path == INFER:
        target.refuses(port, path, deep, inference_header_content_length=str(len(deep)))


@pytest.mark.parametrize(
    "given", ["-1", "+1", "1e3", "0x10", " ", "1 1", "9" * 18, "9" * 30, "١", "1,1", "99999", "NaN"]
)
def test_a_json_length_beyond_the_body_is_refused(target, given):
    """CVE-2025-23310 (Triton): a length from a header is a claim."""
    target.refuses("public", INFER, tensor(), inference_header_content_length=given.encode())


def test_the_largest_body_of_zeros_is_answered_in_time(target):
    """CVE-2025-33201 (Triton): what is within the limit must be cheap enough to refuse."""
    zeros = b"0," * (8 * MIB - 200) + b"0"
    for shape in (b"[1,3,8,8]", b"[43690,3,8,8]"):
        body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":' + shape + b',"data":[' + zeros + b"]}]}"
        assert len(body) <= 16 * MIB
        started = time.monotonic()
        target.refuses("public", INFER, body, status=(400, 413, 429))
        assert target.send("public", "GET", "/health/live")[0] == 200
        assert time.monotonic() - started < HALF_MINUTE_S


# Errors and administration


def test_errors_tell_nothing_of_the_inside(target):
    """CVE-2025-23319, CVE-2025-23320, CVE-2025-23334 (Triton): an error named the shared memory, and led to code."""
    status, content = target.send("public", "POST", INFER, tensor(data=[666.0] * 192))
    assert (status, json.loads(content)) == (500, {"error": "the model failed on this input"})
    for parameters in ({"shared_memory_region": "x"}, {"shared_memory_region": "x", "shared_memory_byte_size": 4}):
        target.refuses("public", INFER, tensor(parameters=parameters, data=[]))
    for path in ("/v2/systemsharedmemory/status", "/v2/cudasharedmemory/status", "/v2/logging", "/v2/trace/setting"):
        target.refuses("public", path, method="GET", status=(404,))


def test_administration_is_off_unless_asked_for_and_never_without_a_key(target):
    """CVE-2023-43654 (TorchServe) and CVE-2023-48022 (Ray): management open to everyone, on every address."""
    assert ServeOptions().admin_port is None
    assert (ServeOptions().host, ServeOptions().admin_host) == ("127.0.0.1", "127.0.0.1")
    with pytest.raises(UsageError, match="key"):
        ServeOptions(admin_port=0)
    for path in (f"{ADMIN}/index", f"{ADMIN}/models/tiny/unload", "/models", "/api/jobs/", "/v2/models/tiny/unload"):
        target.refuses("public", path, status=(404,))
        target.refuses("admin", path, status=(401,), x_api_key="wrong")


def test_a_page_in_a_browser_cannot_administer_by_dns_rebinding(target):
    """CVE-2026-27482 (Ray): a page could delete jobs through the dashboard on localhost."""
    for method, path in (("POST", f"{ADMIN}/models/tiny/unload"), ("DELETE", "/x"), ("GET", "/metrics")):
        connection = http.client.HTTPConnection("127.0.0.1", target.ports["admin"], timeout=HALF_MINUTE_S)
        with contextlib.closing(connection):
            connection.request(method, path, b"", {"host": "rebound.example", "x-api-key": target.key})
            response = connection.getresponse()
            assert response.status == 421
            assert "access-control-allow-origin" not in response.headers
