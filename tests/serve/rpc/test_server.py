"""A real server on both ports, asked by nothing but grpcio, blocking and in asyncio."""

import asyncio
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest

from fettle.core.errors import MissingExtra, UsageError
from fettle.serve.rpc import messages

INFER = "/v2/models/tiny/infer"
Code = grpc.StatusCode


def metrics_of(server):
    return httpx.get(f"{server.url}/metrics", trust_env=False).text


def count_of(server, line):
    """The value of one line of the metrics; 0 where it is not there."""
    return next((float(text.split()[-1]) for text in metrics_of(server).splitlines() if text.startswith(line)), 0.0)


# What answers from memory


def test_health_and_metadata(client):
    assert client.call("ServerLive").live
    assert client.call("ServerReady").ready
    server = client.call("ServerMetadata")
    assert server.name == "fettle"
    assert server.version
    assert client.call("ModelReady", messages.ModelReadyRequest(name="tiny")).ready
    assert client.call("ModelReady", messages.ModelReadyRequest(name="tiny", version="1")).ready
    model = client.call("ModelMetadata", messages.ModelMetadataRequest(name="tiny"))
    assert (model.name, list(model.versions), model.platform) == ("tiny", ["1"], "fettle_onnxfile")
    assert [(t.name, t.datatype, list(t.shape)) for t in model.inputs] == [("x", "FP32", [-1, 3, 8, 8])]
    assert [(t.name, t.datatype, list(t.shape)) for t in model.outputs] == [("logits", "FP32", [-1, 3])]


@pytest.mark.parametrize("method", ["ModelReady", "ModelMetadata"])
def test_unknown_models_and_versions_are_not_found(client, method):
    kind = getattr(messages, f"{method}Request")
    assert client.refused(method, kind(name="nope")).code() is Code.NOT_FOUND
    error = client.refused(method, kind(name="tiny", version="9"))
    assert error.code() is Code.NOT_FOUND
    assert "version '9' is not served" in error.details()
    assert client.refused(method, b"\xff").code() is Code.INVALID_ARGUMENT


def test_the_health_protocol_of_grpc(rpc, serving):
    with rpc.Client(serving.grpc, service="grpc.health.v1.Health") as client:
        for service in ("", "inference.GRPCInferenceService", "tiny"):
            content = messages.HealthCheckRequest(service=service)
            assert messages.HealthCheckResponse.FromString(client.call("Check", content)).status == 1
        assert client.refused("Check", messages.HealthCheckRequest(service="x")).code() is Code.NOT_FOUND
        assert client.refused("Watch").code() is Code.UNIMPLEMENTED


@pytest.mark.parametrize("method", ["RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"])
def test_models_are_not_managed_on_this_port(client, method):
    error = client.refused(method)
    assert (error.code(), error.details()) == (Code.UNIMPLEMENTED, "models are not managed on this port")


def test_other_methods_and_services_are_unimplemented(rpc, client, serving):
    assert client.refused("ModelStreamInfer").code() is Code.UNIMPLEMENTED
    with rpc.Client(serving.grpc, service="a.B") as other:
        assert other.refused("C").code() is Code.UNIMPLEMENTED


def test_a_large_message_to_a_small_method_is_not_parsed(client):
    error = client.refused("ModelMetadata", messages.ModelMetadataRequest(name="a" * 70_000))
    assert error.code() is Code.RESOURCE_EXHAUSTED


# Inference


@pytest.mark.parametrize("raw", [True, False])
def test_inference_answers_as_it_was_asked_and_as_http_does(rpc, client, serving, raw):
    x = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)
    answer = client.infer(rpc.request_of({"x": x}, raw=raw, id="seven", model_version="1"))
    assert (answer.model_name, answer.model_version, answer.id) == ("tiny", "1", "seven")
    assert bool(answer.raw_output_contents) is raw
    tensor = {"name": "x", "shape": [3, 3, 8, 8], "datatype": "FP32", "data": x.ravel().tolist()}
    body = httpx.post(serving.url + INFER, json={"inputs": [tensor]}, trust_env=False).json()
    assert rpc.arrays_of(answer)["logits"].ravel().tolist() == pytest.approx(body["outputs"][0]["data"], rel=1e-6)


