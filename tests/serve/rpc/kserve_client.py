"""KServe's own clients against a server: `python kserve_client.py URL HOST:PORT`, in an environment that has kserve.

Prints "ok" where every answer is as it must be. Imports kserve late: pytest looks into every file for doctests.
"""

import asyncio
import sys

import numpy as np

X = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
WANTED = 5 * X.mean(axis=(2, 3))


def request_of(*, binary, model="tiny", **more):
    from kserve import InferInput, InferRequest

    tensor = InferInput(name="x", shape=list(X.shape), datatype="FP32")
    tensor.set_data_from_numpy(X, binary_data=binary)
    return InferRequest(model_name=model, infer_inputs=[tensor], **more)


def check(response):
    assert (response.model_name, response.id) == ("tiny", "seven"), response
    (output,) = response.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("logits", "FP32", [2, 3]), output
    np.testing.assert_allclose(output.as_numpy().reshape(2, 3), WANTED, rtol=1e-4, atol=1e-5)


async def over_grpc(address):
    import grpc
    from kserve import InferenceGRPCClient

    async with InferenceGRPCClient(address, timeout=30) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("tiny")
        for binary in (True, False):
            check(await client.infer(request_of(binary=binary, request_id="seven")))
        code = None
        try:
            await client.infer(request_of(binary=True, model="nope"))
        except grpc.RpcError as problem:
            code = problem.code()
        assert code is grpc.StatusCode.NOT_FOUND, code


async def over_rest(url):
    from kserve import InferenceRESTClient, RESTConfig
    from kserve.protocol.infer_type import RequestedOutput

    client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=30))
    assert await client.is_server_live(url)
    assert await client.is_server_ready(url)
    assert await client.is_model_ready(url, "tiny")
    for binary in (True, False):
        for outputs in (None, [RequestedOutput("logits", parameters={"binary_data": True})]):
            asked = request_of(binary=binary, request_id="seven", request_outputs=outputs)
            check(await client.infer(url, asked, model_name="tiny"))
    await client.close()


async def main(url, address):
    await over_grpc(address)
    await over_rest(url)
    sys.stdout.write("ok\n")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
