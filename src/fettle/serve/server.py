"""The life of a server: bind, load beside it, serve, and end without losing a request.

On SIGTERM or SIGINT, in this order: readiness turns 503 and every answer closes its connection; requests are served on
for `grace_s`, until the load balancer has noticed; no new connection begins; running requests end; the prediction log
is written; the process returns 0. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable

from fettle.serve.app import Application
from fettle.serve.batching import Batcher
from fettle.serve.health import Health
from fettle.serve.listener import Listener, address_of, bind
from fettle.serve.metrics import Metrics
from fettle.serve.model import LoadedModel
from fettle.serve.observations import ObservationLog
from fettle.serve.options import ServeOptions
from fettle.serve.source import ModelSource
from fettle.serve.switch import Switch

_log = logging.getLogger("fettle.serve")
# Connections the kernel had accepted before new ones were refused have this long to be taken up and to speak.
_SETTLE_S = 0.25
_POLL_S = 0.01
# Once every request is answered, silent connections are not worth waiting for longer than this.
_SILENT_S = 0.5

Announce = Callable[[str], None]


def _nothing(url: str) -> None:
    """The default of a callback."""


def serve(
    source: ModelSource, *, options: ServeOptions, on_ready: Announce = _nothing, on_listening: Announce = _nothing
) -> int:
    """Serve the source until SIGTERM or SIGINT, and return the exit code: 0 after a clean drain, 1 otherwise.

    on_listening: called with the URL once the port is open: health and metrics answer from then on.
    on_ready: called with the URL once a first version is proven; never, where none is good.
    Raises UsageError where the address cannot be had. Call it from the main thread.
    """
    return asyncio.run(_serve_until_signal(source, options, on_ready, on_listening))


async def _serve_until_signal(
    source: ModelSource, options: ServeOptions, on_ready: Announce, on_listening: Announce
) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def received(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, received, number)
    return await serve_until(stop, source, options=options, on_ready=on_ready, on_listening=on_listening)


async def serve_until(
    stop: asyncio.Event,
    source: ModelSource,
    *,
    options: ServeOptions,
    on_ready: Announce = _nothing,
    on_listening: Announce = _nothing,
) -> int:
    """Like `serve`, inside a running loop, until the event is set."""
    service = Service(source, options, on_ready=on_ready)
    engine = service.start()
    on_listening(service.url)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({stopping, engine}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if engine.done():
        _log.error("the HTTP engine ended by itself", exc_info=engine.exception())
    alive = not engine.done()
    drained = await service.drain()
    return 0 if alive and drained else 1


class Service:
    """The parts of one server process, and the order in which they begin and end."""

    def __init__(self, source: ModelSource, options: ServeOptions, *, on_ready: Announce) -> None:
        bound = bind(options.host, options.port)
        self.url = address_of(bound)
        self._options = options
        self._on_ready = on_ready
        self._loop = asyncio.get_running_loop()
        self._announced = False
        metrics = Metrics()
        self._switch = Switch(source, options=options, metrics=metrics, on_change=self._answering)
        self._health = Health(self._switch, source.name)
        self._batcher = Batcher(options=options, metrics=metrics)
        folder = options.observations
        self._log = None if folder is None else ObservationLog(folder, options=options, metrics=metrics)
        self._application = Application(
            options=options, health=self._health, batcher=self._batcher, metrics=metrics, log=self._log
        )
        metrics.watch(
            queued_rows=lambda: self._batcher.queued_rows,
            in_flight=lambda: self._application.in_flight,
            ready=lambda: self._health.ready,
        )
        self._listener = Listener(
            self._application,
            bound,
            max_connections=options.max_connections,
            idle_timeout_s=options.idle_timeout_s,
        )

    def start(self) -> asyncio.Task[None]:
        """Open the port, then load: liveness and the reason for not being ready are told from the first moment."""
        engine = self._listener.start()
        self._switch.start()
        return engine

    async def drain(self) -> bool:
        """End in the order of this module's docstring. False where work was left undone."""
        options = self._options
        self._health.draining = True
        _log.info("draining: %d requests in flight", self._application.in_flight)
        await asyncio.sleep(options.grace_s)
        self._listener.refuse_connections()
        await asyncio.sleep(_SETTLE_S)
        clean = await self._end_requests()
        self._switch.close(timeout_s=0.0)
        clean &= await asyncio.to_thread(self._batcher.close, options.drain_timeout_s if clean else 0.0)
        if self._log is not None:
            clean &= await asyncio.to_thread(self._log.close, options.drain_timeout_s)
        self._application.close()
        _log.info("ended %s", "cleanly" if clean else "with work undone")
        return clean

    def _answering(self, model: LoadedModel) -> None:
        """Called by the switch's thread for each version that answers from now on."""
        if not self._announced:
            self._announced = True
            self._loop.call_soon_threadsafe(self._on_ready, self.url)

    async def _end_requests(self) -> bool:
        """Close the port and idle connections; wait for the requests. False where some did not end in time."""
        closing = asyncio.create_task(self._listener.stop(self._options.drain_timeout_s + _SILENT_S))
        clean = await self._until_quiet(closing, self._options.drain_timeout_s)
        if not clean:
            self._application.give_up()
            await self._until_quiet(closing, _SILENT_S)
        closing.cancel()
        return clean

    async def _until_quiet(self, closing: asyncio.Task[bool], timeout_s: float) -> bool:
        """Wait until all connections are closed, or only silent ones are left. False where requests still run."""
        now = quiet_since = time.monotonic()
        end = now + timeout_s
        while not closing.done() and now < end and now - quiet_since < _SILENT_S:
            await asyncio.sleep(_POLL_S)
            now = time.monotonic()
            if self._application.in_flight:
                quiet_since = now
        return self._application.in_flight == 0
