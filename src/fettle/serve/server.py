"""The life of a server: bind, load beside it, serve, and end without losing a request.

On SIGTERM or SIGINT, in this order: readiness turns 503 and every answer closes its connection; requests are served on
for `grace_s`, until the load balancer has noticed; no new connection begins, and no new call over gRPC; running
requests end; the prediction log is written; the process returns 0. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import uvloop

from fettle.core.errors import FettleError
from fettle.core.plugins import missing_extra
from fettle.serve.admin import AdminRoutes
from fettle.serve.app import Application
from fettle.serve.deploy import Deployer
from fettle.serve.descriptors import room_for
from fettle.serve.dispatch import Dispatcher
from fettle.serve.entry import admin_hosts, keys_of, sockets_of, tls_of
from fettle.serve.guard import Guard
from fettle.serve.health import Health
from fettle.serve.inference import Inference
from fettle.serve.lanes import Lanes
from fettle.serve.metrics import Metrics
from fettle.serve.models import Catalogue, Models
from fettle.serve.observations import ObservationLog
from fettle.serve.options import ServeOptions
from fettle.serve.port import Port
from fettle.serve.routes import Routes, server_version
from fettle.serve.shadow import Shadow
from fettle.serve.traffic import Declared, declared

if TYPE_CHECKING:
    from fettle.serve.rpc.server import RpcServer
    from fettle.serve.tls import Certificates
    from fettle.serve.tracing import Tracing

_log = logging.getLogger("fettle.serve")
# Connections that were accepted before new ones were refused have this many polls to speak, counted from the latest
# request: where one still speaks others may. In polls, not seconds: a machine that stood still gives them no less.
_SETTLE_POLLS = 25
_SETTLE_AT_MOST_S = 5.0
_POLL_S = 0.01
_SWEEP_S = 0.05
_WORKERS_END_S = 5.0
_TRACES_END_S = 5.0
# Objects that are made and not yet freed before the garbage collector looks for circles among them.
_COLLECT_EVERY = 20_000

Announce = Callable[[str], None]


def _nothing(url: str) -> None:
    """The default of a callback."""


def serve(
    models: Declared,
    *,
    options: ServeOptions,
    catalogue: Catalogue | None = None,
    on_ready: Announce = _nothing,
    on_listening: Announce = _nothing,
    on_grpc: Announce = _nothing,
    on_admin: Announce = _nothing,
) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit code: 0 after a clean drain, 1 otherwise.

    models: the source of one model, or its Traffic where it has several versions; a sequence of these for several.
    catalogue: what else may be loaded while the server runs.
    on_listening: called with the URL once the port is open: health and metrics answer from then on.
    on_grpc: called with HOST:PORT of the gRPC port, where there is one, before on_listening.
    on_admin: called with the URL of the admin port, where there is one, before on_listening.
    on_ready: called with the URL once each model has a proven version; never, where one has none.
    Raises UsageError where the address cannot be had, or the models cannot be served together. Call it from the main
    thread.
    """
    _spare_collections()

    async def run() -> int:
        stop = _stopped_by_signals()
        return await serve_until(
            stop,
            models,
            options=options,
            catalogue=catalogue,
            on_ready=on_ready,
            on_listening=on_listening,
            on_grpc=on_grpc,
            on_admin=on_admin,
        )

    return uvloop.run(run())


def _spare_collections() -> None:
    """Let the garbage collector look seldom, and never at what the imports made: requests leave no circles behind."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_EVERY, 20, 50)


def _stopped_by_signals() -> asyncio.Event:
    """Set by SIGTERM or SIGINT; a second one ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def received(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, received, number)
    return stop


async def serve_until(
    stop: asyncio.Event,
    models: Declared,
    *,
    options: ServeOptions,
    catalogue: Catalogue | None = None,
    on_ready: Announce = _nothing,
    on_listening: Announce = _nothing,
    on_grpc: Announce = _nothing,
    on_admin: Announce = _nothing,
) -> int:
    """Like `serve`, inside a running loop, until the event is set."""
    service = Service(models, options, catalogue=catalogue, on_ready=on_ready)
    await service.start()
    if service.admin_url is not None:
        on_admin(service.admin_url)
    if service.rpc is not None:
        on_grpc(service.rpc.address)
    on_listening(service.url)
    await stop.wait()
    return 0 if await service.drain() else 1


