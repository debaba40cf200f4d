"""Alerts as JSON, posted to a URL that the operator gave."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import SplitResult, unquote, urlsplit

from fettle.core import codec
from fettle.core.errors import MonitorError
from fettle.monitor.alerts._base import Alert, AlertChannel, DeliveryFailed

_LARGEST_BACKOFF_S = 30.0
# Worth another try besides 5xx: request timeout, too early, too many requests.
_PASSING = (408, 425, 429)


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook(AlertChannel):
    """POST of the alert as a JSON object; any 2xx is delivered.

    url: http or https; user and password in it are sent as Basic authorization. Path and query are often secrets
        (Slack, Teams), so messages name scheme, host and port only, and `repr` leaves the URL out.
    timeout_s: for one attempt, from the connection to the status line, however slowly the receiver drips.
    attempts: in all; a refused connection, a timeout, 5xx, 408, 425 and 429 are tried again after
        backoff_s · 2^(attempt - 1), at most 30 s; any other answer ends it. Redirects are never followed: they could
        lead an alert to another host.
    sleep: replaced in tests.

    The alert's key is sent as the header Idempotency-Key too. Proxy variables of the environment are not used.
    Raises MonitorError for a URL that is not http or https.

    >>> Webhook(url="https://user:secret@hooks.example.org/services/T0/secret")
    Webhook(timeout_s=5.0, attempts=3, backoff_s=0.5)
    """

    url: str = field(repr=False)
    timeout_s: float = 5.0
    attempts: int = 3
    backoff_s: float = 0.5
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)

    def __post_init__(self) -> None:
        _parse(self.url)
        if not (self.timeout_s > 0 and self.attempts >= 1 and self.backoff_s >= 0):
            raise MonitorError(
                "a webhook needs timeout_s above 0, at least 1 attempt and backoff_s of at least 0, "
                f"got {self.timeout_s}, {self.attempts} and {self.backoff_s}"
            )

    @property
    def identity(self) -> str:
        return f"webhook:{hashlib.sha256(self.url.encode()).hexdigest()[:16]}"

    def deliver(self, alert: Alert) -> None:
        parts = _parse(self.url)
        body = codec.canonical(alert)
        headers = {"Content-Type": "application/json", "User-Agent": "fettle", "Idempotency-Key": alert.key}
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode("ascii")
        reason = ""
        for attempt in range(1, self.attempts + 1):
            try:
                status = _post(parts, body, headers, timeout_s=self.timeout_s)
            except (OSError, http.client.HTTPException) as problem:
                # The class alone: an HTTPException may quote what the receiver sent.
                reason = "no answer in time" if isinstance(problem, TimeoutError) else type(problem).__name__
            else:
                if 200 <= status < 300:
                    return
                reason = f"status {status}"
                if status < 500 and status not in _PASSING:
                    moved = ": redirects are not followed, give the final URL" if 300 <= status < 400 else ""
                    raise DeliveryFailed(f"a webhook must answer 2xx, got {reason} from {_origin(parts)}{moved}")
            if attempt < self.attempts:
                self.sleep(min(_LARGEST_BACKOFF_S, self.backoff_s * 2 ** (attempt - 1)))
        raise DeliveryFailed(
            f"a webhook must answer 2xx, got {reason} from {_origin(parts)} in {self.attempts} attempts"
        )


def _parse(url: str) -> SplitResult:
    """The URL's parts. Raises MonitorError, without the URL in its message."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    # http.client would refuse these later, quoting the path.
    if not usable or not url.isascii() or any(character <= " " or character == "\x7f" for character in url):
        raise MonitorError("a webhook's URL must be http:// or https:// with a host, in ASCII without spaces")
    return parts


def _origin(parts: SplitResult) -> str:
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _post(parts: SplitResult, body: bytes, headers: dict[str, str], *, timeout_s: float) -> int:
    """One attempt; the status. Raises OSError (TimeoutError after timeout_s) or HTTPException."""
    assert parts.hostname is not None
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=timeout_s, context=context)
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    late = threading.Event()

    def cut_off() -> None:
        late.set()
        held = connection.sock
        if held is not None:
            # Not held.shutdown: that of a TLS socket pulls its state from under the thread that reads.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(held, socket.SHUT_RDWR)

    # The socket's own timeout starts anew with every byte; this one does not.
    deadline = threading.Timer(timeout_s, cut_off)
    deadline.daemon = True
    deadline.start()
    try:
        connection.connect()
        if late.is_set():
            raise TimeoutError
        connection.request("POST", path, body=body, headers=headers)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        if late.is_set():
            raise TimeoutError from None
        raise
    finally:
        deadline.cancel()
        connection.close()
