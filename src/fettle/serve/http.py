"""Requests and responses as values, and the one form of every error. Nothing about sockets or models."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

import msgspec

from fettle.serve.keys import Key
from fettle.serve.refusal import Refusal
from fettle.serve.trace_context import TraceContext, trace_context

# Ids that we give: random once for each process, then counted, for randomness is what takes the time.
_OURS = os.urandom(8).hex()
_numbers = itertools.count(1)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_REASONS = {status.value: status.phrase for status in HTTPStatus}
_STATUS_LINES = {code: f"HTTP/1.1 {code} {reason}\r\n".encode() for code, reason in _REASONS.items()}


@dataclass(slots=True)  # not frozen: that takes three times as long to make
class Response:
    """A whole answer."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] | None = None

    @classmethod
    def json(cls, value: Any, status: int = 200) -> Response:
        """The value as JSON.

        >>> Response.json({"ready": True}).body
        b'{"ready":true}'
        """
        return cls(status, msgspec.json.encode(value))

    @classmethod
    def refused(cls, refusal: Refusal) -> Response:
        """The one form of every error: `{"error": "..."}`."""
        body = msgspec.json.encode({"error": refusal.message})
        return cls(refusal.status, body, headers=refusal.headers)

    def encoded(self, *, request_id: str, close: bool, head: bool = False, traceparent: str = "") -> bytes:
        """The bytes for the wire. head: without the body, whose length is told all the same.

        traceparent: the header of that name, "" for none.

        >>> Response(204, b"").encoded(request_id="a", close=True).splitlines()[0]
        b'HTTP/1.1 204 No Content'
        """
        extra = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items()) if self.headers else ""
        if traceparent:
            extra = f"traceparent: {traceparent}\r\n{extra}"
        lines = (
            f"content-type: {self.content_type}\r\ncontent-length: {len(self.body)}\r\n"
            f"x-request-id: {request_id}\r\n{extra}{'connection: close' + chr(13) + chr(10) if close else ''}\r\n"
        )
        start = _STATUS_LINES[self.status] + lines.encode("latin-1")
        return start if head else start + self.body


Respond = Callable[[Response], None]


class Found(Protocol):
    """What a path means: its template, for metrics, and what answers each method."""

    @property
    def template(self) -> str: ...

    def handler(self, method: str) -> Callable[[Request, Respond], None]: ...


class Abandoned(Protocol):
    """Work for a request that somebody else does."""

    def abandon(self) -> None:
        """Nobody waits for it any more."""


class Ending(Protocol):
    """Whoever waits for the end of a request."""

    def end(self, response: Response | None) -> None:
        """It is answered, or its client has gone: None."""


class Request:
    """What the handlers see of a request. `headers` have lower-case names.

    id: the client's X-Request-Id where that is well formed. jobs: what is given up where the client goes away before
    the answer; cancelled: whether it has. route: what the path means, once that is known. answers: name and version
    of the model that was chosen, for metrics. span: who is told of its end, where it is traced.
    key: the API key it came with, None where none was asked for.
    """

    __slots__ = (
        "_id", "_trace", "answers", "body", "cancelled", "headers", "jobs", "key", "method", "path", "route", "span",
        "started",
    )  # fmt: skip

    def __init__(self, method: str, path: str, headers: dict[str, str]) -> None:
        self.started = time.perf_counter()
        self.method = method
        self.path = path
        self.headers = headers
        self.body: bytes = b""
        self.jobs: Sequence[Abandoned] = ()
        self.cancelled = False
        self.key: Key | None = None
        self.route: Found | None = None
        self.answers: tuple[str, str] | None = None
        self.span: Ending | None = None
        self._id: str | None = None
        self._trace: TraceContext | None = None

    @property
    def id(self) -> str:
        if self._id is None:
            given = self.headers.get("x-request-id")
            self._id = given if given is not None and _REQUEST_ID.fullmatch(given) else f"{_OURS}{next(_numbers):016x}"
        return self._id

    @property
    def trace(self) -> TraceContext:
        """The request's place in a trace; a trace begins here where the client has sent none."""
        if self._trace is None:
            self._trace = trace_context(self.headers)
        return self._trace

    @trace.setter
    def trace(self, trace: TraceContext) -> None:
        self._trace = trace

    @property
    def traced(self) -> TraceContext | None:
        """`trace`, where the client has sent one or somebody has asked for it; else nothing is made."""
        if self._trace is None and "traceparent" not in self.headers:
            return None
        return self.trace

    def header(self, name: str) -> str:
        """The header's value, "" where it is missing."""
        return self.headers.get(name, "")

    def elapsed_s(self) -> float:
        """Seconds since the header arrived."""
        return time.perf_counter() - self.started