def _within_descriptors(options: ServeOptions) -> ServeOptions:
    room = room_for(options.max_connections)
    if room < options.max_connections:
        _log.warning("the limit of open files leaves room for %d of %d connections", room, options.max_connections)
    return replace(options, max_connections=room)


class Service:
    """The parts of one server process, and the order in which they begin and end."""

    def __init__(
        self, models: Declared, options: ServeOptions, *, catalogue: Catalogue | None = None, on_ready: Announce
    ) -> None:
        self._tracing = _tracing() if options.trace else None
        traffics = declared(models)
        self._certificates, keys = tls_of(options), keys_of(options)
        sockets = sockets_of(options)
        options = _within_descriptors(options)
        self._options = options
        self._on_ready = on_ready
        self._loop = asyncio.get_running_loop()
        self._announced = False
        metrics = Metrics()
        self._lanes = Lanes(options, metrics)
        folder = options.observations
        self._log = None if folder is None else ObservationLog(folder, options=options, metrics=metrics)
        shadowed = any(traffic.shadow is not None for traffic in traffics)
        self._shadow = Shadow(options, metrics, log=self._log) if shadowed else None
        observe = folder is not None or shadowed
        self._dispatcher = Dispatcher(self._lanes, options=options, metrics=metrics, observe=observe)
        deployer = Deployer(
            options=options,
            metrics=metrics,
            lanes=self._lanes,
            dispatcher=self._dispatcher,
            shadow=self._shadow,
            on_change=self._changed,
        )
        self.models = Models(traffics, build=deployer.build, retire=deployer.retire, catalogue=catalogue)
        self._health = Health(self.models, self._lanes, shadow=self._shadow)
        inference = Inference(options=options, dispatcher=self._dispatcher, log=self._log, shadow=self._shadow)
        routes = Routes(
            models=self.models,
            health=self._health,
            dispatcher=self._dispatcher,
            metrics=metrics,
            inference=inference,
            options=options,
        )
        make = partial(Application, options=options, health=self._health, metrics=metrics, tracing=self._tracing)
        applications = [make(routes=routes, guard=Guard(keys))]
        if options.admin_port is not None:
            admin = AdminRoutes(models=self.models, public=routes)
            applications.append(make(routes=admin, guard=Guard(keys, hosts=admin_hosts(options))))
        try:
            self.rpc = self._rpc_server(partial(make, guard=Guard(keys)), inference)
        except FettleError:
            for bound in sockets:
                bound.close()
            raise
        self._show(metrics)
        tls = None if self._certificates is None else self._certificates.context
        self._ports = [
            Port(bound, one, options=options, tls=tls) for bound, one in zip(sockets, applications, strict=True)
        ]
        self._tasks: list[asyncio.Task[None]] = []

    def _show(self, metrics: Metrics) -> None:
        """What is read when metrics are asked for."""
        metrics.watch(
            queued_rows=lambda: self._dispatcher.queued_rows,
            in_flight=lambda: self._in_flight,
            ready=lambda: self._health.ready,
            jobs=self._jobs,
            versions=self.models.versions,
        )

    def _rpc_server(self, make: Callable[..., Application], inference: Inference) -> RpcServer | None:
        """The gRPC port with an application of its own, where one is asked for. Raises MissingExtra, UsageError."""
        options = self._options
        if options.grpc_port is None:
            return None
        try:
            from fettle.serve.rpc.calls import Calls
            from fettle.serve.rpc.credentials import credentials_of
            from fettle.serve.rpc.server import RpcServer
        except ModuleNotFoundError as problem:
            raise missing_extra("a gRPC port", problem) from None
        calls = Calls(models=self.models, health=self._health, inference=inference)
        return RpcServer(
            options=options, application=make(routes=calls), calls=calls, credentials=credentials_of(self._certificates)
        )

    @property
    def url(self) -> str:
        """Of the public port."""
        return self._ports[0].url

    @property
    def admin_url(self) -> str | None:
        """Of the admin port, where there is one."""
        return self._ports[1].url if len(self._ports) > 1 else None

    async def start(self) -> None:
        """Open the port, then load: liveness and the reason for not being ready are told from the first moment."""
        self._lanes.start()
        for port in self._ports:
            await port.listener.start()
        if self.rpc is not None:
            await self.rpc.start()
        self._dispatcher.start()
        if self._shadow is not None:
            self._shadow.start()
        self.models.start()
        self._tasks.append(self._loop.create_task(self._sweep()))
        if self._certificates is not None:
            self._tasks.append(self._loop.create_task(self._follow(self._certificates)))

    async def drain(self) -> bool:
        """End in the order of this module's docstring. False where work was left undone."""
        options = self._options
        self._health.draining = True
        _log.info("draining: %d requests in flight", self._in_flight)
        await asyncio.sleep(options.grace_s)
        for port in self._ports:
            port.listener.refuse_connections()
        if self.rpc is not None:
            self.rpc.refuse_calls()
        await self._settle()
        for port in self._ports:
            port.listener.stop()
        clean = await self._until_quiet(options.drain_timeout_s)
        self.models.close()
        self._dispatcher.close()
        if self._shadow is not None:
            await self._shadow.close()
        for port in self._ports:
            port.connections.close_idle()
        if self.rpc is not None:
            await self.rpc.close()
        await self._lanes.close(_WORKERS_END_S if clean else 0.0)
        if self._log is not None:
            clean &= await asyncio.to_thread(self._log.close, options.drain_timeout_s)
        if self._tracing is not None and not await self._tracing.close(_TRACES_END_S):
            _log.warning("the collector did not take the last traces within %g s: they are lost", _TRACES_END_S)
        for task in self._tasks:
            task.cancel()
        _log.info("ended %s", "cleanly" if clean else "with work undone")
        return clean

    @property
    def _begun(self) -> int:
        return sum(port.application.begun for port in self._ports) + (self.rpc.begun if self.rpc is not None else 0)

    @property
    def _in_flight(self) -> int:
        return sum(port.application.in_flight for port in self._ports) + (
            self.rpc.in_flight if self.rpc is not None else 0
        )

    def _jobs(self) -> dict[tuple[str, str], int]:
        """Of each version that answers, and of those that are still asked something."""
        return dict.fromkeys((found[:2] for found in self.models.versions()), 0) | self._dispatcher.jobs()

    def _changed(self) -> None:
        if not self._announced and self._health.ready:
            self._announced = True
            self._on_ready(self.url)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            for port in self._ports:
                port.connections.sweep()

    async def _follow(self, certificates: Certificates) -> None:
        """Take renewed certificates; the files are read on a thread, for a disk may be slow."""
        while True:
            await asyncio.sleep(self._options.poll_s)
            await asyncio.to_thread(certificates.refresh)

    async def _settle(self) -> None:
        """Wait until no accepted connection is likely to bring another request."""
        quiet, heard, end = 0, self._begun, time.monotonic() + _SETTLE_AT_MOST_S
        while quiet < _SETTLE_POLLS and time.monotonic() < end:
            await asyncio.sleep(_POLL_S)
            begun = self._begun
            quiet = 0 if begun != heard or any(port.arriving for port in self._ports) else quiet + 1
            heard = begun

    async def _until_quiet(self, timeout_s: float) -> bool:
        """Wait until every request that has begun is answered. False where some were not in time."""
        end = time.monotonic() + timeout_s
        while (self._in_flight or any(port.connections.receiving for port in self._ports)) and time.monotonic() < end:
            await asyncio.sleep(_POLL_S)
        return self._in_flight == 0


def _tracing() -> Tracing:
    """Raises MissingExtra where OpenTelemetry is not installed, UsageError where OTEL_* is not right."""
    try:
        from fettle.serve.tracing import Tracing
    except ModuleNotFoundError as problem:
        raise missing_extra("trace", problem) from None
    return Tracing(version=server_version())
