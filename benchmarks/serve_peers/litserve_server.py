"""Runs in `.peers/litserve`: dynamic batches in `workers` inference processes, ZMQ between them and the HTTP process.

LitServe has one path for each kind of API, and processes for each: one takes all requests, so that none lies idle. The
HTTP process hands bodies on as they are, and workers make whole answers: it is what limits LitServe here.

usage: litserve_server.py PORT WORKERS
"""

import sys
from typing import Annotated, Any

import litserve
import numpy as np
import orjson
from classify import LENGTH_HEADER, Row, from_environment, read_infer, write_infer
from fastapi import Depends, Request, Response

# A request's body, and the length of its JSON where tensors follow it.
Given = tuple[bytes, str | None]
# One row, and how its answer is to be written: as a prediction, or as a tensor in JSON or in binary.
Asked = tuple[Row, str]


async def read(request: Request) -> Given:
    return await request.body(), request.headers.get(LENGTH_HEADER)


class Classify(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.classifier = from_environment()

    def decode_request(self, request: Annotated[Any, Depends(read)]) -> Asked:
        body, length = request
        if length is not None:
            return read_infer(body, length)[0], "binary"
        if body.startswith(b'{"image"'):
            return self.classifier.decode(orjson.loads(body)["image"]), "prediction"
        return read_infer(body, None)[0], "json"

    def batch(self, inputs: list[Asked]) -> tuple[Row, list[str]]:
        return np.stack([row for row, _ in inputs]), [form for _, form in inputs]

    def predict(self, batch: tuple[Row, list[str]]) -> tuple[Row, list[str]]:
        rows, forms = batch
        return self.classifier.infer(rows), forms

    def unbatch(self, output: tuple[Row, list[str]]) -> list[Asked]:
        return list(zip(*output, strict=True))

    def encode_response(self, output: Asked) -> Response:
        logits, form = output
        if form == "prediction":
            return Response(orjson.dumps(self.classifier.answer(logits)), media_type="application/json")
        content, headers = write_infer(logits[None], binary=form == "binary")
        return Response(content, headers=headers)


if __name__ == "__main__":
    port, workers = map(int, sys.argv[1:])
    # No waiting for fuller batches: what has queued up is enough, and any wait is added to every lone request.
    api = Classify(max_batch_size=32, batch_timeout=0.0)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=workers, fast_queue=True)
    server.run(port=port, generate_client_file=False, log_level="warning", access_log=False)
