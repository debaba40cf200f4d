"""A load on loopback: images as PNG over HTTP, from a few threads with one connection each."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from fettle.core.signature import Array


@dataclass(slots=True)
class Answers:
    """What came back: answers by version, right ones, and every failure in words."""

    versions: dict[str, int] = field(default_factory=dict)
    right: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def answered(self) -> int:
        """How many requests got a prediction."""
        return sum(self.versions.values())


def encode(image: Array) -> bytes:
    """The JSON body for one (h, w) uint8 image."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return json.dumps({"image": base64.b64encode(file.getvalue()).decode()}).encode()


def send(url: str, images: Sequence[Array], labels: Sequence[int], *, clients: int = 8) -> Answers:
    """Send each image once and wait for all answers."""
    answers, lock = Answers(), threading.Lock()
    work = [(encode(image), int(label)) for image, label in zip(images, labels, strict=True)]

    def client(share: list[tuple[bytes, int]]) -> None:
        with Connection(url) as connection:
            for body, label in share:
                _one(connection, body, label, answers, lock)

    threads = [threading.Thread(target=client, args=(work[i::clients],)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


class Load:
    """Clients that send without pause until told to stop, as a context: `with Load(url, images) as load`."""

    def __init__(self, url: str, images: Sequence[Array], labels: Sequence[int], *, clients: int = 4) -> None:
        self.answers = Answers()
        self._stop, self._lock = threading.Event(), threading.Lock()
        work = [(encode(image), int(label)) for image, label in zip(images, labels, strict=True)]
        self._threads = [threading.Thread(target=self._client, args=(url, work[i::clients])) for i in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def has_seen(self, version: int) -> int:
        """How many answers came from this version so far."""
        with self._lock:
            return self.answers.versions.get(str(version), 0)

    def _client(self, url: str, work: list[tuple[bytes, int]]) -> None:
        with Connection(url) as connection:
            while not self._stop.is_set():
                for body, label in work:
                    _one(connection, body, label, self.answers, self._lock)
                    if self._stop.is_set():
                        return


class Connection:
    """One keep-alive connection."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._http = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=30)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def predict(self, body: bytes) -> tuple[int, dict[str, object]]:
        """Status and answer of one POST /predict."""
        self._http.request("POST", "/predict", body, {"Content-Type": "application/json"})
        response = self._http.getresponse()
        return response.status, json.loads(response.read())


def _one(connection: Connection, body: bytes, label: int, answers: Answers, lock: threading.Lock) -> None:
    try:
        status, answer = connection.predict(body)
    except (OSError, http.client.HTTPException, ValueError) as problem:
        with lock:
            answers.failures.append(f"{type(problem).__name__}: {problem}")
        return
    with lock:
        if status != 200:
            answers.failures.append(f"{status}: {answer.get('error')}")
            return
        version = str(answer["version"])
        answers.versions[version] = answers.versions.get(version, 0) + 1
        answers.right += answer["index"] == label


def corrupt(images: Array, *, seed: int = 0) -> Array:
    """A camera gone bad: strong noise over a faded picture. images: (n, h, w) uint8; returns the same."""
    noise = np.random.default_rng(seed).normal(0, 70, images.shape)
    return (images * 0.6 + 40 + noise).clip(0, 255).astype(np.uint8)
