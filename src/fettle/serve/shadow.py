"""Shadow traffic: copies of requests go to a version that answers nobody, to compare what it would have said.

It must never delay or fail what it shadows, so it shares nothing with it but the event loop: a worker of its own at
the lowest priority, a small queue of its own, bounded in rows and bytes, and no copy waits for room: it is dropped,
and counted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from fettle.serve.compare import agreeing_rows, largest_difference
from fettle.serve.dispatch import Dispatcher
from fettle.serve.jobs import Job, Result
from fettle.serve.lanes import Lanes, Mounted
from fettle.serve.metrics import Metrics
from fettle.serve.observations import ObservationLog, observation_of
from fettle.serve.options import ServeOptions
from fettle.serve.refusal import Refusal

_log = logging.getLogger("fettle.serve")
_MAX_BYTES = 64 * 2**20


class Shadow:
    """The worker and the queue of all shadows of a server."""

    def __init__(self, options: ServeOptions, metrics: Metrics, *, log: ObservationLog | None) -> None:
        rows = options.shadow_rows
        options = replace(
            options, workers=1, max_queue_rows=rows, max_batch_rows=min(rows, options.max_batch_rows), promise_s=None
        )
        self.lanes = Lanes(options, metrics, background=True)
        self.dispatcher = Dispatcher(self.lanes, options=options, metrics=metrics, observe=True)
        self._options = options
        self._metrics = metrics.shadow
        self._log = log
        self._bytes = 0

    def start(self) -> None:
        """Start the worker, and begin to watch deadlines."""
        self.lanes.start()
        self.dispatcher.start()

    async def close(self) -> None:
        """End the worker at once: nobody waits for what it does."""
        self.dispatcher.close()
        await self.lanes.close(0.0)

    def copy(self, jobs: Sequence[Job], model: Mounted | None) -> None:
        """Give the shadow what these jobs, which are queued by now, bring; `model` is None where it is not ready."""
        if model is None:
            return
        try:
            self._copy(jobs, model)
        except Exception:
            self._count(model, "dropped", len(jobs))
            _log.exception("a request could not be copied for its shadow")

    def _copy(self, jobs: Sequence[Job], model: Mounted) -> None:
        rows, size = sum(job.rows for job in jobs), sum(len(job.payload) for job in jobs)
        full = self.dispatcher.queued_rows + rows > self._options.max_queue_rows or self._bytes + size > _MAX_BYTES
        if full or self.lanes.problem is not None:
            self._count(model, "dropped", len(jobs))
            return
        deadline = time.monotonic() + self._options.request_timeout_s
        pairs = [_Pair(partial(self._compare, model)) for _ in jobs]
        copies = [
            Job(
                model=model,
                kind=job.kind,
                item=job.item,
                payload=job.payload,
                rows=job.rows,
                deadline=deadline,
                done=partial(self._answered, model, job.item.request_id, len(job.payload), time.monotonic(), pair),
            )
            for job, pair in zip(jobs, pairs, strict=True)
        ]
        self._bytes += size
        try:
            self.dispatcher.submit(copies)
        except Refusal:  # it was retired, or the server ends
            self._bytes -= size
            self._count(model, "dropped", len(jobs))
            return
        for job, pair in zip(jobs, pairs, strict=True):
            job.done = partial(_primary_answered, job.done, pair)

    def _answered(
        self, model: Mounted, request_id: str, size: int, since: float, pair: _Pair, outcome: Result | Refusal
    ) -> None:
        self._bytes -= size
        if isinstance(outcome, Refusal):
            self._count(model, "failed")
            return
        self._count(model, "answered")
        if self._log is not None and outcome.rows:
            latency_ms = (time.monotonic() - since) * 1000
            self._log.add(observation_of(outcome, model=model.served, request_id=request_id, latency_ms=latency_ms))
        pair.shadow(outcome)

    def _compare(self, model: Mounted, primary: Result, shadow: Result) -> None:
        served = model.served
        labels = served.name, str(served.version)
        if primary.rows and shadow.rows:
            agreed = agreeing_rows(primary, shadow)
            self._metrics.rows.labels(*labels, "agreed").inc(agreed)
            self._metrics.rows.labels(*labels, "disagreed").inc(max(primary.rows, shadow.rows) - agreed)
            return
        difference = largest_difference(primary, shadow)
        if difference is not None:
            self._metrics.difference.labels(*labels).observe(difference)

    def _count(self, model: Mounted, result: str, count: int = 1) -> None:
        self._metrics.requests.labels(model.served.name, str(model.served.version), result).inc(count)


class _Pair:
    """Two answers to one input, whichever comes first. compare: told of both."""

    __slots__ = ("_compare", "_primary", "_shadow")

    def __init__(self, compare: Callable[[Result, Result], None]) -> None:
        self._compare = compare
        self._primary: Result | None = None
        self._shadow: Result | None = None

    def primary(self, result: Result) -> None:
        self._primary = result
        self._both()

    def shadow(self, result: Result) -> None:
        self._shadow = result
        self._both()

    def _both(self) -> None:
        if self._primary is not None and self._shadow is not None:
            self._compare(self._primary, self._shadow)


def _primary_answered(done: Callable[[Result | Refusal], None], pair: _Pair, outcome: Result | Refusal) -> None:
    """The client first."""
    done(outcome)
    if isinstance(outcome, Result):
        try:
            pair.primary(outcome)
        except Exception:
            _log.exception("an answer could not be compared with its shadow's")
