"""The application: every request counted and answered, every failure turned into `{"error": "..."}`."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Protocol

from fettle.serve.guard import Guard
from fettle.serve.health import Health
from fettle.serve.http import Request, Respond, Response
from fettle.serve.inference import failed
from fettle.serve.logs import about
from fettle.serve.metrics import Metrics
from fettle.serve.options import ServeOptions
from fettle.serve.refusal import Refusal
from fettle.serve.routes import Route

if TYPE_CHECKING:
    from fettle.serve.tracing import Tracing

_log = logging.getLogger("fettle.serve")


class Table(Protocol):
    """What a port answers."""

    def find(self, path: str) -> Route:
        """Raises Refusal where there is nothing."""


class Application:
    """What connections hand their requests to. Nothing in here computes: that is the workers' part."""

    def __init__(
        self,
        *,
        options: ServeOptions,
        health: Health,
        metrics: Metrics,
        routes: Table,
        tracing: Tracing | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.begun = 0
        self.in_flight = 0
        self._options = options
        self._health = health
        self._metrics = metrics
        self._routes = routes
        self._guard = guard or Guard()
        self._tracing = tracing
        self._traces = tracing is not None or options.access_log

    @property
    def draining(self) -> bool:
        """Whether every answer should end its connection."""
        return self._health.draining

    def begin(self, request: Request) -> None:
        """Refuse what no body could mend, and who is not let in."""
        route = self._guard.route(request, self._routes.find)
        request.route = route
        route.handler(request.method)

    def handle(self, request: Request, respond: Respond) -> None:
        """Answer one request, whatever happens."""
        self.begun += 1
        self.in_flight += 1
        answer = partial(self._answer, request, respond)
        if self._traces:
            self._begin_trace(request)
        try:
            assert request.route is not None, "a request is begun before it is handled"
            request.route.handler(request.method)(request, answer)
        except Refusal as refusal:
            answer(Response.refused(refusal))
        except Exception:
            answer(failed(request))

    def _answer(self, request: Request, respond: Respond, response: Response) -> None:
        self.in_flight -= 1
        self._account(request, response)
        request.jobs = ()  # they hold the request: a circle that only the garbage collector would find
        respond(response)

    def cancelled(self, request: Request) -> None:
        """The client has gone before its answer: nobody waits for it."""
        self.in_flight -= 1
        request.cancelled = True
        if request.span is not None:
            request.span.end(None)
        for job in request.jobs:
            job.abandon()

    def refused(self, request: Request, refusal: Refusal) -> None:
        """Account for what a connection refused by itself."""
        self.begun += 1
        if self._traces:
            self._begin_trace(request)
        self._account(request, Response.refused(refusal))

    def _begin_trace(self, request: Request) -> None:
        if self._tracing is not None:
            self._tracing.begin(request)
        _ = request.trace  # the access log names it, and so must what a worker says of the request

    def _account(self, request: Request, response: Response) -> None:
        elapsed_s = request.elapsed_s()
        template = "unknown" if request.route is None else request.route.template
        self._metrics.answered(template, response.status, elapsed_s)
        if request.answers is not None:
            self._metrics.answered_by(*request.answers, response.status)
        if request.span is not None:
            request.span.end(response)
        if self._options.access_log:
            self._log_access(request, response, elapsed_s)

    def _log_access(self, request: Request, response: Response, elapsed_s: float) -> None:
        method, path, ms = request.method[:16], request.path[:200], round(elapsed_s * 1000, 3)
        model, version = request.answers or ("", "")
        fields = about(
            request,
            key=None if request.key is None else request.key.name,
            model=model,
            version=int(version) if version else None,
            method=method,
            path=path,
            status=response.status,
            ms=ms,
            bytes=len(response.body),
        )
        _log.info("%s %s: %d in %g ms, request %s", method, path, response.status, ms, request.id, extra=fields)
