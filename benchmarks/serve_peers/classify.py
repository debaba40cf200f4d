"""The peers' work on one request, without any server: base64 JPEG to class, as fettle does it and as fast.

Reads `model.onnx` and `task.json` (classes, mean, std, input) from a folder. Runs in the peers' environments.
"""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

Row = NDArray[np.float32]


class Classifier:
    """One ONNX Runtime session on one thread, with the session options of `fettle.runtime.onnxruntime`."""

    def __init__(self, folder: Path) -> None:
        task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        self.classes: list[str] = task["classes"]
        # ((pixel / 255) - mean) / std in one multiplication and one addition.
        std = np.array(task["std"], np.float32)[:, None, None]
        self._scale = np.float32(1) / (np.float32(255) * std)
        self._shift = -np.array(task["mean"], np.float32)[:, None, None] / std
        self._input: str = task["input"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )

    def decode(self, text: str) -> Row:
        """Base64 text of a JPEG to (3, 32, 32), normalized."""
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("JPEG",)) as image:
            pixels = np.asarray(image.convert("RGB"))
        return pixels.transpose(2, 0, 1) * self._scale + self._shift

    def infer(self, rows: Row) -> Row:
        """(n, 3, 32, 32) to logits (n, classes)."""
        return self._session.run(None, {self._input: rows})[0]

    def answer(self, logits: Row) -> dict[str, Any]:
        """What fettle answers too: the class, and every probability."""
        powers = np.exp(logits.astype(np.float64) - logits.max())
        probabilities = (powers / powers.sum()).tolist()
        index = int(logits.argmax())
        return {
            "class": self.classes[index],
            "index": index,
            "confidence": probabilities[index],
            "probabilities": probabilities,
        }


def from_environment() -> Classifier:
    """The classifier of the folder in SERVE_FOLDER, warm."""
    classifier = Classifier(Path(os.environ["SERVE_FOLDER"]))
    classifier.infer(np.zeros((1, 3, 32, 32), np.float32))
    return classifier
