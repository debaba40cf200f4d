"""The paths of the admin port: the Open Inference Protocol's repository extension, beside metrics and health.

A model is named, never brought: what a name means is for the server's catalogue to say. Files, configurations and
addresses that a client sends along are refused, whatever they hold.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec

from fettle.core.errors import UsageError
from fettle.core.names import check_name
from fettle.serve.http import Request, Respond, Response
from fettle.serve.inference import failed
from fettle.serve.models import Models
from fettle.serve.protocol import decode
from fettle.serve.refusal import Refusal, quote
from fettle.serve.routes import Route, Routes

_log = logging.getLogger("fettle.serve")
_SHARED = frozenset(
    {"/health", "/health/live", "/health/ready", "/health/startup", "/metrics", "/v2/health/live",
     "/v2/health/ready"}
)  # fmt: skip


class _IndexBody(msgspec.Struct, forbid_unknown_fields=True):
    ready: bool = False


class _ChangeBody(msgspec.Struct, forbid_unknown_fields=True):
    parameters: dict[str, msgspec.Raw] = {}


class AdminRoutes:
    """Built on the public port's routes: what both have is answered by the same handlers."""

    def __init__(self, *, models: Models, public: Routes) -> None:
        self._models = models
        self._public = public
        self._running: set[asyncio.Task[None]] = set()

    def find(self, path: str) -> Route:
        """Raises Refusal 404."""
        if path in _SHARED:
            return self._public.find(path)
        if path == "/v2/repository/index":
            return Route(path, {"POST": self._soon(self._index)}, "admin")
        match path.split("/"):
            case ["", "v2", "repository", "models", name, "load" | "unload" as change]:
                name = _checked(name)
                run = self._load if change == "load" else self._unload
                handler = self._soon(partial(run, name))
                return Route(f"/v2/repository/models/{{model}}/{change}", {"POST": handler}, "admin", name)
        raise Refusal(404, f"no such path: {quote(path)}")

    async def _index(self, request: Request) -> Response:
        wanted: _IndexBody = _body(request, _IndexBody)
        entries = await self._models.index()
        return Response.json([entry for entry in entries if not wanted.ready or entry.state == "READY"])

    async def _load(self, name: str, request: Request) -> Response:
        given: _ChangeBody = _body(request, _ChangeBody)
        if given.parameters:
            raise Refusal(
                400,
                f"load takes no parameters, got {quote(next(iter(given.parameters)))}: a model is loaded as the server"
                " knows it, never from files, configurations or addresses that a client sends",
            )
        await self._models.load(name)
        _log.info("%s was loaded by key '%s'", name, _name_of(request))
        return Response(200, b"")

    async def _unload(self, name: str, request: Request) -> Response:
        given: _ChangeBody = _body(request, _ChangeBody)
        for parameter, value in given.parameters.items():
            # Models here depend on no others, so either answer is the same.
            if parameter != "unload_dependents" or bytes(value) not in (b"true", b"false"):
                raise Refusal(
                    400, f"unload takes the parameter unload_dependents, true or false, got {quote(parameter)}"
                )
        await self._models.unload(name)
        _log.info("%s was unloaded by key '%s'", name, _name_of(request))
        return Response(200, b"")

    def _soon(self, make: Callable[[Request], Awaitable[Response]]) -> Callable[[Request, Respond], None]:
        """A handler whose answer takes a while; it goes on where the client goes away."""

        async def answer(request: Request, respond: Respond) -> None:
            try:
                response = await make(request)
            except Refusal as refusal:
                response = Response.refused(refusal)
            except Exception:
                response = failed(request)
            if not request.cancelled:
                respond(response)

        def handle(request: Request, respond: Respond) -> None:
            task = asyncio.get_running_loop().create_task(answer(request, respond))
            self._running.add(task)  # the loop itself holds tasks weakly
            task.add_done_callback(self._running.discard)

        return handle


def _name_of(request: Request) -> str:
    return request.key.name if request.key is not None else "none"


def _checked(name: str) -> str:
    """The name, where it can be one: nothing else goes further. Raises Refusal 404."""
    try:
        return check_name(name)
    except UsageError:
        raise Refusal(404, f"unknown model {quote(name)}: that is no model's name") from None


def _body(request: Request, kind: Any) -> Any:
    """The request's JSON; no body at all means no wishes. Raises Refusal 400 or 415."""
    if not request.body:
        return kind()
    content_type = request.header("content-type").partition(";")[0].strip().lower()
    if content_type not in ("", "application/json"):
        raise Refusal(415, f"Content-Type must be application/json, got {quote(content_type)}")
    if request.header("content-encoding").lower() not in ("", "identity"):
        raise Refusal(415, "this path takes plain JSON, without Content-Encoding")
    return decode(request.body, kind)
