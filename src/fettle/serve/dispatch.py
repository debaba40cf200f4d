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
from collections import Counter
from collections.abc import Sequence

from fettle.serve import wire
from fettle.serve.fit import Margin
from fettle.serve.jobs import Job, Queue, Result
from fettle.serve.lanes import Lane, Lanes, Mounted
from fettle.serve.metrics import Metrics
from fettle.serve.options import ServeOptions
from fettle.serve.priority import Promptness
from fettle.serve.refusal import Refusal

_log = logging.getLogger("fettle.serve")
_SWEEP_S = 0.01
# What is aimed at, of the time that a client gives: the request has come a way, the answer has one to go, and a longer
# queue than keeps the workers busy wins nothing. At 0.9 twice as many answers came just too late under overload.
_AIM = 0.8
# Of the event loop, before jobs are given away: clients that were just answered send their next requests meanwhile.
# Each takes some microseconds where nothing has arrived.
_TURNS = 4


class Dispatcher:
    """A bounded queue in front of the lanes. Belongs to one event loop."""

    def __init__(self, lanes: Lanes, *, options: ServeOptions, metrics: Metrics, observe: bool) -> None:
        self._lanes = lanes
        self._options = options
        self._metrics = metrics
        self._observe = observe
        self._waiting: dict[tuple[int, wire.Kind], Queue] = {}
        self._running: dict[int, list[Job]] = {}
        self._retired: list[Mounted] = []
        self._works = self._arrived = 0
        self._pumping = False
        self._closed = False
        self._sweeper: asyncio.Task[None] | None = None
        self._margin = Margin()
        self._promptness = Promptness()
        self._estimate_s = 0.0  # of the latest admission, which is that of the jobs that are submitted next
        self._ends: dict[int, float] = {}  # when the batch that runs in a lane is expected to end
        lanes.on_done, lanes.on_lost, lanes.on_idle = self._done, self._lost, lambda _: self._wake()

    @property
    def queued_rows(self) -> int:
        """Rows that wait now."""
        rows = 0
        for queue in self._waiting.values():
            rows += queue.rows
        return rows

    def jobs(self) -> Counter[tuple[str, str]]:
        """How many jobs of each model and version wait or run."""
        served = (job.model.served for job in self._all())
        return Counter((one.name, str(one.version)) for one in served)

    def start(self) -> None:
        """Begin to watch deadlines."""
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep())

    def close(self) -> None:
        """Refuse what still waits."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        gone = _shutting_down()
        for job in self._all():
            job.settle(gone)
        self._waiting.clear()

    def _all(self) -> list[Job]:
        """The jobs that wait, and those that run."""
        waiting = [job for queue in self._waiting.values() for job in queue.jobs]
        return waiting + [job for batch in self._running.values() for job in batch]

    def retire(self, model: Mounted) -> None:
        """Let the workers forget a version once its last job has ended."""
        self._retired.append(model)

    # Admission

    def admit(self, model: Mounted, *, deadline: float) -> None:
        """Raise Refusal 429 or 503 where one more row would come too late. Costs microseconds: ask before parsing."""
        self._check_open()
        now = time.monotonic()
        self._estimate_s = self._wait_s(model, now)
        late_s = self._estimate_s + self._margin.seconds - (deadline - now) * _AIM
        if late_s > 0:
            if deadline > now and not self.queued_rows and len(self._running) < self._lanes.living:
                return  # it costs nobody; and times that were learned in a bad moment are unlearned only by trying
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

    def _wait_s(self, model: Mounted, now: float) -> float:
        """Until a row that comes now is answered: the batches before it, shared by the lanes, and its own.

        Every version has batches of its own, as large and as long as its own times say.
        """
        before_s, own_s = 0.0, model.times.seconds(1)
        if len(self._running) >= self._lanes.living:
            before_s = sum(max(0.0, self._ends[number] - now) for number in self._running)
        for queue in self._waiting.values():
            if queue.rows:
                limit = self._limit(queue.model)
                full_s = queue.model.times.seconds(limit)
                before_s += queue.rows / limit * full_s
                if queue.model is model:
                    own_s = full_s
        return before_s / max(1, self._lanes.living) + own_s

    def _shed(self, model: Mounted) -> None:
        self._promptness.refused(time.monotonic())
        self._metrics.shed.labels(model.served.name, str(model.served.version)).inc()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of the jobs, or none. Raises Refusal 413, 429 or 503."""
        rows = sum(job.rows for job in jobs)
        limit = self._options.max_queue_rows
        if rows > limit:
            raise Refusal(413, f"a request may have at most {limit} rows, got {rows}")
        self._check_open()
        if jobs[0].model.key not in self._lanes.mounted:
            raise Refusal(503, "this version is not served any more: send the request again", retry_after_s=1)
        if self._full(jobs, rows):
            self._pump()  # what an idle worker can take makes room
            if self._full(jobs, rows):
                self._shed(jobs[0].model)
                raise Refusal(429, "too many requests are waiting: try again later", retry_after_s=1)
        self._arrived += len(jobs)
        for job in jobs:
            job.expected_s = self._estimate_s
            self._queue_of(job).add(job)
        self._wake()

    def _full(self, jobs: Sequence[Job], rows: int) -> bool:
        """Whether these and what waits are too much; of bytes never so where nothing waits: one request is let in."""
        if self.queued_rows + rows > self._options.max_queue_rows:
            return True
        waiting = 0
        for queue in self._waiting.values():
            waiting += queue.bytes
        return waiting > 0 and waiting + sum(job.item.size for job in jobs) > self._options.max_queue_bytes

    def _queue_of(self, job: Job) -> Queue:
        key = (job.model.key, job.kind)
        found = self._waiting.get(key)
        if found is None:
            found = self._waiting[key] = Queue(job.model)
        return found

    # Batches

    def _wake(self) -> None:
        """Look for work once the loop has read what is there: what arrives together runs together."""
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._read_on, _TURNS, -1)

    def _read_on(self, turns: int, seen: int) -> None:
        """Take one more turn of the loop, and then another as long as each brings jobs, but no more than so many."""
        if turns and self._arrived != seen:
            asyncio.get_running_loop().call_soon(self._read_on, turns - 1, self._arrived)
        else:
            self._pump()

    def _pump(self) -> None:
        self._pumping = False
        while self.queued_rows and not self._closed:
            idle = [lane for lane in self._lanes.all if lane.alive and lane.batch is None and lane.keys]
            chosen = self._next(idle)
            if chosen is None:
                return
            lane, queue = chosen
            self._give(lane, self._take(queue, share=len(idle)))

    def _next(self, idle: list[Lane]) -> tuple[Lane, Queue] | None:
        """The queue whose head has waited longest, of those that an idle lane can serve."""
        oldest: tuple[float, Lane, Queue] | None = None
        for (key, _), queue in self._waiting.items():
            head = queue.head()
            if head is None or (oldest is not None and head.queued >= oldest[0]):
                continue
            lane = next((lane for lane in idle if key in lane.keys), None)
            if lane is not None:
                oldest = head.queued, lane, queue
        return None if oldest is None else oldest[1:]

    def _limit(self, model: Mounted) -> int:
        return model.times.largest(self._options.max_batch_rows, promise_s=self._options.promise_s)

    def _take(self, queue: Queue, *, share: int) -> list[Job]:
        """What can run together, oldest first; where several lanes are idle, each gets its part."""
        limit = max(1, min(self._limit(queue.model), math.ceil(queue.rows / share) if share > 1 else 2**31))
        ends = time.monotonic() + queue.model.times.seconds(min(limit, queue.rows))
        batch: list[Job] = []
        late: list[Job] = []
        rows = size = 0
        while (job := queue.head()) is not None:
            too_much = rows + job.rows > limit or size + job.item.size > wire.MAX_BATCH_BYTES
            if batch and (job.alone or batch[0].alone or too_much or not job.model.served.row_wise):
                break
            queue.take()
            if job.deadline < ends and queue.jobs:
                late.append(job)
                continue
            batch.append(job)
            rows += job.rows
            size += job.item.size
        for job in late:
            job.settle(_too_late())
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
            job.given = now
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
        self._ends[lane.number] = now + first.model.times.seconds(sum(job.rows for job in batch))
        lane.send(work, [job.payload for job in batch], batch)

    def _done(self, lane: Lane, batch: list[Job], report: wire.Done, body: memoryview) -> None:
        self._running.pop(lane.number, None)
        now = time.monotonic()
        if report.rows:
            model = batch[0].model
            labels = (model.served.name, str(model.served.version))
            model.times.observe(report.rows, now - lane.busy_since)
            if not batch[-1].alone:
                self._margin.observe(now - batch[-1].queued - batch[-1].expected_s)
            self._metrics.inference_seconds.labels(*labels).observe(report.seconds)
            self._metrics.batch_rows.labels(*labels).observe(report.rows)
        self._wake()
        start = 0
        for job, outcome in zip(batch, report.outcomes, strict=True):
            job.finished, job.ran = now, report
            end = start + outcome.size
            content = bytes(body[start:end])
            start = end + 4 * outcome.rows * (outcome.classes + wire.STATISTICS)
            if outcome.status != 200:
                job.settle(Refusal(outcome.status, content.decode("utf-8", "replace")))
                continue
            observed = bytes(body[end:start])
            job.settle(Result(content, outcome.header_bytes, observed, outcome.rows, outcome.classes))

    def _lost(self, lane: Lane, batch: list[Job] | None) -> None:
        """A worker died: its jobs go to another, each by itself, and fail where that dies too.

        Unless it died while it loaded a new version: that is suspected first, and its worker may well die twice.
        """
        self._running.pop(lane.number, None)
        for job in reversed(batch or []):
            if job.settled:
                continue
            if job.alone and not lane.died_trying:
                job.settle(Refusal(500, "the model's process died on this input"))
                continue
            job.alone = job.alone or not lane.died_trying
            self._queue_of(job).add(job, first=True)
        if self._lanes.problem is not None:
            gone = _no_worker()
            for job in [job for queue in self._waiting.values() for job in queue.jobs]:
                job.settle(gone)
        self._wake()

    # Deadlines

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = time.monotonic()
            for job in self._all():
                if not job.settled and now >= job.deadline:
                    job.settle(_too_late())
            for queue in self._waiting.values():  # what nobody waits for any more takes no room
                queue.drop_settled()
            for lane in self._lanes.all:
                if lane.batch is not None and now - lane.busy_since > self._options.worker_timeout_s:
                    _log.error("worker %d has not answered for %g s: it is ended", lane.number, now - lane.busy_since)
                    lane.busy_since = now
                    lane.kill()
            self._forget_retired()
            self._promptness.look(now)
            self._wake()

    def _forget_retired(self) -> None:
        for model in list(self._retired):
            waits = any(queue.jobs for (key, _), queue in self._waiting.items() if key == model.key)
            runs = any(batch[0].model is model for batch in self._running.values())
            if not waits and not runs:
                self._retired.remove(model)
                self._waiting = {key: queue for key, queue in self._waiting.items() if key[0] != model.key}
                self._lanes.unmount(model)


def _shutting_down() -> Refusal:
    return Refusal(503, "the server is shutting down", retry_after_s=1)


def _too_late() -> Refusal:
    return Refusal(504, "no answer before the deadline", retry_after_s=1)


def _no_worker() -> Refusal:
    return Refusal(503, "no worker is left to answer: see /health", retry_after_s=1)
