"""Who is let in: the API key of an HTTP request, and on the admin port the name under which it came."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from ipaddress import ip_address

from fettle.serve.http import Request
from fettle.serve.key_file import KeyFile
from fettle.serve.refusal import Refusal, quote
from fettle.serve.routes import Route

_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?")


class Guard:
    """Checks a request when its header is there, before its body is read.

    keys: None lets everyone in. hosts: the names by which the port may be called, None for any: a page that a browser
    runs can be made to reach a local port by DNS rebinding, but it cannot choose the Host that the browser sends.
    """

    def __init__(self, keys: KeyFile | None = None, *, hosts: Iterable[str] | None = None) -> None:
        self._keys = keys
        self._hosts = None if hosts is None else _LOCAL | {name.lower() for name in hosts}

    def route(self, request: Request, find: Callable[[str], Route]) -> Route:
        """The route of a request that may take it. Raises Refusal 401, 403, 404 or 421.

        Who has no key is not told which paths and models exist.
        """
        if self._hosts is not None:
            self._check_host(request.header("host"))
        if self._keys is None:
            return find(request.path)
        keys = self._keys.keys
        try:
            route = find(request.path)
        except Refusal:
            key = request.key = keys.identify(presented(request.headers))
            if key.models == "*":
                raise
            raise Refusal(404, f"no such path or model: {quote(request.path)}") from None
        if route.action is not None:
            request.key = keys.identify(presented(request.headers))
            request.key.check(route.model, route.action)
        return route

    def _check_host(self, given: str) -> None:
        match = _HOST.fullmatch(given.strip().lower())
        if match is None or (match[1] or match[2]) not in (self._hosts or ()):
            raise Refusal(421, f"this port does not answer to the host {quote(given)}: call it by a name it is given")


def presented(headers: Mapping[str, str]) -> str | None:
    """The key a client sent, by `Authorization: Bearer KEY` or `X-API-Key: KEY`; None where it sent none.

    >>> presented({"authorization": "bearer abc"}), presented({"authorization": "Basic abc"})
    ('abc', None)
    """
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
