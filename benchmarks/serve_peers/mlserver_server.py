"""Runs in `.peers/mlserver`: a runtime of our own on ONNX Runtime, adaptive batches, inference processes of its pool.

usage: mlserver_server.py PORT WORKERS
"""

import asyncio
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
from classify import Row, from_environment
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse, RequestInput


class Classify(MLModel):
    async def load(self) -> bool:
        self.classifier = from_environment()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        tensor = payload.inputs[0]
        if tensor.datatype == "BYTES":
            classifier = self.classifier
            logits = classifier.infer(np.stack([classifier.decode(text) for text in texts_of(tensor)]))
            answers = [classifier.answer(row)["probabilities"] for row in logits]
            outputs = [NumpyCodec.encode_output("probabilities", np.array(answers))]
        else:
            outputs = [NumpyCodec.encode_output("logits", self.classifier.infer(floats_of(tensor)))]
        return InferenceResponse(model_name=self.name, outputs=outputs)


def texts_of(tensor: RequestInput) -> list[str | bytes]:
    """Base64 as it came: the codec would decode it by way of more copies."""
    return list(tensor.data.root)


def floats_of(tensor: RequestInput) -> Row:
    return np.array(tensor.data.root, np.float32).reshape(tensor.shape)


async def main(port: int, workers: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            host="127.0.0.1",
            http_port=port,
            grpc_port=free_port(),
            metrics_endpoint=None,
            parallel_workers=workers,
            debug=False,
            use_structured_logging=False,
            environments_dir=str(Path(folder) / "environments"),
        )
        model = ModelSettings(
            name="resnet20",
            implementation=Classify,
            parameters=ModelParameters(version="1"),
            max_batch_size=32,
            # The wait for fuller batches, which a lone request pays in full: none would batch nothing.
            max_batch_time=0.002,
        )
        server = MLServer(settings)
        await server.start([model])


def free_port() -> int:
    """A port for gRPC, which cannot be turned off."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