@pytest.mark.parametrize("raw", [True, False])
def test_every_data_type_comes_back_bit_by_bit(rpc, echoing, raw):
    rng = np.random.default_rng(1)
    dtypes = {"b": "bool", "u8": "uint8", "u64": "uint64", "i8": "int8", "i64": "int64", "f16": "float16"}
    arrays = {
        name: (rng.random((2, 2)) * 200 - 100 * (dtype[0] in "if")).astype(dtype) for name, dtype in dtypes.items()
    }
    arrays |= {"f32": rng.normal(size=(2, 2)).astype("f4"), "f64": rng.normal(size=(2, 2))}
    arrays["wide"] = rng.normal(size=(2, 2, 7)).astype("f4")
    wanted = [f"out_{name}" for name in arrays if raw or name != "f16"]
    message = rpc.request_of(arrays, raw=True, outputs=wanted)
    with rpc.Client(echoing.grpc) as client:
        if not raw:
            message = rpc.request_of({n: a for n, a in arrays.items() if n != "f16"}, raw=False)
            assert "FP16" not in client.refused("ModelInfer", message).details()
            return
        found = rpc.arrays_of(client.infer(message))
    assert list(found) == wanted
    for name, array in arrays.items():
        assert found[f"out_{name}"].tobytes() == array.tobytes()


def test_refusals_of_inference(rpc, client):
    good = rpc.image_request()
    cases = [
        (rpc.image_request(model="nope"), Code.NOT_FOUND, "unknown model 'nope'; this server has tiny"),
        (rpc.image_request(model_version="9"), Code.NOT_FOUND, "version '9' is not served"),
        (messages.ModelInferRequest(model_name="tiny"), Code.INVALID_ARGUMENT, "inputs must be exactly x"),
        (b"\xff\xff", Code.INVALID_ARGUMENT, "damaged"),
        (good.SerializeToString()[:-5], Code.INVALID_ARGUMENT, "damaged"),
        (rpc.image_request(rows=1100), Code.RESOURCE_EXHAUSTED, "at most 1024 rows, got 1100"),
        (rpc.image_request(666.0), Code.INTERNAL, "the model failed on this input"),
    ]
    for message, code, details in cases:
        error = client.refused("ModelInfer", message)
        assert error.code() is code
        assert details in error.details()
    assert client.infer(good).model_name == "tiny"


def test_a_worker_that_dies_of_an_input_fails_that_call_alone(rpc, client):
    with ThreadPoolExecutor(5) as pool:
        good = [pool.submit(client.infer, rpc.image_request(1.0)) for _ in range(4)]
        error = client.refused("ModelInfer", rpc.image_request(999.0))
        assert (error.code(), error.details()) == (Code.INTERNAL, "the model's process died on this input")
        for future in good:
            assert rpc.arrays_of(future.result())["logits"].tolist() == [[5.0] * 3]


def test_request_ids_are_taken_and_returned_with_errors_too(rpc, client):
    own = (("x-request-id", "my-id"),)
    _, call = client.with_call("ModelInfer", rpc.image_request(), metadata=own)
    assert ("x-request-id", "my-id") in [tuple(pair) for pair in call.trailing_metadata()]
    error = client.refused("ModelInfer", rpc.image_request(model="nope"), metadata=own)
    assert ("x-request-id", "my-id") in [tuple(pair) for pair in error.trailing_metadata()]
    _, call = client.with_call("ServerLive")
    assert len(dict(call.trailing_metadata())["x-request-id"]) == 32


def test_a_trace_goes_on_in_the_answer(rpc, client):
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    _, call = client.with_call(
        "ModelInfer", rpc.image_request(), metadata=(("traceparent", f"00-{trace}-00f067aa0ba902b7-01"),)
    )
    assert dict(call.trailing_metadata())["traceparent"].split("-")[1] == trace
    _, call = client.with_call("ModelInfer", rpc.image_request())
    assert "traceparent" not in dict(call.trailing_metadata())


