"""Failures under load: what is not shed is answered, and every answer is the one that its request deserves."""

import contextlib
import errno
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from fettle.core.home import Home
from fettle.registry.store import Registry
from fettle.serve import deaths, lanes
from fettle.serve.source import registry_source

INFER = "/v2/models/tiny/infer"
JSON = {"content-type": "application/json"}
VALUES = (-0.5, 0.25, 1.0)
TCP_REPAIR = 19


class Judged:
    """Load of several values at once, whose answers are compared with what each value gives in each version."""

    def __init__(self, kit, url, *, clients=4):
        self._kit = kit
        self._loads = {value: kit.Load(url, clients=clients, body=kit.body_of(value)) for value in VALUES}

    @property
    def count(self):
        return sum(len(load.answers) for load in self._loads.values())

    def goes_on(self, more=60):
        """Wait for so many answers to requests, most of which begin after this call."""
        seen = self.count
        self._kit.until(lambda: self.count > seen + more, 60)

    def end(self, **options):
        """The versions that answered; all of it rightly, and nothing lost."""
        versions = set()
        for value, load in self._loads.items():
            for _, version, content in load.end(**options):
                versions.add(version)
                expected = [5 * value, 5 * value, 5 * value + (version == 2)]
                assert json.loads(content)["outputs"][0]["data"] == pytest.approx(expected)
        return versions


