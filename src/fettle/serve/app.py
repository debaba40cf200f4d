"""The application: which path means what, and every failure turned into `{"error": "..."}` with its status."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fettle.serve import infer, predict, protocol
from fettle.serve.compression import decompress
from fettle.serve.dispatch import Dispatcher, Job, Result
from fettle.serve.health import Health
from fettle.serve.http import Request, Respond, Response
from fettle.serve.lanes import Mounted
from fettle.serve.metrics import Metrics
from fettle.serve.observations import ObservationLog, observation_of
from fettle.serve.options import ServeOptions
from fettle.serve.refusal import Refusal, quote
from fettle.serve.wire import Item

_log = logging.getLogger("fettle.serve")
EXTENSIONS = ("binary_tensor_data",)
TIMEOUT = "x-request-timeout-ms"

Handler = Callable[[Request, Respond], None]


@dataclass(frozen=True, slots=True)
class Route:
    """A path that exists: its template, for metrics, and what answers each method."""

    template: str
    handlers: dict[str, Handler]

    def handler(self, method: str) -> Handler:
        """Raises Refusal 405 with Allow."""
        found = self.handlers.get("GET" if method == "HEAD" else method)
        if found is None:
            allowed = ", ".join(("GET", "HEAD") if "GET" in self.handlers else tuple(self.handlers))
            raise Refusal(405, f"this path takes {allowed}, got {quote(method, 16)}", headers={"allow": allowed})
        return found


class Application:
    """What connections hand their requests to. Nothing in here computes: that is the workers' part."""

    def __init__(
        self,
        *,
        options: ServeOptions,
        health: Health,
        dispatcher: Dispatcher,
        metrics: Metrics,
        log: ObservationLog | None,
    ) -> None:
        self.begun = 0
        self.in_flight = 0
        self._options = options
        self._health = health
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._log = log
        self._routes = self._fixed_routes()

    @property
    def draining(self) -> bool:
        """Whether every answer should end its connection."""
        return self._health.draining

    def begin(self, request: Request) -> None:
        """Refuse what no body could mend."""
        self._find(request.path).handler(request.method)

    def handle(self, request: Request, respond: Respond) -> None:
        """Answer one request, whatever happens."""
        self.begun += 1
        self.in_flight += 1
        template = "unknown"

        def answer(response: Response) -> None:
            self.in_flight -= 1
            request.on_cancel = None
            self._account(request, template, response)
            respond(response)

        try:
            route = self._find(request.path)
            template = route.template
            route.handler(request.method)(request, answer)
        except Refusal as refusal:
            answer(Response.refused(refusal))
        except Exception:
            answer(self._failed(request))

    def refused(self, request: Request, refusal: Refusal) -> None:
        """Account for what a connection refused by itself."""
        self.begun += 1
        self._account(request, "unknown", Response.refused(refusal))

    def _cancelled(self, jobs: list[Job]) -> None:
        """The client has gone: nobody waits for the answer."""
        self.in_flight -= 1
        for job in jobs:
            job.abandon()

    def _failed(self, request: Request) -> Response:
        _log.exception("request %s failed", request.id)
        return Response.refused(Refusal(500, f"the server failed on request {request.id}: see its log"))

    def _account(self, request: Request, template: str, response: Response) -> None:
        elapsed_s = request.elapsed_s()
        self._metrics.answered(template, response.status, elapsed_s)
        if self._options.access_log:
            line = {
                "time": time.time(),
                "request_id": request.id,
                "method": request.method[:16],
                "path": request.path[:200],
                "status": response.status,
                "ms": round(elapsed_s * 1000, 3),
                "bytes": len(response.body),
            }
            _log.info("%s", json.dumps(line))

    # Routes

    def _fixed_routes(self) -> dict[str, Route]:
        get: dict[str, Callable[[], Response]] = {
            "/v2": self._server_metadata,
            "/v2/": self._server_metadata,
            "/v2/health/live": self._live,
            "/v2/health/ready": self._ready,
            "/health": self._summary,
            "/health/live": self._live,
            "/health/ready": self._ready,
            "/metrics": self._render_metrics,
        }
        routes = {path: Route(path.rstrip("/"), {"GET": _at_once(handler)}) for path, handler in get.items()}
        routes["/predict"] = Route("/predict", {"POST": self._predict})
        return routes

    def _find(self, path: str) -> Route:
        fixed = self._routes.get(path)
        if fixed is not None:
            return fixed
        parts = path.split("/")
        if parts[:3] != ["", "v2", "models"] or len(parts) < 4:
            raise Refusal(404, f"no such path: {quote(path)}")
        self._check_name(parts[3])
        rest, version = parts[4:], ""
        if rest[:1] == ["versions"] and len(rest) > 1:
            version, rest = rest[1], rest[2:]
        match rest:
            case []:
                handler = _at_once(partial(self._model_metadata, version=version))
                return Route("/v2/models/{model}", {"GET": handler})
            case ["ready"]:
                handler = _at_once(partial(self._model_ready, version=version))
                return Route("/v2/models/{model}/ready", {"GET": handler})
            case ["infer"]:
                return Route("/v2/models/{model}/infer", {"POST": partial(self._infer, version=version)})
        raise Refusal(404, f"no such path: {quote(path)}")

    def _check_name(self, name: str) -> None:
        if name != self._health.name:
            raise Refusal(404, f"unknown model {quote(name)}; this server has {self._health.name}")

    def _model(self, version: str = "") -> Mounted:
        """The model that answers. Raises Refusal 503, or 404 where another version is asked for."""
        model = self._health.model()
        if version and version != str(model.served.version):
            has = f"{model.served.name} answers as {model.served.version}"
            raise Refusal(404, f"version {quote(version, 16)} is not served; {has}")
        return model

    # Health and metadata: answered from memory, never waiting for inference

    def _live(self) -> Response:
        return Response.json({"live": True})

    def _ready(self) -> Response:
        ready = self._health.ready
        return Response.json({"live": True, "ready": ready}, 200 if ready else 503)

    def _summary(self) -> Response:
        summary = self._health.summary()
        summary["queue_rows"] = self._dispatcher.queued_rows
        return Response.json(summary, 200 if summary["ready"] else 503)

    def _render_metrics(self) -> Response:
        return Response(200, self._metrics.render(), content_type=self._metrics.content_type)

    def _server_metadata(self) -> Response:
        return Response.json({"name": "fettle", "version": _version(), "extensions": EXTENSIONS})

    def _model_metadata(self, *, version: str) -> Response:
        return Response.json(protocol.describe(self._model(version).served))

    def _model_ready(self, *, version: str) -> Response:
        if self._health.ready:
            self._model(version)  # 404 for a version that is not served
        ready = self._health.ready
        return Response.json({"name": self._health.name, "ready": ready}, 200 if ready else 503)

    # Inference

    def _infer(self, request: Request, respond: Respond, *, version: str) -> None:
        model = self._model(version)
        deadline = self._deadline(request)
        self._dispatcher.admit(model, deadline=deadline)
        self._with_body(request, respond, partial(self._infer_body, request, respond, model, deadline))

    def _infer_body(self, request: Request, respond: Respond, model: Mounted, deadline: float, body: bytes) -> None:
        kind, header_bytes = infer.kind_of(request, body)
        rows = infer.announced_rows(body, header_bytes) if model.served.row_wise else 1

        def done(outcome: Result | Refusal) -> None:
            if isinstance(outcome, Refusal):
                respond(Response.refused(outcome))
                return
            self._observe(request, model, outcome)
            respond(infer.respond_with(request, outcome))

        job = Job(
            model=model,
            kind=kind,
            item=Item(request.id, len(body), False, header_bytes),
            payload=body,
            rows=rows,
            deadline=deadline,
            done=done,
        )
        self._dispatcher.submit([job])
        request.on_cancel = partial(self._cancelled, [job])

    def _predict(self, request: Request, respond: Respond) -> None:
        model = self._model()
        predict.image_spec(model.served)
        deadline = self._deadline(request)
        self._dispatcher.admit(model, deadline=deadline)
        self._with_body(request, respond, partial(self._predict_body, request, respond, model, deadline))

    def _predict_body(self, request: Request, respond: Respond, model: Mounted, deadline: float, body: bytes) -> None:
        images, many = predict.images_in(body, request.header("content-type"))
        gathered = predict.Gathered(len(images), many, partial(self._predicted, request, respond, model))
        jobs = [
            Job(
                model=model,
                kind="image",
                item=Item(request.id, len(image.content), image.encoded),
                payload=image.content,
                rows=1,
                deadline=deadline,
                done=partial(gathered.add, number),
            )
            for number, image in enumerate(images)
        ]
        self._dispatcher.submit(jobs)
        request.on_cancel = partial(self._cancelled, jobs)

    def _predicted(self, request: Request, respond: Respond, model: Mounted, gathered: predict.Gathered) -> None:
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
            if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
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
        gone = False

        def left() -> None:
            nonlocal gone
            gone = True
            self.in_flight -= 1

        def unpacked(future: asyncio.Future[bytes]) -> None:
            problem = future.exception()
            if gone:
                return
            try:
                if problem is not None:
                    raise problem
                go_on(future.result())
            except Refusal as refusal:
                respond(Response.refused(refusal))
            except Exception:
                respond(self._failed(request))

        request.on_cancel = left
        unpacking.add_done_callback(unpacked)

    def _observe(self, request: Request, model: Mounted, result: Result) -> None:
        if self._log is not None and result.rows:
            latency_ms = request.elapsed_s() * 1000
            try:
                self._log.add(observation_of(result, model=model.served, request_id=request.id, latency_ms=latency_ms))
            except Exception:  # the log must never stand between a client and its answer
                _log.exception("request %s could not be logged", request.id)


def _at_once(make: Callable[[], Response]) -> Handler:
    return lambda _, respond: respond(make())


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fettle-ml")
    except PackageNotFoundError:
        return "unknown"
