"""The listening socket by itself."""

import asyncio
import socket

import pytest

from fettle.core.errors import UsageError
from fettle.serve.listener import Listener, address_of, bind


@pytest.fixture
def bound():
    found = bind("127.0.0.1", 0)
    yield found
    found.close()


def listener_on(bound):
    return Listener(asyncio.Protocol, bound)


def test_connections_that_nobody_took_up_are_counted(bound):
    listener = listener_on(bound)
    assert listener.waiting() == 0
    clients = [socket.create_connection(bound.getsockname()) for _ in range(3)]
    assert listener.waiting() == 3
    taken, _ = bound.accept()
    assert listener.waiting() == 2
    for connection in (*clients, taken):
        connection.close()


def test_after_a_refusal_no_connection_begins_and_those_before_it_stay(bound):
    listener = listener_on(bound)
    early = socket.create_connection(bound.getsockname())
    listener.refuse_connections()
    with pytest.raises(TimeoutError):
        socket.create_connection(bound.getsockname(), timeout=0.3)
    assert listener.waiting() == 1
    taken, _ = bound.accept()
    early.sendall(b"still here")
    assert taken.recv(32) == b"still here"
    early.close()
    taken.close()


def test_a_port_in_use_is_an_error_that_names_it(bound):
    port = bound.getsockname()[1]
    with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}"):
        bind("127.0.0.1", port)


@pytest.mark.parametrize(
    ("name", "url"), [(("127.0.0.1", 80), "http://127.0.0.1:80"), (("::1", 80, 0, 0), "http://[::1]:80")]
)
def test_the_address_is_a_url(name, url):
    class Bound:
        def getsockname(self):
            return name

    assert address_of(Bound()) == url
