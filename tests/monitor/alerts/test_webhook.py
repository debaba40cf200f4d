"""The webhook against real receivers on the loopback interface."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fettle.core.errors import MonitorError
from fettle.monitor.alerts._base import Alert, DeliveryFailed
from fettle.monitor.alerts.webhook import Webhook

ALERT = Alert(
    key="k1",
    event="drift",
    model="digits",
    version=None,
    digest="a" * 64,
    incident=1,
    time="2026-11-01T12:00:00+00:00",
    sentence="Drift – in 1 of 15 features.",
)


class Receiver:
    """An HTTP server that answers with the given statuses, the last one for ever."""

    def __init__(self, *statuses: int, headers: dict[str, str] | None = None) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.requests.append((self.path, dict(self.headers), body))
                self.send_response(statuses[min(len(receiver.requests), len(statuses)) - 1])
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)


@pytest.fixture
def receive():
    opened: list[Receiver] = []

    def make(*statuses: int, **options) -> Receiver:
        opened.append(Receiver(*statuses, **options))
        return opened[-1]

    yield make
    for receiver in opened:
        receiver.close()


@pytest.fixture
def slept():
    return []


@pytest.fixture
def webhook(slept):
    def make(url: str, **options) -> Webhook:
        return Webhook(url=url, sleep=slept.append, **options)

    return make


@pytest.mark.parametrize("status", [200, 201, 202, 204])
def test_any_2xx_is_delivered_at_once(receive, webhook, slept, status):
    receiver = receive(status)
    webhook(f"http://127.0.0.1:{receiver.port}/hook?token=1").deliver(ALERT)
    ((path, headers, body),) = receiver.requests
    assert path == "/hook?token=1"
    assert headers["Content-Type"] == "application/json"
    assert headers["Idempotency-Key"] == "k1"
    assert json.loads(body)["sentence"] == ALERT.sentence
    assert json.loads(body)["key"] == "k1"
    assert slept == []


def test_no_path_is_the_root(receive, webhook):
    receiver = receive(200)
    webhook(f"http://127.0.0.1:{receiver.port}").deliver(ALERT)
    assert receiver.requests[0][0] == "/"


@pytest.mark.parametrize("status", [500, 502, 503, 408, 425, 429])
def test_a_passing_failure_is_tried_again_with_the_same_key(receive, webhook, slept, status):
    receiver = receive(status, status, 200)
    webhook(f"http://127.0.0.1:{receiver.port}/").deliver(ALERT)
    assert [headers["Idempotency-Key"] for _, headers, _ in receiver.requests] == ["k1"] * 3
    assert slept == [0.5, 1.0]


def test_it_gives_up_after_its_attempts(receive, webhook, slept):
    receiver = receive(500)
    with pytest.raises(DeliveryFailed, match=r"got status 500 .* in 4 attempts"):
        webhook(f"http://127.0.0.1:{receiver.port}/", attempts=4).deliver(ALERT)
    assert len(receiver.requests) == 4
    assert slept == [0.5, 1.0, 2.0]


def test_backoff_is_bounded(receive, webhook, slept):
    receiver = receive(500)
    with pytest.raises(DeliveryFailed):
        webhook(f"http://127.0.0.1:{receiver.port}/", attempts=10, backoff_s=1).deliver(ALERT)
    assert max(slept) == 30.0


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_refusal_is_not_tried_again(receive, webhook, slept, status):
    receiver = receive(status)
    with pytest.raises(DeliveryFailed, match=f"got status {status}"):
        webhook(f"http://127.0.0.1:{receiver.port}/").deliver(ALERT)
    assert len(receiver.requests) == 1
    assert slept == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(receive, webhook, status):
    other = receive(200)
    receiver = receive(status, headers={"Location": f"http://127.0.0.1:{other.port}/steal"})
    with pytest.raises(DeliveryFailed, match="redirects are not followed"):
        webhook(f"http://127.0.0.1:{receiver.port}/").deliver(ALERT)
    assert len(receiver.requests) == 1
    assert other.requests == []


def test_a_refused_connection_is_tried_again(webhook, slept):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: refused, and nobody else gets the port
        with pytest.raises(DeliveryFailed, match="ConnectionRefusedError"):
            webhook(f"http://127.0.0.1:{taken.getsockname()[1]}/").deliver(ALERT)
    assert slept == [0.5, 1.0]


@pytest.fixture
def raw():
    """raw(answer) is the port of a server that reads a request and hands the connection to `answer`."""
    stop, threads, servers = threading.Event(), [], []

    def make(answer) -> int:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def accept() -> None:
            while not stop.is_set():
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    answer(connection, stop)

        threads.append(threading.Thread(target=accept, daemon=True))
        threads[-1].start()
        return server.getsockname()[1]

    yield make
    stop.set()
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
    for thread in threads:
        thread.join(5)


def test_a_receiver_that_never_answers_costs_the_timeout(raw, webhook):
    port = raw(lambda connection, stop: stop.wait(1.0))
    before = time.monotonic()
    with pytest.raises(DeliveryFailed, match="no answer in time"):
        webhook(f"http://127.0.0.1:{port}/", timeout_s=0.2, attempts=1).deliver(ALERT)
    assert time.monotonic() - before < 5


def test_a_receiver_that_drips_costs_the_timeout_too(raw, webhook):
    """Each byte starts the socket's own timeout anew; the whole attempt still ends."""

    def drip(connection, stop) -> None:
        for letter in b"HTTP/1.1 200 " + b"O" * 400:
            try:
                connection.sendall(bytes([letter]))
            except OSError:
                return
            if stop.wait(0.05):
                return

    port = raw(drip)
    before = time.monotonic()
    with pytest.raises(DeliveryFailed, match="no answer in time"):
        webhook(f"http://127.0.0.1:{port}/", timeout_s=0.3, attempts=1).deliver(ALERT)
    assert time.monotonic() - before < 5


