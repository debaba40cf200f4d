"""The wire between server and workers: the same messages however the stream is cut, and no others."""

import itertools
import struct

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fettle.serve import wire

numbers = st.integers(0, 2**63 - 1)
texts = st.text(max_size=20)
items = st.builds(wire.Item, request_id=texts, size=numbers, encoded=st.booleans(), header_bytes=numbers)
outcomes = st.builds(
    wire.Outcome, status=st.integers(100, 599), size=numbers, header_bytes=numbers, rows=numbers, classes=numbers
)
orders = st.one_of(
    st.builds(wire.Load, key=numbers, name=texts, version=numbers, root=texts, threads=numbers, max_batch_rows=numbers),
    st.builds(wire.Unload, key=numbers),
    st.builds(
        wire.Work,
        id=numbers,
        key=numbers,
        kind=st.sampled_from(["image", "json", "binary"]),
        items=st.lists(items, max_size=3),
        observe=st.booleans(),
        max_image_pixels=numbers,
        max_rows=numbers,
    ),
)
reports = st.one_of(
    st.builds(
        wire.Loaded,
        key=numbers,
        rows=st.lists(numbers, max_size=3),
        seconds=st.lists(st.floats(0, 100), max_size=3),
    ),
    st.builds(wire.Refused, key=numbers, reason=texts, detail=texts),
    st.builds(wire.Done, id=numbers, outcomes=st.lists(outcomes, max_size=3), seconds=st.floats(0, 9), rows=numbers),
)


def cut(stream, places):
    """The stream in pieces."""
    ends = sorted({place % (len(stream) + 1) for place in places} | {0, len(stream)})
    return [stream[start:end] for start, end in itertools.pairwise(ends)]


def whole(frames, pieces):
    """Everything in the pieces, as bytes of one's own."""
    return [(bytes(header), bytes(body)) for piece in pieces for header, body in frames.feed(piece)]


@settings(deadline=None)
@given(st.lists(st.tuples(orders | reports, st.binary(max_size=40)), max_size=6), st.lists(st.integers(0, 10**6)))
def test_frames_are_the_same_whatever_the_cuts(messages, places):
    stream = b"".join(wire.frame(message, len(body)) + body for message, body in messages)
    found = whole(wire.Frames(), cut(stream, places))
    assert found == [(msgspec.msgpack.encode(message), body) for message, body in messages]


def test_frames_come_out_of_a_stream_of_single_bytes():
    stream = (wire.frame(wire.Unload(1), 3) + b"abc" + wire.frame(wire.Unload(2))) * 3
    found = whole(wire.Frames(), [stream[at : at + 1] for at in range(len(stream))])
    assert [(wire.order_of(header).key, body) for header, body in found] == [(1, b"abc"), (2, b"")] * 3


def test_a_frame_is_told_as_soon_as_it_is_whole_and_not_before():
    stream = wire.frame(wire.Unload(1), 2) + b"hi"
    frames = wire.Frames()
    assert whole(frames, [stream[:-1]]) == []
    assert len(whole(frames, [stream[-1:]])) == 1
    assert whole(frames, [b""]) == []


def test_what_was_told_stays_as_it_was():
    """A batch may be held longer than the buffer it came in."""
    frames = wire.Frames()
    ((_, first),) = frames.feed(wire.frame(wire.Unload(1), 3) + b"abc")
    ((_, second),) = frames.feed(wire.frame(wire.Unload(2), 3) + b"xyz")
    assert (bytes(first), bytes(second)) == (b"abc", b"xyz")


@pytest.mark.parametrize(("header", "body"), [(2**31, 0), (0, 2**31), (2**32 - 1, 2**32 - 1), (2**30, 2**30 + 1)])
def test_a_frame_that_is_too_large_is_an_error_before_it_is_held(header, body):
    with pytest.raises(ValueError, match="at most"):
        list(wire.Frames().feed(struct.pack("<II", header, body)))


def test_frames_before_one_that_is_too_large_are_told():
    frames = wire.Frames().feed(wire.frame(wire.Unload(7)) + struct.pack("<II", 2**31, 2**31))
    header, _ = next(frames)
    assert wire.order_of(header) == wire.Unload(7)
    with pytest.raises(ValueError, match="at most"):
        next(frames)


@settings(deadline=None)
@given(orders)
def test_orders_come_back_as_they_were(order):
    ((header, body),) = wire.Frames().feed(wire.frame(order))
    assert wire.order_of(header) == order
    assert not len(body)
    with pytest.raises(msgspec.MsgspecError):
        wire.report_of(header)


@settings(deadline=None)
@given(reports)
def test_reports_come_back_as_they_were(report):
    ((header, _),) = wire.Frames().feed(wire.frame(report))
    assert wire.report_of(header) == report
    with pytest.raises(msgspec.MsgspecError):
        wire.order_of(header)


