import asyncio
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture
def generators() -> ModuleType:
    return importlib.import_module("serve_peers.generators")


@pytest.fixture
def processes() -> ModuleType:
    return importlib.import_module("serve_peers.processes")


class Echo(BaseHTTPRequestHandler):
    """Answers the index that the body asks for; "status", "drop", "hang" and "chunked" in a body do as they say."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet, else each answer waits for the delayed acknowledgment of its head

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "hang" in asked:
            self.server.released.wait(10)
        if "drop" in asked or "hang" in asked:
            self.close_connection = True
            return
        body = json.dumps({"index": asked.get("index", 0)}).encode()
        self.send_response(asked.get("status", 200))
        self.send_header("Connection", asked.get("connection", "keep-alive"))
        if "chunked" not in asked:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if "chunked" in asked:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


class Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:
        """Clients that go away in the middle are what is tested."""


def request_of(body: dict[str, Any]) -> bytes:
    """A whole request of this body as JSON."""
    content = json.dumps(body).encode()
    return f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def payload_of(*bodies: bytes) -> Any:
    payloads = importlib.import_module("serve_peers.payloads")
    return payloads.Payload("image", "/predict", bodies, payloads.read_prediction)


def judge_by(indices: list[int]) -> Callable[[int, bytes], bool]:
    return lambda number, body: json.loads(body)["index"] == indices[number]


@contextmanager
def echo() -> Iterator[int]:
    with Quiet(("127.0.0.1", 0), Echo) as server:
        server.released = threading.Event()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


def run_drive(generators: ModuleType, bodies: list[dict[str, Any]], *, seconds: float = 0.3, **options: Any) -> Any:
    with echo() as port:
        encoded = [request_of(body) for body in bodies]
        return asyncio.run(generators.drive(port, encoded, **{"connections": 4, "seconds": seconds, **options}))


# The built-in generator


def test_good_answers_are_counted_and_timed(generators: ModuleType) -> None:
    load = run_drive(generators, [{"index": 1}])
    assert load.answered > 10
    assert (load.refused, load.broken, load.wrong) == (0, 0, 0)
    assert 0 < load.p50_ms <= load.p99_ms < 5000
    assert load.per_s == pytest.approx(load.answered / load.seconds)


def test_a_judge_sees_the_number_of_each_body_with_its_answer(generators: ModuleType) -> None:
    bodies = [{"index": index} for index in (5, 6, 7)]
    right = run_drive(generators, bodies, judge=judge_by([5, 6, 7]))
    assert right.answered > 10
    assert right.wrong == 0
    half = run_drive(generators, bodies, judge=judge_by([5, 0, 7]))
    assert 0.25 < half.wrong / half.answered < 0.42


@pytest.mark.parametrize("status", [429, 500, 503, 404, 201])
def test_every_status_but_200_is_refused(generators: ModuleType, status: int) -> None:
    load = run_drive(generators, [{"status": status}, {}])
    assert load.refused > 5
    assert abs(load.refused - load.answered) <= 4
    assert load.broken == 0


@pytest.mark.parametrize("fault", [{"drop": 1}, {"chunked": 1}])
def test_what_is_no_whole_answer_is_broken_and_the_load_goes_on(generators: ModuleType, fault: dict[str, int]) -> None:
    load = run_drive(generators, [fault, {}])
    assert load.broken > 5
    assert load.answered > 5


def test_a_connection_closed_after_its_answer_is_no_error(generators: ModuleType) -> None:
    load = run_drive(generators, [{"connection": "close"}])
    assert load.answered > 5
    assert (load.refused, load.broken) == (0, 0)


def test_a_request_that_is_never_answered_is_broken(generators: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generators, "LOST_S", 0.1)
    load = run_drive(generators, [{"hang": 1}])
    assert (load.answered, load.broken) == (0, 4)
    assert load.p50_ms == float("inf")
    assert load.per_s == 0


def test_nobody_listening_is_broken_not_an_exception(generators: ModuleType, processes: ModuleType) -> None:
    port = processes.free_port()
    load = asyncio.run(generators.drive(port, [request_of({})], connections=2, seconds=0.1))
    assert load.answered == 0
    assert load.broken >= 2


def test_a_failing_judge_is_told_and_not_swallowed(generators: ModuleType) -> None:
    def judge(number: int, body: bytes) -> bool:
        raise AssertionError("no such image")

    with pytest.raises(RuntimeError, match="a client of the load generator failed") as caught:
        run_drive(generators, [{}], judge=judge)
    assert "no such image" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("received", "expected"),
    [
        (b"", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", (200, b"hi", False)),
        (b"HTTP/1.1 503 Busy\r\nX: y\r\nCONTENT-LENGTH:0\r\n\r\n", (503, b"", False)),
        (b"HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: 1\r\n\r\n{", (200, b"{", True)),
    ],
)
def test_split_answer(generators: ModuleType, received: bytes, expected: object) -> None:
    found = generators.split_answer(received)
    assert (found and (found.status, found.body, found.last)) == expected


@pytest.mark.parametrize(
    "received",
    [
        b"HTTP/1.1 200 OK\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nh",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nhi",
        b"HTTP/1.1 twohundred\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_split_answer_refuses_what_has_no_one_length(generators: ModuleType, received: bytes) -> None:
    with pytest.raises(ValueError, match=r"answer|invalid literal"):
        generators.split_answer(received)


@given(body=st.binary(max_size=50), cut=st.integers(0, 200))
def test_an_answer_is_whole_exactly_at_its_end(body: bytes, cut: int) -> None:
    generators = importlib.import_module("serve_peers.generators")
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    found = generators.split_answer(whole[:cut])
    assert (found and found.body) == (body if cut >= len(whole) else None)


# wrk


def test_wrk_output_becomes_a_load(generators: ModuleType) -> None:
    line = '{"duration_us":2000000,"requests":100,"p50_us":1500,"p99_us":9000,"refused":10,"broken":3}'
    load = generators.parse_wrk(f"Running 2s test\n  1 threads\n{line}\n", connections=32)
    assert (load.answered, load.refused, load.broken, load.per_s) == (90, 10, 3, 45.0)
    assert (load.connections, load.p50_ms, load.p99_ms) == (32, 1.5, 9.0)


@pytest.mark.parametrize("output", ["", "unable to connect", "{}\nand more"])
def test_wrk_output_without_its_line_is_an_error(generators: ModuleType, output: str) -> None:
    with pytest.raises(ValueError, match=r"rotate\.lua"):
        generators.parse_wrk(output, connections=1)


@pytest.mark.parametrize("connections", [1, 4])
def test_wrk_itself_rotates_over_the_bodies(generators: ModuleType, connections: int) -> None:
    if generators.shutil.which("wrk") is None:
        pytest.skip("wrk is not installed")
    bodies = payload_of(b'{"index": 1}', b'{"index": 2,\n "status": 503}')
    with echo() as port:
        load = generators.generate(port, bodies, connections=connections, seconds=1)
    assert load.answered > 10
    assert abs(load.answered - load.refused) <= 2 * connections
    assert load.broken == 0


def test_without_wrk_the_built_in_generator_measures(generators: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generators.shutil, "which", lambda name: None)
    bodies = payload_of(b'{"index": 1}')
    with echo() as port:
        load = generators.generate(port, bodies, connections=2, seconds=0.2)
    assert load.answered > 5
    assert load.connections == 2


# Processes

READY = """
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    do_GET = do_POST
    def log_message(self, *_): pass