def test_metadata_of_the_transport_is_not_believed(rpc, client):
    """What over HTTP says how a body is written says nothing here."""
    metadata = (
        ("content-encoding", "gzip"),
        ("inference-header-content-length", "5"),
        ("b-bin", b"\xff"),
    )
    assert client.infer(rpc.image_request(), metadata=metadata).model_name == "tiny"


def test_a_client_in_asyncio(rpc, serving):
    async def ask():
        async with grpc.aio.insecure_channel(serving.grpc) as channel:
            infer = channel.unary_unary(
                f"/{rpc.SERVICE}/ModelInfer",
                request_serializer=messages.ModelInferRequest.SerializeToString,
                response_deserializer=messages.ModelInferResponse.FromString,
            )
            answers = await asyncio.gather(*(infer(rpc.image_request(float(n)), timeout=20) for n in range(40)))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await infer(rpc.image_request(model="nope"), timeout=20)
            return answers, caught.value.code()

    answers, code = asyncio.run(ask())
    assert code is Code.NOT_FOUND
    for number, answer in enumerate(answers):
        np.testing.assert_allclose(rpc.arrays_of(answer)["logits"], [[5.0 * number] * 3], rtol=1e-5)


# Limits


def test_messages_over_the_limit_are_refused_and_the_connection_lives_on(rpc, client):
    error = client.refused("ModelInfer", bytes(2_000_001))
    assert error.code() is Code.RESOURCE_EXHAUSTED
    assert "larger than max" in error.details()
    assert client.infer(rpc.image_request()).model_name == "tiny"


def test_compressed_messages_are_taken_and_a_bomb_is_not_blown_up(rpc, client, serving):
    answer = client.infer(rpc.image_request(2.0), compression=grpc.Compression.Gzip)
    assert rpc.arrays_of(answer)["logits"].tolist() == [[10.0] * 3]
    before = peak_kib(serving)
    error = client.refused("ModelInfer", bytes(200_000_000), compression=grpc.Compression.Gzip, timeout=60)
    assert error.code() is Code.RESOURCE_EXHAUSTED
    assert peak_kib(serving) - before < 50_000