@pytest.mark.parametrize("answer", [b"", b"garbage\r\n\r\n", b"\x00" * 100, b"HTTP/1.1 abc\r\n\r\n"])
def test_a_receiver_that_speaks_no_http(raw, webhook, answer):
    def send(connection, stop) -> None:
        if answer:
            connection.sendall(answer)

    with pytest.raises(DeliveryFailed, match="in 2 attempts"):
        webhook(f"http://127.0.0.1:{raw(send)}/", attempts=2, timeout_s=2).deliver(ALERT)


def test_plain_http_behind_https_fails_cleanly(receive, webhook):
    receiver = receive(200)
    with pytest.raises(DeliveryFailed, match="SSLError"):
        webhook(f"https://127.0.0.1:{receiver.port}/", attempts=1, timeout_s=2).deliver(ALERT)
    assert receiver.requests == []


def test_credentials_are_sent_as_authorization_and_never_shown(receive, webhook):
    receiver = receive(401)
    channel = webhook(f"http://us%40er:s3cr%3At@127.0.0.1:{receiver.port}/T0/path-secret?token=query-secret")
    with pytest.raises(DeliveryFailed) as failed:
        channel.deliver(ALERT)
    assert receiver.requests[0][1]["Authorization"] == "Basic dXNAZXI6czNjcjp0"
    shown = f"{failed.value} {channel!r} {channel.identity}"
    for secret in ("s3cr", "us@er", "us%40er", "path-secret", "query-secret"):
        assert secret not in shown
    assert f"http://127.0.0.1:{receiver.port}" in str(failed.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.example.org",
        "ftp://example.org/",
        "file:///etc/passwd",
        "http://",
        "http:///path",
        "javascript:alert(1)",
        "http://example.org:99999/",
        "http://example.org:port/",
        "http://example.org:0/",
        "http://exa mple.org/",
        "http://example.org/a b",
        "http://example.org/\r\nHost: evil",
        "http://example.org/ä",
        "http://[::1/",
        " http://example.org/",
    ],
)
def test_a_url_that_cannot_work_is_refused_at_once(url):
    with pytest.raises(MonitorError, match="http:// or https://") as refused:
        Webhook(url=url)
    assert len(url) < 8 or url not in str(refused.value)


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"attempts": 0}, {"backoff_s": -1}], ids=str)
def test_settings_that_mean_nothing_are_refused(options):
    with pytest.raises(MonitorError):
        Webhook(url="http://example.org", **options)


def test_every_url_is_a_channel_of_its_own():
    one, other = Webhook(url="http://example.org/a"), Webhook(url="http://example.org/b")
    assert one.identity != other.identity
    assert one.identity == Webhook(url="http://example.org/a", attempts=9).identity
