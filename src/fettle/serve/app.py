"""The application: which path means what, and every failure turned into `{"error": "..."}` with its status."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from fettle.serve import predict, protocol
from fettle.serve.batching import Answer, Batcher, Job
from fettle.serve.health import Health
from fettle.serve.http import Request, Response
from fettle.serve.metrics import Metrics
from fettle.serve.model import LoadedModel
from fettle.serve.observations import Observation, ObservationLog
from fettle.serve.options import ServeOptions
from fettle.serve.refusal import Refusal, quote

_log = logging.getLogger("fettle.serve")
# Parsing a larger body takes milliseconds, which the event loop does not have.
_PARSE_ASIDE_BYTES = 32 * 1024
EXTENSIONS: tuple[str, ...] = ()

Handler = Callable[[Request], Awaitable[Response]]


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
    """The RSGI callable. Parses and routes in the event loop; all that costs time goes to the batcher's workers."""

    def __init__(
        self, *, options: ServeOptions, health: Health, batcher: Batcher, metrics: Metrics, log: ObservationLog | None
    ) -> None:
        self._running: set[asyncio.Task[Any]] = set()
        self._options = options
        self._health = health
        self._batcher = batcher
        self._metrics = metrics
        self._log = log
        self._parsers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="fettle-parser")
        self._routes = self._fixed_routes()

    async def __rsgi__(self, scope: Any, proto: Any) -> None:
        """One request."""
        request = Request(scope, proto)
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            template, response = await self._respond(request)
            self._account(request, template, response)
            await request.send(response, close=self._health.draining)
        finally:
            self._running.discard(task)

    @property
    def in_flight(self) -> int:
        """Requests that are being answered."""
        return len(self._running)

    def give_up(self) -> None:
        """Answer what still runs with 503, at the end of the drain."""
        for task in self._running:
            task.cancel()

    def close(self) -> None:
        """Give back the threads."""
        self._parsers.shutdown(wait=False, cancel_futures=True)

    async def _respond(self, request: Request) -> tuple[str, Response]:
        """The route's template and the answer, whatever happens."""
        template = "unknown"
        try:
            route = self._find(request.path)
            template = route.template
            return template, await route.handler(request.method)(request)
        except Refusal as refusal:
            return template, Response.refused(refusal)
        except asyncio.CancelledError:  # only `give_up` cancels, and the client deserves a last word
            return template, Response.refused(Refusal(503, "the server is shutting down", retry_after_s=1))
        except Exception:
            _log.exception("request %s failed", request.id)
            message = f"the server failed on request {request.id}: see its log"
            return template, Response.refused(Refusal(500, message))

    def _account(self, request: Request, template: str, response: Response) -> None:
        elapsed_s = request.elapsed_s()
        self._metrics.requests.labels(template, str(response.status)).inc()
        self._metrics.request_seconds.labels(template).observe(elapsed_s)
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
        get: dict[str, Handler] = {
            "/v2": self._server_metadata,
            "/v2/": self._server_metadata,
            "/v2/health/live": self._live,
            "/v2/health/ready": self._ready,
            "/health": self._summary,
            "/health/live": self._live,
            "/health/ready": self._ready,
            "/metrics": self._render_metrics,
        }
        routes = {path: Route(path.rstrip("/"), {"GET": handler}) for path, handler in get.items()}
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
                return Route("/v2/models/{model}", {"GET": partial(self._model_metadata, version=version)})
            case ["ready"]:
                return Route("/v2/models/{model}/ready", {"GET": partial(self._model_ready, version=version)})
            case ["infer"]:
                return Route("/v2/models/{model}/infer", {"POST": partial(self._infer, version=version)})
        raise Refusal(404, f"no such path: {quote(path)}")

    def _check_name(self, name: str) -> None:
        if name != self._health.name:
            raise Refusal(404, f"unknown model {quote(name)}; this server has {self._health.name}")

    def _model(self, version: str = "") -> LoadedModel:
        """The model that answers. Raises Refusal 503, or 404 where another version is asked for."""
        model = self._health.model()
        if version and version != str(model.version):
            raise Refusal(404, f"version {quote(version, 16)} is not served; {model.name} answers as {model.version}")
        return model

    # Health and metadata: answered from memory, never waiting for inference

    async def _live(self, request: Request) -> Response:
        return Response.json({"live": True})

    async def _ready(self, request: Request) -> Response:
        ready = self._health.ready
        return Response.json({"live": True, "ready": ready}, 200 if ready else 503)

    async def _summary(self, request: Request) -> Response:
        summary = self._health.summary()
        summary["queue_rows"] = self._batcher.queued_rows
        return Response.json(summary, 200 if summary["ready"] else 503)

    async def _render_metrics(self, request: Request) -> Response:
        return Response(200, self._metrics.render(), content_type=self._metrics.content_type)

    async def _server_metadata(self, request: Request) -> Response:
        return Response.json({"name": "fettle", "version": _version(), "extensions": EXTENSIONS})

    async def _model_metadata(self, request: Request, *, version: str) -> Response:
        return Response.json(protocol.describe(self._model(version)))

    async def _model_ready(self, request: Request, *, version: str) -> Response:
        if self._health.ready:
            self._model(version)  # 404 for a version that is not served
        ready = self._health.ready
        return Response.json({"name": self._health.name, "ready": ready}, 200 if ready else 503)

    # Inference

    async def _infer(self, request: Request, *, version: str) -> Response:
        self._model(version)
        if request.header("inference-header-content-length"):
            raise Refusal(415, "binary tensors are not supported here: send the data as JSON")
        kind = request.header("content-type").partition(";")[0].strip().lower()
        if kind not in ("", "application/json"):
            raise Refusal(415, f"Content-Type must be application/json, got {quote(kind)}")
        body = await self._body(request)
        model = self._model(version)
        call = await self._parse(body, partial(protocol.parse_infer, signature=model.signature))
        job = Job(
            model=model,
            rows=call.rows if model.row_wise else 1,
            shape=("infer", call.shape),
            prepare=lambda: call.inputs,
            finish=lambda answer: (protocol.format_infer(answer, model=model, call=call), answer),
            deadline=time.monotonic() + self._options.request_timeout_s,
            request_id=request.id,
        )
        ((content, answer),) = await self._run([job])
        self._observe(request, model, [answer])
        return Response(200, content)

    async def _predict(self, request: Request) -> Response:
        predict.image_spec(self._model())
        body = await self._body(request)
        model = self._model()
        predict.image_spec(model)
        content_type = request.header("content-type")
        images, many = await self._parse(body, partial(predict.images_in, content_type=content_type))
        deadline = time.monotonic() + self._options.request_timeout_s
        jobs = [self._image_job(image, model, request.id, deadline) for image in images]
        results = await self._run(jobs, name="image" if len(jobs) > 1 else "")
        self._observe(request, model, [answer for _, answer in results])
        found = [prediction for prediction, _ in results]
        return Response.json({"predictions": found} if many else found[0])

    def _image_job(self, image: predict.ImageBytes, model: LoadedModel, request_id: str, deadline: float) -> Job:
        max_pixels = self._options.max_image_pixels
        return Job(
            model=model,
            rows=1,
            shape="image",
            prepare=partial(predict.prepare_image, image, model=model, max_pixels=max_pixels),
            finish=lambda answer: (
                predict.format_prediction(answer, model=model, request_id=request_id),
                answer,
            ),
            deadline=deadline,
            request_id=request_id,
        )

    async def _body(self, request: Request) -> bytes:
        options = self._options
        return await request.read(limit_bytes=options.max_body_bytes, timeout_s=options.body_timeout_s)

    async def _parse(self, body: bytes, parse: Callable[[bytes], Any]) -> Any:
        if len(body) <= _PARSE_ASIDE_BYTES:
            return parse(body)
        return await asyncio.get_running_loop().run_in_executor(self._parsers, parse, body)

    async def _run(self, jobs: Sequence[Job], *, name: str = "") -> list[Any]:
        """What each job's `finish` gave, or the first Refusal, which names its item; 504 where time runs out."""
        futures = self._batcher.submit(jobs)
        try:
            _, pending = await asyncio.wait(futures, timeout=max(0.0, jobs[0].deadline - time.monotonic()))
            if pending:
                seconds = f"{self._options.request_timeout_s:g} s"
                raise Refusal(504, f"no answer within {seconds}", retry_after_s=1)
            for number, future in enumerate(futures):
                problem = future.exception()
                if isinstance(problem, Refusal) and name:
                    raise Refusal(problem.status, f"{name} {number}: {problem.message}")
                if problem is not None:
                    raise problem
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def _observe(self, request: Request, model: LoadedModel, answers: list[Answer]) -> None:
        if self._log is None:
            return
        for answer in answers:
            if answer.probabilities is None or answer.statistics is None:
                continue
            latency_s = request.elapsed_s()
            self._log.add(
                Observation(
                    time_us=time.time_ns() // 1000,
                    request_id=request.id,
                    model=model.name,
                    version=model.version,
                    digest=model.digest,
                    latency_ms=latency_s * 1000,
                    probabilities=answer.probabilities,
                    statistics=answer.statistics,
                )
            )


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fettle-ml")
    except PackageNotFoundError:
        return "unknown"
