"""What waits for a worker: jobs, their outcomes, and the queue of one version."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from fettle.serve import wire
from fettle.serve.lanes import Mounted
from fettle.serve.logs import about
from fettle.serve.refusal import Refusal

_log = logging.getLogger("fettle.serve")


class Result:
    """What a worker made of one job. content: the answer's bytes, of which `header_bytes` are JSON before tensors.

    probabilities: rows × classes float32, and then statistics, as bytes; empty where nothing is logged.
    """

    __slots__ = ("classes", "content", "header_bytes", "observed", "rows")

    def __init__(self, content: bytes, header_bytes: int, observed: bytes, rows: int, classes: int) -> None:
        self.content = content
        self.header_bytes = header_bytes
        self.observed = observed
        self.rows = rows
        self.classes = classes


class Job:
    """Some rows for one version.

    payload: bytes for the worker, read as `kind` says. rows: as far as the server knows. deadline: on the clock of
    `time.monotonic`. done: called once, in the event loop, with the result or a Refusal.
    queued, given, finished: on that clock too; the latter two are 0 as long as no worker has it. ran: the report on
    the batch that it was part of.
    """

    __slots__ = (
        "alone",
        "deadline",
        "done",
        "expected_s",
        "finished",
        "given",
        "item",
        "kind",
        "model",
        "payload",
        "queued",
        "ran",
        "rows",
        "settled",
    )

    def __init__(
        self,
        *,
        model: Mounted,
        kind: wire.Kind,
        item: wire.Item,
        payload: bytes | memoryview,
        rows: int,
        deadline: float,
        done: Callable[[Result | Refusal], None],
    ) -> None:
        self.model = model
        self.kind = kind
        self.item = item
        self.payload = payload
        self.rows = rows
        self.deadline = deadline
        self.done = done
        self.queued = time.monotonic()
        self.given = self.finished = 0.0
        self.ran: wire.Done | None = None
        # When it was queued, from then to its answer.
        self.expected_s = 0.0
        # A worker died with it: it goes to another, once, and by itself, for it may be what killed the first.
        self.alone = False
        self.settled = False

    def settle(self, outcome: Result | Refusal) -> None:
        """Tell the outcome, unless one was told before. A client that cannot be told harms no other."""
        if not self.settled:
            self.settled = True
            try:
                self.done(outcome)
            except Exception:
                item, served = self.item, self.model.served
                fields = about(
                    request_id=item.request_id, trace_id=item.trace_id, model=served.name, version=served.version
                )
                _log.exception("the answer to request %s cannot be told", item.request_id, extra=fields)

    def abandon(self) -> None:
        """Nobody waits any more."""
        self.settled = True


class Queue:
    """The jobs of one version and kind that wait, their rows and bytes."""

    __slots__ = ("bytes", "jobs", "model", "rows")

    def __init__(self, model: Mounted) -> None:
        self.model = model
        self.jobs: deque[Job] = deque()
        self.rows = self.bytes = 0

    def add(self, job: Job, *, first: bool = False) -> None:
        if first:
            self.jobs.appendleft(job)
        else:
            self.jobs.append(job)
        self.rows += job.rows
        self.bytes += job.item.size

    def take(self) -> Job:
        job = self.jobs.popleft()
        self.rows -= job.rows
        self.bytes -= job.item.size
        return job

    def head(self) -> Job | None:
        """The first job that somebody waits for."""
        while self.jobs and self.jobs[0].settled:
            self.take()
        return self.jobs[0] if self.jobs else None

    def drop_settled(self) -> None:
        if any(job.settled for job in self.jobs):
            self.jobs = deque(job for job in self.jobs if not job.settled)
            self.rows = sum(job.rows for job in self.jobs)
            self.bytes = sum(job.item.size for job in self.jobs)