def understood(read, header):
    """What the header means, or None after the only error that may come."""
    try:
        return read(header)
    except msgspec.MsgspecError:
        return None


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_garbage_is_an_error_or_a_message(header):
    assert isinstance(understood(wire.order_of, header), wire.Load | wire.Unload | wire.Work | None)
    assert isinstance(understood(wire.report_of, header), wire.Loaded | wire.Refused | wire.Done | None)


@settings(deadline=None)
@given(orders | reports, st.integers(0, 10**6), st.integers(0, 255), st.integers(0, 5))
@example(wire.Unload(0), 7, 0x80, 0)
def test_a_damaged_header_is_an_error_or_a_message(message, at, octet, lost):
    header = bytearray(msgspec.msgpack.encode(message))
    header[at % len(header)] = octet
    del header[len(header) - lost :]
    assert isinstance(understood(wire.order_of, header), wire.Load | wire.Unload | wire.Work | None)
    assert isinstance(understood(wire.report_of, header), wire.Loaded | wire.Refused | wire.Done | None)


@pytest.mark.parametrize(
    "header", [b"", b"\xc0", b"hello", msgspec.msgpack.encode({"type": "Unload"}), msgspec.msgpack.encode([1, 2])]
)
def test_what_is_no_message_is_an_error(header):
    for read in (wire.order_of, wire.report_of):
        with pytest.raises(msgspec.MsgspecError):
            read(header)


def test_a_kind_that_nobody_reads_is_an_error():
    header = msgspec.msgpack.encode(wire.Work(1, 2, "pickle", [], False, 1, 1))
    with pytest.raises(msgspec.MsgspecError):
        wire.order_of(header)


def test_items_and_outcomes_are_short_lists():
    """There is one for each request: no names of fields on the wire."""
    assert msgspec.to_builtins(wire.Item("r", 5, True, 3, "t")) == ["r", 5, True, 3, "t"]
    assert msgspec.to_builtins(wire.Outcome(200, 10, 4, 2, 3)) == [200, 10, 4, 2, 3]
    assert wire.Item("r", 5) == wire.Item("r", 5, encoded=False, header_bytes=0, trace_id="")
    assert wire.Outcome(400, 10) == wire.Outcome(400, 10, header_bytes=0, rows=0, classes=0)


def test_the_lengths_are_little_endian_and_of_the_header_first():
    frame = wire.frame(wire.Unload(1), 258)
    assert frame[:8] == bytes([len(frame) - 8, 0, 0, 0, 2, 1, 0, 0])


WORK = wire.Work(7, 1, "json", [wire.Item("a", 3), wire.Item("b", 3)], True, 1, 1)
GOOD = wire.Done(7, [wire.Outcome(200, 5, 2, rows=1, classes=3), wire.Outcome(400, 2)], 0.1, 1)
GOOD_BYTES = 5 + 4 * (3 + wire.STATISTICS) + 2


def test_a_report_that_describes_its_body_passes():
    wire.check_done(GOOD, WORK, GOOD_BYTES)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"id": 6}, GOOD_BYTES),
        ({"outcomes": GOOD.outcomes[:1]}, GOOD_BYTES - 2),
        ({"outcomes": [*GOOD.outcomes, wire.Outcome(200, 0)]}, GOOD_BYTES),
        ({}, GOOD_BYTES + 1),
        ({}, GOOD_BYTES - 1),
        ({"outcomes": [wire.Outcome(200, -1), wire.Outcome(200, 1)]}, 0),
        ({"outcomes": [wire.Outcome(200, 1, -1), wire.Outcome(200, 0)]}, 1),
        ({"outcomes": [wire.Outcome(200, 1, 2), wire.Outcome(200, 0)]}, 1),
        ({"outcomes": [wire.Outcome(200, 40, 0, -2, 0), wire.Outcome(200, 0)]}, 0),
        ({"outcomes": [wire.Outcome(200, 0, 0, 2, -5), wire.Outcome(200, 0)]}, 0),
        ({"outcomes": [wire.Outcome(299, 1), wire.Outcome(200, 0)]}, 1),
        ({"outcomes": [wire.Outcome(999, 1), wire.Outcome(200, 0)]}, 1),
        ({"seconds": float("nan")}, GOOD_BYTES),
        ({"seconds": -0.1}, GOOD_BYTES),
        ({"rows": -1}, GOOD_BYTES),
    ],
)
def test_a_report_that_cannot_be_is_an_error(changes, size):
    with pytest.raises(ValueError, match=r"work|batch|outcome"):
        wire.check_done(msgspec.structs.replace(GOOD, **changes), WORK, size)


@pytest.mark.parametrize(("rows", "seconds"), [([1], []), ([0], [0.1]), ([1], [float("inf")]), ([2], [-1.0])])
def test_a_warm_up_that_cannot_be_is_an_error(rows, seconds):
    with pytest.raises(ValueError, match="warm-up"):
        wire.check_loaded(wire.Loaded(1, rows, seconds))
