"""What the cores could do without a server: decoding and inference alone, in one process for each core, in batches.

usage: compute.py ARTIFACT FOLDER: answers each line `KIND ROWS SECONDS` on its input with its rows a second, in
batches of ROWS.
FOLDER holds `KIND.bodies`, as `rotate.lua` reads them, and `binary.length`, the length of the JSON in a binary body.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from fettle.core.artifact import Artifact
from fettle.serve.binary import parse_binary
from fettle.serve.images import decode_base64, preprocess_into
from fettle.serve.predict import images_in
from fettle.serve.protocol import parse_infer

BATCHES = (8, 16, 32)
MAX_PIXELS = 25_000_000


class LimitFailed(Exception):
    """A process that computes without a server did not."""


def main(artifact: str, folder: str) -> None:
    """One process: loads, says so, and works when it is told."""
    opened = Artifact.open(Path(artifact))
    runner = opened.load()
    name = opened.manifest.signature.inputs[0].name
    fills = fillers(opened, Path(folder))
    shape = tuple(side for side in opened.manifest.signature.inputs[0].shape if isinstance(side, int))
    rows = np.zeros((max(BATCHES), *shape), np.float32)
    for size in BATCHES:
        runner.run({name: rows[:size]})
    print("ready", flush=True)
    for line in sys.stdin:
        kind, size_text, seconds = line.split()
        size, done, fill = int(size_text), 0, fills[kind]
        start = now = time.perf_counter()
        while now - start < float(seconds):
            for index in range(size):
                fill(done + index, rows[index])
            runner.run({name: rows[:size]})
            done += size
            now = time.perf_counter()
        print(done / (now - start), flush=True)


def fillers(artifact: Artifact, folder: Path) -> dict[str, Callable[[int, np.ndarray], None]]:
    """For each kind of payload, how the body with this number becomes a row, as fettle's workers do it."""
    signature = artifact.manifest.signature
    spec, name = signature.image, signature.inputs[0].name
    assert spec is not None
    # The JSON around the base64 text is read by the server's front and is not part of the computation.
    texts = [images_in(body, "application/json")[0][0].content for body in bodies_in(folder / "image.bodies")]
    floats, tensors = list(bodies_in(folder / "json.bodies")), list(bodies_in(folder / "binary.bodies"))
    header_bytes = int((folder / "binary.length").read_text())

    def image(number: int, row: np.ndarray) -> None:
        preprocess_into(decode_base64(texts[number % len(texts)]), spec, row, max_pixels=MAX_PIXELS)

    def json(number: int, row: np.ndarray) -> None:
        row[...] = parse_infer(floats[number % len(floats)], signature).inputs[name][0]

    def binary(number: int, row: np.ndarray) -> None:
        body = tensors[number % len(tensors)]
        row[...] = parse_binary(body, header_bytes=header_bytes, signature=signature).inputs[name][0]

    return {"image": image, "json": json, "binary": binary}


def bodies_in(path: Path) -> Iterator[bytes]:
    """The bodies that `Payload.write` has written."""
    content = path.read_bytes()
    start = 0
    while start < len(content):
        size = int.from_bytes(content[start : start + 4], "big")
        yield content[start + 4 : start + 4 + size]
        start += 4 + size


@contextmanager
def limit_of(artifact: Path, folder: Path, *, processes: int) -> Iterator[Limit]:
    """Processes that compute when they are asked, as long as this lasts. Raises LimitFailed, and so does the asking."""
    command = [sys.executable, __file__, str(artifact), str(folder)]
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
            )
            for _ in range(processes)
        ]
        stack.callback(_hang_up, workers)
        for worker in workers:
            _hear(worker)
        yield Limit(workers)


class Limit:
    """What the cores allow without a server."""

    def __init__(self, workers: Sequence[subprocess.Popen[str]]) -> None:
        self._workers = workers

    def measure(self, kind: str, *, seconds: float) -> dict[int, float]:
        """Rows a second by rows in a batch, all processes together. seconds: for each size of batch."""
        found = {}
        for size in BATCHES:
            for worker in self._workers:
                _tell(worker, f"{kind} {size} {seconds}\n")
            found[size] = sum(float(_hear(worker)) for worker in self._workers)
        return found


def _tell(worker: subprocess.Popen[str], line: str) -> None:
    assert worker.stdin is not None
    try:
        worker.stdin.write(line)
        worker.stdin.flush()
    except OSError as problem:
        raise LimitFailed(f"the computation cannot be asked: {problem}") from None


def _hear(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    answer = worker.stdout.readline()
    if not answer:
        raise LimitFailed(f"the computation ended with code {worker.wait()}")
    return answer


def _hang_up(workers: Sequence[subprocess.Popen[str]]) -> None:
    for worker in workers:
        assert worker.stdin is not None
        with suppress(OSError):  # it has gone already
            worker.stdin.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
