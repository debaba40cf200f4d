"""Runs in `.peers/bentoml`: `bentoml serve` with batchable APIs, whose sizes its dispatcher adapts by itself.

BentoML merges requests along the first axis of an argument: a request is a list of one. It has no way to take raw
bytes into a batch, so that tensors come as JSON only.

usage: bentoml_server.py PORT WORKERS
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import bentoml
import numpy as np
from bentoml.validators import DType, Shape

Rows = Annotated[np.ndarray, Shape((-1, 3, 32, 32)), DType("float32")]
# Not annotated with the answer's fields: a model of them would be made and checked for every row.
Answers = list[dict[str, Any]]


@bentoml.service(workers=int(os.environ.get("SERVE_WORKERS", "1")), logging={"access": {"enabled": False}})
class Classify:
    def __init__(self) -> None:
        sys.path.insert(0, str(Path(__file__).parent))
        from classify import from_environment

        self.classifier = from_environment()

    @bentoml.api(batchable=True, max_batch_size=32, route="/predict")
    def predict(self, images: list[str]) -> Answers:
        return self._answers(np.stack([self.classifier.decode(text) for text in images]))

    @bentoml.api(batchable=True, max_batch_size=32, route="/infer")
    def infer(self, rows: Rows) -> Answers:
        return self._answers(rows)

    def _answers(self, rows: np.ndarray) -> Answers:
        return [self.classifier.answer(row) for row in self.classifier.infer(rows)]


def main(port: str, workers: str) -> None:
    folder = Path(__file__).parent
    home = tempfile.mkdtemp(prefix="bentoml-", dir=os.environ["SERVE_FOLDER"])
    environment = {
        **os.environ,
        "SERVE_WORKERS": workers,
        "BENTOML_HOME": home,
        "BENTOML_DO_NOT_TRACK": "True",
    }
    command = [sys.executable, "-m", "bentoml", "serve", "bentoml_server:Classify"]
    command += ["--host", "127.0.0.1", "--port", port, "--working-dir", str(folder)]
    os.execve(sys.executable, command, environment)


if __name__ == "__main__":
    main(*sys.argv[1:])
