"""Work-conserving dynamic batching: a worker that becomes free takes what waits, up to the maximum.

There is no window and no timer: an idle server answers a lone request at once, a busy one finds more rows waiting
each time, so the batch grows with the load by itself (the rule of Triton's batcher at delay 0). The queue is bounded
in rows; what does not fit is refused at once. Everything that costs time (decoding, inference, formatting) runs in
the workers, where the engines release the interpreter lock.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fettle.core.observation import input_statistics
from fettle.core.signature import Array
from fettle.serve.metrics import Metrics
from fettle.serve.model import LoadedModel, ModelFault, run
from fettle.serve.options import ServeOptions
from fettle.serve.refusal import Refusal

_log = logging.getLogger("fettle.serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The rows of one job. probabilities: (rows, classes), statistics: (rows, 5); None where nothing is logged."""

    outputs: dict[str, Array]
    probabilities: Array | None
    statistics: Array | None


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """Some rows for one model.

    shape: what must be equal for two jobs to share a batch, besides the model.
    prepare: gives the named, checked inputs; finish: makes of the answer what the caller awaits. Both run in a
        worker and may raise Refusal, which is then this job's outcome alone.
    deadline: on the clock of `time.monotonic`; a job still waiting then is dropped.
    """

    model: LoadedModel
    rows: int
    shape: Hashable
    prepare: Callable[[], Mapping[str, Array]]
    finish: Callable[[Answer], Any]
    deadline: float
    request_id: str = ""
    queued: float = field(default_factory=time.monotonic)
    future: asyncio.Future[Any] | None = None

    @property
    def abandoned(self) -> bool:
        """True where nobody waits for the answer any more."""
        return (self.future is not None and self.future.done()) or time.monotonic() >= self.deadline

    def joins(self, other: Job) -> bool:
        """True where both can run as one batch."""
        return self.model is other.model and self.shape == other.shape and self.model.row_wise


