"""One port of a server: its socket, who is connected to it, and the application that answers there."""

from __future__ import annotations

import socket
import ssl
import time
from weakref import WeakKeyDictionary

from fettle.serve.app import Application
from fettle.serve.connection import Connection, Connections
from fettle.serve.listener import Listener, address_of
from fettle.serve.options import ServeOptions

# A handshake of TLS that takes longer is not waited for at the end: its client has sent no request yet.
_HANDSHAKE_S = 2.0


class Port:
    """tls: None for plain HTTP."""

    def __init__(
        self,
        bound: socket.socket,
        application: Application,
        *,
        options: ServeOptions,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.url = address_of(bound, "http" if tls is None else "https")
        self.application = application
        self.connections = Connections(options)
        self._begun: WeakKeyDictionary[Connection, float] = WeakKeyDictionary()
        self.listener = Listener(
            self._connection if tls is None else self._greeted,
            bound,
            tls=tls,
            handshake_timeout_s=options.header_timeout_s,
        )

    def _connection(self) -> Connection:
        return Connection(self.application, self.connections)

    def _greeted(self) -> Connection:
        """A connection that TLS will hand over once it has shaken hands, or never."""
        connection = self._connection()
        self._begun[connection] = time.monotonic()
        return connection

    @property
    def arriving(self) -> bool:
        """Whether a connection was accepted that nobody has heard of yet."""
        now = time.monotonic()
        return bool(self.listener.waiting()) or any(
            not connection.connected and now - begun < _HANDSHAKE_S for connection, begun in self._begun.items()
        )

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return bool(self.application.in_flight or self.connections.receiving)
