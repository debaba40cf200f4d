"""One request and one response on top of RSGI: limits on the body, request ids, JSON. Nothing about models."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from granian._granian import RSGIProtocolClosed, RSGIProtocolError

from fettle.serve.refusal import Refusal

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# What is still read and thrown away after an early answer, so that the client sees it and not a reset connection.
_DISCARD_BYTES = 256 * 2**20
_DISCARD_S = 2.0


@dataclass(frozen=True, slots=True)
class Response:
    """A whole answer."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

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


class Request:
    """What the handlers see of a request. `id` is the client's X-Request-Id where that is well formed."""

    __slots__ = ("_protocol", "_unread", "headers", "id", "method", "path", "started")

    def __init__(self, scope: Any, protocol: Any) -> None:
        self.started = time.perf_counter()
        self.method: str = scope.method
        self.path: str = scope.path
        self.headers = scope.headers
        self._protocol = protocol
        self._unread = self._has_body()
        given = self.headers.get("x-request-id")
        self.id: str = given if given is not None and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

    def header(self, name: str) -> str:
        """The header's value, "" where it is missing."""
        value = self.headers.get(name)
        return value if isinstance(value, str) else ""

    def elapsed_s(self) -> float:
        """Seconds since the header arrived."""
        return time.perf_counter() - self.started

    def _has_body(self) -> bool:
        return self.headers.get("content-length", "0") != "0" or "transfer-encoding" in self.headers

    async def read(self, *, limit_bytes: int, timeout_s: float) -> bytes:
        """The whole body. Raises Refusal 408, 411, 413 or 415; 413 comes before a declared length is read."""
        if self.header("content-encoding").lower() not in ("", "identity"):
            raise Refusal(415, "Content-Encoding must be identity: send the body uncompressed")
        length = self.header("content-length")
        if not length and "transfer-encoding" not in self.headers:
            raise Refusal(411, "a POST request needs a body with Content-Length")
        too_large = Refusal(413, f"a body may have at most {limit_bytes} bytes")
        if length and (not length.isdigit() or int(length) > limit_bytes):
            raise too_large
        try:
            async with asyncio.timeout(timeout_s):
                if length:
                    body: bytes = await self._protocol()
                    self._unread = False
                    return body
                chunks: list[bytes] = []
                size = 0
                async for chunk in self._protocol:
                    size += len(chunk)
                    if size > limit_bytes:
                        raise too_large
                    chunks.append(chunk)
                self._unread = False
                return b"".join(chunks)
        except (RSGIProtocolClosed, RSGIProtocolError):
            raise Refusal(400, "the body ended before its length") from None
        except TimeoutError:
            raise Refusal(408, f"the body must arrive within {timeout_s:g} s") from None

    async def send(self, response: Response, *, close: bool) -> None:
        """Answer; then swallow what is left of the body, within bounds.

        close: end the connection after this answer.
        """
        headers = [("content-type", response.content_type), ("x-request-id", self.id), *response.headers.items()]
        if close or self._unread:
            headers.append(("connection", "close"))
        try:
            self._protocol.response_bytes(response.status, headers, response.body)
        except RSGIProtocolClosed:  # the client has gone
            return
        if self._unread:
            await self._discard()

    async def _discard(self) -> None:
        size = 0
        try:
            async with asyncio.timeout(_DISCARD_S):
                async for chunk in self._protocol:
                    size += len(chunk)
                    if size > _DISCARD_BYTES:
                        return
        except Exception:  # the client has gone, or never sends the rest: the answer is out, that is all
            return
