"""W3C Trace Context: whose trace a request belongs to, read strictly from its headers, and our own span in it.

Level 2 of the recommendation, which only adds a flag to Level 1. What is malformed is ignored, and a new trace begins.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import NamedTuple

_VERSION_00 = re.compile("00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
# A later version may say more, behind a dash; what we know of it is where it always was.
_LATER = re.compile("(?!00|ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_NO_TRACE, _NO_SPAN = "0" * 32, "0" * 16
SAMPLED, RANDOM = 0x01, 0x02
# Ids must differ, not be secret; and the system's own generator costs a call of the kernel each time.
_random = random.Random()
_MAX_MEMBERS = 32
_MEMBER = re.compile(r"[a-z0-9][a-z0-9_*/@-]{0,255}=[ -+\--<>-~]{0,255}[!-+\--<>-~]")


class TraceContext(NamedTuple):
    """One request's place in a trace. parent_id: the caller's span, "" where the trace begins here.

    state: the caller's tracestate, "" where there is none or it is malformed.

    >>> TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", 1).header
    '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01'
    """

    trace_id: str
    span_id: str
    flags: int
    parent_id: str = ""
    state: str = ""

    @property
    def header(self) -> str:
        """The value of `traceparent`."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


def trace_context(headers: Mapping[str, str]) -> TraceContext:
    """Our span in the caller's trace, or in a new one. headers: by lower-case name; a repeated one joined by commas."""
    span_id = new_span_id()
    caller = parse_traceparent(headers.get("traceparent", ""))
    if caller is None:
        return TraceContext(f"{_random.getrandbits(128) or 1:032x}", span_id, RANDOM)
    trace_id, parent_id, flags = caller
    return TraceContext(trace_id, span_id, flags, parent_id, parse_tracestate(headers.get("tracestate", "")))


def new_span_id() -> str:
    """Eight random bytes in hex, not all of them zero."""
    return f"{_random.getrandbits(64) or 1:016x}"


def parse_traceparent(text: str) -> tuple[str, str, int] | None:
    """The trace id, the caller's span id and the flags that we know; None where it is malformed.

    >>> parse_traceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    ('0af7651916cd43dd8448eb211c80319c', 'b7ad6b7169203331', 1)
    """
    found = _VERSION_00.fullmatch(text) or _LATER.fullmatch(text)
    if found is None:
        return None
    trace_id, parent_id, flags = found.groups()
    if trace_id == _NO_TRACE or parent_id == _NO_SPAN:
        return None
    return trace_id, parent_id, int(flags, 16) & (SAMPLED | RANDOM)


def parse_tracestate(text: str) -> str:
    """The list without its empty members; "" where one is malformed, a key comes twice, or there are too many.

    >>> parse_tracestate("congo=t61rcWkgMzE, ,rojo=00f067aa0ba902b7"), parse_tracestate("Congo=1")
    ('congo=t61rcWkgMzE,rojo=00f067aa0ba902b7', '')
    """
    if not text:
        return ""
    members = [member for part in text.split(",") if (member := part.strip(" \t"))]
    keys = {member.partition("=")[0] for member in members}
    if len(members) > _MAX_MEMBERS or len(keys) < len(members) or not all(map(_MEMBER.fullmatch, members)):
        return ""
    return ",".join(members)
