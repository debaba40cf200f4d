import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.serve.http import Request, Response
from fettle.serve.trace_context import TraceContext, parse_traceparent, parse_tracestate, trace_context

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (GOOD, 1),
        (f"00-{TRACE}-{SPAN}-00", 0),
        (f"00-{TRACE}-{SPAN}-03", 3),
        (f"00-{TRACE}-{SPAN}-ff", 3),  # flags that nobody has defined are not passed on
        (f"01-{TRACE}-{SPAN}-01", 1),
        (f"cc-{TRACE}-{SPAN}-01-what the future will be like", 1),
        (f"cc-{TRACE}-{SPAN}-01-", 1),
        (f"fe-{TRACE}-{SPAN}-01", 1),
    ],
)
def test_well_formed_traceparents_of_known_and_later_versions_are_read(text, flags):
    assert parse_traceparent(text) == (TRACE, SPAN, flags)


@pytest.mark.parametrize(
    "text",
    [
        "", "-", "00", GOOD + "-", GOOD + "-01", GOOD + " ", " " + GOOD, GOOD + "\n", GOOD.upper(), f"{GOOD},{GOOD}",
        f"{GOOD}, {GOOD}", f"ff-{TRACE}-{SPAN}-01", f"FF-{TRACE}-{SPAN}-01", f"0-{TRACE}-{SPAN}-01",
        f"000-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}0-{SPAN}-01", f"00-{TRACE}-{SPAN[1:]}-01", f"00-{TRACE}-{SPAN}-1", f"00-{TRACE}-{SPAN}-0g",
        f"00-{TRACE}-{SPAN}", f"00_{TRACE}_{SPAN}_01", f"01-{TRACE}-{SPAN}-01.what", f"01-{TRACE}-{SPAN}-01what",
        f"cc-{'0' * 32}-{SPAN}-01", f"00-{TRACE[:-1]}g-{SPAN}-01", f"0٠-{TRACE}-{SPAN}-01",
    ],
)  # fmt: skip
def test_malformed_traceparents_are_ignored_and_a_new_trace_begins(text):
    assert parse_traceparent(text) is None
    made = trace_context({"traceparent": text, "tracestate": "congo=1"})
    assert (made.parent_id, made.state, made.flags) == ("", "", 2)
    assert made.trace_id != TRACE


@given(st.text(max_size=80))
def test_no_text_raises_and_what_is_read_has_the_form_of_ids(text):
    found = parse_traceparent(text)
    assert found is None or (len(found[0]), len(found[1])) == (32, 16)
    parse_tracestate(text)


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=8, max_size=8), st.integers(0, 3))
def test_what_we_write_is_what_we_read(trace, span, flags):
    written = TraceContext(trace.hex(), span.hex(), flags).header
    expected = (trace.hex(), span.hex(), flags) if any(trace) and any(span) else None
    assert parse_traceparent(written) == expected


def test_our_own_span_is_new_each_time_and_its_parent_is_the_callers():
    made = [trace_context({"traceparent": GOOD, "tracestate": "congo=t61rcWkgMzE"}) for _ in range(100)]
    assert {one.trace_id for one in made} == {TRACE}
    assert {one.parent_id for one in made} == {SPAN}
    assert {one.state for one in made} == {"congo=t61rcWkgMzE"}
    assert len({one.span_id for one in made} - {SPAN}) == 100


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a=1", "a=1"),
        ("a=1,b=2", "a=1,b=2"),
        ("a=1 \t,\tb=2", "a=1,b=2"),
        (",,a=1,,", "a=1"),
        ("fw529a3039@dt=FfSiwAAAAAA", "fw529a3039@dt=FfSiwAAAAAA"),
        ("0a_-*/=!~ +", "0a_-*/=!~ +"),
        (",".join(f"k{n}=1" for n in range(32)), ",".join(f"k{n}=1" for n in range(32))),
        (f"{'k' * 256}={'v' * 256}", f"{'k' * 256}={'v' * 256}"),
        ("", ""),
    ],
)
def test_well_formed_tracestates_are_kept(text, kept):
    assert parse_tracestate(text) == kept


@pytest.mark.parametrize(
    "text",
    [
        "a", "a=", "=1", "A=1", "a=1=2", "a=ü", "a=\x01", "a b=1", "a=1;b=2,c", "@a=1", "a=1,a=2",
        ",".join(f"k{n}=1" for n in range(33)), f"{'k' * 257}=1", f"k={'v' * 257}", "a=\x7f",
    ],
)  # fmt: skip
def test_a_malformed_tracestate_is_dropped_and_the_trace_kept(text):
    assert parse_tracestate(text) == ""
    assert trace_context({"traceparent": GOOD, "tracestate": text}).trace_id == TRACE


def test_where_nobody_asks_no_trace_is_made():
    request = Request("GET", "/", {})
    assert request.traced is None
    made = request.trace
    assert request.traced is made
    assert Request("GET", "/", {"traceparent": "bad"}).traced is not None


def test_the_answers_header_is_a_line_of_its_own():
    lines = Response(200, b"", headers={"vary": "x"}).encoded(request_id="a", close=False, traceparent=GOOD)
    assert f"\r\ntraceparent: {GOOD}\r\nvary: x\r\n".encode() in lines
    assert b"traceparent" not in Response(200, b"").encoded(request_id="a", close=False)


def test_a_real_answer_continues_the_callers_trace_and_only_where_there_is_one(images):
    assert "traceparent" not in images.get("/health").headers
    for path in ("/health", "/nope", "/predict"):
        answered = images.get(path, headers={"traceparent": GOOD}).headers["traceparent"]
        trace_id, span_id, flags = parse_traceparent(answered)
        assert (trace_id, flags) == (TRACE, 1)
        assert span_id != SPAN
    fresh = images.get("/health", headers={"traceparent": GOOD.upper()}).headers["traceparent"]
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-02", fresh)
    assert TRACE not in fresh
    twice = images.get("/health", headers=[("traceparent", GOOD), ("traceparent", GOOD)]).headers["traceparent"]
    assert TRACE not in twice


def test_what_a_connection_refuses_by_itself_continues_the_trace_too(images):
    response = images.post("/predict", headers={"traceparent": GOOD}, content=bytes(3_000_000))
    assert response.status_code == 413
    assert parse_traceparent(response.headers["traceparent"])[0] == TRACE
