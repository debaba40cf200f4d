"""The socket and the HTTP engine: Granian's embedded server on a listening socket of our own.

Our own socket gives three things that Granian's does not: the real port where port 0 was asked for, an error where
another process listens there already (Granian would share the port with it silently), and a way to stop taking
connections without losing one that the kernel has already accepted.
"""

from __future__ import annotations

import asyncio
import ctypes
import socket
import struct
import sys
from typing import Any

from granian._granian import SocketHolder
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.server.embed import Server

from fettle.core.errors import UsageError

BACKLOG = 2048
_SO_ATTACH_FILTER = 26
# Granian configures the logging of the whole process in its constructor; this makes that a change of nothing.
_NO_LOGGING = {"incremental": True, "handlers": {}, "loggers": {}}


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises UsageError for a bad address or a port in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        bound.bind((host, port))
        bound.listen(BACKLOG)
        bound.setblocking(False)
    except OSError as problem:
        bound.close()
        reason = problem.strerror or str(problem)
        raise UsageError(f"cannot listen on {host}:{port}: {reason}; choose another host or port") from None
    return bound


def address_of(bound: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Listener:
    """Granian on a bound socket, inside the running event loop."""

    def __init__(self, application: Any, bound: socket.socket, *, max_connections: int, idle_timeout_s: float) -> None:
        self._bound = bound
        self._server = _OnSocket(
            application,
            descriptor=bound.dup().detach(),  # Granian closes the descriptor it is given
            interface=Interfaces.RSGI,
            http=HTTPModes.http1,
            http1_settings=HTTP1Settings(header_read_timeout=int(idle_timeout_s * 1000)),
            websockets=False,
            backlog=BACKLOG,
            backpressure=max_connections,
            log_enabled=False,
            log_dictconfig=_NO_LOGGING,
        )
        self._task: asyncio.Task[None] | None = None

    def start(self) -> asyncio.Task[None]:
        """Begin to accept. The task ends when the server does."""
        self._task = asyncio.get_running_loop().create_task(self._server.serve())
        return self._task

    def refuse_connections(self) -> None:
        """Let no new connection begin, while those the kernel already accepted are still taken up.

        A classic BPF program that drops every packet is put before the listening socket; established connections
        have sockets of their own and do not feel it. A client that connects now gets no answer to its SYN, tries
        again, and is refused once the socket is closed: before it has sent anything. Linux only; elsewhere a
        connection may be reset in the moment of closing.
        """
        if sys.platform != "linux":
            return
        drop = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
        program = struct.pack("HL", 1, ctypes.addressof(drop))
        try:
            self._bound.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        except OSError:
            return  # a sandbox may forbid it; closing without it risks only the last microseconds

    async def stop(self, timeout_s: float) -> bool:
        """Close the socket and idle connections, let requests end. False where connections were still open then."""
        self._bound.close()
        if self._task is None:
            return True
        self._server.stop()  # type: ignore[no-untyped-call]
        done, _ = await asyncio.wait({self._task}, timeout=timeout_s)
        return bool(done)


class _OnSocket(Server):
    """Granian binds by address, with SO_REUSEPORT; this hands it a listening socket instead."""

    def __init__(self, target: Any, *, descriptor: int, **options: Any) -> None:
        super().__init__(target, **options)
        self._descriptor = descriptor

    def _init_shared_socket(self) -> None:
        self._ssp = None
        self._shd: Any = SocketHolder(self._descriptor, False, BACKLOG)  # type: ignore[call-arg]
