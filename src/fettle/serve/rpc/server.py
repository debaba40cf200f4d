"""The gRPC port: every call becomes a request of the application, and its response the call's end.

What gRPC brings of its own is turned into what the application knows: metadata into headers, the client's deadline into
X-Request-Timeout-Ms, a cancelled call into a client that has gone. Limits are those of HTTP where both have them.
Whether a call is let in is decided by its metadata, before its message is read: whoever has no key sends none.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import grpc
import grpc.aio
import msgspec

from fettle.core.errors import UsageError
from fettle.serve.app import Application
from fettle.serve.http import Request, Response
from fettle.serve.inference import TIMEOUT
from fettle.serve.options import ServeOptions
from fettle.serve.refusal import Refusal
from fettle.serve.rpc.calls import Calls
from fettle.serve.rpc.codes import code_of

# Streams of one connection that may run at the same time; more of them wait at the client.
_MAX_STREAMS = 1024
_PING_S = 60.0
_PING_TIMEOUT_S = 20.0
_SHORTEST_PING_S = 5.0
_CLOSE_S = 0.5
# gRPC undoes compression itself, so a client's word on it must not reach the application.
_OF_TRANSPORT = frozenset({"content-encoding", "accept-encoding", "content-type", "content-length"})


class RpcServer:
    """One gRPC port of a server. Belongs to one event loop.

    credentials: of TLS, None for a port in the clear.
    """

    def __init__(
        self,
        *,
        options: ServeOptions,
        application: Application,
        calls: Calls,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        assert options.grpc_port is not None
        self._application = application
        self._server = grpc.aio.server(options=_limits(options), maximum_concurrent_rpcs=options.max_connections)
        methods = frozenset(f"/{service}/{method}" for service, found in calls.services.items() for method in found)
        self._server.add_generic_rpc_handlers((_Entrance(methods, self._enter),))
        self.address = self._bind(options.host, options.grpc_port, credentials)
        self._refusing = False

    @property
    def in_flight(self) -> int:
        """Calls being answered."""
        return self._application.in_flight

    @property
    def begun(self) -> int:
        """Calls that ever began, refused ones too."""
        return self._application.begun

    async def start(self) -> None:
        """Open the port."""
        await self._server.start()

    def refuse_calls(self) -> None:
        """Answer what comes from now on with UNAVAILABLE, while running calls go on.

        Not `stop` of gRPC: that one cancels calls which are under way to it, and no client tries those again.
        """
        self._refusing = True

    async def close(self) -> None:
        """Close the port, once what was answered has been sent."""
        await self._server.stop(_CLOSE_S)

    def _bind(self, host: str, port: int, credentials: grpc.ServerCredentials | None) -> str:
        """HOST:PORT. Raises UsageError where it cannot be had."""
        where = f"[{host}]" if ":" in host else host
        wanted = f"{where}:{port}"
        try:
            if credentials is None:
                bound = self._server.add_insecure_port(wanted)
            else:
                bound = self._server.add_secure_port(wanted, credentials)
        except RuntimeError:
            bound = 0
        if not bound:
            raise UsageError(f"cannot listen on {wanted} for gRPC: the address is in use or not of this machine")
        return f"{where}:{bound}"

    def _enter(self, path: str, metadata: Iterable[tuple[str, str | bytes]]) -> grpc.RpcMethodHandler:
        """How to go on with a call of which nothing but the metadata is read."""
        request = Request("POST", path, _headers_of(metadata))
        try:
            self._application.begin(request)
        except Refusal as refusal:
            # As if the client streamed: gRPC reads the message of any other call before it asks us.
            return grpc.stream_unary_rpc_method_handler(partial(self._refuse, request, refusal))
        return grpc.unary_unary_rpc_method_handler(partial(self._call, request))

    async def _refuse(self, request: Request, refusal: Refusal, _: Any, context: Any) -> None:
        self._application.refused(request, refusal)
        response = Response.refused(refusal)
        await context.abort(code_of(response.status), _message_of(response), _trailing_of(request, response))

    async def _call(self, request: Request, content: bytes, context: Any) -> bytes:
        _heed_deadline(request, context)
        request.body = content
        answered: asyncio.Future[Response] = asyncio.get_running_loop().create_future()

        def respond(response: Response) -> None:
            if not answered.done():
                answered.set_result(response)

        if self._refusing:
            refusal = Refusal(503, "the server is shutting down", retry_after_s=1)
            self._application.refused(request, refusal)
            respond(Response.refused(refusal))
        else:
            self._application.handle(request, respond)
        try:
            response = await answered
        except asyncio.CancelledError:
            if answered.cancelled():
                self._application.cancelled(request)
            raise
        trailing = _trailing_of(request, response)
        if response.status != 200:
            await context.abort(code_of(response.status), _message_of(response), trailing)
        context.set_trailing_metadata(trailing)
        return response.body


class _Entrance:
    """A GenericRpcHandler, which gRPC asks when a call begins. methods: their paths; gRPC itself refuses all others."""

    def __init__(
        self,
        methods: frozenset[str],
        enter: Callable[[str, Iterable[tuple[str, str | bytes]]], grpc.RpcMethodHandler],
    ) -> None:
        self._methods = methods
        self._enter = enter

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        path = handler_call_details.method
        return self._enter(path, handler_call_details.invocation_metadata or ()) if path in self._methods else None


def _limits(options: ServeOptions) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # else a second server on the same port would take half of the calls
        ("grpc.max_receive_message_length", options.max_body_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", options.max_header_bytes),
        ("grpc.absolute_max_metadata_size", options.max_header_bytes),
        ("grpc.max_concurrent_streams", _MAX_STREAMS),
        ("grpc.max_connection_idle_ms", math.ceil(options.idle_timeout_s * 1000)),
        ("grpc.keepalive_time_ms", math.ceil(_PING_S * 1000)),
        ("grpc.keepalive_timeout_ms", math.ceil(_PING_TIMEOUT_S * 1000)),
        ("grpc.http2.min_ping_interval_without_data_ms", math.ceil(_SHORTEST_PING_S * 1000)),
    ]


def _headers_of(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for key, value in metadata:
        if isinstance(value, str) and key not in _OF_TRANSPORT:
            headers[key] = f"{headers[key]}, {value}" if key in headers else value
    return headers


def _heed_deadline(request: Request, context: Any) -> None:
    """The call's own, where it is sooner than a time that the metadata says."""
    left_s = context.time_remaining()
    if left_s is not None:
        left_ms = max(1, math.ceil(left_s * 1000))
        said = request.headers.get(TIMEOUT, "")
        if not said or (said.isdecimal() and int(said) > left_ms):
            request.headers[TIMEOUT] = str(min(left_ms, 10**9 - 1))


def _trailing_of(request: Request, response: Response) -> tuple[tuple[str, str], ...]:
    """What HTTP says in the header of an answer."""
    trace = request.traced
    traced = () if trace is None else (("traceparent", trace.header),)
    return (("x-request-id", request.id), *traced, *(response.headers or {}).items())


def _message_of(response: Response) -> str:
    """The sentence of `{"error": "..."}`, the one form of every refusal."""
    return str(msgspec.json.decode(response.body)["error"])
