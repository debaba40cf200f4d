"""The listening socket: opened with clear errors, and closed without losing a connection.

Our own socket gives the real port where port 0 was asked for, an error where another process listens there already,
and a way to stop taking connections without losing one that the kernel has already accepted.
"""

from __future__ import annotations

import asyncio
import ctypes
import socket
import ssl
import struct
import sys
from collections.abc import Callable

from fettle.core.errors import UsageError

BACKLOG = 2048
_SO_ATTACH_FILTER = 26
# The flags of the TCP header, byte 13: where SYN is set keep 0 bytes of the packet, else all.
_DROP_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
_TCP_INFO_QUEUE = 24  # where tcpi_unacked lies in struct tcp_info


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


def address_of(bound: socket.socket, scheme: str = "http") -> str:
    """The URL of a listening socket."""
    host, port = bound.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class Listener:
    """An asyncio server on a bound socket, inside the running event loop.

    make: gives the protocol of each new connection. tls: None for plain HTTP; a handshake, and a farewell, may take
    `handshake_timeout_s`.
    """

    def __init__(
        self,
        make: Callable[[], asyncio.Protocol],
        bound: socket.socket,
        *,
        tls: ssl.SSLContext | None = None,
        handshake_timeout_s: float = 10.0,
    ) -> None:
        self._bound = bound
        self._make = make
        self._tls = tls
        self._handshake_s = None if tls is None else handshake_timeout_s
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Begin to accept."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            self._make,
            sock=self._bound.dup(),
            ssl=self._tls,
            backlog=BACKLOG,
            ssl_handshake_timeout=self._handshake_s,
            ssl_shutdown_timeout=self._handshake_s,
        )

    def refuse_connections(self) -> None:
        """Let no new connection begin, while those the kernel already accepted are still taken up.

        A classic BPF program that drops every SYN is put before the listening socket; a handshake that has begun still
        ends, and established connections have sockets of their own. A client that connects now gets no answer, tries
        again, and is refused once the socket is closed: before it has sent anything. Linux only; elsewhere a
        connection may be reset in the moment of closing.
        """
        if sys.platform != "linux":
            return
        steps = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in _DROP_SYN))
        program = struct.pack("HL", len(_DROP_SYN), ctypes.addressof(steps))
        try:
            self._bound.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        except OSError:
            return  # a sandbox may forbid it; closing without it risks only the last microseconds

    def waiting(self) -> int:
        """Connections that the kernel has accepted and nobody has taken up yet; 0 where none can tell."""
        if sys.platform != "linux":
            return 0
        try:
            info = self._bound.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_QUEUE + 4)
        except OSError:
            return 0
        # Of a listening socket the kernel counts its queue here, where it counts unacknowledged segments of others.
        return int(struct.unpack_from("I", info, _TCP_INFO_QUEUE)[0]) if len(info) == _TCP_INFO_QUEUE + 4 else 0

    def stop(self) -> None:
        """Close the socket; connections that are open stay so."""
        if self._server is not None:
            self._server.close()
        self._bound.close()
