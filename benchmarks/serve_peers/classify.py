"""The peers' work on one request, without any server: bytes to class, as fettle does it and as fast.

Reads `model.onnx` and `task.json` (classes, mean, std, input) from a folder. Runs in the peers' environments.
"""

from __future__ import annotations

import binascii
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import simplejpeg
from numpy.typing import NDArray

Row = NDArray[np.float32]
LENGTH_HEADER = "inference-header-content-length"
MODEL = "resnet20"


class Classifier:
    """Decoding and answers; `infer` is left to an engine."""

    def __init__(self, folder: Path) -> None:
        task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        self.classes: list[str] = task["classes"]
        self.input: str = task["input"]
        self._mean = np.array(task["mean"], np.float32)[:, None, None]
        self._std = np.array(task["std"], np.float32)[:, None, None]

    def infer(self, rows: Row) -> Row:
        """(n, 3, 32, 32) to logits (n, classes)."""
        raise NotImplementedError

    def decode(self, text: str | bytes) -> Row:
        """Base64 text of a JPEG to (3, 32, 32), normalized, by the same steps in the same precision as fettle."""
        pixels = simplejpeg.decode_jpeg(binascii.a2b_base64(text, strict_mode=True), "RGB")
        row = np.empty((3, *pixels.shape[:2]), np.float32)
        row[...] = pixels.transpose(2, 0, 1)
        np.divide(row, np.float32(255), out=row)
        np.subtract(row, self._mean, out=row)
        np.divide(row, self._std, out=row)
        return row

    def answer(self, logits: Row) -> dict[str, Any]:
        """What fettle answers too: the class, and every probability."""
        powers = np.exp(logits.astype(np.float64) - np.float64(logits.max()))
        probabilities = (powers / powers.sum()).tolist()
        index = int(logits.argmax())
        return {
            "class": self.classes[index],
            "index": index,
            "confidence": probabilities[index],
            "probabilities": probabilities,
        }


class OnnxClassifier(Classifier):
    """One ONNX Runtime session on one thread, with the session options of `fettle.runtime.onnxruntime`."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        super().__init__(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )

    def infer(self, rows: Row) -> Row:
        return self._session.run(None, {self.input: rows})[0]


def from_environment() -> OnnxClassifier:
    """The classifier of the folder in SERVE_FOLDER, warm."""
    classifier = OnnxClassifier(Path(os.environ["SERVE_FOLDER"]))
    classifier.infer(np.zeros((1, 3, 32, 32), np.float32))
    return classifier


def read_infer(body: bytes, header: str | None) -> Row:
    """The one input of a request of the Open Inference Protocol; header: the length of its JSON where it is binary."""
    if header is None:
        tensor = orjson.loads(body)["inputs"][0]
        return np.array(tensor["data"], np.float32).reshape(tensor["shape"])
    end = int(header)
    tensor = orjson.loads(body[:end])["inputs"][0]
    return np.frombuffer(body, "<f4", offset=end).reshape(tensor["shape"])


def write_infer(logits: Row, *, binary: bool) -> tuple[bytes, dict[str, str]]:
    """The answer in the same protocol, and its headers."""
    head: dict[str, Any] = {"model_name": MODEL, "model_version": "1"}
    output: dict[str, Any] = {"name": "logits", "shape": list(logits.shape), "datatype": "FP32"}
    if not binary:
        content = orjson.dumps({**head, "outputs": [{**output, "data": logits.ravel().tolist()}]})
        return content, {"content-type": "application/json"}
    output["parameters"] = {"binary_data_size": logits.nbytes}
    content = orjson.dumps({**head, "outputs": [output]})
    headers = {"content-type": "application/octet-stream", LENGTH_HEADER: str(len(content))}
    return content + logits.astype("<f4").tobytes(), headers