class Batcher:
    """A bounded queue and its worker threads. `submit` belongs to one event loop, the workers to no loop."""

    def __init__(self, *, options: ServeOptions, metrics: Metrics) -> None:
        self.max_batch_rows = options.max_batch_rows
        self.max_queue_rows = options.max_queue_rows
        self._metrics = metrics
        self._waiting: deque[Job] = deque()
        self._rows = 0
        self._closed = False
        self._wake = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"fettle-worker-{index}", daemon=True)
            for index in range(options.workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued_rows(self) -> int:
        """Rows that wait now."""
        return self._rows

    def submit(self, jobs: Sequence[Job]) -> list[asyncio.Future[Any]]:
        """Queue all of the jobs, or none. Raises Refusal 413 or 429; the futures fail with Refusal."""
        loop = asyncio.get_running_loop()
        rows = sum(job.rows for job in jobs)
        if rows > self.max_queue_rows:
            raise Refusal(413, f"a request may have at most {self.max_queue_rows} rows, got {rows}")
        futures = []
        for job in jobs:
            job.future = loop.create_future()
            futures.append(job.future)
        with self._wake:
            if self._closed:
                raise Refusal(503, "the server is shutting down", retry_after_s=1)
            if self._rows + rows > self.max_queue_rows:
                self._metrics.shed.inc()
                raise Refusal(429, "too many requests are waiting: try again later", retry_after_s=1)
            self._waiting.extend(jobs)
            self._rows += rows
            self._wake.notify(len(jobs))
        return futures

    def close(self, timeout_s: float) -> bool:
        """Finish what waits, then stop the workers. False where they did not end in time."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (batch := self._take()) is not None:
            if not batch:
                continue
            try:
                self._execute(batch)
            except BaseException:  # a worker that dies silently would leave its requests hanging for ever
                _log.exception("a worker failed outside of the model")
                _deliver([(job, Refusal(500, "the server failed on this request")) for job in batch])

    def _take(self) -> list[Job] | None:
        """What can run together now, oldest first; [] where only abandoned jobs waited; None at the end."""
        with self._wake:
            while not self._waiting:
                if self._closed:
                    return None
                self._wake.wait()
            batch: list[Job] = []
            others: list[Job] = []
            rows = 0
            while self._waiting and (not batch or rows < self.max_batch_rows):
                job = self._waiting.popleft()
                if job.abandoned:
                    self._rows -= job.rows
                elif not batch or (job.joins(batch[0]) and rows + job.rows <= self.max_batch_rows):
                    batch.append(job)
                    rows += job.rows
                    if not job.model.row_wise:
                        break
                else:
                    others.append(job)
            self._waiting.extendleft(reversed(others))
            self._rows -= rows
            return batch

    def _execute(self, batch: list[Job]) -> None:
        started = time.monotonic()
        for job in batch:
            self._metrics.queue_seconds.observe(started - job.queued)
        outcomes: list[tuple[Job, Any]] = []
        ready: list[tuple[Job, Mapping[str, Array]]] = []
        for job in batch:
            try:
                ready.append((job, job.prepare()))
            except Exception as problem:
                outcomes.append((job, _refusal(problem, job)))
        if ready:
            outcomes.extend(self._answer(ready))
        _deliver(outcomes)

    def _answer(self, ready: list[tuple[Job, Mapping[str, Array]]]) -> list[tuple[Job, Any]]:
        try:
            answers = self._infer(ready)
        except Exception as problem:
            if len(ready) == 1:
                return [(ready[0][0], _refusal(problem, ready[0][0]))]
            # One bad item must not fail its neighbors: each gets its own chance.
            return [outcome for item in ready for outcome in self._answer([item])]
        outcomes: list[tuple[Job, Any]] = []
        for (job, _), answer in zip(ready, answers, strict=True):
            try:
                outcomes.append((job, job.finish(answer)))
            except Exception as problem:
                outcomes.append((job, _refusal(problem, job)))
        return outcomes

    def _infer(self, ready: list[tuple[Job, Mapping[str, Array]]]) -> list[Answer]:
        model = ready[0][0].model
        inputs = merge([arrays for _, arrays in ready])
        rows = sum(job.rows for job, _ in ready)
        started = time.monotonic()
        outputs = run(model, inputs, max_batch_rows=self.max_batch_rows)
        self._metrics.inference_seconds.observe(time.monotonic() - started)
        self._metrics.batch_rows.observe(rows)
        probabilities = statistics = None
        if model.classifies:
            with np.errstate(invalid="ignore"):
                probabilities = model.signature.probabilities(outputs[model.signature.outputs[0].name])
                statistics = input_statistics(inputs[model.signature.inputs[0].name])
        if len(ready) == 1:
            return [Answer(outputs=outputs, probabilities=probabilities, statistics=statistics)]
        answers = []
        start = 0
        for job, _ in ready:
            part = slice(start, start + job.rows)
            start += job.rows
            answers.append(
                Answer(
                    outputs={name: array[part] for name, array in outputs.items()},
                    probabilities=None if probabilities is None else probabilities[part],
                    statistics=None if statistics is None else statistics[part],
                )
            )
        return answers


def merge(inputs: Sequence[Mapping[str, Array]]) -> Mapping[str, Array]:
    """The rows of all, one below the other.

    >>> merge([{"x": np.zeros((1, 2))}, {"x": np.ones((2, 2))}])["x"].shape
    (3, 2)
    """
    if len(inputs) == 1:
        return inputs[0]
    return {name: np.concatenate([arrays[name] for arrays in inputs]) for name in inputs[0]}


def _refusal(problem: Exception, job: Job) -> Refusal:
    if isinstance(problem, Refusal):
        return problem
    if isinstance(problem, ModelFault):
        _log.error("request %s: %s", job.request_id, problem)
        return Refusal(500, str(problem))
    _log.error("request %s failed in %s:%d", job.request_id, job.model.name, job.model.version, exc_info=problem)
    return Refusal(500, "the model failed on this input")


def _deliver(outcomes: list[tuple[Job, Any]]) -> None:
    """Wake the event loop once for the whole batch."""
    settled = [(job.future, outcome) for job, outcome in outcomes if job.future is not None]
    if not settled:
        return
    try:
        settled[0][0].get_loop().call_soon_threadsafe(_settle, settled)
    except RuntimeError:  # the loop is closed: the process is ending and nobody waits
        _log.warning("%d answers came after the end", len(settled))


def _settle(settled: list[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, outcome in settled:
        if future.done():
            continue
        if isinstance(outcome, Refusal):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
