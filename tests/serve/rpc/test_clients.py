"""The clients that are used: tritonclient in its four forms, and KServe's two, against a real server."""

import asyncio
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fettle.serve.protocol import DATATYPES

HERE = Path(__file__).parent
# KServe pins an older protobuf than torch's exporter brings: `make kserve` gives it an environment of its own.
KSERVE = Path(os.environ.get("FETTLE_KSERVE_PYTHON", HERE.parents[2] / ".venv-kserve" / "bin" / "python"))
X = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
WANTED = 5 * X.mean(axis=(2, 3))


def module_of(name):
    return pytest.importorskip(f"tritonclient.{name}")


@contextmanager
def connected(module, address):
    """A client that is closed here and only here: tritonclient's closes itself once more when it is collected, and
    gevent refuses that in a thread other than its own."""
    kind = type("Client", (module.InferenceServerClient,), {"__del__": lambda self: None})
    with kind(address) as client:
        yield client


def address_of(server, name):
    return server.grpc if name.startswith("grpc") else server.url.removeprefix("http://")


def tensor_of(module, array=X, name="x"):
    return module.InferInput(name, list(array.shape), DATATYPES[array.dtype.name]).set_data_from_numpy(array)


def check(result, response_id):
    assert response_id == "seven"
    np.testing.assert_allclose(result.as_numpy("logits"), WANTED, rtol=1e-4, atol=1e-5)


def field(value, name):
    """Of a message or of JSON."""
    return value[name] if isinstance(value, dict) else getattr(value, name)


@pytest.mark.parametrize("name", ["grpc", "http"])
def test_tritonclient(serving, name):
    module = module_of(name)
    with connected(module, address_of(serving, name)) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("tiny")
        assert client.is_model_ready("tiny", "1")
        assert field(client.get_server_metadata(), "name") == "fettle"
        metadata = client.get_model_metadata("tiny")
        assert list(field(metadata, "versions")) == ["1"]
        assert list(field(field(metadata, "inputs")[0], "shape"))[1:] in ([3, 8, 8], ["3", "8", "8"])
        outputs = [module.InferRequestedOutput("logits")]
        for asked in (None, outputs):
            result = client.infer("tiny", [tensor_of(module)], outputs=asked, request_id="seven", headers={"a": "b"})
            check(result, field(result.get_response(), "id"))
        result = client.infer("tiny", [tensor_of(module)], model_version="1", request_id="seven", **compressed(name))
        check(result, field(result.get_response(), "id"))
        refused_with_reason(name, lambda: client.infer("nope", [tensor_of(module)]))
        waited = client.async_infer
        if name == "http":
            check(waited("tiny", [tensor_of(module)], request_id="seven").get_result(), "seven")


def compressed(name):
    if name.startswith("grpc"):
        return {"compression_algorithm": "gzip"}
    return {"request_compression_algorithm": "gzip", "response_compression_algorithm": "gzip"}


def refused_with_reason(name, infer):
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException) as caught:
        infer()
    assert_not_found(name, caught.value)


def assert_not_found(name, problem):
    assert "unknown model 'nope'" in problem.message()
    assert problem.status() == ("StatusCode.NOT_FOUND" if name.startswith("grpc") else "404")


@pytest.mark.parametrize("name", ["grpc.aio", "http.aio"])
def test_tritonclient_in_asyncio(serving, name):
    module = module_of(name)
    from tritonclient.utils import InferenceServerException

    async def ask():
        async with module.InferenceServerClient(address_of(serving, name)) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("tiny")
            assert field(await client.get_model_metadata("tiny"), "name") == "tiny"
            calls = [client.infer("tiny", [tensor_of(module)], request_id="seven") for _ in range(20)]
            for result in await asyncio.gather(*calls):
                # Over HTTP in asyncio the response is a coroutine's in some releases, a value in others.
                response = result.get_response()
                check(result, field(await response if asyncio.iscoroutine(response) else response, "id"))
            with pytest.raises(InferenceServerException) as caught:
                await client.infer("nope", [tensor_of(module)])
            assert_not_found(name, caught.value)

    asyncio.run(ask())


def test_tritonclient_with_callbacks_and_a_deadline(serving, kit):
    module = module_of("grpc")
    answers = []
    with connected(module, serving.grpc) as client:
        for _ in range(10):
            callback = lambda result, error: answers.append((result, error))  # noqa: E731
            client.async_infer("tiny", [tensor_of(module)], callback, request_id="seven", client_timeout=20)
        kit.until(lambda: len(answers) == 10)
    for result, error in answers:
        assert error is None
        check(result, result.get_response().id)


@pytest.mark.parametrize("name", ["grpc", "http"])
def test_tritonclient_with_every_data_type(echoing, name):
    module = module_of(name)
    rng = np.random.default_rng(1)
    arrays = {
        "b": rng.random((2, 2)) > 0.5,
        "u8": rng.integers(0, 255, (2, 2), "u1"), "u64": rng.integers(0, 2**63, (2, 2), "u8"),
        "i8": rng.integers(-128, 127, (2, 2), "i1"), "i64": rng.integers(-(2**62), 2**62, (2, 2), "i8"),
        "f16": rng.random((2, 2)).astype("f2"), "f32": rng.random((2, 2), "f4"), "f64": rng.random((2, 2)),
        "wide": rng.random((2, 2, 5), "f4"),
    }  # fmt: skip
    with connected(module, address_of(echoing, name)) as client:
        result = client.infer("tiny", [tensor_of(module, array, key) for key, array in arrays.items()])
        for key, array in arrays.items():
            found = result.as_numpy(f"out_{key}")
            assert found.dtype == array.dtype
            assert found.tobytes() == array.tobytes()


@pytest.mark.slow
@pytest.mark.skipif(not KSERVE.exists(), reason=f"there is no {KSERVE}: make kserve")
def test_kserve_clients(serving):
    command = [str(KSERVE), str(HERE / "kserve_client.py"), serving.url, serving.grpc]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.stdout.strip().endswith("ok"), done.stderr[-3000:]
