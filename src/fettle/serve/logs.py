"""Log lines for people or for programs, each on one line, whatever a client has sent.

A call of a logger may give what the line is about, `extra=about(...)`: JSON has it in fields of their own.
"""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime
from typing import Any, Literal, TextIO, get_args

from fettle.core.errors import UsageError
from fettle.serve.http import Request

Format = Literal["text", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)
# The variable of the environment by which a server tells its workers.
LOG_FORMAT = "FETTLE_LOG_FORMAT"

_MESSAGE_LETTERS = 2000
_VALUE_LETTERS = 200
# The end of a traceback says most.
_EXCEPTION_LETTERS = 8000
# What moves a cursor, ends a line, or turns the direction of what follows.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def about(request: Request | None = None, **fields: str | int | float | None) -> dict[str, Any]:
    """The `extra` of a logger's call. fields: such as model, version, request_id; those without a value are left out.

    >>> about(model="digits", version=3, trace_id="")
    {'about': {'model': 'digits', 'version': 3}}
    """
    known: dict[str, Any] = {}
    if request is not None:
        known["request_id"] = request.id
        if request.traced is not None:
            known["trace_id"] = request.traced.trace_id
    return {"about": {**known, **{name: value for name, value in fields.items() if value not in (None, "")}}}


def escaped(text: str) -> str:
    """The text on one line, without what a terminal would obey.

    >>> escaped("a" + chr(10) + chr(27) + "[31m")
    'a\\\\n\\\\x1b[31m'
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class JsonFormatter(logging.Formatter):
    """One JSON object: time, level, logger, process, message, what the line is about, exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": _cut(record.getMessage(), _MESSAGE_LETTERS),
        }
        for name, value in getattr(record, "about", {}).items():
            line.setdefault(name, _cut(value, _VALUE_LETTERS) if isinstance(value, str) else value)
        if trace := self._exception(record):
            line["exception"] = trace
        # ASCII only, and DEL is the one control character that JSON leaves as it is.
        return json.dumps(line, default=str).replace("\x7f", "\\u007f")

    def _exception(self, record: logging.LogRecord) -> str:
        return self.formatException(record.exc_info)[-_EXCEPTION_LETTERS:] if record.exc_info else ""


class TextFormatter(JsonFormatter):
    """One line, and the lines of an exception below it, all of them indented: so no client can forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        message = escaped(_cut(record.getMessage(), _MESSAGE_LETTERS))
        line = f"{_time(record)} {record.levelname.lower()} {record.name}: {message}"
        below = [f"\n    {escaped(part)}" for part in self._exception(record).split("\n") if part]
        return line + "".join(below)


def format_for(name: str, *, terminal: bool) -> Format:
    """The form by its name; "auto" is text on a terminal, where a person reads, and else JSON, for programs.

    Raises UsageError for another name.

    >>> format_for("auto", terminal=False), format_for("text", terminal=False)
    ('json', 'text')
    """
    if name == "auto":
        return "text" if terminal else "json"
    for form in FORMATS:
        if name == form:
            return form
    raise UsageError(f"the log format must be one of auto, {', '.join(FORMATS)}, got {name!r}")


def configure(form: Format, *, stream: TextIO | None = None) -> None:
    """Write what all loggers of this process say to the stream, stderr by default. For whoever owns the process.

    That is warnings of any library, and what fettle says from "info" upwards.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("fettle").setLevel(logging.INFO)
    logging.captureWarnings(True)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[:letters]}..."
