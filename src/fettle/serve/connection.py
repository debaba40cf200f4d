"""One HTTP/1.1 connection: bytes in, requests to the application, answers out, in order and within limits.

llhttp (by httptools) reads the protocol, strictly; here are the limits, the timeouts and the order. A request that is
refused before its body is read is answered at once; the rest of the body is then read and thrown away, within bounds,
so that the client sees the answer and not a reset connection.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from functools import partial
from typing import Any, Protocol, cast
from urllib.parse import unquote

import httptools

from fettle.serve.http import Request, Respond, Response
from fettle.serve.options import ServeOptions
from fettle.serve.refusal import Refusal

# Requests that a client may send ahead of their answers before it is no longer read.
_AHEAD = 8
# What is still read and thrown away after an early answer.
_DISCARD_BYTES = 256 * 2**20
_DISCARD_S = 2.0
_METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
_IDLE, _HEADER, _BODY = "idle", "header", "body"
# Names as nearly every client writes them: looking one up takes a fifth of the time of decoding it.
_NAMES = {
    form: name
    for name in (
        "host", "content-type", "content-length", "user-agent", "accept", "accept-encoding", "connection",
        "content-encoding", "inference-header-content-length", "authorization", "traceparent", "x-request-id",
        "x-request-timeout-ms",
    )
    for form in (name.encode(), name.title().encode())
}  # fmt: skip


class Handler(Protocol):
    """The application, as a connection sees it."""

    @property
    def draining(self) -> bool:
        """Whether every answer should end its connection."""

    def begin(self, request: Request) -> None:
        """The header of a request is there. Raises Refusal where its body need not be read."""

    def handle(self, request: Request, respond: Respond) -> None:
        """The request is whole; `respond` is called once, now or later."""

    def cancelled(self, request: Request) -> None:
        """The client of a request that is handled has gone."""

    def refused(self, request: Request, refusal: Refusal) -> None:
        """The connection itself has answered, before the request was whole."""


class Connections:
    """All that are open. `sweep` ends those that exceed a timeout; call it a few times a second."""

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        self.open: set[Connection] = set()

    def sweep(self) -> None:
        """Close what has been idle, or incomplete, for too long."""
        now = time.monotonic()
        for connection in [one for one in self.open if one.due is not None and now >= one.due]:
            connection.expire()

    @property
    def receiving(self) -> int:
        """Connections whose request is half there, or waits for its turn."""
        return sum(one.receiving for one in self.open)

    def close_idle(self) -> None:
        """Close what has no request under way."""
        for connection in list(self.open):
            connection.close_if_idle()


class Connection(asyncio.Protocol):
    """Also the parser's callbacks. due: when a timeout strikes, on the monotonic clock."""

    def __init__(self, application: Handler, connections: Connections) -> None:
        self._application = application
        self._connections = connections
        self._options = connections.options
        self.due: float | None = None
        self.connected = False
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._waiting: deque[tuple[Request, bool]] = deque()
        self._current: Request | None = None
        self._refused: bytes | None = None
        self._discarded = 0
        self._unsent = 0
        self._paused = self._blocked = self._ended = False
        # What the client is in the middle of, and what of it `due` is about.
        self._stage = self._timed = _IDLE
        self._reset()

    def _reset(self) -> None:
        self._url = b""
        self._headers: dict[str, str] = {}
        self._left_bytes = self._options.max_header_bytes
        self._unheard = 0
        self._request: Request | None = None
        self._body: bytes | bytearray = b""
        self._body_bytes = 0

    @property
    def receiving(self) -> bool:
        """Whether a request is half there, or waits for its turn."""
        return self._refused is None and (self._request is not None or bool(self._waiting))

    # From the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's are none by class
        self.connected = True
        self._parser = httptools.HttpRequestParser(self)
        if len(self._connections.open) >= self._options.max_connections:
            refusal = Refusal(503, "too many connections are open: try again later", retry_after_s=1)
            transport.write(Response.refused(refusal).encoded(request_id="-", close=True))
            transport.close()
            return
        self._connections.open.add(self)
        self._wait(self._options.idle_timeout_s)

    def connection_lost(self, problem: Exception | None) -> None:
        self._connections.open.discard(self)
        self._transport = None
        self._waiting.clear()
        if self._current is not None:
            self._application.cancelled(self._current)

    def data_received(self, data: bytes) -> None:
        if self._refused is not None:
            self._discarded += len(data)
            if self._discarded > _DISCARD_BYTES:
                self._end()
            return
        inside = self._stage is _HEADER
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as problem:
            cause = problem.__context__
            self._refuse_now(cause if isinstance(cause, Refusal) else Refusal(400, "the request cannot be read"))
        except httptools.HttpParserUpgrade:
            self._refuse_now(Refusal(400, "this server does not switch protocols"))
        except httptools.HttpParserError:
            self._refuse_now(Refusal(400, "the request is not valid HTTP/1.1"))
        if inside and self._stage is _HEADER and self._refused is None:
            # The parser tells of a header once it is whole, and keeps it until then, however long it is.
            self._unheard += len(data)
            if self._unheard > 2 * self._options.max_header_bytes:
                self._refuse_now(self._header_too_large())
        if self._stage is not self._timed:  # never so where requests arrive in one piece
            self._time_stage()

    def _time_stage(self) -> None:
        self._timed = self._stage
        options = self._options
        if self._refused is None and self._stage is _HEADER:
            self._wait(min(options.header_timeout_s, options.idle_timeout_s))
        elif self._refused is None and self._stage is _BODY:
            self._wait(options.body_timeout_s)

    def eof_received(self) -> bool:
        # A client may close its side once it has sent its last request, and still wants the answer.
        # TLS cannot be closed by halves.
        self._ended = True
        halved = self._transport is not None and self._transport.can_write_eof()
        return halved and (self._current is not None or bool(self._waiting))

    def pause_writing(self) -> None:
        self._blocked = True
        self._wait(self._options.body_timeout_s)

    def resume_writing(self) -> None:
        self._blocked = False
        if self._refused is None and self._transport is not None and not self._transport.is_closing():
            self._wait(self._options.idle_timeout_s)
        self._next()

    # From the parser

    def on_message_begin(self) -> None:
        self._reset()
        self._stage = _HEADER

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._left_bytes -= len(url)
        if self._left_bytes < 0:
            raise self._header_too_large()

    def on_header(self, name: bytes, value: bytes) -> None:
        headers = self._headers
        self._left_bytes -= len(name) + len(value)
        if self._left_bytes < 0 or len(headers) > self._options.max_headers:
            raise self._header_too_large()
        if self._request is not None:
            return  # a trailer, which must not change what was decided by the header
        key, text = _NAMES.get(name) or name.decode("latin-1").lower(), value.decode("latin-1")
        # Repeated headers are one list by RFC 9110; of those that must not be one, llhttp refuses the lengths.
        headers[key] = f"{headers[key]}, {text}" if key in headers else text

    def on_headers_complete(self) -> None:
        method = self._parser.get_method().decode("latin-1")
        path = self._url.partition(b"?")[0].decode("latin-1")
        if not path.startswith("/"):
            raise Refusal(400, "the request's target must be a path")
        headers = self._headers
        request = self._request = Request(method, unquote(path) if "%" in path else path, headers)
        self._stage = _BODY
        if "host" not in headers and self._parser.get_http_version() == "1.1":
            raise Refusal(400, "a request needs a Host header")
        self._check_length(request)
        self._application.begin(request)
        if "expect" in headers and headers["expect"].lower() == "100-continue" and self._current is None:
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > self._options.max_body_bytes:
            raise self._too_large()
        if not self._body:
            self._body = body
            return
        # Not a list of the pieces: of chunks of one byte it would take forty times the limit.
        if isinstance(self._body, bytes):
            self._body = bytearray(self._body)
        self._body += body

    def on_message_complete(self) -> None:
        request = self._request
        assert request is not None
        self._request = None
        self._stage = self._timed = _IDLE
        request.body = bytes(self._body)
        self._waiting.append((request, self._parser.should_keep_alive()))
        self._body = b""
        if len(self._waiting) >= _AHEAD and self._transport is not None and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._next()

    def _header_too_large(self) -> Refusal:
        return Refusal(431, f"a request's header may have at most {self._options.max_header_bytes} bytes")

    def _check_length(self, request: Request) -> None:
        length = request.headers.get("content-length")
        if length:
            if int(length) > self._options.max_body_bytes:
                raise self._too_large()
        elif request.method in _METHODS_WITH_BODY and "transfer-encoding" not in request.headers:
            raise Refusal(411, "a POST request needs a body with Content-Length")

    def _too_large(self) -> Refusal:
        return Refusal(413, f"a body may have at most {self._options.max_body_bytes} bytes")

    # Answers, in order

    def _next(self) -> None:
        """Hand the next whole request to the application, unless one is under way or the client does not read."""
        while self._current is None and self._waiting and not self._blocked and self._transport is not None:
            request, keep = self._waiting.popleft()
            self._current = request
            self.due = None
            if self._paused and len(self._waiting) < _AHEAD:
                self._paused = False
                self._transport.resume_reading()
            self._application.handle(request, partial(self._answer, request, keep))

    def _answer(self, request: Request, keep: bool, response: Response) -> None:
        if self._transport is None:
            self._current = None
            return
        assert self._current is request, "a request is answered once"
        self._current = None
        more = bool(self._waiting) or self._refused is not None
        close = not keep or ((self._application.draining or self._ended) and not more)
        self._transport.write(_encoded(request, response, close=close))
        if close:
            self._end()
        elif self._waiting:
            asyncio.get_running_loop().call_soon(self._next)
        elif self._refused is not None:
            self._answer_refused()
        elif not self._blocked:
            self._wait(self._options.idle_timeout_s)

    def _refuse_now(self, refusal: Refusal) -> None:
        """Answer before the request is whole, after the answers to those before it; then read no more of it."""
        request = self._request or Request("", "", self._headers)
        self._application.refused(request, refusal)
        self._refused = _encoded(request, Response.refused(refusal), close=True)
        if self._current is None and not self._waiting:
            self._answer_refused()

    def _answer_refused(self) -> None:
        assert self._refused is not None
        self._write(self._refused)
        self._wait(_DISCARD_S)
        if self._transport is not None and self._transport.can_write_eof():
            self._transport.write_eof()

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    # Ends

    def _wait(self, seconds: float) -> None:
        self.due = time.monotonic() + seconds
        self._unsent = self._waits_for_client()

    def _waits_for_client(self) -> int:
        """Bytes of answers that the client has not taken."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def expire(self) -> None:
        """A timeout has struck: 408 where a body is half there, else just the end; a slow reader may go on reading."""
        self.due = None
        unsent = self._waits_for_client()
        if unsent and self._transport is not None:
            if unsent < self._unsent:
                self._wait(self._options.body_timeout_s)
            else:
                self._transport.abort()
            return
        if self._current is not None:  # the next request is late, but this one still deserves its answer
            return
        if self._request is not None and self._refused is None:
            refusal = Refusal(408, f"the body must arrive within {self._options.body_timeout_s:g} s")
            self._application.refused(self._request, refusal)
            self._write(_encoded(self._request, Response.refused(refusal), close=True))
        self._end()

    def close_if_idle(self) -> None:
        """Close unless a request is under way or half there."""
        if self._current is None and not self._waiting and self._request is None:
            self._end()

    def _end(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._wait(self._options.body_timeout_s)


def _encoded(request: Request, response: Response, *, close: bool) -> bytes:
    trace = request.traced
    return response.encoded(
        request_id=request.id,
        close=close,
        head=request.method == "HEAD",
        traceparent="" if trace is None else trace.header,
    )
