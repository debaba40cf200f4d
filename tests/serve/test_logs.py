import io
import json
import logging
import re
import sys
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.errors import UsageError
from fettle.serve.http import Request
from fettle.serve.logs import JsonFormatter, TextFormatter, about, configure, format_for
from fettle.serve.options import ServeOptions

INFER = "/v2/models/tiny/infer"
JSON = {"content-type": "application/json"}
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
NASTY = 'a\r\n{"level":"error","message":"forged"}\x1b[2J\x1b[31m\x00\x7f\x9b\u2028\u202e"\\'


def record(message="hello", *, exc_info=None, **fields):
    made = logging.LogRecord("fettle.serve", logging.ERROR, "f.py", 1, "%s", (message,), exc_info)
    vars(made).update(about(**fields))
    return made


def failure(message):
    try:
        raise ValueError(message)
    except ValueError:
        return sys.exc_info()


def test_a_json_line_has_time_level_logger_message_and_what_it_is_about():
    line = json.loads(JsonFormatter().format(record(request_id="r", trace_id=TRACE, model="tiny", version=3)))
    when = datetime.fromisoformat(line.pop("time"))
    assert when.utcoffset().total_seconds() == 0
    assert abs((datetime.now(UTC) - when).total_seconds()) < 60
    assert line.pop("process") > 0
    assert line == {
        "level": "error", "logger": "fettle.serve", "message": "hello", "request_id": "r", "trace_id": TRACE,
        "model": "tiny", "version": 3,
    }  # fmt: skip


def test_an_exception_is_one_field_with_its_traceback():
    text = JsonFormatter().format(record(exc_info=failure("why")))
    assert "\n" not in text
    line = json.loads(text)
    assert line["exception"].startswith("Traceback (most recent call last):\n")
    assert line["exception"].endswith("ValueError: why")


@pytest.mark.parametrize("make", [JsonFormatter, TextFormatter])
@given(text=st.text(max_size=200))
def test_whatever_is_said_is_one_line_of_printable_letters(make, text):
    line = make().format(record(text, request_id=text))
    assert len(line.splitlines()) == 1
    assert line.isprintable() or make is TextFormatter
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", line)
    if make is JsonFormatter and len(text) < 200:
        assert json.loads(line)["message"] == text
        assert json.loads(line).get("request_id", "") == text


def test_no_exception_can_forge_a_line_of_the_text_log():
    whole = TextFormatter().format(record(exc_info=failure(NASTY)))
    first, *below = whole.split("\n")
    assert first.endswith("error fettle.serve: hello")
    assert below
    assert all(line.startswith("    ") for line in below)
    assert "\x1b" not in whole
    assert "\r" not in whole


def test_long_texts_are_cut_and_the_end_of_a_traceback_is_kept():
    line = json.loads(JsonFormatter().format(record("m" * 9999, model="x" * 999, exc_info=failure("e" * 9000 + "end"))))
    assert len(line["message"]) == 2003
    assert len(line["model"]) == 203
    assert len(line["exception"]) == 8000
    assert line["exception"].endswith("end")


def test_a_field_can_hide_none_of_the_lines_own():
    made = record()
    made.about = {"level": "info", "message": "forged", "path": "/x"}
    line = json.loads(JsonFormatter().format(made))
    assert (line["level"], line["message"], line["path"]) == ("error", "hello", "/x")


def test_a_trace_is_named_only_where_there_is_one():
    assert set(about(Request("GET", "/", {}))["about"]) == {"request_id"}
    assert about(Request("GET", "/", {"traceparent": PARENT}))["about"]["trace_id"] == TRACE


@pytest.mark.parametrize(("name", "terminal", "form"), [
    ("auto", True, "text"), ("auto", False, "json"), ("text", False, "text"), ("json", True, "json"),
])  # fmt: skip
def test_the_form_follows_the_terminal_unless_it_is_named(name, terminal, form):
    assert format_for(name, terminal=terminal) == form


