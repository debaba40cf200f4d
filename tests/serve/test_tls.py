"""HTTPS and client certificates: certificates are made here, servers and handshakes are real."""

import contextlib
import socket
import ssl
import time

import httpx
import pytest
import trustme

from fettle.core.errors import UsageError
from fettle.core.files import write_atomic
from fettle.serve.options import ServeOptions
from fettle.serve.tls import Certificates, server_context

INFER = "/v2/models/tiny/infer"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def files(kit, authority, tmp_path_factory):
    """Options for a server whose certificate is for 127.0.0.1."""
    root = tmp_path_factory.mktemp("tls")
    options, _ = kit.issue(authority, root)
    return options


def trusting(authority, issued=None):
    context = ssl.create_default_context()
    authority.configure_trust(context)
    if issued is not None:
        issued.configure_cert(context)
    return context


def address(server):
    host, port = server.url.removeprefix("https://").split(":")
    return host, int(port)


# The files


def test_the_context_is_tls_12_or_better_and_asks_for_no_certificate(files):
    context = server_context(files["tls_certificate"], files["tls_key"])
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert context.verify_mode == ssl.CERT_NONE


def test_each_bad_file_is_an_error_that_names_it(files, tmp_path):
    certificate, key = files["tls_certificate"], files["tls_key"]
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
    foreign = tmp_path / "foreign.pem"
    trustme.CA().issue_cert("elsewhere").private_key_pem.write_to_path(str(foreign))
    for arguments, words in (
        ((tmp_path / "none.pem", key), "certificate .*none.pem cannot be read"),
        ((certificate, tmp_path / "none.pem"), "key .*none.pem cannot be read"),
        ((certificate, tmp_path), "key .* cannot be read"),
        ((nonsense, key), "nonsense.pem .*PEM"),
        ((certificate, nonsense), "nonsense.pem .*PEM"),
        ((certificate, foreign), "foreign.pem does not belong to the certificate"),
        ((certificate, key, tmp_path / "none.pem"), "client CA .*none.pem cannot be read"),
        ((certificate, key, nonsense), "client CA .*nonsense.pem must hold"),
        ((certificate, key, foreign), "client CA .*foreign.pem must hold"),
    ):
        with pytest.raises(UsageError, match=words):
            server_context(*arguments)


def test_a_key_with_a_password_is_an_error_and_no_question_at_the_terminal(files, tmp_path):
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(files["tls_key"].read_bytes(), None)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    with pytest.raises(UsageError, match="must not need a password"):
        server_context(files["tls_certificate"], locked)


@pytest.mark.parametrize(
    "given", [("tls_certificate",), ("tls_key",), ("tls_client_ca",), ("tls_key", "tls_client_ca")]
)
def test_half_of_the_options_is_an_error(given, tmp_path):
    with pytest.raises(UsageError, match="tls_"):
        ServeOptions(**dict.fromkeys(given, tmp_path / "x"))


# Servers


def test_https_answers_all_that_http_does(start, shelf, kit, files, authority):
    server = start(shelf, **files).wait_ready()
    assert server.url.startswith("https://127.0.0.1:")
    with server.client(verify=trusting(authority)) as client:
        assert client.get("/health").status_code == 200
        assert client.post(INFER, content=kit.body_of(), headers=JSON).status_code == 200
        big = kit.body_of(rows=200)
        assert len(client.post(INFER, content=big, headers=JSON).json()["outputs"][0]["data"]) == 600
        kit.error_of(client.post(INFER, content=b"x" * 17_000_000, headers=JSON), 413)
        assert client.get("/metrics").status_code == 200
    with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"), server.client() as client:
        client.get("/health")


@pytest.mark.parametrize("keep", [True, False], ids=["keep-alive", "a connection each"])
def test_sigterm_under_load_over_tls_loses_no_request(start, shelf, kit, files, authority, keep):
    server = start(shelf.root, process=True, **files).wait_ready()
    load = kit.Load(server.url, clients=12, keep=keep, tls=trusting(authority))
    kit.until(lambda: len(load.answers) > 50)
    server.signal()
    load.end(stop=False)
    assert load.refused == 12
    assert server.wait() == (0, "torch False")


def test_mtls_speaks_only_to_clients_with_a_certificate_of_the_authority(start, shelf, files, authority):
    client_ca = files["tls_key"].with_name("ca.pem")
    server = start(shelf, **files, tls_client_ca=client_ca).wait_ready()
    ours, foreign = authority.issue_cert("client"), trustme.CA().issue_cert("client")
    with server.client(verify=trusting(authority, ours)) as client:
        assert client.get("/health").status_code == 200
    for issued in (None, foreign):
        with pytest.raises(httpx.TransportError), server.client(verify=trusting(authority, issued)) as client:
            client.get("/health")
    with server.client(verify=trusting(authority, ours)) as client:
        assert client.get("/health").status_code == 200


