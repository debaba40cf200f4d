"""Checks of compressed bodies: Content-Encoding of requests, Accept-Encoding of answers.

Source: RFC 9110 8.4, 12.5.3 and 15.5.16; Triton takes gzip and deflate. No server has to: 415 is a good answer. What
no server may do is to misread, to fail, or to unpack without a limit.
"""

from __future__ import annotations

import functools
import gzip
import zlib
from collections.abc import Callable
from dataclasses import replace

from fettle.testing.oip.answers import error_of, infer, read_answer, refusal, same_outputs, still_answers
from fettle.testing.oip.binary import EXTENSION, binary_request, pack
from fettle.testing.oip.client import Reply, Skipped, short
from fettle.testing.oip.server import Server
from fettle.testing.oip.tensors import encode

_BOMB_BYTES = 2**30
_BLOCK_BYTES = 2**24
# RFC 9110 8.4.1.2: "deflate" is the zlib format, whatever the name says.
_CODINGS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}
_IDENTITY = ("", "identity")


def takes_gzip_or_refuses_it(server: Server) -> None:
    """A gzip body is answered as the plain one is, or refused with 415 and an error."""
    _taken_or_refused(server, "gzip")


def takes_deflate_or_refuses_it(server: Server) -> None:
    """The same for deflate, which is zlib's format (RFC 9110 8.4.1.2)."""
    _taken_or_refused(server, "deflate")


def _taken_or_refused(server: Server, coding: str) -> None:
    body = encode(server.good())
    for name in (coding, coding.upper()):  # codings are case-insensitive
        reply = server.infer(_CODINGS[coding](body), {"Content-Encoding": name})
        assert reply.status in (200, 415), f"a {name} body must be answered, or refused with 415, got {reply}"
        if reply.status == 415:
            error_of(reply, f"a {name} body")
        else:
            same_outputs(server, read_answer(server, reply), infer(server, body), f"{name} must change nothing")


def takes_compressed_bytes(server: Server) -> None:
    """Inference-Header-Content-Length counts the JSON as it was before compression (tritonclient, Triton)."""
    if EXTENSION not in server.extensions:
        raise Skipped(f"the server does not advertise {EXTENSION}")
    for coding in _accepted(server):
        body, headers = pack(*binary_request(server))
        found = infer(server, _CODINGS[coding](body), {**headers, "Content-Encoding": coding})
        rule = f"binary inputs in {coding} must be answered as JSON ones"
        same_outputs(server, found, infer(server, server.good()), rule)


def refuses_unknown_codings(server: Server) -> None:
    """What a coding nobody knows means cannot be understood, even where the bytes look like JSON."""
    for coding in ("oip-check-none", "gzip, oip-check-none"):
        reply = server.infer(encode(server.good()), {"Content-Encoding": coding})
        refusal(reply, f"a body in the coding {coding!r}")


def refuses_broken_compression(server: Server) -> None:
    """Plain JSON that says gzip, a stream cut short or altered, and bytes behind its end are refused."""
    body = encode(server.good())
    for coding, compress in _CODINGS.items():
        whole = compress(body)
        altered = whole[:-1] + bytes([whole[-1] ^ 1])  # the checksum or the size at the end
        for what, content in (("plain JSON", body), ("cut", whole[:-5]), ("altered", altered), ("empty", b"")):
            refusal(server.infer(content, {"Content-Encoding": coding}), f"a body that says {coding} and is {what}")
    still_answers(server, "broken compression")


def refuses_a_bomb(server: Server) -> None:
    """A megabyte that unpacks to a gibibyte of good JSON is refused within the timeout, and the server goes on."""
    body = encode(server.good())
    for coding in _CODINGS:
        reply = server.infer(_bomb(body, coding), {"Content-Encoding": coding})
        refusal(reply, f"a {coding} body that unpacks to {_BOMB_BYTES} bytes")
    still_answers(server, "a compression bomb")


@functools.lru_cache(maxsize=2)  # for one body: the request is the same in every coding
def _bomb(body: bytes, coding: str) -> bytes:
    """The request, good as it is, followed by so much white space that it has a gibibyte; one megabyte in all."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = packer.compress(body) + packer.flush(zlib.Z_FULL_FLUSH)
    # After a full flush nothing refers back, so the same block can be written once and repeated.
    space = b" " * _BLOCK_BYTES
    block = packer.compress(space) + packer.flush(zlib.Z_FULL_FLUSH)
    count = _BOMB_BYTES // _BLOCK_BYTES
    content = start + block * count + packer.flush()
    check = zlib.crc32 if coding == "gzip" else zlib.adler32
    total = check(body)
    for _ in range(count):
        total = check(space, total)
    if coding == "gzip":
        size = (len(body) + _BOMB_BYTES) % 2**32
        end = total.to_bytes(4, "little") + size.to_bytes(4, "little")
        return b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff" + content + end
    return b"\x78\xda" + content + total.to_bytes(4, "big")


def answers_in_a_coding_that_was_asked_for(server: Server) -> None:
    """Content-Encoding is one that Accept-Encoding has, never one with q=0, and the body unpacks to the same answer."""
    wanted = infer(server, server.good())
    for accepted, allowed in (("gzip", "gzip"), ("deflate", "deflate"), ("gzip;q=0, identity", ""), ("", "")):
        reply = server.infer(server.good(), {"Accept-Encoding": accepted})
        coding = reply.header("content-encoding").lower()
        choice = f"plain or in {allowed}" if allowed else "plain"
        assert coding in (*_IDENTITY, allowed), f"Accept-Encoding {accepted!r} must be answered {choice}, got {coding}"
        rule = f"an answer to Accept-Encoding {accepted!r} must be the same"
        same_outputs(server, read_answer(server, _unpacked(reply)), wanted, rule)


def _unpacked(reply: Reply) -> Reply:
    coding = reply.header("content-encoding").lower()
    if coding in _IDENTITY:
        return reply
    try:
        body = zlib.decompress(reply.body, 31 if coding == "gzip" else 15)
    except zlib.error as problem:
        raise AssertionError(f"an answer in {coding} must unpack, got {short(reply.body)}: {problem}") from None
    return replace(reply, body=body)


def _accepted(server: Server) -> list[str]:
    """The codings that the server takes. Raises Skipped where it takes none."""
    body = encode(server.good())
    taken = [
        coding
        for coding, compress in _CODINGS.items()
        if server.infer(compress(body), {"Content-Encoding": coding}).status == 200
    ]
    if not taken:
        raise Skipped("the server takes no compressed bodies")
    return taken


CHECKS: tuple[Callable[[Server], None], ...] = (
    takes_gzip_or_refuses_it,
    takes_deflate_or_refuses_it,
    takes_compressed_bytes,
    refuses_unknown_codings,
    refuses_broken_compression,
    refuses_a_bomb,
    answers_in_a_coding_that_was_asked_for,
)
