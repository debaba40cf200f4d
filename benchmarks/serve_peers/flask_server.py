"""Runs in `.peers/flask`: Flask under gunicorn's synchronous workers, PyTorch in eager mode, one row an inference.

The model is the float one before quantization, exported and called operator by operator: what a first deployment is.

usage: flask_server.py PORT WORKERS
"""

import os
import sys
from pathlib import Path

import torch
from classify import LENGTH_HEADER, Classifier, Row, read_infer, write_infer
from flask import Flask, Response, jsonify, request
from gunicorn.app.base import BaseApplication


class TorchClassifier(Classifier):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        torch.set_num_threads(1)
        self._model = torch.export.load(folder / "model.pt2").module()
        self.infer(torch.zeros(1, 3, 32, 32).numpy())

    def infer(self, rows: Row) -> Row:
        with torch.inference_mode():
            return self._model(torch.from_numpy(rows)).numpy()


app = Flask(__name__)


@app.post("/predict")
def predict() -> Response:
    classifier = app.config["classifier"]
    return jsonify(classifier.answer(classifier.infer(classifier.decode(request.get_json()["image"])[None])[0]))


@app.post("/v2/models/resnet20/infer")
def infer() -> Response:
    length = request.headers.get(LENGTH_HEADER)
    # torch warns of memory that it must not write to, which a request's body is.
    rows = read_infer(request.get_data(), length).copy()
    content, headers = write_infer(app.config["classifier"].infer(rows), binary=length is not None)
    return Response(content, headers=headers)


@app.get("/ready")
def ready() -> str:
    return "ready"


class Gunicorn(BaseApplication):
    """Threads keep connections alive, which its plain synchronous worker does not; each worker computes in turn."""

    def __init__(self, port: str, workers: str) -> None:
        self._settings = {
            "bind": f"127.0.0.1:{port}",
            "workers": int(workers),
            "worker_class": "gthread",
            "threads": 4,
            "worker_connections": 2000,
            "keepalive": 30,
            "loglevel": "warning",
            "post_fork": load,
        }
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._settings.items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        return app


def load(_server: object, _worker: object) -> None:
    """After the fork: the threads of PyTorch do not survive one."""
    app.config["classifier"] = TorchClassifier(Path(os.environ["SERVE_FOLDER"]))


if __name__ == "__main__":
    port, workers = sys.argv[1:]
    sys.argv = sys.argv[:1]  # gunicorn would read them too
    Gunicorn(port, workers).run()
