"""`POST /v2/models/NAME/infer`, as far as the server itself reads it: what a worker must be told, and its answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from fettle.serve.binary import header_bytes_of
from fettle.serve.compression import compress
from fettle.serve.http import Request, Response
from fettle.serve.jobs import Result
from fettle.serve.refusal import Refusal, quote
from fettle.serve.wire import Kind

HEADER_LENGTH = "inference-header-content-length"
_COMPRESS_AT_MOST_BYTES = 256 * 2**10
_ROWS = re.compile(rb'"shape"\s*:\s*\[\s*(\d{1,9})')


def announced_rows(body: bytes, header_bytes: int) -> int:
    """How many rows a request says it has: enough to bound the queue by, for the worker counts them rightly.

    No row takes less than a byte: who announces more than it brings is refused by the worker, with the reason.

    >>> announced_rows(b'{"inputs": [{"name": "x", "shape": [12, 3]}]}' + bytes(36), 45)
    12
    """
    found = _ROWS.search(body, 0, header_bytes or len(body))
    return max(1, min(int(found[1]), len(body))) if found else 1


def kind_of(request: Request, body: bytes) -> tuple[Kind, int]:
    """How the body is to be read. Raises Refusal 400 or 415."""
    given = request.headers.get(HEADER_LENGTH)
    if given is not None:
        header_bytes = header_bytes_of(given)
        if header_bytes > len(body):
            raise Refusal(400, f"Inference-Header-Content-Length must be 0 to {len(body)}, got {header_bytes}")
        return "binary", header_bytes
    kind = request.header("content-type").partition(";")[0].strip().lower()
    if kind not in ("", "application/json", "application/octet-stream"):
        raise Refusal(415, f"Content-Type must be application/json, got {quote(kind)}")
    return "json", 0


def _announced(request: Request, body: bytes) -> tuple[Kind, int, int]:
    kind, header_bytes = kind_of(request, body)
    return kind, header_bytes, announced_rows(body, header_bytes)


def respond_with(request: Request, result: Result) -> Response:
    """The answer of a model, compressed where the client wants that and it is worth it.

    Tensors in binary hardly shrink, and a large answer would hold the event loop up.
    """
    headers: dict[str, str] = {}
    content_type = "application/json"
    if result.header_bytes:
        headers[HEADER_LENGTH] = str(result.header_bytes)
        content_type = "application/octet-stream"
    content = result.content
    accepted = request.headers.get("accept-encoding")
    if accepted is not None and not result.header_bytes and len(content) <= _COMPRESS_AT_MOST_BYTES:
        headers["vary"] = "accept-encoding"
        content, encoding = compress(content, accepted)
        if encoding:
            headers["content-encoding"] = encoding
    return Response(200, content, content_type, headers)


@dataclass(frozen=True, slots=True)
class Form:
    """How requests of one transport are read, and answered.

    announce: how a worker must read the body, how many bytes of it are JSON before tensors, and how many rows it has
    by its own word. Raises Refusal 400 or 415.
    """

    announce: Callable[[Request, bytes], tuple[Kind, int, int]]
    respond: Callable[[Request, Result], Response]


REST = Form(_announced, respond_with)
