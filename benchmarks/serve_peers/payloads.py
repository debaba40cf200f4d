"""The same 64 images as three kinds of request, in the words that each server understands; and what an answer says.

image: a JPEG as base64 in JSON; json: 3×32×32 floats as JSON of the Open Inference Protocol; binary: the same floats
as bytes behind the JSON, by the protocol's binary extension. Where a server speaks another dialect its request holds
the same base64 text or the same floats, and no more than a name or a bracket around them differs.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = ("image", "json", "binary")
TITLES = {"image": "base64 JPEG in JSON", "json": "3×32×32 floats in JSON", "binary": "3×32×32 floats in binary"}
MODEL = "resnet20"
INFER = f"/v2/models/{MODEL}/infer"
JSON = {"Content-Type": "application/json"}
LENGTH_HEADER = "Inference-Header-Content-Length"

Scores = NDArray[np.float64]
# The number of a body, and the body of its answer; True where the answer is right.
Judge = Callable[[int, bytes], bool]


@dataclass(frozen=True, slots=True)
class Payload:
    """One kind of request as one server wants it.

    read: the class scores in the body of an answer; logits: whether these are logits or else probabilities.
    """

    kind: str
    path: str
    bodies: tuple[bytes, ...] = field(repr=False)
    read: Callable[[bytes], Scores]
    logits: bool = False
    headers: Mapping[str, str] = field(default_factory=lambda: JSON)

    def requests(self, extra: Mapping[str, str] | None = None) -> list[bytes]:
        """Whole HTTP requests, one for each body."""
        lines = [f"{name}: {value}\r\n" for name, value in {**self.headers, **(extra or {})}.items()]
        head = f"POST {self.path} HTTP/1.1\r\nHost: localhost\r\n{''.join(lines)}"
        return [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in self.bodies]

    def write(self, path: Path) -> None:
        """For `rotate.lua`: each body behind its length, four bytes, the highest first."""
        path.write_bytes(b"".join(len(body).to_bytes(4, "big") + body for body in self.bodies))


@dataclass(frozen=True, slots=True)
class Images:
    """What is asked about. rows: the JPEGs preprocessed, float32 of shape (images, 3, 32, 32)."""

    jpegs: Sequence[bytes]
    rows: NDArray[np.float32]

    def texts(self) -> list[str]:
        """The JPEGs as base64."""
        return [base64.b64encode(jpeg).decode() for jpeg in self.jpegs]


def plain(images: Images, *, output: str = "logits") -> dict[str, Payload]:
    """What fettle takes, and every peer whose routes are free to choose."""
    rows = images.rows
    inputs = {"name": "images", "shape": [1, *rows.shape[1:]], "datatype": "FP32"}
    size = rows[0].nbytes
    head = _dump(
        {
            "inputs": [{**inputs, "parameters": {"binary_data_size": size}}],
            "outputs": [{"name": output, "parameters": {"binary_data": True}}],
        }
    )
    octets = {"Content-Type": "application/octet-stream", LENGTH_HEADER: str(len(head))}
    texts = tuple(_dump({"image": text}) for text in images.texts())
    floats = tuple(_dump({"inputs": [{**inputs, "data": row.ravel().tolist()}]}) for row in rows)
    binary = tuple(head + row.astype("<f4").tobytes() for row in rows)
    return {
        "image": Payload("image", "/predict", texts, read_prediction),
        "json": Payload("json", INFER, floats, read_tensor, logits=True),
        "binary": Payload("binary", INFER, binary, read_binary, logits=True, headers=octets),
    }


def litserve(images: Images) -> dict[str, Payload]:
    """The plain ones on LitServe's one path."""
    return {kind: replace(payload, path="/predict") for kind, payload in plain(images).items()}


def mlserver(images: Images) -> dict[str, Payload]:
    """MLServer knows the protocol only: an image is a BYTES tensor of base64 text. It has no binary extension."""
    known = plain(images)
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"content_type": "base64"}}
    texts = tuple(_dump({"inputs": [{**tensor, "data": [text]}]}) for text in images.texts())
    return {"image": Payload("image", INFER, texts, read_tensor), "json": known["json"]}


def bentoml(images: Images) -> dict[str, Payload]:
    """BentoML merges requests along the first axis of an argument, so that each is a list of one."""
    texts = tuple(_dump({"images": [text]}) for text in images.texts())
    floats = tuple(_dump({"rows": [row.tolist()]}) for row in images.rows)
    return {
        "image": Payload("image", "/predict", texts, read_prediction),
        "json": Payload("json", "/infer", floats, read_prediction),
    }


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def read_prediction(body: bytes) -> Scores:
    """The probabilities of a prediction, or of the one in a list.

    >>> read_prediction(b'[{"probabilities": [0.25, 0.75]}]')
    array([0.25, 0.75])
    """
    answer: Any = json.loads(body)
    return np.array((answer[0] if isinstance(answer, list) else answer)["probabilities"], np.float64)


def read_tensor(body: bytes) -> Scores:
    """The first output of an answer of the protocol.

    >>> read_tensor(b'{"outputs": [{"name": "y", "shape": [1, 2], "data": [[1.5, 2]]}]}')
    array([1.5, 2. ])
    """
    return np.array(json.loads(body)["outputs"][0]["data"], np.float64).ravel()


def read_binary(body: bytes) -> Scores:
    """The only output of a binary answer: what follows the JSON, whose end its own size tells.

    >>> head = b'{"outputs":[{"name":"y","parameters":{"binary_data_size":8}}]}'
    >>> read_binary(head + np.array([1.5, 2], "<f4").tobytes())
    array([1.5, 2. ])
    """
    end = body.index(b"}]}") + 3
    size = json.loads(body[:end])["outputs"][0]["parameters"]["binary_data_size"]
    if len(body) - end != size:
        raise ValueError(f"{size} bytes must follow the JSON, got {len(body) - end}")
    return np.frombuffer(body[end:], "<f4").astype(np.float64)


def judge_by(expected: Scores, read: Callable[[bytes], Scores], *, tolerance: float = 0.0) -> Judge:
    """Right is an answer with the scores that the engine gives for that image, to the last bit at tolerance 0.

    >>> judge_by(np.array([[0.1, 0.9]]), read_prediction)(0, b'{"probabilities": [0.1, 0.9]}')
    True
    """

    def judge(number: int, body: bytes) -> bool:
        try:
            found = read(body)
        except (ValueError, TypeError, KeyError, IndexError):
            return False
        wanted = expected[number]
        if found.shape != wanted.shape or found.argmax() != wanted.argmax():
            return False
        return bool(np.abs(found - wanted).max() <= tolerance)

    return judge