def workers_of(server):
    found = subprocess.run(["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def sockets_of(server):
    """How many sockets the server holds."""
    folder = f"/proc/{server.process.pid}/fd"
    count = 0
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(f"{folder}/{name}").startswith("socket:")
    return count


@pytest.fixture
def connect():
    """Opens connections, `connect(server, receive_bytes=None)`, and closes them after the test."""
    opened = []

    def to(server, *, receive_bytes=None):
        host, port = server.url.removeprefix("http://").split(":")
        connection = socket.socket()
        opened.append(connection)
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(30)
        connection.connect((host, int(port)))
        return connection

    yield to
    for connection in opened:
        connection.close()


def metric(client, name):
    return float(client.get("/metrics").text.split(f"\n{name} ")[1].split()[0])


# Workers


def test_a_worker_that_is_stopped_under_load_is_replaced_and_nothing_is_lost(start, shelf, kit):
    server = start(shelf.root, process=True, worker_timeout_s=2.0).wait_ready()
    load = Judged(kit, server.url)
    load.goes_on()
    stopped = workers_of(server)[0]
    os.kill(stopped, signal.SIGSTOP)
    load.goes_on()
    kit.until(lambda: stopped not in workers_of(server))
    with server.client() as client:
        kit.until(lambda: client.get("/health").json()["workers"] == 2)
        assert metric(client, "fettle_worker_deaths_total") == 1
    load.goes_on()
    assert load.end() == {1}


def test_a_worker_killed_while_the_server_drains_loses_nothing(start, slow, kit):
    server = start(slow(0.02).root, process=True, grace_s=0.3).wait_ready()
    load = Judged(kit, server.url)
    load.goes_on()
    server.signal()
    os.kill(workers_of(server)[0], signal.SIGKILL)
    assert load.end(stop=False) == {1}
    assert server.wait()[0] == 0


def test_workers_killed_while_versions_switch_lose_nothing(start, shelf, kit):
    server = start(shelf.root, process=True, retry_s=0.1).wait_ready()
    load = Judged(kit, server.url)
    with server.client() as client:
        for version in (2, 1, 2):
            load.goes_on()
            kit.until(lambda: client.get("/health").json()["workers"] == 2)
            shelf.point(version)
            os.kill(workers_of(server)[0], signal.SIGKILL)
            kit.until(lambda version=version: client.get("/health").json()["version"] == version)
        kit.until(lambda: client.get("/health").json()["workers"] == 2)
        load.goes_on()
    assert load.end() == {1, 2}


# Versions


@pytest.fixture
def dying(monkeypatch, tmp_path):
    """Let workers of servers inside this process get a signal as they load a version, `dying(2, signal, times)`."""
    monkeypatch.setattr(lanes, "COMMAND", [sys.executable, str(Path(__file__).with_name("dying_worker.py"))])
    monkeypatch.setenv("FETTLE_TEST_DEATH", str(tmp_path / "death"))

    def wish(version, number, times):
        (tmp_path / "death").write_text(json.dumps({"version": version, "signal": number, "times": times}))

    wish(0, 0, 0)
    return wish


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_killed_while_it_loads_a_promotion_does_not_hold_it_up(start, shelf, kit, dying, workers):
    server = start(shelf, workers=workers, retry_s=1000.0).wait_ready()
    load = Judged(kit, server.url)
    with server.client() as client:
        load.goes_on()
        dying(2, signal.SIGKILL, 1)
        shelf.point(2)
        kit.until(lambda: client.get("/health").json()["version"] == 2)
        assert metric(client, "fettle_worker_deaths_total") == 1
        assert metric(client, 'fettle_switches_total{result="failed"}') == 0
        kit.until(lambda: client.get("/health").json()["workers"] == workers)
        load.goes_on()
    assert load.end() == {1, 2}


def test_a_worker_stopped_while_it_loads_a_promotion_is_ended_and_the_promotion_goes_on(start, shelf, kit, dying):
    server = start(shelf, load_timeout_s=6.0, retry_s=1000.0).wait_ready()
    load = Judged(kit, server.url)
    with server.client() as client:
        dying(2, signal.SIGSTOP, 1)
        shelf.point(2)
        kit.until(lambda: client.get("/health").json()["version"] == 2)
        assert metric(client, "fettle_worker_deaths_total") == 1
        load.goes_on()
    assert load.end() == {1, 2}


def test_a_version_that_kills_every_worker_that_loads_it_is_refused_and_no_place_is_given_up(
    start, shelf, kit, dying, monkeypatch
):
    monkeypatch.setattr(deaths, "FIRST_WAIT_S", 0.001)
    server = start(shelf, retry_s=0.01).wait_ready()
    load = Judged(kit, server.url)
    with server.client() as client:
        load.goes_on()
        dying(2, signal.SIGKILL, 1000)
        shelf.point(2)
        kit.until(lambda: metric(client, "fettle_worker_deaths_total") > deaths.MANY, 60)
        body = client.get("/health").json()
        assert (body["status"], body["version"]) == ("ready", 1)
        assert body["problem"] == "version 2 was refused: a worker process died while it loaded this version"
        dying(2, signal.SIGKILL, 0)  # somebody mended the machine
        kit.until(lambda: client.get("/health").json()["version"] == 2)
        kit.until(lambda: client.get("/health").json()["workers"] == 2)
        load.goes_on()
    assert load.end() == {1, 2}


def test_promotions_a_bad_version_and_a_rollback_by_an_alias_under_load(start, tmp_path, kit):
    """Through the real registry: the bad one changes nothing, and /health says why it was refused."""
    registry = Registry(Home(tmp_path / "home"))
    for number, bias in enumerate(((0.0, 0.0, 0.0), (0.0, 0.0, 1.0)), 1):
        registry.put("tiny", kit.image_artifact(tmp_path / str(number), bias=bias))
    registry.put("tiny", kit.image_artifact(tmp_path / "3", spoil=lambda golden: golden["output:logits"].__iadd__(0.1)))
    registry.promote("tiny", 1)
    server = start(registry_source(registry, "tiny@champion")).wait_ready()
    load = Judged(kit, server.url)
    with server.client() as client:

        def serves(version):
            kit.until(lambda: client.get("/health").json()["version"] == version)
            load.goes_on()

        serves(1)
        registry.promote("tiny", 2)
        serves(2)
        registry.promote("tiny", 3)
        body = kit.until(lambda: (b := client.get("/health").json())["problem"] and b)
        assert body["problem"].startswith("version 3 was refused: golden output 'logits' differs by 0.1")
        assert (body["status"], body["version"]) == ("ready", 2)
        load.goes_on()
        registry.rollback("tiny")
        kit.until(lambda: client.get("/health").json()["problem"] is None)
        serves(2)
        registry.promote("tiny", 1)
        serves(1)
    assert load.end() == {1, 2}


def test_no_place_is_given_up_for_a_shortage_that_passes(start, shelf, kit, monkeypatch):
    left = 3 * deaths.MANY
    begin = subprocess.Popen

    def short(*given, **options):
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(errno.EMFILE, "Too many open files")
        return begin(*given, **options)

    monkeypatch.setattr(deaths, "FIRST_WAIT_S", 0.0001)
    monkeypatch.setattr(deaths, "LONGEST_WAIT_S", 0.001)
    monkeypatch.setattr(subprocess, "Popen", short)
    server = start(shelf, workers=1).wait_ready()
    with server.client() as client:
        assert client.get("/health").json()["problem"] is None


# Workers that lie


@pytest.fixture
def lying(monkeypatch, tmp_path):
    """Let the workers of servers inside this process spoil the report of one batch."""
    script = Path(__file__).with_name("lying_worker.py")
    monkeypatch.setattr(lanes, "COMMAND", [sys.executable, str(script)])
    monkeypatch.setenv("FETTLE_TEST_LIE", str(tmp_path / "lie"))
    return tmp_path / "lie"


@pytest.mark.parametrize("lie", ["id", "long"])
def test_a_worker_whose_report_is_not_of_its_work_is_replaced_and_nobody_is_told_it(start, shelf, kit, lying, lie):
    server = start(shelf).wait_ready()
    load = Judged(kit, server.url)
    with server.client() as client:
        load.goes_on()
        lying.write_text(lie)
        kit.until(lambda: not lying.exists())
        kit.until(lambda: metric(client, "fettle_worker_deaths_total") == 1)
        load.goes_on()
        kit.until(lambda: client.get("/health").json()["workers"] == 2)
    assert load.end() == {1}


# Clients


HEAD = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ncontent-length: 100000\r\n\r\n"


@pytest.mark.parametrize("part", ["header", "body"])
def test_clients_that_send_byte_after_byte_are_ended_and_hold_nobody_up(start, shelf, kit, connect, part):
    server = start(shelf.root, process=True, header_timeout_s=1.0, body_timeout_s=1.0).wait_ready()
    before = sockets_of(server)
    load = Judged(kit, server.url)
    load.goes_on()
    slow = [connect(server) for _ in range(40)]
    for connection in slow:
        connection.sendall(HEAD if part == "body" else b"POST /predict HTTP/1.1\r\nx-a: ")
    ended = set()

    def all_ended():
        """Each gets another byte now and then."""
        for connection in set(slow) - ended:
            try:
                connection.sendall(b"a")
                connection.setblocking(False)
                if not connection.recv(4096).startswith(b"HTTP/1.1 408" if part == "body" else b"nothing"):
                    ended.add(connection)
                connection.setblocking(True)
            except BlockingIOError:
                connection.setblocking(True)
            except OSError:
                ended.add(connection)
        return len(ended) == len(slow)

    kit.until(all_ended)
    load.goes_on()
    assert load.end() == {1}
    for connection in slow:
        connection.close()
    kit.until(lambda: sockets_of(server) <= before)


def test_clients_that_do_not_read_their_answers_are_left_and_hold_nobody_up(start, shelf, kit, connect):
    server = start(shelf.root, process=True, body_timeout_s=1.0).wait_ready()
    before = sockets_of(server)
    load = Judged(kit, server.url)
    deaf = [connect(server, receive_bytes=4096) for _ in range(3)]
    for connection in deaf:
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:  # until the server reads no more either
                connection.send(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n" * 100)
    load.goes_on()
    assert load.end() == {1}
    kit.until(lambda: sockets_of(server) <= before)


def test_a_slow_reader_that_goes_on_reading_gets_its_whole_answer(start, tmp_path, kit, connect):
    kit.echo_artifact(tmp_path / "shelf" / "1")
    (tmp_path / "shelf" / "current").write_text("1")
    server = start(kit.Shelf(tmp_path / "shelf", "echo"), body_timeout_s=0.3, idle_timeout_s=0.3).wait_ready()
    rows, width = 2, 400_000
    tensors = [
        {"name": name, "datatype": kind, "shape": [rows, 2], "data": [1] * 4}
        for name, kind in (("u8", "UINT8"), ("u64", "UINT64"), ("i8", "INT8"), ("i64", "INT64"), ("f16", "FP16"),
                           ("f32", "FP32"), ("f64", "FP64"))
    ]  # fmt: skip
    tensors.append({"name": "b", "datatype": "BOOL", "shape": [rows, 2], "data": [True] * 4})
    size = rows * 2 * width * 4
    wide = {"name": "wide", "datatype": "FP32", "shape": [rows, 2, width], "parameters": {"binary_data_size": size}}
    outputs = [{"name": "out_wide", "parameters": {"binary_data": True}}]
    header = json.dumps({"inputs": [*tensors, wide], "outputs": outputs}).encode()
    with connect(server, receive_bytes=65536) as connection:
        lengths = f"inference-header-content-length: {len(header)}\r\ncontent-length: {len(header) + size}\r\n"
        connection.sendall(f"POST /v2/models/echo/infer HTTP/1.1\r\nhost: x\r\n{lengths}\r\n".encode() + header)
        connection.sendall(bytes(size))
        pause = threading.Event()
        received = bytearray()
        while chunk := connection.recv(2**18):
            received += chunk
            pause.wait(0.02)  # a reader that is slower than the timeout as a whole
    assert received.startswith(b"HTTP/1.1 200 OK")
    assert received.endswith(bytes(size))


def vanish(connection):
    """Be gone without a word, as after a power cut; where that is not allowed, with a reset."""
    try:
        connection.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    except OSError:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("leave", [vanish, reset])
def test_clients_that_vanish_at_any_moment_leave_nothing_behind(start, slow, kit, connect, leave):
    server = start(
        slow(0.05).root, process=True, header_timeout_s=1.0, body_timeout_s=1.0, idle_timeout_s=1.0
    ).wait_ready()
    before = sockets_of(server)
    load = Judged(kit, server.url)
    body = kit.body_of()
    whole = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (INFER.encode(), len(body)) + body
    for _ in range(5):
        for sent in (b"", whole[:30], HEAD, HEAD + bytes(5000), whole[:-1], whole, whole * 3):
            connection = connect(server)
            connection.sendall(sent)
            leave(connection)
    load.goes_on()
    assert load.end() == {1}
    kit.until(lambda: sockets_of(server) <= before)
    with server.client() as client:
        assert metric(client, "fettle_requests_in_flight") == 1  # this one
        assert metric(client, "fettle_queue_rows") == 0
        assert metric(client, "fettle_worker_deaths_total") == 0


# The machine


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for 256 KiB, where this user may mount one; else None."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_loses_rows_of_the_log_and_no_request(start, shelf, kit, small_disk, tmp_path):
    folder = (small_disk or tmp_path) / "observations"
    server = start(shelf.root, process=True, observations=folder, log_rows=50, log_flush_s=0.1).wait_ready()
    load = Judged(kit, server.url)
    with server.client() as client:
        kit.until(lambda: metric(client, "fettle_observations_written_total") > 0)
        if small_disk:
            with contextlib.suppress(OSError):
                (small_disk / "filler").write_bytes(bytes(2**20))
        else:
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))
        kit.until(lambda: metric(client, "fettle_observations_dropped_total") > 0)
        load.goes_on()
        assert client.get("/health/ready").status_code == 200
        if small_disk:
            (small_disk / "filler").unlink()
        else:
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        written = metric(client, "fettle_observations_written_total")
        kit.until(lambda: metric(client, "fettle_observations_written_total") > written)
    assert load.end() == {1}
    assert not list(folder.glob("*.tmp"))


def test_without_descriptors_what_is_connected_is_served_and_afterwards_everyone(start, shelf, kit, connect):
    server = start(shelf.root, process=True).wait_ready()
    load = Judged(kit, server.url)
    load.goes_on()
    before = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (before + 20, before + 20))
    idle = [connect(server) for _ in range(100)]
    with server.client() as client, pytest.raises(httpx.TransportError):
        client.get("/health/live")
    load.goes_on()
    os.kill(workers_of(server)[-1], signal.SIGKILL)
    load.goes_on()
    for connection in idle:
        connection.close()
    kit.until(lambda: len(workers_of(server)) == 2)
    load.goes_on()
    with server.client() as client:
        kit.until(lambda: client.get("/health").json()["workers"] == 2)
        assert client.get("/health").json()["problem"] is None
    load.goes_on()
    assert load.end() == {1}
