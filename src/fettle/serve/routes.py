"""Which path means what: health, metadata and metrics, answered from memory, and where inference begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fettle.serve import protocol
from fettle.serve.dispatch import Dispatcher
from fettle.serve.health import Health
from fettle.serve.http import Request, Respond, Response
from fettle.serve.inference import Inference
from fettle.serve.metrics import Metrics
from fettle.serve.models import Deployment, Models
from fettle.serve.refusal import Refusal, quote

EXTENSIONS = ("binary_tensor_data",)

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


class Routes:
    """All paths of the server's public port."""

    def __init__(
        self, *, models: Models, health: Health, dispatcher: Dispatcher, metrics: Metrics, inference: Inference
    ) -> None:
        self._models = models
        self._health = health
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._inference = inference
        self._fixed = self._fixed_routes()

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
        return routes

    def find(self, path: str) -> Route:
        """Raises Refusal 404."""
        fixed = self._fixed.get(path)
        if fixed is not None:
            return fixed
        if path == "/predict":
            return self._predict_route(path, self._models.first)
        parts = path.split("/")
        if parts[:2] == ["", "predict"] and len(parts) == 3:
            return self._predict_route("/predict/{model}", self._models.find(parts[2]))
        if parts[:3] != ["", "v2", "models"] or len(parts) < 4:
            raise Refusal(404, f"no such path: {quote(path)}")
        deployment = self._models.find(parts[3])
        rest, version = parts[4:], ""
        if rest[:1] == ["versions"] and len(rest) > 1:
            version, rest = rest[1], rest[2:]
        match rest:
            case []:
                handler = _at_once(partial(self._model_metadata, deployment, version))
                return Route("/v2/models/{model}", {"GET": handler})
            case ["ready"]:
                handler = _at_once(partial(self._model_ready, deployment, version))
                return Route("/v2/models/{model}/ready", {"GET": handler})
            case ["infer"]:
                handler = partial(self._inference.infer, deployment=deployment, version=version)
                return Route("/v2/models/{model}/infer", {"POST": handler})
        raise Refusal(404, f"no such path: {quote(path)}")

    def _predict_route(self, template: str, deployment: Deployment) -> Route:
        return Route(template, {"POST": partial(self._inference.predict, deployment=deployment)})

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

    def _model_metadata(self, deployment: Deployment, version: str) -> Response:
        model = deployment.find(version)
        versions = (one.served.version for one in deployment.active)
        return Response.json(protocol.describe(model.served, versions=versions))

    def _model_ready(self, deployment: Deployment, version: str) -> Response:
        ready = self._health.answers(deployment)
        if ready:
            deployment.find(version)  # 404 for a version that is not served
        return Response.json({"name": deployment.name, "ready": ready}, 200 if ready else 503)


def _at_once(make: Callable[[], Response]) -> Handler:
    return lambda _, respond: respond(make())


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fettle-ml")
    except PackageNotFoundError:
        return "unknown"
