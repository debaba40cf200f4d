"""An answer that is not the one asked for: a status and a sentence for the client, never internals."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fettle.core.errors import FettleError

_PATH = re.compile(r"(?:[A-Za-z]:)?(?:[\\/][^\s\\/:,;'\"]+){2,}[\\/]?")


class Refusal(Exception):
    """Raised anywhere between the socket and the model; the application turns it into `{"error": message}`.

    >>> Refusal(429, "the queue is full", retry_after_s=1).headers
    {'retry-after': '1'}
    """

    def __init__(
        self, status: int, message: str, *, retry_after_s: int | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers: dict[str, str] = dict(headers or {})
        if retry_after_s is not None:
            self.headers["retry-after"] = str(retry_after_s)


def quote(text: object, limit: int = 80) -> str:
    """Text of a client, safe to repeat in a message: quoted, escaped, cut.

    >>> quote("a" * 100, 5), quote(chr(10))
    ("'aaaaa'...", "'\\\\n'")
    """
    text = str(text)
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."


def reason_of(problem: BaseException) -> str:
    """The reason in words for `/health`, which anyone may read: without paths, and without internals of others.

    >>> reason_of(FettleError("no manifest in /srv/fettle/blobs/ab"))
    'no manifest in [path]'
    >>> reason_of(ValueError("secret"))
    'it failed with ValueError: see the log'
    """
    if not isinstance(problem, FettleError):
        return f"it failed with {type(problem).__name__}: see the log"
    return _PATH.sub("[path]", str(problem))[:500]
