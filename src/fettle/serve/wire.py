"""What the server and its worker processes say to each other: small headers in MessagePack, tensors as they are.

A frame is two lengths (u32 little endian), a header of one message, and a body that the header describes. Nothing on
this wire is ever unpickled: a worker that has gone wrong can spoil an answer, not the server.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from http import HTTPStatus
from typing import Literal, TypeVar

import msgspec

_LENGTHS = struct.Struct("<II")
# A frame holds one batch: requests of no more bytes than these together, or one request alone; and their answers.
MAX_FRAME_BYTES = 2**31
MAX_BATCH_BYTES = 2**26
MAX_ALONE_BYTES = 2**30
MAX_ANSWER_BYTES = MAX_FRAME_BYTES - 2**24

_REFUSALS = frozenset(status.value for status in HTTPStatus if status >= 400)

# Statistics of one row: see `core.statistics`.
STATISTICS = 5

Kind = Literal["image", "json", "binary", "grpc"]


class Item(msgspec.Struct, array_like=True, frozen=True):
    """One job of a batch. size: bytes of it in the frame's body.

    encoded: of an image, whether the bytes are base64 text. header_bytes: of a binary request, its JSON part.
    trace_id: for the log, "" where the request has no trace.
    """

    request_id: str
    size: int
    encoded: bool = False
    header_bytes: int = 0
    trace_id: str = ""


class Load(msgspec.Struct, tag=True, frozen=True):
    """Load an artifact beside what is there, prove it, and answer with Loaded or Refused."""

    key: int
    name: str
    version: int
    root: str
    threads: int
    max_batch_rows: int


class Unload(msgspec.Struct, tag=True, frozen=True):
    """Forget a model."""

    key: int


class Work(msgspec.Struct, tag=True, frozen=True):
    """One batch for one model. observe: whether probabilities and statistics are wanted for the prediction log."""

    id: int
    key: int
    kind: Kind
    items: list[Item]
    observe: bool
    max_image_pixels: int
    max_rows: int


class Loaded(msgspec.Struct, tag=True, frozen=True):
    """The model is proven and warm. rows, seconds: how long the batches of the warm-up took."""

    key: int
    rows: list[int]
    seconds: list[float]


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The model is not fit. reason: for anyone to read; detail: for the log."""

    key: int
    reason: str
    detail: str


class Outcome(msgspec.Struct, array_like=True, frozen=True):
    """What came of one item. size: bytes of its content in the body, an answer or the text of a refusal.

    header_bytes: of a binary answer, its JSON part. rows, classes: of the observed probabilities (float32), which
    follow the content in the body, and then the statistics; 0 where nothing is observed.
    """

    status: int
    size: int
    header_bytes: int = 0
    rows: int = 0
    classes: int = 0


class Done(msgspec.Struct, tag=True, frozen=True):
    """A batch has ended. seconds: of it in the engine; rows: that ran."""

    id: int
    outcomes: list[Outcome]
    seconds: float
    rows: int


def check_loaded(report: Loaded) -> None:
    """Raise ValueError where the times cannot be those of batches."""
    if len(report.rows) != len(report.seconds) or min(report.rows, default=1) < 1 or not _times(report.seconds):
        raise ValueError(f"the warm-up cannot have taken {report.seconds} s for {report.rows} rows")


def check_done(report: Done, work: Work, body_bytes: int) -> None:
    """Raise ValueError where the report is not of this work, or does not describe its own body: it may not be cut.

    >>> work = Work(1, 1, "json", [Item("a", 2)], False, 1, 1)
    >>> check_done(Done(1, [Outcome(200, 5)], 0.1, 1), work, 5)
    >>> check_done(Done(1, [Outcome(200, 5)], 0.1, 1), work, 6)
    Traceback (most recent call last):
    ValueError: the outcomes describe 5 bytes, the body has 6
    """
    if report.id != work.id or len(report.outcomes) != len(work.items):
        raise ValueError(f"{len(report.outcomes)} outcomes of work {report.id} for {len(work.items)} of {work.id}")
    if report.rows < 0 or not _times([report.seconds]):
        raise ValueError(f"a batch cannot have {report.rows} rows and take {report.seconds} s")
    described = 0
    for outcome in report.outcomes:
        if not _possible(outcome):
            raise ValueError(f"there is no such outcome: {outcome}")
        described += outcome.size + 4 * outcome.rows * (outcome.classes + STATISTICS)
    if described != body_bytes:
        raise ValueError(f"the outcomes describe {described} bytes, the body has {body_bytes}")


def _times(seconds: list[float]) -> bool:
    return all(math.isfinite(one) and one >= 0.0 for one in seconds)


def _possible(outcome: Outcome) -> bool:
    if outcome.status == 200:
        return 0 <= outcome.header_bytes <= outcome.size and outcome.rows >= 0 and outcome.classes >= 0
    return outcome.status in _REFUSALS and outcome.size >= 0 and not outcome.rows


Order = Load | Unload | Work
Report = Loaded | Refused | Done

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_orders: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_reports: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def frame(message: Order | Report, body_bytes: int = 0) -> bytes:
    """What goes before the body."""
    header = _encoder.encode(message)
    return _LENGTHS.pack(len(header), body_bytes) + header


def order_of(header: bytes | memoryview) -> Order:
    """Raises msgspec.MsgspecError for anything else."""
    return _decoded(_orders, header)


def report_of(header: bytes | memoryview) -> Report:
    """Raises msgspec.MsgspecError for anything else."""
    return _decoded(_reports, header)


def _decoded(decoder: msgspec.msgpack.Decoder[T], header: bytes | memoryview) -> T:
    try:
        return decoder.decode(header)
    except UnicodeDecodeError as problem:  # msgspec lets this one through
        raise msgspec.DecodeError(str(problem)) from None


class Frames:
    """Cuts a stream of bytes into frames. Raises ValueError where one would be larger than MAX_FRAME_BYTES.

    >>> frames = Frames()
    >>> whole = frame(Unload(7), 2) + b"hi"
    >>> list(frames.feed(whole[:5])), [(order_of(header), bytes(body)) for header, body in frames.feed(whole[5:])]
    ([], [(Unload(key=7), b'hi')])
    """

    def __init__(self) -> None:
        self._held = bytearray()
        self._wanted = _LENGTHS.size

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[memoryview, memoryview]]:
        """The header and body of each frame that is whole now."""
        self._held += data
        while len(self._held) >= self._wanted:
            first, second = _LENGTHS.unpack_from(self._held)
            self._wanted = _LENGTHS.size + first + second
            if self._wanted > MAX_FRAME_BYTES:
                raise ValueError(f"a frame may have at most {MAX_FRAME_BYTES} bytes, got {self._wanted}")
            if len(self._held) < self._wanted:
                return
            whole = memoryview(bytes(self._held[: self._wanted]))
            del self._held[: self._wanted]
            self._wanted = _LENGTHS.size
            start = _LENGTHS.size
            yield whole[start : start + first], whole[start + first :]