def test_plain_http_to_the_tls_port_ends_at_once_and_harms_nobody(start, shelf, files, authority, caplog):
    server = start(shelf, **files).wait_ready()
    for request in (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01" + bytes(200), b"\0" * 4000):
        with socket.create_connection(address(server), timeout=10) as plain:
            plain.sendall(request)
            with contextlib.suppress(ConnectionResetError):
                assert b"HTTP/1.1 200" not in plain.recv(4096)
    with server.client(verify=trusting(authority)) as client:
        assert client.get("/health").status_code == 200
    assert server.stop() == 0
    assert "Traceback" not in caplog.text


def test_old_tls_is_refused(start, shelf, files):
    server = start(shelf, **files).wait_ready()
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with socket.create_connection(address(server), timeout=10) as plain, pytest.raises(ssl.SSLError):
        old.wrap_socket(plain)


def test_a_handshake_that_does_not_come_is_ended(start, shelf, files):
    server = start(shelf, **files, header_timeout_s=0.3).wait_ready()
    for begin in (b"", b"\x16\x03\x01\x02\x00"):
        with socket.create_connection(address(server), timeout=10) as silent:
            silent.sendall(begin)
            started = time.monotonic()
            assert silent.recv(4096) == b""
            assert time.monotonic() - started < 5


def test_unfinished_handshakes_do_not_hold_the_drain(start, shelf, files):
    # uvloop warns of a handshake that is cut, and hangs where that warning is an error.
    server = start(shelf.root, process=True, warnings="default", **files).wait_ready()
    silent = [socket.create_connection(address(server)) for _ in range(3)]
    server.signal()
    started = time.monotonic()
    assert server.wait()[0] == 0
    assert time.monotonic() - started < 8
    for one in silent:
        one.close()


def test_a_client_that_closes_its_side_of_tls_is_no_noise_in_the_log(start, slow, kit, files, authority, caplog):
    server = start(slow(0.3), **files).wait_ready()
    for _ in range(2):
        with socket.create_connection(address(server)) as plain:
            wrapped = trusting(authority).wrap_socket(plain, server_hostname="127.0.0.1")
            body = kit.body_of()
            head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            wrapped.sendall(head.encode() + body)
            wrapped.settimeout(5)
            with contextlib.suppress(OSError):  # its answer may be on its way, which is no farewell
                wrapped.unwrap()
            wrapped.close()
    assert server.stop() == 0
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


# Renewed certificates


def shown(port):
    """The certificate that a new handshake is answered with."""
    return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("127.0.0.1", port), timeout=20))


def der(issued):
    return ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())


@pytest.mark.parametrize("process", [True, False], ids=["uvloop", "asyncio"])
def test_a_renewed_certificate_is_shown_to_new_connections_and_old_ones_live_on(
    start, shelf, kit, tmp_path, authority, process
):
    options, before = kit.issue(authority, tmp_path)
    server = start(shelf.root if process else shelf, process=process, **options).wait_ready()
    port = address(server)[1]
    assert shown(port) == der(before)
    load = kit.Load(server.url, clients=2, tls=trusting(authority))
    kit.until(lambda: len(load.answers) > 10)
    for renewal in range(2):
        old = shown(port)
        aside = tmp_path / f"aside{renewal}"  # as cert-manager: another folder, and one link to it
        aside.mkdir()
        _, now = kit.issue(authority, aside)
        for name in ("key.pem", "certificate.pem"):
            (aside / name).rename(tmp_path / name)
        kit.until(lambda old=old: shown(port) != old)
        assert shown(port) == der(now)
        seen = len(load.answers)
        kit.until(lambda seen=seen: len(load.answers) > seen + 10)
    load.end()
    with server.client(verify=trusting(authority)) as client:
        assert client.get("/health").status_code == 200


def test_a_pair_that_does_not_fit_changes_nothing_and_is_told_once(start, shelf, kit, tmp_path, authority, caplog):
    options, before = kit.issue(authority, tmp_path)
    server = start(shelf, **options).wait_ready()
    port = address(server)[1]

    def told():
        return [record.message for record in caplog.records if "stays as it was" in record.message]

    write_atomic(tmp_path / "key.pem", authority.issue_cert("127.0.0.1").private_key_pem.bytes())
    kit.until(told)
    write_atomic(tmp_path / "certificate.pem", b"nonsense")
    kit.until(lambda: len(told()) == 2)
    (tmp_path / "certificate.pem").unlink()
    kit.until(lambda: len(told()) == 3)
    for _ in range(20):  # handshakes, while the files are looked at again and again
        assert shown(port) == der(before)
    assert len(told()) == 3
    for message, words in zip(told(), ("does not belong to", "must be PEM", "cannot be read"), strict=True):
        assert words in message
    _, now = kit.issue(authority, tmp_path)
    kit.until(lambda: shown(port) == der(now))


def test_another_authority_for_clients_is_taken_too(start, shelf, kit, tmp_path, authority):
    options, _ = kit.issue(authority, tmp_path)
    another = trustme.CA()
    ours, theirs = authority.issue_cert("client"), another.issue_cert("client")
    server = start(shelf, **options, tls_client_ca=tmp_path / "ca.pem").wait_ready()

    def served(issued):
        with server.client(verify=trusting(authority, issued)) as client:
            try:
                return client.get("/health").status_code == 200
            except httpx.TransportError:
                return False

    assert (served(ours), served(theirs), served(None)) == (True, False, False)
    another.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    kit.until(lambda: served(theirs))
    assert (served(ours), served(theirs), served(None)) == (False, True, False)


def test_nothing_is_read_while_the_files_still_change(kit, authority, tmp_path):
    options, _ = kit.issue(authority, tmp_path)
    files = Certificates(options["tls_certificate"], options["tls_key"])
    first = files.latest
    files.refresh()
    assert files.latest is first
    for _ in range(3):  # each look finds other files than the one before
        kit.issue(authority, tmp_path)
        files.refresh()
        assert files.latest is first
    files.refresh()
    assert files.latest.key == (tmp_path / "key.pem").read_bytes()
    assert files.latest.certificate == (tmp_path / "certificate.pem").read_bytes()
