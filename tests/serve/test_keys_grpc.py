"""API keys and TLS on the gRPC port: the same file, the same scopes."""

import threading

import grpc
import numpy as np
import pytest
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException

from fettle.serve.key_file import add_key
from fettle.serve.keys import new_key


def tensor():
    one = triton.InferInput("x", [1, 3, 8, 8], "FP32")
    one.set_data_from_numpy(np.zeros((1, 3, 8, 8), np.float32))
    return [one]


@pytest.mark.parametrize("tls", [False, True])
def test_keys_and_certificates_hold_over_grpc_too(start, shelf, kit, authority, tmp_path, tls):
    texts = {}
    for name, models, actions in (("all", "*", ["infer", "read"]), ("other", ["other"], ["infer", "read"])):
        key, texts[name] = new_key(name, models=models, actions=actions)
        add_key(tmp_path / "keys.json", key)
    options, credentials = {}, None
    if tls:
        options, _ = kit.issue(authority, tmp_path)
        credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    server = start(shelf, grpc_port=0, keys=tmp_path / "keys.json", **options).wait_ready()
    with triton.InferenceServerClient(server.grpc, creds=credentials, ssl=tls) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        good = {"authorization": f"Bearer {texts['all']}"}
        assert client.infer("tiny", tensor(), headers=good).as_numpy("logits").shape == (1, 3)
        assert client.get_model_metadata("tiny", headers={"x-api-key": texts["all"]}).name == "tiny"
        for headers, code in ((None, "UNAUTHENTICATED"), ({"x-api-key": texts["other"]}, "PERMISSION_DENIED")):
            for call in (
                lambda headers=headers: client.infer("tiny", tensor(), headers=headers),
                lambda headers=headers: client.get_model_metadata("tiny", headers=headers),
                lambda headers=headers: client.is_model_ready("tiny", headers=headers),
            ):
                with pytest.raises(InferenceServerException, match=code):
                    call()


def test_who_has_no_key_is_refused_before_its_message_is_read(start, shelf, kit, tmp_path):
    """Clients that begin a call and do not send its message: a server that reads first would wait for it."""
    texts = {}
    for name, actions in (("all", ["infer", "read"]), ("reader", ["read"])):
        key, texts[name] = new_key(name, models="*", actions=actions)
        add_key(tmp_path / "keys.json", key)
    server = start(shelf, grpc_port=0, keys=tmp_path / "keys.json").wait_ready()
    ended = threading.Event()

    def never():
        ended.wait(60)
        yield b""

    with grpc.insecure_channel(server.grpc) as channel:
        infer = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
        for given, code in (
            (None, grpc.StatusCode.UNAUTHENTICATED),
            ("fettle_x", grpc.StatusCode.UNAUTHENTICATED),
            (texts["reader"], grpc.StatusCode.PERMISSION_DENIED),
        ):
            metadata = (("x-request-id", "one"), *((("x-api-key", given),) if given else ()))
            with pytest.raises(grpc.RpcError) as caught:
                infer(never(), timeout=30, metadata=metadata)
            assert caught.value.code() is code
            assert ("x-request-id", "one") in [tuple(pair) for pair in caught.value.trailing_metadata()]
        waiting = infer.future(never(), timeout=30, metadata=(("x-api-key", texts["all"]),))
        with server.client(headers={"x-api-key": texts["reader"]}) as client:
            text = client.get("/metrics").text
            assert 'fettle_requests_total{code="401",route="unknown"} 2.0' in text
            assert 'fettle_requests_total{code="403",route="unknown"} 1.0' in text
        assert not waiting.done()  # whoever is let in may take its time
        waiting.cancel()
        ended.set()
        for message in (bytes(10_000), bytes(10_000_000)):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(message, timeout=30)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert server.stop() == 0
