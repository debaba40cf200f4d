"""The worker processes: started, watched, given batches, replaced when they die, given up when they keep dying.

A *lane* is one place for a worker and its connection. It holds at most one batch, so a batch that waits can still grow
and go to whichever lane is free first.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

from fettle.core.errors import ArtifactError
from fettle.serve import deaths, wire
from fettle.serve.descriptors import SHORTAGES
from fettle.serve.fit import BatchTimes
from fettle.serve.logs import LOG_FORMAT
from fettle.serve.metrics import Metrics
from fettle.serve.model import Served
from fettle.serve.options import ServeOptions
from fettle.serve.process import end_process, start_process

_log = logging.getLogger("fettle.serve")
# How a worker is started; the descriptor of its socket is put behind it.
COMMAND = [sys.executable, "-m", "fettle.serve.worker"]


class _Died(ArtifactError):
    """A worker ended while it loaded a version, which may or may not be the version's fault."""


@dataclass(frozen=True, slots=True, eq=False)
class Mounted:
    """A version in the workers. key: its name on the wire; root: the artifact's folder; times: of its batches."""

    key: int
    served: Served
    root: str
    times: BatchTimes


class Lane(asyncio.Protocol):
    """One worker at a time. `batch` is what it works on, for whoever gave it.

    died_trying: the latest worker ended while it loaded a version that no worker is known to survive.
    """

    def __init__(self, number: int, lanes: Lanes) -> None:
        self.number = number
        self.batch: Any = None
        self.busy_since = 0.0
        self.problem: str | None = None
        self.died_trying = False
        self.keys: set[int] = set()
        self.process: subprocess.Popen[bytes] | None = None
        self._lanes = lanes
        self._deaths = deaths.Deaths(first_rest_s=lanes.options.retry_s)
        self._transport: asyncio.Transport | None = None
        self._frames = wire.Frames()
        self._work: wire.Work | None = None
        self._loading: dict[int, asyncio.Future[wire.Loaded]] = {}
        self._keeper: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        self._wanted = asyncio.Event()
        self._complete = asyncio.Event()  # the worker has what the others have, or none will come

    @property
    def alive(self) -> bool:
        """Whether a worker listens."""
        return self._transport is not None

    def wake(self) -> None:
        """Try again at once where the place was given up for a while."""
        self._wanted.set()

    def start(self) -> None:
        """Keep a worker here from now on."""
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    async def load(self, mounted: Mounted) -> None:
        """Load a version into this lane's worker. Raises ArtifactError with the reason where it is not fit.

        A worker that takes longer than `load_timeout_s` is ended.
        """
        transport = self._transport
        if transport is None:
            raise _Died(f"worker {self.number} is not running")
        under_way = self._loading.get(mounted.key)
        if under_way is not None:  # a worker that came up during a mount is told of the version by both
            await asyncio.shield(under_way)
            return
        options, served = self._lanes.options, mounted.served
        future = asyncio.get_running_loop().create_future()
        self._loading[mounted.key] = future
        order = wire.Load(
            mounted.key, served.name, served.version, mounted.root, options.threads, options.max_batch_rows
        )
        transport.write(wire.frame(order))
        timer = asyncio.get_running_loop().call_later(options.load_timeout_s, self._load_is_late, served)
        try:
            loaded = await future
        finally:
            timer.cancel()
            self._loading.pop(mounted.key, None)
        if self._transport is not transport:
            raise _Died("a worker process died when it had loaded this version")
        if mounted.key not in self._lanes.wanted:
            raise ArtifactError("this version was given up while it was loaded")
        for rows, seconds in zip(loaded.rows, loaded.seconds, strict=True):
            mounted.times.observe(rows, seconds)
        self.keys.add(mounted.key)
        self._lanes.on_idle(self)

    def _load_is_late(self, served: Served) -> None:
        what = f"{served.name}:{served.version} within {self._lanes.options.load_timeout_s:g} s"
        _log.error("worker %d has not loaded %s: it is ended", self.number, what)
        self.kill()

    async def complete(self, timeout_s: float) -> None:
        """Wait until another worker has taken the place of one that died, and has what the others have."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._complete.wait(), timeout_s)

    def unload(self, key: int) -> None:
        """Let the worker forget a version, also one that it is loading."""
        if key not in self.keys and key not in self._loading:
            return
        self.keys.discard(key)
        if self._transport is not None:
            self._transport.write(wire.frame(wire.Unload(key)))

    def send(self, work: wire.Work, payloads: Sequence[bytes | memoryview], batch: Any) -> None:
        """Give the worker a batch; `batch` comes back with its outcome."""
        assert self._transport is not None
        assert self.batch is None
        self.batch, self._work, self.busy_since = batch, work, time.monotonic()
        self._transport.writelines([wire.frame(work, sum(len(payload) for payload in payloads)), *payloads])

    def kill(self) -> None:
        """End the worker that is stuck; another takes its place."""
        if self.process is not None:
            self.process.kill()

    async def close(self, timeout_s: float) -> None:
        """Hang up, and wait for the worker to end; kill it after the timeout."""
        if self._keeper is not None:
            self._keeper.cancel()
        self._complete.set()
        if self._transport is not None:
            self._transport.close()
        if self.process is not None:
            await asyncio.to_thread(end_process, self.process, timeout_s)

    # Of the worker's life

    async def _keep(self) -> None:
        while True:
            started = time.monotonic()
            try:
                await self._run_worker()
            except OSError as problem:
                _log.error("worker %d cannot be started: %s", self.number, problem)
                if problem.errno in SHORTAGES:
                    await asyncio.sleep(self._deaths.wait())
                    continue
            now = time.monotonic()
            if self.died_trying:  # the place is well, and the version waits longer each time it is tried
                await asyncio.sleep(deaths.FIRST_WAIT_S)
            elif not self._deaths.died(now, lived_s=now - started):
                await asyncio.sleep(self._deaths.wait())
            elif self._lanes.background:
                why, rest_s = self._deaths.sentence, self._deaths.rest()
                self._give_up(f"{why}: given up, and tried again after {rest_s:g} s")
                await self._rest(rest_s)
            else:
                self._give_up(f"{self._deaths.sentence}: given up")
                return

    def _give_up(self, why: str) -> None:
        self.problem = f"worker {self.number} {why}"
        _log.error("%s", self.problem)
        self._complete.set()
        self._lanes.on_given_up(self)

    async def _rest(self, seconds: float) -> None:
        """Leave the place empty for so long, or until another version is to be tried."""
        self._wanted.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._wanted.wait(), seconds)
        self.problem = None
        self._complete.clear()
        self._lanes.on_tried_again()

    async def _run_worker(self) -> None:
        """Start a worker, bring it what the others have, and wait for its end."""
        self.died_trying = False
        lanes, options = self._lanes, self._lanes.options
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), LOG_FORMAT: options.log_format}
        core = lanes.cores[self.number]
        self.process, ours = start_process(COMMAND, environment, core=core, background=lanes.background)
        self._lost.clear()
        await asyncio.get_running_loop().create_connection(lambda: self, sock=ours)
        for mounted in list(self._lanes.mounted.values()):
            if mounted.key not in self._lanes.wanted:  # while those before it were loaded
                continue
            try:
                await self.load(mounted)
            except ArtifactError as problem:
                _log.error("worker %d cannot load what the others have: %s", self.number, problem)
        if self.alive:
            self._complete.set()
        await self._lost.wait()
        code = await asyncio.to_thread(end_process, self.process, 5.0)
        _log.error("worker %d ended with %d and is replaced", self.number, code)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by class
        self._frames = wire.Frames()
        self._lanes.on_start(self)

    def data_received(self, data: bytes) -> None:
        try:
            for header, body in self._frames.feed(data):
                self._told(wire.report_of(header), body)
        except Exception:
            _log.exception("worker %d said what makes no sense: it is ended", self.number)
            self.kill()

    def _told(self, report: wire.Report, body: memoryview) -> None:
        if isinstance(report, wire.Done):
            if self._work is None:
                raise ValueError(f"nobody asked for work {report.id}")
            wire.check_done(report, self._work, len(body))
            self._work = None
            self._lanes.on_done(self, self.batch, report, body)
            self.batch = None  # only now: where the report makes no sense, the batch is that of a worker that is lost
            return
        future = self._loading.get(report.key)
        if future is None or future.done():
            return
        if isinstance(report, wire.Loaded):
            wire.check_loaded(report)
            future.set_result(report)
        else:
            _log.error("worker %d refused a version: %s", self.number, report.detail)
            future.set_exception(ArtifactError(report.reason))

    def connection_lost(self, problem: Exception | None) -> None:
        self._transport = None
        self._complete.clear()
        self.keys.clear()
        self.died_trying = any(key not in self._lanes.mounted for key in self._loading)
        for future in self._loading.values():
            if not future.done():
                future.set_exception(_Died("a worker process died while it loaded this version"))
        batch, self.batch, self._work = self.batch, None, None
        self._lost.set()
        self._lanes.on_end()
        self._lanes.on_lost(self, batch)


class Lanes:
    """Workers that all have the same versions, and what is mounted in them.

    living: lanes that answer, or soon will; problem: why none is left, or None.
    background: their processes take what time others leave, and a place that is given up is tried again, ever later.
    wanted: keys of the versions mounted or being mounted.
    on_done(lane, batch, report, body), on_lost(lane, batch or None), on_idle(lane): told to whoever gives the batches.
    """

    def __init__(self, options: ServeOptions, metrics: Metrics, *, background: bool = False) -> None:
        self.options = options
        self.background = background
        self.cores = [None] * options.workers if background else options.worker_cores()
        self._versions = metrics.versions
        self._deaths = metrics.shadow.worker_deaths if background else metrics.worker_deaths
        self.mounted: dict[int, Mounted] = {}
        self.wanted: set[int] = set()
        self._excused: set[int] = set()  # of versions being mounted, those that one worker has died of, perhaps
        self.on_done: Callable[[Lane, Any, wire.Done, memoryview], None] = lambda *_: None
        self.on_lost: Callable[[Lane, Any], None] = lambda *_: None
        self.on_idle: Callable[[Lane], None] = lambda _: None
        self.all = [Lane(number, self) for number in range(options.workers)]
        self.living = len(self.all)
        self.problem: str | None = None
        self._keys = 0
        self._closing = False
        self._alive = asyncio.Event()

    def start(self) -> None:
        """Start every worker."""
        for lane in self.all:
            lane.start()

    def on_start(self, lane: Lane) -> None:
        """A worker listens."""
        self._alive.set()

    def on_given_up(self, lane: Lane) -> None:
        """A lane will have no worker again, or none for a while."""
        self.living -= 1
        if not self.living:
            self.problem = lane.problem
        self._alive.set()  # whoever waits for a first worker should learn that there may be none
        self.on_lost(lane, None)

    def on_tried_again(self) -> None:
        """A lane that was given up will have a worker."""
        self.living += 1
        self.problem = None

    def on_end(self) -> None:
        """A worker has died."""
        self._deaths.inc()

    async def mount(self, served: Served, root: str) -> Mounted:
        """Load a version into every worker; where one finds it unfit, into none. Raises ArtifactError.

        Where nothing answers yet all load at once, else one after the other, to leave the cores to the requests.
        """
        self._keys += 1
        mounted = Mounted(self._keys, served, root, BatchTimes())
        self.wanted.add(mounted.key)
        try:
            while not any(mounted.key in lane.keys for lane in self.all):  # who has loaded it may be gone since
                lanes = await self._some_alive()
                if self.mounted:
                    for lane in lanes:
                        await self._prove(lane, mounted)
                else:
                    await asyncio.gather(*(self._prove(lane, mounted) for lane in lanes))
        except ArtifactError:
            self._drop(mounted)
            raise
        finally:
            self._excused.discard(mounted.key)
        self.mounted[mounted.key] = mounted
        self._versions.begin(served.name, str(served.version))
        for lane in self.all:  # one that came up meanwhile found nothing to load
            if lane.alive and mounted.key not in lane.keys:
                try:
                    await lane.load(mounted)
                except ArtifactError as problem:
                    _log.error("worker %d cannot load what the others have: %s", lane.number, problem)
        return mounted

    async def _some_alive(self) -> list[Lane]:
        """Those whose worker listens: one at least. Raises ArtifactError where there will be none."""
        if self.background:  # a switch waits ever longer before it asks again for what was refused
            for lane in self.all:
                lane.wake()
        while True:
            if self._closing or (self.problem and not self.background):
                raise ArtifactError(self.problem or "the server is shutting down")
            if alive := [lane for lane in self.all if lane.alive]:
                return alive
            self._alive.clear()
            await self._alive.wait()

    async def _prove(self, lane: Lane, mounted: Mounted) -> None:
        """Load a version into one worker. Raises ArtifactError.

        Anything may kill a worker once: the next one in its place tries again. A second death is the version's fault.
        A worker that is gone before its turn comes tells nothing; the next one loads what is mounted by then.
        """
        while lane.alive:
            try:
                await lane.load(mounted)
            except _Died:
                if self._closing or mounted.key in self._excused or mounted.key not in self.wanted:
                    raise
                self._excused.add(mounted.key)
                await lane.complete(self.options.load_timeout_s)
            else:
                return

    def unmount(self, mounted: Mounted) -> None:
        """Let every worker forget a version."""
        if self.mounted.pop(mounted.key, None) is not None:
            self._versions.end(mounted.served.name, str(mounted.served.version))
        self._drop(mounted)

    def _drop(self, mounted: Mounted) -> None:
        self.wanted.discard(mounted.key)
        for lane in self.all:
            lane.unload(mounted.key)

    async def close(self, timeout_s: float) -> None:
        """End every worker."""
        self._closing = True
        self._alive.set()
        await asyncio.gather(*(lane.close(timeout_s) for lane in self.all))
