"""Runs in `.peers/litserve`: dynamic batches in `workers` inference processes, ZMQ between them and the HTTP process.

usage: litserve_server.py PORT WORKERS
"""

import sys
from typing import Any

import litserve
import numpy as np
from classify import Row, from_environment


class Classify(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.classifier = from_environment()

    def decode_request(self, request: dict[str, Any]) -> Row:
        return self.classifier.decode(request["image"])

    def batch(self, inputs: list[Row]) -> Row:
        return np.stack(inputs)

    def predict(self, rows: Row) -> Row:
        return self.classifier.infer(rows)

    def unbatch(self, output: Row) -> list[Row]:
        return list(output)

    def encode_response(self, output: Row) -> dict[str, Any]:
        return self.classifier.answer(output)


if __name__ == "__main__":
    port, workers = map(int, sys.argv[1:])
    # No waiting for fuller batches: what has queued up is enough, and any wait is added to every lone request.
    api = Classify(max_batch_size=32, batch_timeout=0.0)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=workers, fast_queue=True)
    server.run(port=port, generate_client_file=False, log_level="warning", access_log=False)
