"""A worker process: loads models, answers batches, and ends when the server hangs up.

Started by the server as `python -m fettle.serve.worker DESCRIPTOR`, an open socket. One thread answers; a version is
loaded beside it on a thread of its own, so that loading delays answers and does not stop them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

from fettle.core.artifact import Artifact
from fettle.serve import priority, wire
from fettle.serve.execute import Batch, execute
from fettle.serve.logs import LOG_FORMAT, configure, format_for
from fettle.serve.model import LoadedModel, load_model
from fettle.serve.refusal import Refusal, reason_of

_log = logging.getLogger("fettle.serve")
_READ_BYTES = 2**20


class Worker:
    """The models of one process, and what it says on its socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._models: dict[int, tuple[LoadedModel, int]] = {}
        self._wanted: set[int] = set()
        self._changing = threading.Lock()

    def run(self) -> None:
        """Obey until the server hangs up."""
        frames = wire.Frames()
        read = memoryview(bytearray(_READ_BYTES))  # one for all: a new megabyte each time costs more than the reading
        while count := self._connection.recv_into(read):
            for header, body in frames.feed(read[:count]):
                self._obey(wire.order_of(header), body)

    def _obey(self, order: wire.Order, body: memoryview) -> None:
        match order:
            case wire.Work():
                self._answer(order, body)
            case wire.Load():
                self._wanted.add(order.key)
                threading.Thread(target=self._load, args=(order,), name="fettle-load", daemon=True).start()
            case wire.Unload():
                with self._changing:
                    self._wanted.discard(order.key)
                    self._models.pop(order.key, None)
                threading.Thread(target=give_back, name="fettle-give-back", daemon=True).start()

    def _load(self, order: wire.Load) -> None:
        try:
            artifact = Artifact.open(Path(order.root))
            model, times = load_model(
                order.name, order.version, artifact, threads=order.threads, max_batch_rows=order.max_batch_rows
            )
        except Exception as problem:
            with self._changing:
                self._wanted.discard(order.key)
            detail = "".join(traceback.format_exception(problem))
            self._say(wire.Refused(order.key, reason_of(problem), detail))
            return
        with self._changing:
            if order.key in self._wanted:  # else it was forgotten meanwhile
                self._models[order.key] = model, order.max_batch_rows
        self._say(wire.Loaded(order.key, [rows for rows, _ in times], [seconds for _, seconds in times]))

    def _answer(self, work: wire.Work, body: memoryview) -> None:
        payloads, start = [], 0
        for item in work.items:
            payloads.append(body[start : start + item.size])
            start += item.size
        try:
            model, max_batch_rows = self._models[work.key]
            batch = execute(work, payloads, model, max_batch_rows=max_batch_rows)
        except Exception:  # of our own making: every item must have an outcome, or its client waits for nothing
            _log.exception("a batch failed outside of the model")
            batch = Batch([Refusal(500, "the server failed on this request")] * len(work.items))
        outcomes, parts = batch.packed()
        self._say(wire.Done(work.id, outcomes, batch.seconds, batch.rows), b"".join(parts))

    def _say(self, report: wire.Report, body: bytes = b"") -> None:
        with self._sending:
            self._connection.sendall(wire.frame(report, len(body)) + body)


def give_back() -> None:
    """Return to the system what a model had: glibc would keep it, in pieces that the next model does not fit into.

    Without it a worker grows by a third within twenty switches of a small model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def main(descriptor: int) -> None:
    """Work on the socket with this descriptor. Signals are the server's business: it ends its workers itself."""
    priority.come_second()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    configure(format_for(os.environ.get(LOG_FORMAT, "auto"), terminal=sys.stderr.isatty()))
    try:
        Worker(socket.socket(fileno=descriptor)).run()
    except (ConnectionResetError, BrokenPipeError):
        return  # the server has gone
    except Exception:
        _log.exception("the worker failed")
        sys.exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