def serve():
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""
PLAIN = READY + "serve()"
STUBBORN = READY + "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); serve()"
PARENT = READY + ("import subprocess; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); serve()")


@pytest.fixture
def start(processes: ModuleType, tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    started = []

    def start(code: str) -> Any:
        launch = processes.Launch((sys.executable, "-c", code, "{port}"), {"SERVE_TEST": "1"})
        started.append(processes.Server(launch, tmp_path / "log"))
        return started[-1]

    yield start
    for server in started:
        server.stop(grace_s=0, orphan_grace_s=0)


@pytest.mark.parametrize(
    ("code", "ending"),
    [(PLAIN, (-signal.SIGTERM, 0)), (STUBBORN, (None, 0)), (PARENT, (-signal.SIGTERM, 1))],
    ids=["plain", "stubborn", "parent"],
)
def test_whatever_a_server_does_nothing_outlives_its_stop(
    processes: ModuleType, start: Callable[[str], Any], code: str, ending: tuple[int | None, int]
) -> None:
    server = start(code)
    server.wait_ready(payload_of(b"{}"), limit_s=20)
    assert 0 < server.ready_s <= server.first_s < 20
    assert server.cpu_s() > 0
    assert server.memory_bytes() > 2**20
    grace_s = 0.2 if ending[0] is None else 10
    found = server.stop(grace_s=grace_s, orphan_grace_s=0.1)
    assert (found.code, found.left) == ending
    assert processes.processes_with(server.mark) == []


def test_a_server_that_ends_is_told_with_its_last_words(start: Callable[[str], Any], processes: ModuleType) -> None:
    server = start("import sys; print('one'); sys.exit('no such model')")
    with pytest.raises(processes.ServerFailed, match="ended with code 1: no such model"):
        server.wait_ready(payload_of(b"{}"), limit_s=20)


def test_a_server_that_never_answers_is_told(start: Callable[[str], Any], processes: ModuleType) -> None:
    server = start("import time; time.sleep(60)")
    with pytest.raises(processes.ServerFailed, match=r"no good answer within 0\.2 s: its log is empty"):
        server.wait_ready(payload_of(b"{}"), limit_s=0.2)


def test_an_answer_that_is_not_200_is_not_ready(start: Callable[[str], Any], processes: ModuleType) -> None:
    server = start(PLAIN.replace("200", "503"))
    with pytest.raises(processes.ServerFailed, match=r"no good answer within 0\.5 s"):
        server.wait_ready(payload_of(b"{}"), limit_s=0.5)


def test_a_process_is_found_by_its_mark_in_any_session_and_a_dead_one_is_not(processes: ModuleType) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"],
        stdin=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, processes.MARK: "this one"},
    )
    assert processes.processes_with("this one") == [child.pid]
    assert processes.processes_with("another one") == []
    child.communicate(b"\n")
    assert processes.processes_with("this one") == []
    assert processes.cpu_s_of(child.pid) == 0
    assert processes.memory_bytes_of(child.pid) == 0


def test_cpu_time_is_the_kernels(processes: ModuleType) -> None:
    before, own = processes.cpu_s_of(os.getpid()), time.process_time()
    busy = processes.busy_s(os.sched_getaffinity(0))
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    spent = time.process_time() - own
    assert processes.cpu_s_of(os.getpid()) - before == pytest.approx(spent, abs=0.05)
    assert processes.busy_s(os.sched_getaffinity(0)) - busy >= spent - 0.05


def test_a_free_port_is_free(processes: ModuleType) -> None:
    with socket.socket() as probe:
        port = processes.free_port()
        probe.bind(("127.0.0.1", port))
        assert probe.getsockname()[1] == port