def test_an_unknown_form_is_a_clear_error():
    with pytest.raises(UsageError, match="one of auto, text, json, got 'xml'"):
        format_for("xml", terminal=True)
    with pytest.raises(UsageError, match="log_format must be one of text, json, got 'auto'"):
        ServeOptions(log_format="auto")


def test_configure_writes_warnings_of_all_and_what_fettle_says():
    root, ours = logging.getLogger(), logging.getLogger("fettle")
    before = root.handlers[:], root.level, ours.level
    stream = io.StringIO()
    try:
        configure("json", stream=stream)
        logging.getLogger("other").info("no")
        logging.getLogger("other").warning("yes")
        logging.getLogger("fettle.serve").info("%s", NASTY, extra=about(model=NASTY))
    finally:
        root.handlers[:], root.level, ours.level = before
        logging.captureWarnings(False)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["logger"], line["message"]) for line in lines] == [("other", "yes"), ("fettle.serve", NASTY)]
    assert lines[1]["model"] == NASTY


def test_every_line_of_the_front_and_of_the_workers_is_json_and_names_request_and_trace(start, shelf, kit):
    server = start(shelf.root, process=True, access_log=True, log_format="json").wait_ready()
    with server.client() as client:
        good = client.post(INFER, content=kit.body_of(), headers={**JSON, "x-request-id": "good"})
        headers = {**JSON, "x-request-id": "bad", "traceparent": PARENT}
        assert client.post(INFER, content=kit.body_of(666.0), headers=headers).status_code == 500
        client.get("/nope%0d%0a%1b[31mforged%22" + "a" * 500, headers={"x-request-id": '","forged":"'})
        client.request("BREW%0A" + "X" * 50, "/health")
    server.signal()
    _, err = server.process.communicate(timeout=30)
    assert server.process.returncode == 0
    lines = [json.loads(line) for line in err.splitlines()]
    assert all({"time", "level", "logger", "process", "message"} <= set(line) for line in lines)
    by_request = {}
    for line in lines:
        by_request.setdefault(line.get("request_id"), []).append(line)
    (line,) = by_request["good"]
    assert (line["method"], line["path"], line["status"], line["model"], line["version"]) == (
        "POST",
        INFER,
        200,
        "tiny",
        1,
    )
    assert line["bytes"] == len(good.content)
    assert line["ms"] > 0
    assert good.headers["traceparent"].split("-")[1] == line["trace_id"]
    worker, front = by_request["bad"]
    assert worker["process"] != front["process"]
    assert (worker["level"], worker["trace_id"], worker["model"], worker["version"]) == ("error", TRACE, "tiny", 1)
    assert worker["exception"].startswith("Traceback")
    assert (front["level"], front["trace_id"], front["status"]) == ("info", TRACE, 500)
    (nope,) = [line for line in lines if line.get("path", "").startswith("/nope")]
    assert nope["path"].startswith('/nope\r\n\x1b[31mforged"aaa')
    assert len(nope["path"]) == 200
    assert re.fullmatch("[0-9a-f]{32}", nope["request_id"])
    assert any("answers now" in line["message"] and line["model"] == "tiny" for line in lines)


def test_what_clients_send_can_neither_forge_a_line_of_text_nor_move_the_cursor(start, shelf, kit):
    server = start(shelf.root, process=True, access_log=True, log_format="text").wait_ready()
    with server.client() as client:
        client.get("/nope%0d%0a2026-01-01T00:00:00.000000Z%20error%20forged%1b[2J%e2%80%ae")
    server.signal()
    _, err = server.process.communicate(timeout=30)
    assert all(
        re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z \w+ fettle\.serve: ", line) for line in err.splitlines()
    )
    (line,) = [line for line in err.splitlines() if "/nope" in line]
    assert r"GET /nope\r\n2026-01-01T00:00:00.000000Z error forged\x1b[2J\u202e: 404 in" in line
    assert "\x1b" not in err


def test_without_an_access_log_no_request_is_logged(start, shelf, caplog):
    server = start(shelf).wait_ready()
    with caplog.at_level("INFO", "fettle.serve"), server.client() as client:
        client.get("/health")
    assert not [one for one in caplog.records if "/health" in one.getMessage()]
