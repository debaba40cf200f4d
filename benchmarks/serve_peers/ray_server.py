"""Runs in `.peers/ray`: Ray Serve with dynamic batches in replicas, each a process of its own behind Ray's HTTP proxy.

usage: ray_server.py PORT WORKERS
"""

import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

# Ray's own switch for more throughput; read when it is imported, here and in each process that it starts.
os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"

import numpy as np
import orjson
import ray
from classify import LENGTH_HEADER, Row, from_environment, read_infer, write_infer
from ray import serve
from ray.serve.config import HTTPOptions
from starlette.requests import Request
from starlette.responses import Response

JSON = {"content-type": "application/json"}


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
class Classify:
    def __init__(self) -> None:
        self.classifier = from_environment()

    # No wait for fuller batches: what has queued up while the last one ran is enough.
    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.0)
    async def predict(self, texts: list[str]) -> list[dict[str, Any]]:
        logits = self.classifier.infer(np.stack([self.classifier.decode(text) for text in texts]))
        return [self.classifier.answer(row) for row in logits]

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.0)
    async def infer(self, rows: list[Row]) -> list[Row]:
        logits = self.classifier.infer(np.concatenate(rows))
        return [row[None] for row in logits]

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        if request.url.path == "/predict":
            return Response(orjson.dumps(await self.predict(orjson.loads(body)["image"])), headers=JSON)
        length = request.headers.get(LENGTH_HEADER)
        content, headers = write_infer(await self.infer(read_infer(body, length)), binary=length is not None)
        return Response(content, headers=headers)


def main(port: int, workers: int) -> None:
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    folder = str(Path(__file__).parent)
    environment = {"PYTHONPATH": folder, "SERVE_FOLDER": os.environ["SERVE_FOLDER"]}
    os.environ["PYTHONPATH"] = folder
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as temporary:  # a socket's path must be short
        ray.init(
            num_cpus=workers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            runtime_env={"env_vars": environment},
            object_store_memory=100 * 2**20,
            _temp_dir=temporary,
        )
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port, access_log=False))
        serve.run(Classify.options(num_replicas=workers).bind(), route_prefix="/")
        ended.wait()
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
