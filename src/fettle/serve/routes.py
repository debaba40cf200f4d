"""Which path means what: health, metadata and metrics, answered from memory, and where inference begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from fettle.serve import protocol
from fettle.serve.dispatch import Dispatcher
from fettle.serve.health import Health
from fettle.serve.http import Request, Respond, Response
from fettle.serve.inference import Inference
from fettle.serve.keys import Action
from fettle.serve.metrics import Metrics
from fettle.serve.models import Deployment, Models
from fettle.serve.openapi import Description
from fettle.serve.options import ServeOptions
from fettle.serve.refusal import Refusal, quote

EXTENSIONS = ("binary_tensor_data",)

Handler = Callable[[Request, Respond], None]
# Paths that are remembered, for making a route is a seventh of a refusal. Bounded: a version may be any text.
_MOST_KNOWN = 256
_MODEL, _PREDICT = "/v2/models/{model}", "/predict/{model}"


@dataclass(frozen=True, slots=True)
class Route:
    """A path that exists: its template, for metrics, and what answers each method.

    action, model: what a key must be good for; no action: open to everyone. No model: the whole server is meant.
    """

    template: str
    handlers: dict[str, Handler]
    action: Action | None
    model: str | None = None

    def handler(self, method: str) -> Handler:
        """Raises Refusal 405 with Allow."""
        found = self.handlers.get("GET" if method == "HEAD" else method)
        if found is None:
            allowed = ", ".join(("GET", "HEAD") if "GET" in self.handlers else tuple(self.handlers))
            raise Refusal(405, f"this path takes {allowed}, got {quote(method, 16)}", headers={"allow": allowed})
        return found


@dataclass(frozen=True, slots=True)
class _OfModel:
    """What a path under a model's name leads to. handler: made for the model and the version that are asked for."""

    template: str
    method: str
    handler: Callable[[Deployment, str], Handler]


class Routes:
    """All paths of the server's public port."""

    def __init__(
        self,
        *,
        models: Models,
        health: Health,
        dispatcher: Dispatcher,
        metrics: Metrics,
        inference: Inference,
        options: ServeOptions,
    ) -> None:
        self._models = models
        self._health = health
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._inference = inference
        self._known: dict[str, Route] = {}
        self._known_at = models.changes
        self._fixed = self._fixed_routes()
        self._of_model = self._model_routes()
        self._description = Description(self.table(), options)

    def _fixed_routes(self) -> dict[str, Route]:
        get: dict[str, Callable[[], Response]] = {
            "/v2": self._server_metadata,
            "/v2/": self._server_metadata,
            "/health": self._summary,
            "/metrics": self._render_metrics,
            "/openapi.json": self._describe,
        }
        probes = {
            "/v2/health/live": self._live,
            "/v2/health/ready": self._ready,
            "/health/live": self._live,
            "/health/ready": self._ready,
            "/health/startup": self._startup,
        }
        routes = {path: Route(path.rstrip("/"), {"GET": _at_once(handler)}, "read") for path, handler in get.items()}
        # Who sends probes has no key to send along, and learns nothing from them.
        return routes | {path: Route(path, {"GET": _at_once(handler)}, None) for path, handler in probes.items()}

    def _model_routes(self) -> dict[tuple[str, ...], _OfModel]:
        """By what follows a model's name."""

        def metadata(deployment: Deployment, version: str) -> Handler:
            return _at_once(partial(self._model_metadata, deployment, version))

        def ready(deployment: Deployment, version: str) -> Handler:
            return _at_once(partial(self._model_ready, deployment, version))

        def infer(deployment: Deployment, version: str) -> Handler:
            return partial(self._inference.infer, deployment=deployment, version=version)

        return {
            (): _OfModel(_MODEL, "GET", metadata),
            ("ready",): _OfModel(f"{_MODEL}/ready", "GET", ready),
            ("infer",): _OfModel(f"{_MODEL}/infer", "POST", infer),
        }

    def table(self) -> dict[str, Sequence[str]]:
        """Every path with its methods, but HEAD, which goes wherever GET goes."""
        table: dict[str, Sequence[str]] = {path: tuple(route.handlers) for path, route in self._fixed.items()}
        table |= {"/predict": ("POST",), _PREDICT: ("POST",)}
        for prefix in (_MODEL, f"{_MODEL}/versions/{{version}}"):
            table |= {"/".join((prefix, *rest)): (found.method,) for rest, found in self._of_model.items()}
        return table

    def find(self, path: str) -> Route:
        """Raises Refusal 404."""
        if self._known_at != self._models.changes or len(self._known) >= _MOST_KNOWN:
            self._known, self._known_at = {}, self._models.changes
        found = self._known.get(path)
        if found is None:
            found = self._known[path] = self._find(path)
        return found

    def _find(self, path: str) -> Route:
        fixed = self._fixed.get(path)
        if fixed is not None:
            return fixed
        if path == "/predict":
            return self._predict_route(path, self._models.first)
        parts = path.split("/")
        if parts[:2] == ["", "predict"] and len(parts) == 3:
            return self._predict_route(_PREDICT, self._models.find(parts[2]))
        if parts[:3] != ["", "v2", "models"] or len(parts) < 4:
            raise Refusal(404, f"no such path: {quote(path)}")
        deployment = self._models.find(parts[3])
        rest, version = parts[4:], ""
        if rest[:1] == ["versions"] and len(rest) > 1:
            version, rest = rest[1], rest[2:]
        found = self._of_model.get(tuple(rest))
        if found is None:
            raise Refusal(404, f"no such path: {quote(path)}")
        handlers = {found.method: found.handler(deployment, version)}
        return Route(found.template, handlers, "read" if found.method == "GET" else "infer", deployment.name)

    def _predict_route(self, template: str, deployment: Deployment) -> Route:
        handler = partial(self._inference.predict, deployment=deployment)
        return Route(template, {"POST": handler}, "infer", deployment.name)

    # Health and metadata: answered from memory, never waiting for inference

    def _live(self) -> Response:
        return Response.json({"live": True})

    def _ready(self) -> Response:
        ready = self._health.ready
        return Response.json({"live": True, "ready": ready}, 200 if ready else 503)

    def _startup(self) -> Response:
        started = self._health.started
        return Response.json({"live": True, "started": started}, 200 if started else 503)

    def _summary(self) -> Response:
        summary = self._health.summary()
        summary["queue_rows"] = self._dispatcher.queued_rows
        return Response.json(summary, 200 if summary["ready"] else 503)

    def _render_metrics(self) -> Response:
        return Response(200, self._metrics.render(), content_type=self._metrics.content_type)

    def _describe(self) -> Response:
        names = [deployment.name for deployment in self._models]
        models = (one.served for deployment in self._models for one in deployment.active)
        return self._description.response(names, models)

    def _server_metadata(self) -> Response:
        return Response.json({"name": "fettle", "version": server_version(), "extensions": EXTENSIONS})

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


def server_version() -> str:
    """Of this package, as installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fettle-ml")
    except PackageNotFoundError:
        return "unknown"
