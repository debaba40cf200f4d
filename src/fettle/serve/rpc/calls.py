"""Which method means what: health and metadata, answered from memory, and where inference begins."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fettle.serve import protocol
from fettle.serve.health import Health
from fettle.serve.http import Request, Respond, Response
from fettle.serve.infer import Form
from fettle.serve.inference import Inference
from fettle.serve.jobs import Result
from fettle.serve.keys import Action
from fettle.serve.models import Models
from fettle.serve.refusal import Refusal
from fettle.serve.routes import EXTENSIONS, Handler, Route, server_version
from fettle.serve.rpc import messages
from fettle.serve.rpc.head import head_of

INFERENCE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"
CONTENT_TYPE = "application/grpc"
# Whatever is asked besides inference is a name and a version; the limit keeps parsing out of the event loop's way.
_MAX_BYTES = 64 * 2**10
_PROBES = frozenset({"ServerLive", "ServerReady", "Check"})
_SERVING, _NOT_SERVING = 1, 2


class Calls:
    """All methods of the gRPC port, by their path."""

    def __init__(self, *, models: Models, health: Health, inference: Inference) -> None:
        self._models = models
        self._health = health
        self._inference = inference
        asked: dict[str, Callable[[bytes], Any]] = {
            "ServerLive": lambda _: messages.ServerLiveResponse(live=True),
            "ServerReady": lambda _: messages.ServerReadyResponse(ready=health.ready),
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "RepositoryIndex": _repository,
            "RepositoryModelLoad": _repository,
            "RepositoryModelUnload": _repository,
        }
        inferences = {name: _at_once(make) for name, make in asked.items()} | {"ModelInfer": self._infer}
        inferences |= {name: _named(inferences[name]) for name in ("ModelReady", "ModelMetadata")}
        self.services: dict[str, dict[str, Handler]] = {
            INFERENCE: inferences,
            HEALTH: {"Check": _at_once(self._check)},
        }

    def find(self, path: str) -> Route:
        """Raises Refusal 501."""
        _, service, method = path.split("/")
        handler = self.services.get(service, {}).get(method)
        if handler is None:
            raise Refusal(501, "this server does not have the method")
        # Who sends probes has no key; of which model a message speaks is known once it is read.
        action: Action | None = None if method in _PROBES else "infer" if method == "ModelInfer" else "read"
        return Route(f"grpc/{method}", {"POST": handler}, action)

    def _infer(self, request: Request, respond: Respond) -> None:
        head = head_of(request.body)
        if request.key is not None:
            request.key.check(head.model, "infer")
        deployment = self._models.find(head.model)
        form = Form(announce=lambda *_: ("grpc", 0, head.rows), respond=_respond_with)
        self._inference.infer(request, respond, deployment=deployment, version=head.version, form=form)

    def _server_metadata(self, _: bytes) -> Any:
        return messages.ServerMetadataResponse(name="fettle", version=server_version(), extensions=EXTENSIONS)

    def _model_metadata(self, content: bytes) -> Any:
        asked = messages.parse(messages.ModelMetadataRequest, content)
        deployment = self._models.find(asked.name)
        model = deployment.find(asked.version)
        versions = (one.served.version for one in deployment.active)
        return messages.ModelMetadataResponse(**protocol.describe(model.served, versions=versions))

    def _model_ready(self, content: bytes) -> Any:
        asked = messages.parse(messages.ModelReadyRequest, content)
        deployment = self._models.find(asked.name)
        ready = self._health.answers(deployment)
        if ready:
            deployment.find(asked.version)  # NOT_FOUND for a version that is not served
        return messages.ModelReadyResponse(ready=ready)

    def _check(self, content: bytes) -> Any:
        """The service is the whole server, one of its services, or a model."""
        service = messages.parse(messages.HealthCheckRequest, content).service
        if service and service not in self.services:
            ready = self._health.answers(self._models.find(service))
        else:
            ready = self._health.ready
        return messages.HealthCheckResponse(status=_SERVING if ready else _NOT_SERVING)


def _respond_with(_: Request, result: Result) -> Response:
    return Response(200, result.content, CONTENT_TYPE)


def _repository(_: bytes) -> Any:
    raise Refusal(501, "models are not managed on this port")


def _named(handler: Handler) -> Handler:
    """The handler, for keys that are good for the model that the message names."""

    def checked(request: Request, respond: Respond) -> None:
        if request.key is not None and len(request.body) <= _MAX_BYTES:
            request.key.check(messages.parse(messages.ModelReadyRequest, request.body).name, "read")
        handler(request, respond)

    return checked


def _at_once(make: Callable[[bytes], Any]) -> Handler:
    return partial(_answer, make)


def _answer(make: Callable[[bytes], Any], request: Request, respond: Respond) -> None:
    if len(request.body) > _MAX_BYTES:
        raise Refusal(413, f"a message of this method may have at most {_MAX_BYTES} bytes, got {len(request.body)}")
    respond(Response(200, make(request.body).SerializeToString(), CONTENT_TYPE))
