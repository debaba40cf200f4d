"""A small HTTP client with full control of headers and bytes, in which every call ends within its timeout."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, Self
from urllib.parse import urlsplit

_CHUNK_BYTES = 65536


class Skipped(Exception):
    """A check does not apply to this server or model; the message says why."""


class Unanswered(AssertionError):
    """No whole HTTP answer came within the timeout."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One HTTP answer. asked: what was sent, for messages; headers: names in lower case."""

    asked: str
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON. Raises AssertionError where it is none."""
        return parse_json(self.body, where=f"the answer to {self.asked}")

    def header(self, name: str) -> str:
        """The header's value, "" where it is missing."""
        return self.headers.get(name.lower(), "")

    def __str__(self) -> str:
        kind = f" {self.header('content-type')}" if self.header("content-type") else ""
        return f"HTTP {self.status}{kind} with {short(self.body)}"


def short(value: object, limit: int = 160) -> str:
    """Any value in one line of bounded length.

    >>> short("a" * 9, 5), short(b"{}")
    ("'aaaa...", "b'{}'")
    """
    text = repr(value[: limit + 1] if isinstance(value, bytes | str) else value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def parse_json(text: bytes, *, where: str) -> Any:
    """The value of a JSON text, RFC 8259 to the letter: Python's own parser takes NaN too. Raises AssertionError."""
    try:
        return json.loads(text.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as problem:
        raise AssertionError(f"{where} must be JSON, got {short(text)}: {problem}") from None


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a server listens. prefix: what stands before `/v2` in its URL.

    >>> Target.parse("http://localhost:8080/a/")
    Target(scheme='http', host='localhost', port=8080, prefix='/a')
    """

    scheme: str
    host: str
    port: int
    prefix: str

    @classmethod
    def parse(cls, url: str) -> Self:
        """Raises ValueError for what is no http or https URL."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the URL must be http://HOST[:PORT] or https://HOST[:PORT], got {short(url)}")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return cls(parts.scheme, parts.hostname, port, parts.path.rstrip("/"))


class Connection:
    """One HTTP/1.1 connection, kept open between requests; opened again only after an announced close."""

    def __init__(self, target: Target, *, timeout_s: float, headers: Mapping[str, str]) -> None:
        kind = http.client.HTTPSConnection if target.scheme == "https" else http.client.HTTPConnection
        self._http = kind(target.host, target.port, timeout=timeout_s)
        self._target = target
        self._timeout_s = timeout_s
        self._headers = dict(headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def request(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Reply:
        """Send one request and read the whole answer. Raises Unanswered.

        Content-Length is added for methods that have a body, unless the headers name a Transfer-Encoding: then the
        body is sent as it is.
        """
        asked = f"{method} {path}"
        given = {**self._headers, **(headers or {})}
        chunked = any(name.lower() == "transfer-encoding" for name in given)
        if (body or method in ("POST", "PUT", "PATCH")) and not chunked:
            given.setdefault("Content-Length", str(len(body)))
        late = threading.Event()
        try:
            with self._deadline(late):
                self._send(method, path, body, given)
                response = self._http.getresponse()
                content = response.read()
            if late.is_set():
                raise TimeoutError  # what was read until then may look like a whole answer
        except (OSError, http.client.HTTPException, ValueError) as problem:
            self._http.close()
            timed_out = late.is_set() or isinstance(problem, TimeoutError)
            reason = "no whole answer in that time" if timed_out else f"{type(problem).__name__} {problem}".strip()
            raise Unanswered(f"{asked} must be answered within {self._timeout_s:g} s, got {reason}") from None
        found = {name.lower(): value for name, value in response.getheaders()}
        return Reply(asked, response.status, found, content)

    def _send(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> None:
        self._http.putrequest(method, self._target.prefix + path, skip_accept_encoding=True)
        for name, value in headers.items():
            self._http.putheader(name, value)
        # A server may refuse a body before it has read all of it: the answer is there although sending failed.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._http.endheaders(body or None)

    @contextlib.contextmanager
    def _deadline(self, late: threading.Event) -> Iterator[None]:
        """End whatever is waited for once the time is up: a socket's own timeout starts anew with each byte."""
        if self._http.sock is None:
            self._http.connect()
        connected: socket.socket = self._http.sock

        def end() -> None:
            late.set()
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

        watch = threading.Timer(self._timeout_s, end)
        watch.daemon = True
        watch.start()
        try:
            yield
        finally:
            watch.cancel()

    def exchange(self, content: bytes, *, cut: bool = False) -> bytes:
        """Send these bytes as they are; return what comes back until the server closes or the time is up.

        cut: end the sending side too, as a client does that dies in the middle of its request.
        Raises Unanswered where no connection is accepted.
        """
        try:
            self._http.connect()
        except OSError as problem:
            raise Unanswered(f"a connection must be accepted within {self._timeout_s:g} s, got {problem}") from None
        connected: socket.socket = self._http.sock
        received, end = b"", time.monotonic() + self._timeout_s
        with contextlib.suppress(OSError):
            connected.sendall(content)
            if cut:
                connected.shutdown(socket.SHUT_WR)
            while (left := end - time.monotonic()) > 0:
                connected.settimeout(left)
                part = connected.recv(_CHUNK_BYTES)
                if not part:
                    break
                received += part
        self._http.close()
        return received

    def head(self, method: str, path: str, headers: Mapping[str, str] | None = None) -> bytes:
        """The request line and headers as bytes, for `exchange`."""
        host = f"[{self._target.host}]" if ":" in self._target.host else self._target.host
        given = {"Host": f"{host}:{self._target.port}", **self._headers, **(headers or {})}
        lines = [
            f"{method} {self._target.prefix}{path} HTTP/1.1",
            *(f"{name}: {value}" for name, value in given.items()),
        ]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")
