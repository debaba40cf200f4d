"""OpenTelemetry spans of requests: when each came, waited, ran and was answered. Needs the extra `otel`.

Configured by the standard variables OTEL_*: the exporter (OTLP over HTTP), the sampler, the batches, the resource. The
event loop only puts finished spans on a bounded queue; a thread sends them, and drops what a slow collector leaves
behind. Spans of queue and inference are made when the request is answered, from the times that its jobs carry.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import uuid
from collections.abc import Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    TraceState,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)

from fettle.core.errors import UsageError
from fettle.serve.http import Request, Response
from fettle.serve.jobs import Job
from fettle.serve.logs import about
from fettle.serve.trace_context import TraceContext, trace_context

# Asked for by machines, every few seconds, for ever.
_UNTRACED = ("/health", "/v2/health", "/metrics", "/openapi.json")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
_EVENTS = {429: "shed", 504: "timeout"}
_LETTERS = 200
_POLL_S = 0.01
# A request of very many images may be part of as many batches.
_MOST_BATCHES = 16
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

_log = logging.getLogger("fettle.serve")


class Tracing:
    """Makes a span for each request. processor: where finished spans go; by default to the collector of OTEL_*.

    scheme: of the server's URL. Raises UsageError where OTEL_* asks for what there is not.
    """

    def __init__(self, *, version: str, scheme: str = "http", processor: SpanProcessor | None = None) -> None:
        exports = _exports()
        self._scheme = scheme
        self._provider = TracerProvider(resource=_resource(version), shutdown_on_exit=False)
        if processor is not None:
            self._provider.add_span_processor(processor)
        elif exports:
            self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("fettle.serve", version)

    def begin(self, request: Request) -> None:
        """Begin the request's span, in the caller's trace where there is one; `request.span` ends it. Never raises."""
        if request.path.startswith(_UNTRACED):
            return
        try:
            self._begin(request)
        except Exception:  # a trace must never stand between a client and its answer
            _log.exception("request %s cannot be traced", request.id, extra=about(request))

    def _begin(self, request: Request) -> None:
        caller = trace_context(request.headers)
        started_ns = time.time_ns() - int(request.elapsed_s() * 1e9)
        attributes = _attributes(request, self._scheme)
        span = self._tracer.start_span(
            _method(request), _context(caller), SpanKind.SERVER, attributes, start_time=started_ns
        )
        context = span.get_span_context()
        if context.is_valid:  # it is not where OTEL_SDK_DISABLED is set
            trace_id, span_id = format_trace_id(context.trace_id), format_span_id(context.span_id)
            request.trace = TraceContext(trace_id, span_id, int(context.trace_flags), caller.parent_id, caller.state)
        if span.is_recording():
            request.span = RequestSpan(self._tracer, span, request)

    async def close(self, timeout_s: float) -> bool:
        """Send what waits; False where that did not end in time, and what is left is lost."""
        ended = threading.Event()

        def end() -> None:
            self._provider.shutdown()
            ended.set()

        # A thread of its own, and a daemon: a collector that hangs must not hold the process.
        threading.Thread(target=end, name="fettle-traces", daemon=True).start()
        deadline = time.monotonic() + timeout_s
        while not ended.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        return ended.is_set()


class RequestSpan:
    """The span of one request, to be ended once."""

    def __init__(self, tracer: Tracer, span: Span, request: Request) -> None:
        self._tracer = tracer
        self._span = span
        self._request = request
        # All times of one trace by one clock: the wall clock may be set meanwhile.
        self._wall_ns = time.time_ns() - time.monotonic_ns()

    def end(self, response: Response | None) -> None:
        """The request is answered, or its client has gone: None. Never raises."""
        try:
            self._end(response)
        except Exception:
            _log.exception("request %s could not be traced", self._request.id, extra=about(self._request))
        finally:
            self._request.span = None  # else they hold each other

    def _end(self, response: Response | None) -> None:
        span, route = self._span, self._request.route
        now = time.monotonic()
        jobs = [job for job in self._request.jobs if isinstance(job, Job)]
        if route is not None:
            span.update_name(f"{_method(self._request)} {route.template}")
            span.set_attribute("http.route", route.template)
        if self._request.answers is not None:
            model, version = self._request.answers
            span.set_attributes({"fettle.model.name": model, "fettle.model.version": int(version)})
        if any(job.alone for job in jobs):
            span.add_event("worker died")
        error = "cancelled" if response is None else _EVENTS.get(response.status, "")
        if error:
            span.add_event(error)
        self._add_batches(jobs, error, response, now)
        if response is not None:
            span.set_attribute("http.response.status_code", response.status)
            span.set_attribute("http.response.body.size", len(response.body))
        if response is None or response.status >= 500:
            span.set_attribute("error.type", str(response.status) if response else error)
            span.set_status(Status(StatusCode.ERROR))
        span.end(self._ns(now))

    def _add_batches(self, jobs: Sequence[Job], error: str, response: Response | None, now: float) -> None:
        """A span for the wait and one for the inference of each batch that some of the jobs were in."""
        batches: dict[float, list[Job]] = {}
        for job in jobs:
            batches.setdefault(job.given, []).append(job)
        faulty = response is not None and response.status >= 500 and len(batches) == 1
        for given, batch in sorted(batches.items())[:_MOST_BATCHES]:
            first, ran = batch[0], batch[0].ran
            rows = {**_model(first), "fettle.rows": sum(job.rows for job in batch)}
            queued = min(job.queued for job in batch)
            if not given:
                self._child("queue", rows, queued, now, error or "refused")
                continue
            self._child("queue", rows, queued, given, "")
            if ran is None:
                self._child("inference", rows, given, now, error or "lost")
                continue
            engine = {"fettle.batch.rows": ran.rows, "fettle.engine.seconds": ran.seconds}
            self._child("inference", {**rows, **engine}, given, first.finished, "model" if faulty else "")

    def _child(self, name: str, attributes: dict[str, str | int | float], start: float, end: float, error: str) -> None:
        if error:
            attributes = {**attributes, "error.type": error}
        parent = set_span_in_context(self._span, Context())
        span = self._tracer.start_span(name, parent, SpanKind.INTERNAL, attributes, start_time=self._ns(start))
        if error:
            span.set_status(Status(StatusCode.ERROR))
        span.end(self._ns(end))

    def _ns(self, monotonic_s: float) -> int:
        return self._wall_ns + int(monotonic_s * 1e9)


def _context(caller: TraceContext) -> Context:
    """The caller's span as the parent; no parent where the trace begins here."""
    if not caller.parent_id:
        return Context()
    remote = SpanContext(
        int(caller.trace_id, 16),
        int(caller.parent_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(caller.flags),
        trace_state=TraceState.from_header([caller.state] if caller.state else []),
    )
    return set_span_in_context(NonRecordingSpan(remote), Context())


def _method(request: Request) -> str:
    return request.method if request.method in _METHODS else "HTTP"


def _attributes(request: Request, scheme: str) -> dict[str, str]:
    """By the semantic conventions for HTTP servers, as far as they are known before the answer."""
    known = request.method in _METHODS
    attributes = {
        "http.request.method": request.method if known else "_OTHER",
        "url.scheme": scheme,
        "url.path": request.path[:_LETTERS],
        "fettle.request.id": request.id,
    }
    if not known:
        attributes["http.request.method_original"] = request.method[:_LETTERS]
    for name, header in (("user_agent.original", "user-agent"), ("server.address", "host")):
        if value := request.header(header):
            attributes[name] = value[:_LETTERS]
    return attributes


def _model(job: Job) -> dict[str, str | int | float]:
    served = job.model.served
    return {"fettle.model.name": served.name, "fettle.model.version": served.version}


def _exports() -> bool:
    """Whether spans leave the process. Raises UsageError for an exporter or a protocol that is not here."""
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "").strip() or "otlp"
    if exporter not in ("otlp", "none"):
        raise UsageError(f"OTEL_TRACES_EXPORTER must be otlp or none, got {exporter!r}")
    protocol = next((value for name in _PROTOCOLS if (value := os.environ.get(name, "").strip())), "http/protobuf")
    if exporter == "otlp" and protocol != "http/protobuf":
        raise UsageError(
            f"traces are sent by OTLP over HTTP: OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf, got {protocol!r}"
        )
    return exporter == "otlp"


def _resource(version: str) -> Resource:
    """What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say goes before what we say."""
    ours = {"service.name": "fettle", "service.version": version, "service.instance.id": str(uuid.uuid4())}
    theirs = Resource.create()
    unnamed = str(theirs.attributes.get("service.name", "")).startswith("unknown_service")
    said = {name for name in theirs.attributes if not (unnamed and name == "service.name")}
    return theirs.merge(Resource({name: value for name, value in ours.items() if name not in said}))
