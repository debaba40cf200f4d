import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from fettle.serve.protocol import DATATYPES
from fettle.serve.rpc import messages

SERVICE = "inference.GRPCInferenceService"
TYPED = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents",
}  # fmt: skip
ANSWERS = {
    "ServerLive": messages.ServerLiveResponse,
    "ServerReady": messages.ServerReadyResponse,
    "ServerMetadata": messages.ServerMetadataResponse,
    "ModelReady": messages.ModelReadyResponse,
    "ModelMetadata": messages.ModelMetadataResponse,
    "ModelInfer": messages.ModelInferResponse,
}


def request_of(arrays, *, model="tiny", raw=True, outputs=(), **more):
    """A ModelInferRequest of these arrays. more: id, model_version."""
    message = messages.ModelInferRequest(model_name=model, **more)
    for name, array in arrays.items():
        datatype = DATATYPES[array.dtype.name]
        tensor = message.inputs.add(name=name, datatype=datatype, shape=array.shape)
        if raw:
            message.raw_input_contents.append(array.tobytes())
        else:
            getattr(tensor.contents, TYPED[datatype]).extend(array.ravel().tolist())
    for name in outputs:
        message.outputs.add(name=name)
    return message


def image_request(value=0.0, rows=1, **more):
    """What the tiny image model takes: 5 × value for each class."""
    return request_of({"x": np.full((rows, 3, 8, 8), value, np.float32)}, **more)


def arrays_of(response):
    """The outputs by name, typed or raw."""
    numpy_of = {datatype: name for name, datatype in DATATYPES.items()}
    raw = list(response.raw_output_contents)
    assert len(raw) in (0, len(response.outputs))
    found = {}
    for index, output in enumerate(response.outputs):
        dtype = numpy_of[output.datatype]
        if raw:
            assert not output.contents.ByteSize()
            values = np.frombuffer(raw[index], dtype)
        else:
            values = np.array(list(getattr(output.contents, TYPED[output.datatype])), dtype)
        found[output.name] = values.reshape(list(output.shape))
    return found


class Client:
    """A blocking client of nothing but grpcio."""

    def __init__(self, address, *, service=SERVICE, **options):
        settings = {"grpc.max_receive_message_length": -1, "grpc.max_send_message_length": -1, **options}
        # Channels to one address share a connection unless told otherwise.
        settings["grpc.use_local_subchannel_pool"] = 1
        self.channel = grpc.insecure_channel(address, options=list(settings.items()))
        self.service = service

    def callable(self, method):
        return self.channel.unary_unary(f"/{self.service}/{method}")

    def call(self, method, content=b"", *, timeout=20, **options):
        """The parsed answer. content: a message or bytes."""
        answer, _ = self.with_call(method, content, timeout=timeout, **options)
        return answer

    def with_call(self, method, content=b"", *, timeout=20, **options):
        content = content if isinstance(content, bytes) else content.SerializeToString()
        answer, call = self.callable(method).with_call(content, timeout=timeout, **options)
        kind = ANSWERS.get(method)
        return (kind.FromString(answer) if kind else answer), call

    def infer(self, message, **options):
        return self.call("ModelInfer", message, **options)

    def refused(self, method, content=b"", **options):
        """The error of a call that must fail, after a look for internals in it."""
        with pytest.raises(grpc.RpcError) as caught:
            self.call(method, content, **options)
        details = caught.value.details()
        assert "Traceback" not in details
        assert ".py" not in details
        return caught.value

    def close(self):
        self.channel.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class GrpcLoad:
    """Clients that call one after another until refused with UNAVAILABLE or told to stop; other failures count."""

    def __init__(self, address, *, clients=8, value=0.0):
        self.answers, self.failures, self.unavailable = [], [], 0
        self.stopped = threading.Event()
        self.address, self.value = address, value
        self.content = image_request(value).SerializeToString()
        self.pool = ThreadPoolExecutor(clients)
        self.running = [self.pool.submit(self._client, number) for number in range(clients)]

    def _client(self, number):
        with Client(self.address, **{"grpc.enable_retries": 0}) as client:
            count = 0
            while not self.stopped.is_set():
                count += 1
                request_id = f"g{number}-{count}"
                try:
                    answer = client.infer(self.content, metadata=(("x-request-id", request_id),))
                except grpc.RpcError as problem:
                    if problem.code() is grpc.StatusCode.UNAVAILABLE:
                        self.unavailable += 1
                        return
                    self.failures.append((request_id, problem.code(), problem.details()))
                    return
                self.answers.append((request_id, arrays_of(answer)["logits"]))

    def end(self, *, stop=True):
        if stop:
            self.stopped.set()
        for future in self.running:
            future.result(timeout=60)
        self.pool.shutdown()
        assert self.failures == [], str(self.failures[:5])
        return self.answers


@pytest.fixture(scope="session")
def rpc():
    """The helpers above, for tests: conftest files cannot be imported."""
    return sys.modules[__name__]


@pytest.fixture(scope="module")
def serving(shelf_root, kit):
    """A shared server process of image version 1 with both ports."""
    server = kit.Process(shelf_root, grpc_port=0, max_body_bytes=2_000_000).wait_ready()
    yield server
    server.signal()
    server.process.communicate(timeout=30)  # without a look at the log: tests made the model fail on purpose
    assert server.process.returncode == 0


@pytest.fixture(scope="module")
def client(serving):
    with Client(serving.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def echoing(tmp_path_factory, kit):
    """A shared server process of the model with every data type; the model is called tiny there too."""
    root = tmp_path_factory.mktemp("echo")
    kit.echo_artifact(root / "1")
    (root / "current").write_text("1")
    server = kit.Process(root, grpc_port=0).wait_ready()
    yield server
    server.signal()
    server.process.communicate(timeout=30)  # without a look at the log: tests made the model fail on purpose
    assert server.process.returncode == 0
