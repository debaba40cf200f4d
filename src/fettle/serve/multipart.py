"""The files in a `multipart/form-data` body: RFC 7578, strict, bounded, in time linear in the body."""

from __future__ import annotations

import re

from fettle.serve.refusal import Refusal, quote

MAX_PARTS = 256
MAX_HEADER_BYTES = 4096
_BOUNDARY = re.compile(r"""(?i)\bboundary=(?:"([0-9a-z'()+_,./:=? -]{1,70})"|([0-9a-z'()+_,./:=?-]{1,70}))\s*(?:;|$)""")
_NAME = re.compile(r'(?i);\s*name="([^"\r\n]{0,200})"')
_FILE = re.compile(r"(?i);\s*filename\*?=")


def boundary_of(content_type: str) -> bytes:
    """The boundary in a Content-Type header. Raises Refusal 400.

    >>> boundary_of('multipart/form-data; boundary="a b"')
    b'a b'
    """
    match = _BOUNDARY.search(content_type)
    if match is None or (match[1] or match[2]).endswith(" "):
        raise Refusal(400, "multipart/form-data needs a boundary of 1 to 70 characters in Content-Type")
    return (match[1] or match[2]).encode("ascii")


def files_in(body: bytes, boundary: bytes) -> list[bytes]:
    """The content of each file part, in order. Raises Refusal 400 for anything else in the body.

    >>> head = b'Content-Disposition: form-data; name="f"; filename="a.png"'
    >>> files_in(b"--x" + bytes([13, 10]) + head + bytes([13, 10, 13, 10]) + b"hi" + bytes([13, 10]) + b"--x--", b"x")
    [b'hi']
    """
    delimiter = b"\r\n--" + boundary
    body = b"\r\n" + body
    position = body.find(delimiter)
    if position != 0:
        raise Refusal(400, "a multipart body must begin with its boundary")
    found: list[bytes] = []
    while True:
        position += len(delimiter)
        if body.startswith(b"--", position):
            if body[position + 2 :].strip(b"\r\n \t"):
                raise Refusal(400, "a multipart body must end with its closing boundary")
            return found
        end = body.find(delimiter, position)
        if not body.startswith(b"\r\n", position) or end < 0:
            raise Refusal(400, "a multipart body must be closed by its boundary: it seems truncated")
        if len(found) == MAX_PARTS:
            raise Refusal(413, f"a multipart body may have at most {MAX_PARTS} parts")
        found.append(_file_in(body, position + 2, end))
        position = end


def _file_in(body: bytes, start: int, end: int) -> bytes:
    head_end = body.find(b"\r\n\r\n", start, min(end, start + MAX_HEADER_BYTES))
    if head_end < 0:
        raise Refusal(400, f"each part needs headers of at most {MAX_HEADER_BYTES} bytes and an empty line after them")
    headers: dict[str, str] = {}
    for line in body[start:head_end].decode("utf-8", "replace").split("\r\n"):
        key, _, value = line.partition(":")
        headers[key.strip().lower()] = value.strip()
    disposition = headers.get("content-disposition", "")
    name = _NAME.search(disposition)
    if not disposition.lower().startswith("form-data") or name is None:
        raise Refusal(400, 'each part needs a header like: Content-Disposition: form-data; name="image"; filename="x"')
    if headers.get("content-transfer-encoding", "binary").lower() not in ("binary", "8bit", "7bit"):
        raise Refusal(400, f"part {quote(name[1])} must be sent as it is, without Content-Transfer-Encoding")
    if not _FILE.search(disposition) and not headers.get("content-type", "").lower().startswith("image/"):
        raise Refusal(400, f"part {quote(name[1])} must be an image file, got a plain field")
    return body[head_end + 4 : end]
