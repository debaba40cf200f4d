"""What the server itself reads of a serialized ModelInferRequest: which model, and how many rows.

The rest stays bytes until a worker parses it, because parsing is what a hostile message makes dear: 15 MB of shape, or
of empty inputs, keep protobuf busy for seconds, and this is the event loop of all connections. So this takes steps from
field to field without looking into them, and no more steps than any honest request needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fettle.serve.refusal import Refusal

_MAX_FIELDS = 2048
_MAX_SHAPE_BYTES = 160  # 16 numbers of at most 10 bytes
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Numbers of fields in open_inference.proto.
_MODEL_NAME, _MODEL_VERSION, _INPUTS, _OUTPUTS, _SHAPE = 1, 2, 5, 6, 3


@dataclass(frozen=True, slots=True)
class Head:
    """version: "" where none is asked for. rows: the first side of the first input as announced, 1 at least."""

    model: str
    version: str
    rows: int


def head_of(content: bytes) -> Head:
    """Raises Refusal 400 for what is no message of protobuf, or one of more fields than a request can need.

    >>> head_of(bytes([0x0A, 2]) + b"ab" + bytes([0x2A, 4, 0x1A, 2, 7, 3]))
    Head(model='ab', version='', rows=7)
    """
    scan = _Scan(content)
    model = version = b""
    rows: int | None = None
    for number, wire, start, end in scan.fields(0, len(content)):
        if wire != _BYTES:
            continue
        if number == _MODEL_NAME:
            model = content[start:end]
        elif number == _MODEL_VERSION:
            version = content[start:end]
        elif number == _INPUTS:
            side = scan.first_side(start, end)
            rows = side if rows is None else rows
        elif number == _OUTPUTS:
            for _ in scan.fields(start, end):
                pass
    try:
        return Head(model.decode(), version.decode(), max(1, min(rows or 1, len(content))))
    except UnicodeDecodeError:
        raise Refusal(400, "model_name and model_version must be UTF-8") from None


class _Scan:
    """Steps over the fields of one message, and counts them together."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._steps = 0

    def fields(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Each field: its number, its wire type, and where its value begins and ends."""
        content = self._content
        while start < end:
            self._steps += 1
            if self._steps > _MAX_FIELDS:
                raise Refusal(400, f"a request may have at most {_MAX_FIELDS} fields besides the tensors' values")
            key = content[start]
            start += 1
            if key > 127:  # most keys are one byte, and most lengths: they are worth their own lines
                key, start = self._varint(start - 1, end)
            wire = key & 7
            if wire == _BYTES and start < end:
                size = content[start]
                start += 1
                if size > 127:
                    size, start = self._varint(start - 1, end)
                stop = start + size
            elif wire == _VARINT:
                _, stop = self._varint(start, end)
            elif wire in (_FIXED64, _FIXED32):
                stop = start + (8 if wire == _FIXED64 else 4)
            else:
                raise _damaged()
            if stop > end or key < 8:
                raise _damaged()
            yield key >> 3, wire, start, stop
            start = stop
        assert end <= len(content)

    def first_side(self, start: int, end: int) -> int:
        """The first number of an input's shape; 1 where it has none that counts."""
        side: int | None = None
        for number, wire, first, last in self.fields(start, end):
            if number != _SHAPE or wire not in (_VARINT, _BYTES) or first == last:
                continue
            if last - first > _MAX_SHAPE_BYTES:
                raise Refusal(400, "an input's shape must be 1 to 16 positive numbers of 63 bits, got a longer one")
            if side is None:
                side, _ = self._varint(first, last)
        return side if side is not None and side < 2**63 else 1

    def _varint(self, start: int, end: int) -> tuple[int, int]:
        content = self._content
        value = shift = 0
        while start < end and shift < 70:
            octet = content[start]
            start += 1
            if octet < 128:
                return value | octet << shift, start
            value |= (octet & 127) << shift
            shift += 7
        raise _damaged()


def _damaged() -> Refusal:
    return Refusal(400, "the message must be a valid inference.ModelInferRequest, got one that is damaged")
