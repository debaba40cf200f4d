"""Content codings: what clients compressed, unpacked under a hard limit; and answers, compressed for who asks for it.

The limit holds for memory too: a few kilobytes can stand for gigabytes, so output is counted as it comes and the first
byte too many ends it.
"""

from __future__ import annotations

import io
import re
import zlib

from fettle.serve.refusal import Refusal, quote

# Smaller answers do not gain what the header costs.
MIN_COMPRESS_BYTES = 1024
# zlib's own state has 40 KiB; with these two steps all that is held besides the output stays within 64.
_STEP_BYTES = 4096
_GZIP, _ZLIB, _BARE = 31, 15, -15
_CODINGS = {"gzip": _GZIP, "deflate": _ZLIB}
_WEIGHTED = re.compile(r"(?i)([!#$%&'*+.^_`|~0-9a-z-]+)[ \t]*(?:;[ \t]*q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?))?")


def decompress(body: bytes, encoding: str, *, limit_bytes: int) -> bytes:
    """The body as it was before its Content-Encoding: one of gzip, deflate, identity or "".

    deflate may have zlib's frame, as RFC 9110 says, or none, as some clients send it; without it damage may go unseen.
    gzip is one member, not several in a row.

    limit_bytes: of the result. At most this and 64 KiB are allocated, whatever the body claims.
    Raises Refusal 400 for what is damaged, cut or followed by anything; 413 above the limit; 415 for another coding or
    a list of them.

    >>> decompress(zlib.compress(b"hi"), "deflate", limit_bytes=2)
    b'hi'
    """
    coding = encoding.strip().lower()
    if coding in ("", "identity"):
        if len(body) > limit_bytes:
            raise _too_large(limit_bytes)
        return body
    if coding in ("gzip", "x-gzip"):
        return _unpack(body, "gzip", _GZIP, limit_bytes)
    if coding == "deflate":
        return _unpack(body, "deflate", _ZLIB if _has_zlib_header(body) else _BARE, limit_bytes)
    raise Refusal(
        415,
        f"Content-Encoding must be one of gzip, deflate, identity, and only one, got {quote(encoding)}",
        headers={"accept-encoding": "gzip, deflate"},
    )


def _too_large(limit_bytes: int) -> Refusal:
    return Refusal(413, f"a body may have at most {limit_bytes} bytes, after decompression too")


def _has_zlib_header(body: bytes) -> bool:
    """RFC 1950: method 8, window of at most 32 KiB, and both bytes a multiple of 31.

    No bare stream begins so: its low bits would mean a stored block, with bits set that every encoder leaves 0.
    """
    return len(body) >= 2 and body[0] & 0x0F == 8 and body[0] >> 4 <= 7 and (body[0] << 8 | body[1]) % 31 == 0


def _unpack(body: bytes, coding: str, window_bits: int, limit_bytes: int) -> bytes:
    unpacker = zlib.decompressobj(window_bits)
    output = _Output(limit_bytes)
    waiting = memoryview(body)
    # In small steps, because zlib copies what it leaves of each: of the whole body that takes quadratic time.
    step: bytes | memoryview = b""
    try:
        while not unpacker.eof:
            if not step:
                step, waiting = waiting[:_STEP_BYTES], waiting[_STEP_BYTES:]
            ended = not step
            found = unpacker.decompress(step, _STEP_BYTES)
            if ended and not found and not unpacker.eof:
                raise Refusal(400, f"the body must be a whole {coding} stream, got one that is cut off")
            output.add(found)
            step = unpacker.unconsumed_tail
    except zlib.error:
        raise Refusal(400, f"the body must be a {coding} stream, as Content-Encoding says, got a damaged one") from None
    if waiting or unpacker.unused_data:
        raise Refusal(400, f"the body must be one {coding} stream, got more bytes behind it")
    return output.whole()


class _Output:
    """Bytes that come in pieces, in one place that is never larger than the limit.

    Left to itself BytesIO takes an eighth more than it needs, except where it must grow by more than that; and joining
    a list of pieces would take everything twice.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._room = 0
        self._file = io.BytesIO()

    def add(self, piece: bytes) -> None:
        """Raises Refusal 413 where the limit is passed."""
        start = self._file.tell()
        end = start + len(piece)
        if end > self._limit:
            raise _too_large(self._limit)
        if end > self._room:
            wanted = max(2 * self._room, end)
            # The last step must not be a small one, see above.
            self._room = wanted if wanted * 5 // 4 < self._limit else self._limit
            self._file.seek(self._room - 1)
            self._file.write(b"\0")
            self._file.seek(start)
        self._file.write(piece)

    def whole(self) -> bytes:
        """Everything, without a copy."""
        self._file.truncate()
        return self._file.getvalue()


def compress(body: bytes, accept_encoding: str) -> tuple[bytes, str]:
    """The body in the coding that an Accept-Encoding likes best, and that coding's name; "" where it stays as it is.

    It stays below 1 KiB, where it would not become smaller, and where neither gzip nor deflate is named, or is liked
    less than identity. Of equals gzip wins. What is malformed in the header counts as not there.

    >>> packed, coding = compress(bytes(2000), "br, gzip;q=0.5, deflate;q=0.8")
    >>> coding, decompress(packed, coding, limit_bytes=2000) == bytes(2000)
    ('deflate', True)
    """
    if len(body) < MIN_COMPRESS_BYTES:
        return body, ""
    weights = _weights(accept_encoding)
    other = weights.get("*", 0.0)
    liked = {coding: weights.get(coding, other) for coding in _CODINGS}
    best = max(liked, key=lambda coding: liked[coding])
    if liked[best] <= 0.0 or liked[best] < weights.get("identity", 0.0):
        return body, ""
    packed = zlib.compress(body, level=1, wbits=_CODINGS[best])
    return (packed, best) if len(packed) < len(body) else (body, "")


def _weights(accept_encoding: str) -> dict[str, float]:
    """RFC 9110, 12.5.3: each coding with its weight, 1 where none is given.

    >>> _weights("gzip, *;q=0.25, deflate;q=7")
    {'gzip': 1.0, '*': 0.25}
    """
    weights: dict[str, float] = {}
    for item in accept_encoding.split(","):
        match = _WEIGHTED.fullmatch(item.strip(" \t"))
        if match is not None:
            name = match[1].lower()
            weights["gzip" if name == "x-gzip" else name] = 1.0 if match[2] is None else float(match[2])
    return weights
