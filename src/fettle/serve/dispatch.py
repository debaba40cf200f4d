"""Work-conserving dynamic batching: a worker that becomes free takes what waits, up to what is worth its latency.

There is no window and no timer: an idle server answers a lone request at once, a busy one finds more rows waiting
each time, so the batch grows with the load by itself (the rule of Triton's batcher at delay 0). The queue is bounded
in rows, and what could not be answered before its deadline is refused at once, while the client can still ask another
server. Runs in the event loop; all that costs time is done by the workers.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence

from fettle.serve import wire
from fettle.serve.lanes import Lane, Lanes, Mounted
from fettle.serve.metrics import Metrics
from fettle.serve.options import ServeOptions
from fettle.serve.refusal import Refusal

_log = logging.getLogger("fettle.serve")
_SWEEP_S = 0.01


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
    """

    __slots__ = ("alone", "deadline", "done", "item", "kind", "model", "payload", "queued", "rows", "settled")

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
                _log.exception("the answer to request %s cannot be told", self.item.request_id)

    def abandon(self) -> None:
        """Nobody waits any more."""
        self.settled = True


class Dispatcher:
    """A bounded queue in front of the lanes. Belongs to one event loop."""

    def __init__(self, lanes: Lanes, *, options: ServeOptions, metrics: Metrics, observe: bool) -> None:
        self._lanes = lanes
        self._options = options
        self._metrics = metrics
        self._observe = observe
        self._waiting: dict[tuple[int, wire.Kind], deque[Job]] = {}
        self._rows = 0
        self._running: dict[int, list[Job]] = {}
        self._retired: list[Mounted] = []
        self._forgotten: set[int] = set()
        self._works = 0
        self._pumping = False
        self._closed = False
        self._sweeper: asyncio.Task[None] | None = None
        lanes.on_done, lanes.on_lost, lanes.on_idle = self._done, self._lost, lambda _: self._wake()

    @property
    def queued_rows(self) -> int:
        """Rows that wait now."""
        return self._rows

    def start(self) -> None:
        """Begin to watch deadlines."""
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())

    def close(self) -> None:
        """Refuse what still waits."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        gone = _shutting_down()
        for job in [job for jobs in (*self._waiting.values(), *self._running.values()) for job in jobs]:
            job.settle(gone)
        self._waiting.clear()
        self._rows = 0

    def retire(self, model: Mounted) -> None:
        """Let the workers forget a version once its last job has ended."""
        self._retired.append(model)

    # Admission

    def admit(self, model: Mounted, *, deadline: float) -> None:
        """Raise Refusal 429 or 503 where one more row would come too late. Costs microseconds: ask before parsing."""
        self._check_open()
        late_s = time.monotonic() + self._wait_s(model) - deadline
        if late_s > 0:
            self._shed(model)
            raise Refusal(
                429, "the answer would come too late: try again later", retry_after_s=max(1, math.ceil(late_s))
            )

    def _check_open(self) -> None:
        """Raise Refusal 503 where nothing will be answered any more."""
        if self._closed:
            raise _shutting_down()
        if self._lanes.problem is not None:
            raise _no_worker()

    def _wait_s(self, model: Mounted) -> float:
        """Until a row that comes now is answered: the batches before it, shared by the lanes, and its own."""
        times = model.times
        limit = self._limit(model)
        full_s = times.seconds(limit)
        before = self._rows / limit / max(1, self._lanes.living)
        return (before + 1.0) * full_s if self._rows else times.seconds(1)

    def _shed(self, model: Mounted) -> None:
        self._metrics.shed.labels(model.served.name, str(model.served.version)).inc()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of the jobs, or none. Raises Refusal 413, 429 or 503."""
        rows = sum(job.rows for job in jobs)
        limit = self._options.max_queue_rows
        if rows > limit:
            raise Refusal(413, f"a request may have at most {limit} rows, got {rows}")
        self._check_open()
        if jobs[0].model.key in self._forgotten:
            raise Refusal(503, "this version is not served any more: send the request again", retry_after_s=1)
        if self._rows + rows > limit:
            self._shed(jobs[0].model)
            raise Refusal(429, "too many requests are waiting: try again later", retry_after_s=1)
        for job in jobs:
            self._waiting.setdefault((job.model.key, job.kind), deque()).append(job)
        self._rows += rows
        self._wake()

    # Batches

    def _wake(self) -> None:
        """Look for work at the end of this turn of the loop: what arrives together runs together."""
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        while self._rows and not self._closed:
            idle = [lane for lane in self._lanes.all if lane.alive and lane.batch is None and lane.keys]
            chosen = self._next(idle)
            if chosen is None:
                return
            lane, queue = chosen
            self._give(lane, self._take(queue, share=len(idle)))

    def _next(self, idle: list[Lane]) -> tuple[Lane, deque[Job]] | None:
        """The queue whose head has waited longest, of those that an idle lane can serve."""
        oldest: tuple[float, Lane, deque[Job]] | None = None
        for (key, _), queue in self._waiting.items():
            while queue and queue[0].settled:
                self._rows -= queue.popleft().rows
            if not queue or (oldest is not None and queue[0].queued >= oldest[0]):
                continue
            lane = next((lane for lane in idle if key in lane.keys), None)
            if lane is not None:
                oldest = queue[0].queued, lane, queue
        return None if oldest is None else oldest[1:]

    def _limit(self, model: Mounted) -> int:
        return model.times.largest(self._options.max_batch_rows, promise_s=self._options.promise_s)

    def _take(self, queue: deque[Job], *, share: int) -> list[Job]:
        """What can run together, oldest first; where several lanes are idle, each gets its part."""
        first = queue[0]
        waiting = sum(job.rows for job in queue) if share > 1 else 0
        limit = max(1, min(self._limit(first.model), math.ceil(waiting / share) if share > 1 else 2**31))
        batch: list[Job] = []
        rows = 0
        while queue:
            job = queue[0]
            if job.settled:
                self._rows -= queue.popleft().rows
                continue
            if batch and (job.alone or batch[0].alone or rows + job.rows > limit or not job.model.served.row_wise):
                break
            batch.append(queue.popleft())
            rows += job.rows
            self._rows -= job.rows
        return batch

    def _give(self, lane: Lane, batch: list[Job]) -> None:
        if not batch:
            return
        now = time.monotonic()
        first = batch[0]
        served = first.model.served
        queue_seconds = self._metrics.queue_seconds.labels(served.name, str(served.version))
        for job in batch:
            queue_seconds.observe(now - job.queued)
        self._works += 1
        options = self._options
        work = wire.Work(
            id=self._works,
            key=first.model.key,
            kind=first.kind,
            items=[job.item for job in batch],
            observe=self._observe,
            max_image_pixels=options.max_image_pixels,
            max_rows=options.max_queue_rows,
        )
        self._running[lane.number] = batch
        lane.send(work, [job.payload for job in batch], batch)

    def _done(self, lane: Lane, batch: list[Job], report: wire.Done, body: memoryview) -> None:
        self._running.pop(lane.number, None)
        if len(report.outcomes) != len(batch):
            _log.error("worker %d gave %d outcomes for %d jobs", lane.number, len(report.outcomes), len(batch))
            self._lost(lane, batch)
            return
        if report.rows:
            model = batch[0].model
            labels = (model.served.name, str(model.served.version))
            model.times.observe(report.rows, time.monotonic() - lane.busy_since)
            self._metrics.inference_seconds.labels(*labels).observe(report.seconds)
            self._metrics.batch_rows.labels(*labels).observe(report.rows)
        self._wake()
        start = 0
        for job, outcome in zip(batch, report.outcomes, strict=True):
            end = start + outcome.size
            content = bytes(body[start:end])
            start = end + 4 * outcome.rows * (outcome.classes + wire.STATISTICS)
            if outcome.status != 200:
                job.settle(Refusal(outcome.status, content.decode("utf-8", "replace")))
                continue
            observed = bytes(body[end:start])
            job.settle(Result(content, outcome.header_bytes, observed, outcome.rows, outcome.classes))

    def _lost(self, lane: Lane, batch: list[Job] | None) -> None:
        """A worker died: its jobs go to another, each by itself, and fail where that dies too."""
        self._running.pop(lane.number, None)
        for job in reversed(batch or []):
            if job.settled:
                continue
            if job.alone:
                job.settle(Refusal(500, "the model's process died on this input"))
                continue
            job.alone = True
            self._waiting.setdefault((job.model.key, job.kind), deque()).appendleft(job)
            self._rows += job.rows
        if self._lanes.problem is not None:
            gone = _no_worker()
            for job in [job for queue in self._waiting.values() for job in queue]:
                job.settle(gone)
        self._wake()

    # Deadlines

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = time.monotonic()
            for jobs in (*self._waiting.values(), *self._running.values()):
                for job in jobs:
                    if not job.settled and now >= job.deadline:
                        job.settle(Refusal(504, "no answer before the deadline", retry_after_s=1))
            self._drop_settled()
            for lane in self._lanes.all:
                if lane.batch is not None and now - lane.busy_since > self._options.worker_timeout_s:
                    _log.error("worker %d has not answered for %g s: it is ended", lane.number, now - lane.busy_since)
                    lane.busy_since = now
                    lane.kill()
            self._forget_retired()
            self._wake()

    def _drop_settled(self) -> None:
        """What nobody waits for any more takes no room in the queue."""
        for key, queue in self._waiting.items():
            gone = sum(job.rows for job in queue if job.settled)
            if gone:
                self._waiting[key] = deque(job for job in queue if not job.settled)
                self._rows -= gone

    def _forget_retired(self) -> None:
        for model in list(self._retired):
            waits = any(queue for (key, _), queue in self._waiting.items() if key == model.key)
            runs = any(batch[0].model is model for batch in self._running.values())
            if not waits and not runs:
                self._retired.remove(model)
                self._forgotten.add(model.key)
                self._waiting = {key: queue for key, queue in self._waiting.items() if key[0] != model.key}
                self._lanes.unmount(model)


def _shutting_down() -> Refusal:
    return Refusal(503, "the server is shutting down", retry_after_s=1)


def _no_worker() -> Refusal:
    return Refusal(503, "no worker is left to answer: see /health", retry_after_s=1)
