"""A gRPC port with credentials: TLS, and nothing in the clear."""

import asyncio
import shutil
import subprocess
from types import SimpleNamespace

import grpc
import pytest

from fettle.serve.app import Application
from fettle.serve.metrics import Metrics
from fettle.serve.options import ServeOptions
from fettle.serve.rpc.calls import Calls
from fettle.serve.rpc.server import RpcServer


@pytest.fixture
def certificate(tmp_path):
    """Key and certificate of localhost, in PEM."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    key, signed = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(signed)],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return key.read_bytes(), signed.read_bytes()


def test_with_credentials_the_port_speaks_tls_only(certificate):
    options = ServeOptions(grpc_port=0)
    health = SimpleNamespace(ready=True, draining=False)
    calls = Calls(models=None, health=health, inference=None)
    application = Application(options=options, health=health, metrics=Metrics(), routes=calls)

    async def ask():
        server = RpcServer(
            options=options,
            application=application,
            calls=calls,
            credentials=grpc.ssl_server_credentials([certificate]),
        )
        await server.start()
        trusted = grpc.ssl_channel_credentials(certificate[1])
        address = server.address.replace("127.0.0.1", "localhost")
        live = "/inference.GRPCInferenceService/ServerLive"
        async with (
            grpc.aio.secure_channel(address, trusted) as channel,
            grpc.aio.insecure_channel(server.address) as clear,
        ):
            assert await channel.unary_unary(live)(b"", timeout=20) == b"\x08\x01"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await clear.unary_unary(live)(b"", timeout=20)
        await server.close()
        return caught.value.code()

    assert asyncio.run(ask()) is grpc.StatusCode.UNAVAILABLE
