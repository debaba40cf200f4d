"""Requests that a model answers: from the body to jobs for the workers, and from their results to the answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial

from fettle.serve.compression import decompress
from fettle.serve.dispatch import Dispatcher
from fettle.serve.http import Request, Respond, Response
from fettle.serve.infer import REST, Form
from fettle.serve.jobs import Job, Result
from fettle.serve.lanes import Mounted
from fettle.serve.logs import about
from fettle.serve.models import Deployment
from fettle.serve.observations import ObservationLog, observation_of
from fettle.serve.options import ServeOptions
from fettle.serve.predict import Gathered, images_in
from fettle.serve.prediction import image_spec
from fettle.serve.refusal import Refusal, quote
from fettle.serve.shadow import Shadow
from fettle.serve.wire import Item

_log = logging.getLogger("fettle.serve")
TIMEOUT = "x-request-timeout-ms"


class Inference:
    """The handlers of `/v2/models/NAME/infer`, of the same over gRPC, and of `/predict`."""

    def __init__(
        self, *, options: ServeOptions, dispatcher: Dispatcher, log: ObservationLog | None, shadow: Shadow | None = None
    ) -> None:
        self._options = options
        self._dispatcher = dispatcher
        self._log = log
        self._shadow = shadow

    def infer(
        self, request: Request, respond: Respond, *, deployment: Deployment, version: str, form: Form = REST
    ) -> None:
        model = self._choose(request, deployment, version)
        deadline = self._deadline(request)
        self._dispatcher.admit(model, deadline=deadline)
        go_on = partial(self._infer_body, request, respond, deployment, model, deadline, form)
        self._with_body(request, respond, go_on)

    def _choose(self, request: Request, deployment: Deployment, version: str = "") -> Mounted:
        model = deployment.choose(version, headers=request.headers, body=request.body)
        request.answers = deployment.name, str(model.served.version)
        return model

    def _infer_body(
        self,
        request: Request,
        respond: Respond,
        deployment: Deployment,
        model: Mounted,
        deadline: float,
        form: Form,
        body: bytes,
    ) -> None:
        kind, header_bytes, rows = form.announce(request, body)

        def done(outcome: Result | Refusal) -> None:
            if isinstance(outcome, Refusal):
                respond(Response.refused(outcome))
                return
            self._observe(request, model, outcome)
            respond(form.respond(request, outcome))

        job = Job(
            model=model,
            kind=kind,
            item=Item(request.id, len(body), False, header_bytes, _trace_id(request)),
            payload=body,
            rows=rows if model.served.row_wise else 1,
            deadline=deadline,
            done=done,
        )
        self._submit(request, deployment, [job])

    def predict(self, request: Request, respond: Respond, *, deployment: Deployment) -> None:
        model = self._choose(request, deployment)
        image_spec(model.served)
        deadline = self._deadline(request)
        self._dispatcher.admit(model, deadline=deadline)
        self._with_body(request, respond, partial(self._predict_body, request, respond, deployment, model, deadline))

    def _predict_body(
        self,
        request: Request,
        respond: Respond,
        deployment: Deployment,
        model: Mounted,
        deadline: float,
        body: bytes,
    ) -> None:
        images, many = images_in(body, request.header("content-type"))
        gathered = Gathered(len(images), many, partial(self._predicted, request, respond, model))
        trace_id = _trace_id(request)
        jobs = [
            Job(
                model=model,
                kind="image",
                item=Item(request.id, len(image.content), image.encoded, trace_id=trace_id),
                payload=image.content,
                rows=1,
                deadline=deadline,
                done=partial(gathered.add, number),
            )
            for number, image in enumerate(images)
        ]
        self._submit(request, deployment, jobs)

    def _submit(self, request: Request, deployment: Deployment, jobs: list[Job]) -> None:
        self._dispatcher.submit(jobs)
        request.jobs = jobs
        if self._shadow is not None and deployment.shadow is not None:
            # In the next turn of the loop, when the workers have been given theirs.
            asyncio.get_running_loop().call_soon(self._shadow.copy, jobs, deployment.shadow.active)

    def _predicted(self, request: Request, respond: Respond, model: Mounted, gathered: Gathered) -> None:
        if gathered.refusal is not None:
            respond(Response.refused(gathered.refusal))
            return
        for result in gathered.results:
            assert result is not None
            self._observe(request, model, result)
        respond(Response(200, gathered.content()))

    def _deadline(self, request: Request) -> float:
        """On the monotonic clock: the client's own, where it gives one that is sooner. Raises Refusal 400."""
        seconds = self._options.request_timeout_s
        text = request.headers.get(TIMEOUT)
        if text is not None:
            if not (text.isascii() and text.isdecimal() and len(text) <= 9 and int(text)):
                raise Refusal(400, f"X-Request-Timeout-Ms must be a positive number, got {quote(text, 16)}")
            seconds = min(seconds, int(text) / 1000)
        return time.monotonic() + seconds

    def _with_body(self, request: Request, respond: Respond, go_on: Callable[[bytes], None]) -> None:
        """Go on with the body as it was before it was compressed, which is undone on a thread: it takes long."""
        encoding = request.headers.get("content-encoding")
        if encoding is None:
            go_on(request.body)
            return
        loop = asyncio.get_running_loop()
        limit = self._options.max_body_bytes
        unpacking = loop.run_in_executor(None, partial(decompress, request.body, encoding, limit_bytes=limit))

        def unpacked(future: asyncio.Future[bytes]) -> None:
            problem = future.exception()
            if request.cancelled:
                return
            try:
                if problem is not None:
                    raise problem
                go_on(future.result())
            except Refusal as refusal:
                respond(Response.refused(refusal))
            except Exception:
                respond(failed(request))

        unpacking.add_done_callback(unpacked)

    def _observe(self, request: Request, model: Mounted, result: Result) -> None:
        if self._log is not None and result.rows:
            latency_ms = request.elapsed_s() * 1000
            try:
                self._log.add(observation_of(result, model=model.served, request_id=request.id, latency_ms=latency_ms))
            except Exception:  # the log must never stand between a client and its answer
                fields = about(request, model=model.served.name, version=model.served.version)
                _log.exception("request %s could not be logged", request.id, extra=fields)


def _trace_id(request: Request) -> str:
    trace = request.traced
    return "" if trace is None else trace.trace_id


def failed(request: Request) -> Response:
    """For a fault of our own. Call it where the exception is handled: the log has the rest."""
    _log.exception("request %s failed", request.id, extra=about(request))
    return Response.refused(Refusal(500, f"the server failed on request {request.id}: see its log"))
