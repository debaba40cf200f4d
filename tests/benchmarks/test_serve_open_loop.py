import importlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def open_loop() -> ModuleType:
    module = importlib.import_module("serve_peers.open_loop")
    if shutil.which("cc") is None:
        pytest.skip("the generator needs a C compiler")
    return module


class Answer(BaseHTTPRequestHandler):
    """Answers with the status that the body asks for; "slow" waits for its turn at the one lock, "drop" hangs up."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "drop" in asked:
            self.close_connection = True
            return
        if "hang" in asked:
            self.server.released.wait(10)
        if "slow" in asked:
            with self.server.lock:
                time.sleep(asked["slow"])
        body = json.dumps(asked).encode()
        self.send_response(asked.get("status", 200))
        self.send_header("Connection", asked.get("connection", "keep-alive"))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *_: Any) -> None:
        """Clients that go away in the middle are what is tested."""


@contextmanager
def answering() -> Iterator[int]:
    with Quiet(("127.0.0.1", 0), Answer) as server:
        server.released, server.lock = threading.Event(), threading.Lock()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


def request_of(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def run(open_loop: ModuleType, bodies: list[dict[str, Any]], **options: Any) -> Any:
    requests = [request_of(body) for body in bodies]
    plain = {"rate_per_s": 200.0, "seconds": 0.5, "deadline_s": 5.0}
    with answering() as port:
        return open_loop.drive_open(port, requests, **{**plain, **options})


def accounted(load: Any) -> int:
    return int(load.good + load.late + load.shed + load.refused + load.broken + load.unanswered)


def test_all_that_is_due_is_sent_and_answers_in_time_are_good(open_loop: ModuleType) -> None:
    load, samples = run(open_loop, [{"index": 0}, {"index": 1}, {"index": 2}])
    assert load.sent == load.good == accounted(load) == len(open_loop.arrivals(200.0, 0.5, seed=0))
    assert load.goodput_per_s == load.good / 0.5
    assert 0 < load.p50_ms <= load.p99_ms < 5000
    assert samples
    assert all(json.loads(body) == {"index": number} for number, body in samples)


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
def test_429_is_shed_and_other_statuses_are_refused(open_loop: ModuleType, connection: str) -> None:
    bodies = [{"status": status, "connection": connection} for status in (429, 504, 200)]
    load, _ = run(open_loop, bodies)
    assert load.sent == accounted(load)
    assert abs(load.shed - load.good) <= 1
    assert abs(load.refused - load.good) <= 1
    assert load.shed_p50_ms <= load.shed_p99_ms < 5000


def test_latency_counts_from_when_a_request_was_due_not_from_when_it_could_be_sent(
    open_loop: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One connection, 20 ms an answer, 100 requests a second: every one waits for all before it."""
    monkeypatch.setattr(open_loop, "MAX_CONNECTIONS", 1)
    load, _ = run(open_loop, [{"slow": 0.02}], rate_per_s=100.0, deadline_s=0.1)
    assert load.late > load.good
    assert load.p99_ms > 300
    assert load.lag_p99_ms > 200
    assert load.sent == load.good + load.late + load.unanswered


def test_what_is_never_answered_is_told_and_ends(open_loop: ModuleType) -> None:
    load, _ = run(open_loop, [{"hang": 1}], seconds=0.1, deadline_s=0.05)
    assert (load.good, load.late) == (0, 0)
    assert load.unanswered == load.sent > 0
    assert load.p50_ms == float("inf")


def test_connections_that_end_are_broken_and_the_load_goes_on(open_loop: ModuleType) -> None:
    load, _ = run(open_loop, [{"drop": 1}, {}])
    assert abs(load.broken - load.good) <= 1
    assert load.sent == accounted(load)


def test_nobody_listening_is_broken_not_an_exception(open_loop: ModuleType) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"rate_per_s": 200.0, "seconds": 0.1, "deadline_s": 0.1}
    load, _ = open_loop.drive_open(port, [request_of({})], **options)
    assert load.broken == load.sent == accounted(load) > 0


def test_a_rate_at_which_nothing_is_due_is_an_empty_load(open_loop: ModuleType) -> None:
    load, samples = run(open_loop, [{}], rate_per_s=1e-9)
    assert (load.sent, accounted(load), samples) == (0, 0, [])


def test_without_a_compiler_it_is_missing_and_says_what_to_install(
    open_loop: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(open_loop, "PEERS", tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(open_loop.PeerMissing, match="apt-get install -y gcc"):
        open_loop.generator()