def peak_kib(server):
    with open(f"/proc/{server.process.pid}/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1])


def test_metadata_over_the_limit_is_refused(rpc, client):
    error = client.refused("ModelInfer", rpc.image_request(), metadata=(("note", "x" * 60_000),))
    assert error.code() is Code.RESOURCE_EXHAUSTED
    assert client.infer(rpc.image_request()).model_name == "tiny"


# Deadlines, cancellation, load


def test_the_clients_deadline_is_the_jobs(rpc, start, slow):
    server = start(slow(1.0).root, process=True, workers=1, grpc_port=0).wait_ready()
    with rpc.Client(server.grpc) as client, ThreadPoolExecutor(2) as pool:
        error = client.refused("ModelInfer", rpc.image_request(), timeout=0.3)
        assert error.code() is Code.DEADLINE_EXCEEDED
        busy = pool.submit(client.infer, rpc.image_request(1.0))
        until_in_flight(server, 1)
        # By the server's own knowledge of its batches it cannot be answered in time: refused at once.
        error = client.refused("ModelInfer", rpc.image_request(), timeout=0.001)
        assert error.code() in (Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED)
        metadata = (("x-request-timeout-ms", "50"),)
        error = client.refused("ModelInfer", rpc.image_request(), timeout=20, metadata=metadata)
        assert error.code() in (Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED)
        error = client.refused("ModelInfer", rpc.image_request(), metadata=(("x-request-timeout-ms", "soon"),))
        assert error.code() is Code.INVALID_ARGUMENT
        assert rpc.arrays_of(busy.result())["logits"].tolist() == [[5.0] * 3]


def until_in_flight(server, calls):
    end = time.monotonic() + 20
    while count_of(server, "fettle_requests_in_flight") != calls + 1:  # and the request for the metrics
        assert time.monotonic() < end
        threading.Event().wait(0.01)


def test_a_cancelled_call_gives_its_place_up(rpc, start, slow):
    server = start(slow(0.7).root, process=True, workers=1, max_queue_rows=32, grpc_port=0).wait_ready()
    with rpc.Client(server.grpc) as client:
        content = rpc.image_request(rows=20).SerializeToString()
        first = client.callable("ModelInfer").future(content, timeout=20)
        until_in_flight(server, 1)
        waiting = client.callable("ModelInfer").future(content, timeout=20)
        until_in_flight(server, 2)
        assert client.refused("ModelInfer", content).code() is Code.RESOURCE_EXHAUSTED
        waiting.cancel()
        until_in_flight(server, 1)
        assert client.infer(content).model_name == "tiny"
        assert first.result()
        until_in_flight(server, 0)


def test_what_is_shed_may_be_tried_again_after_the_time_that_is_said(rpc, start, slow):
    server = start(slow(0.5).root, process=True, workers=1, max_queue_rows=32, grpc_port=0).wait_ready()
    with rpc.Client(server.grpc) as client:
        content = rpc.image_request(rows=32).SerializeToString()
        running = client.callable("ModelInfer").future(content, timeout=20)
        until_in_flight(server, 1)
        waiting = client.callable("ModelInfer").future(content, timeout=20)
        until_in_flight(server, 2)
        error = client.refused("ModelInfer", content)
        assert error.code() is Code.RESOURCE_EXHAUSTED
        assert int(dict(error.trailing_metadata())["retry-after"]) >= 1
        # Health never waits for inference.
        assert client.call("ServerReady", timeout=5).ready
        assert running.result()
        assert waiting.result()


def test_a_server_without_a_model_is_live_and_not_ready(rpc, start, shelf):
    shelf.point(9)
    server = start(shelf.root, process=True, grpc_port=0)
    with rpc.Client(server.grpc) as client:
        assert client.call("ServerLive").live
        assert not client.call("ServerReady").ready
        assert not client.call("ModelReady", messages.ModelReadyRequest(name="tiny")).ready
        error = client.refused("ModelInfer", rpc.image_request())
        assert error.code() is Code.UNAVAILABLE
        assert "no version of tiny is ready" in error.details()
        assert dict(error.trailing_metadata())["retry-after"] == "1"


# What is written down


def test_calls_are_counted_and_logged_as_requests_are(rpc, start, shelf, tmp_path, kit):
    server = start(shelf.root, process=True, grpc_port=0, observations=tmp_path / "obs", access_log=True).wait_ready()
    with rpc.Client(server.grpc) as client:
        for number in range(3):
            client.infer(rpc.image_request(1.0, rows=2), metadata=(("x-request-id", f"r{number}"),))
        client.refused("ModelInfer", rpc.image_request(model="nope"))
        client.call("ServerLive")
    assert count_of(server, 'fettle_requests_total{code="200",route="grpc/ModelInfer"}') == 3
    assert count_of(server, 'fettle_requests_total{code="404",route="grpc/ModelInfer"}') == 1
    assert count_of(server, 'fettle_requests_total{code="200",route="grpc/ServerLive"}') == 1
    server.signal()
    assert server.wait()[0] == 0
    rows = [row for path in sorted((tmp_path / "obs").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert sorted(row["request_id"] for row in rows) == ["r0", "r0", "r1", "r1", "r2", "r2"]


# The port itself


def test_a_port_that_is_taken_is_a_usage_error(serving, shelf, kit):
    from fettle.serve.options import ServeOptions
    from fettle.serve.server import serve_until

    port = int(serving.grpc.rpartition(":")[2])
    with pytest.raises(UsageError, match="gRPC: the address is in use"):
        asyncio.run(serve_until(asyncio.Event(), shelf, options=ServeOptions(port=0, grpc_port=port)))


def test_a_missing_extra_is_named(shelf, monkeypatch):
    import sys

    from fettle.serve.options import ServeOptions
    from fettle.serve.server import serve_until

    for name in [name for name in sys.modules if name.startswith("fettle.serve.rpc")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(MissingExtra, match=r"a gRPC port needs grpc: pip install 'fettle-ml\[grpc\]'"):
        asyncio.run(serve_until(asyncio.Event(), shelf, options=ServeOptions(port=0, grpc_port=0)))


def test_there_is_no_grpc_port_unless_asked_for(start, shelf):
    server = start(shelf.root, process=True).wait_ready()
    server.signal(signal.SIGTERM)
    assert server.wait()[0] == 0
    assert not hasattr(server, "grpc")
