"""The gRPC port: every call becomes a request of the application, and its response the call's end.

What gRPC brings of its own is turned into what the application knows: metadata into headers, the client's deadline into
X-Request-Timeout-Ms, a cancelled call into a client that has gone. Limits are those of HTTP where both have them.
"""

from __future__ import annotations

import asyncio
import math
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
        self._server.add_generic_rpc_handlers(
            tuple(
                grpc.method_handlers_generic_handler(
                    service,
                    {
                        method: grpc.unary_unary_rpc_method_handler(partial(self._call, f"/{service}/{method}"))
                        for method in methods
                    },
                )
                for service, methods in calls.services.items()
            )
        )
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

    async def _call(self, path: str, content: bytes, context: Any) -> bytes:
        request = Request("POST", path, _headers_of(context))
        request.body = content
        answered: asyncio.Future[Response] = asyncio.get_running_loop().create_future()

        def respond(response: Response) -> None:
            if not answered.done():
                answered.set_result(response)

        try:
            self._application.begin(request)
            if self._refusing:
                raise Refusal(503, "the server is shutting down", retry_after_s=1)
        except Refusal as refusal:
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


def _headers_of(context: Any) -> dict[str, str]:
    """The call's metadata, and its deadline where that is sooner than a time that the metadata says."""
    headers: dict[str, str] = {}
    for key, value in context.invocation_metadata() or ():
        if isinstance(value, str) and key not in _OF_TRANSPORT:
            headers[key] = f"{headers[key]}, {value}" if key in headers else value
    left_s = context.time_remaining()
    if left_s is not None:
        left_ms = max(1, math.ceil(left_s * 1000))
        said = headers.get(TIMEOUT, "")
        if not said or (said.isdecimal() and int(said) > left_ms):
            headers[TIMEOUT] = str(min(left_ms, 10**9 - 1))
    return headers


def _trailing_of(request: Request, response: Response) -> tuple[tuple[str, str], ...]:
    """What HTTP says in the header of an answer."""
    trace = request.traced
    traced = () if trace is None else (("traceparent", trace.header),)
    return (("x-request-id", request.id), *traced, *(response.headers or {}).items())


def _message_of(response: Response) -> str:
    """The sentence of `{"error": "..."}`, the one form of every refusal."""
    return str(msgspec.json.decode(response.body)["error"])
