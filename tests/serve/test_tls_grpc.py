"""Certificates on the gRPC port: real servers, real handshakes, and clients that are turned away."""

import contextlib
import shutil
import socket
import ssl

import grpc
import pytest
import trustme

from fettle.serve.rpc import messages

LIVE, READY = (f"/inference.GRPCInferenceService/{name}" for name in ("ServerLive", "ServerReady"))


@pytest.fixture(scope="module")
def mutual(kit, authority, tmp_path_factory):
    """Options for a server whose certificate is for 127.0.0.1, and whose clients must show one of the authority."""
    root = tmp_path_factory.mktemp("mtls")
    options, _ = kit.issue(authority, root)
    return {"grpc_port": 0, **options, "tls_client_ca": root / "ca.pem"}


@contextlib.contextmanager
def channel(server, authority, issued=None):
    """A connection of its own, for channels to one address share theirs otherwise."""
    key, chain = (None, None) if issued is None else (issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes(), key, chain)
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    with grpc.secure_channel(server.grpc, credentials, options) as opened:
        yield opened


def live(opened):
    """What the server answers, which is the same for all that it lets in."""
    answer = opened.unary_unary(LIVE)(b"", timeout=20)
    return messages.ServerLiveResponse.FromString(answer).live


def turned_away(server, authority, issued=None):
    with channel(server, authority, issued) as opened:
        try:
            return not live(opened)
        except grpc.RpcError as problem:
            return problem.code() is grpc.StatusCode.UNAVAILABLE


def test_mtls_over_grpc_serves_only_clients_with_a_certificate_of_the_authority(start, shelf, authority, mutual):
    server = start(shelf, **mutual).wait_ready()
    with channel(server, authority, authority.issue_cert("client")) as opened:
        assert live(opened)
        assert messages.ServerReadyResponse.FromString(opened.unary_unary(READY)(b"", timeout=20)).ready
    assert turned_away(server, authority)
    assert turned_away(server, authority, trustme.CA().issue_cert("client"))


def test_clients_that_are_turned_away_neither_end_nor_hold_up_a_server_with_mtls(start, shelf, authority, mutual):
    server = start(shelf.root, process=True, **mutual).wait_ready()
    host, port = server.grpc.split(":")
    anonymous = ssl.create_default_context()
    authority.configure_trust(anonymous)
    anonymous.set_alpn_protocols(["h2"])
    silent = [socket.create_connection((host, int(port)), timeout=20) for _ in range(20)]
    silent[0].sendall(b"\x16\x03\x01\x02\x00")  # the beginning of a handshake
    silent[1].sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100))  # no TLS
    with channel(server, authority, authority.issue_cert("client")) as opened:
        for _ in range(20):
            # TLS 1.3: the client is done before the server has looked at its certificate.
            with (
                contextlib.suppress(OSError),
                socket.create_connection((host, int(port)), timeout=20) as plain,
                anonymous.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped,
            ):
                assert wrapped.recv(100) == b""
            assert live(opened)
        assert turned_away(server, authority, trustme.CA().issue_cert("client"))
        assert live(opened)
    with channel(server, authority, authority.issue_cert("another")) as opened:
        assert live(opened)
    for one in silent:
        one.close()
    server.signal()
    assert server.wait() == (0, "torch False")


def test_a_renewed_certificate_is_shown_to_new_clients_and_old_ones_are_served_on(
    start, shelf, kit, authority, mutual, tmp_path
):
    """Of another authority, which only new clients trust."""
    for name, path in mutual.items():
        if name.startswith("tls_"):
            shutil.copy(path, tmp_path / path.name)
    options = {name: tmp_path / path.name for name, path in mutual.items() if name.startswith("tls_")}
    server = start(shelf, grpc_port=0, **options).wait_ready()
    client, another = authority.issue_cert("client"), trustme.CA()
    with channel(server, authority, client) as old:
        assert live(old)
        assert turned_away(server, another, client)
        issued = another.issue_cert("127.0.0.1")
        issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
        assert live(old)
        issued.cert_chain_pems[0].write_to_path(str(tmp_path / "certificate.pem"))
        kit.until(lambda: not turned_away(server, another, client))
        assert turned_away(server, authority, client)
        assert turned_away(server, another)
        (tmp_path / "key.pem").write_text("nonsense")
        with channel(server, another, client) as new:
            assert live(new)
        assert live(old)
