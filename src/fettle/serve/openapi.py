"""The OpenAPI document of the public port: every path of the routes table, with the schemas of the served models.

Made when it is asked for and kept until another version answers. A path that is routed and not described here is an
error, which a test finds: so the document cannot drift from the routes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fettle.serve import schemas
from fettle.serve.http import Response
from fettle.serve.model import Served
from fettle.serve.options import ServeOptions
from fettle.serve.schemas import Schema, object_of

_DOCUMENT = "3.1.0"
# What a connection answers by itself, whatever the path: see `connection.py`.
_ALWAYS = {
    400: "The request is not valid HTTP/1.1, or has no Host.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    431: "The header is too large.",
    500: "The server failed, which is a fault of ours: its log tells more.",
    503: "The server cannot answer now: it has no model yet, too many connections, or it shuts down.",
}
_BODY = {**_ALWAYS, 411: "A body needs Content-Length or chunks."}
_OF_MODEL = {**_ALWAYS, 404: "No such model or version."}
_INFER = {
    **_BODY,
    400: "The body is not a request as described.",
    404: "No such model or version.",
    413: "The body is too large, also after decompression, or has too many rows.",
    415: "Content-Type or Content-Encoding is not one of those that are taken.",
    429: "The answer would come too late, or too many rows wait: try again later.",
    504: "No answer before the deadline.",
}
_PREDICT = {**_INFER, 422: "The model does not classify images."}
_RETRY = frozenset({429, 503, 504})
_NO_WORD = re.compile(r"\W+")
_SEGMENT = {"pattern": "^[^/]+$"}
_PATH_PARAMETER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operation:
    """What a path does. ok: the content of 200; refused: why for each status; unready: the content of a 503 of its own.

    body: the content that is taken, None where there is none.
    """

    summary: str
    ok: dict[str, Schema]
    refused: Mapping[int, str]
    unready: Schema | None = None
    body: dict[str, Schema] | None = None
    headers: tuple[str, ...] = ("request-id",)


class Description:
    """The document as bytes, made anew only where a version that answers has changed."""

    def __init__(self, paths: Mapping[str, Sequence[str]], options: ServeOptions) -> None:
        self._paths = paths
        self._options = options
        self._made: tuple[object, Response] | None = None

    def response(self, names: Iterable[str], models: Iterable[Served]) -> Response:
        """The answer of `/openapi.json`. names: of the models that there are; models: the versions that answer now."""
        now = tuple(names), tuple(models)
        if self._made is None or self._made[0] != now:
            content = document(self._paths, names=now[0], models=now[1], options=self._options)
            self._made = now, Response.json(content)
        return self._made[1]


def document(
    paths: Mapping[str, Sequence[str]], *, names: Sequence[str], models: Sequence[Served], options: ServeOptions
) -> dict[str, Any]:
    """The document. paths: the methods of each path; names: of the models; models: those of them that are ready.

    Raises KeyError for a path that nothing here describes.
    """
    described = _operations()
    return {
        "openapi": _DOCUMENT,
        "info": {
            "title": "fettle",
            "version": "2",
            "summary": "Images and tensors in, predictions out: the Open Inference Protocol 2, and /predict.",
            "description": _ABOUT,
        },
        "paths": {
            path: {method.lower(): _operation(method, path, described[method, path], names) for method in methods}
            for path, methods in paths.items()
        },
        "components": {
            "schemas": _components(models, options),
            "parameters": _parameters(),
            "headers": _response_headers(),
        },
    }


_ABOUT = """Every error is `{"error": "one sentence"}`. A path takes HEAD wherever it takes GET; any other method is
answered with 405, any other path with 404. Bodies may be compressed: Content-Encoding gzip or deflate."""


def _json(schema: str) -> dict[str, Schema]:
    return {"application/json": _ref("schemas", schema)}


def _ref(kind: str, name: str) -> Schema:
    return {"$ref": f"#/components/{kind}/{name}"}


def _operations() -> dict[tuple[str, str], _Operation]:
    live = _Operation(summary="Whether the process answers at all.", ok=_json("Live"), refused=_ALWAYS)
    ready = _Operation(
        summary="Whether a load balancer should send requests.",
        ok=_json("Ready"), refused=_ALWAYS, unready=_ref("schemas", "Ready"),
    )  # fmt: skip
    startup = _Operation(
        summary="Whether each model has been loaded and proven since the start: a probe that waits for it.",
        ok=_json("Startup"), refused=_ALWAYS, unready=_ref("schemas", "Startup"),
    )  # fmt: skip
    server = _Operation(
        summary="The server's name, version and extensions of the protocol.", ok=_json("Server"), refused=_ALWAYS
    )
    health = _Operation(
        summary="The state of the server and of its model, in detail.",
        ok=_json("Health"), refused=_ALWAYS, unready=_ref("schemas", "Health"),
    )  # fmt: skip
    text = {"text/plain": {"type": "string"}}
    table = {
        ("GET", "/v2"): server,
        ("GET", "/v2/"): server,
        ("GET", "/v2/health/live"): live,
        ("GET", "/v2/health/ready"): ready,
        ("GET", "/health"): health,
        ("GET", "/health/live"): live,
        ("GET", "/health/ready"): ready,
        ("GET", "/health/startup"): startup,
        ("GET", "/metrics"): _Operation(summary="Metrics for Prometheus.", ok=text, refused=_ALWAYS),
        ("GET", "/openapi.json"): _Operation(
            summary="This document.", ok={"application/json": {"type": "object"}}, refused=_ALWAYS
        ),
        ("POST", "/predict"): _predict("the server's first model"),
        ("POST", "/predict/{model}"): _predict("that model"),
    }
    for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        table["GET", prefix] = _Operation(
            summary="The names, data types and shapes of the model's tensors.", ok=_json("Model"), refused=_OF_MODEL
        )
        table["GET", f"{prefix}/ready"] = _Operation(
            summary="Whether the model answers.",
            ok=_json("ModelReady"), refused=_OF_MODEL, unready=_ref("schemas", "ModelReady"),
        )  # fmt: skip
        table["POST", f"{prefix}/infer"] = _infer()
    return table


def _infer() -> _Operation:
    binary = {"type": "string", "format": "binary", "description": "JSON, and behind it the bytes of tensors."}
    return _Operation(
        summary="Tensors in, tensors out.",
        ok={**_json("InferResponse"), "application/octet-stream": binary},
        refused=_INFER,
        body={**_json("InferRequest"), "application/octet-stream": binary},
        headers=("request-id", "timeout", "header-length"),
    )


def _predict(whose: str) -> _Operation:
    one = _ref("schemas", "Prediction")
    file = {"type": "string", "format": "binary", "description": "An image file, such as JPEG or PNG."}
    form = {"type": "object", "additionalProperties": {"type": "string", "format": "binary"}, "minProperties": 1}
    many = object_of({"predictions": {"type": "array", "items": one, "minItems": 1}})
    return _Operation(
        summary=f"Images in, classes with probabilities out; of {whose}.",
        ok={"application/json": {"oneOf": [one, many]}},
        refused=_PREDICT,
        body={**_json("PredictRequest"), "multipart/form-data": form, "image/*": file},
        headers=("request-id", "timeout"),
    )


def _operation(method: str, path: str, operation: _Operation, names: Sequence[str]) -> dict[str, Any]:
    in_path = [
        {
            "name": name, "in": "path", "required": True,
            "schema": {"type": "string", **({"enum": list(names)} if name == "model" and names else _SEGMENT)},
        }
        for name in _PATH_PARAMETER.findall(path)
    ]  # fmt: skip
    described: dict[str, Any] = {
        "operationId": f"{method.lower()}{_NO_WORD.sub('_', path)}",
        "summary": operation.summary,
        "parameters": [*in_path, *(_ref("parameters", name) for name in operation.headers)],
        "responses": _responses(operation),
    }
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": _content(operation.body)}
    return described


def _responses(operation: _Operation) -> dict[str, Any]:
    id_header = {"X-Request-Id": _ref("headers", "request-id")}
    responses: dict[str, Any] = {
        "200": {"description": "As asked.", "headers": id_header, "content": _content(operation.ok)}
    }
    error = _ref("schemas", "Error")
    for status, why in sorted(operation.refused.items()):
        headers = {**id_header, **({"Retry-After": _ref("headers", "retry-after")} if status in _RETRY else {})}
        schema = {"anyOf": [operation.unready, error]} if status == 503 and operation.unready else error
        responses[str(status)] = {
            "description": why,
            "headers": headers,
            "content": _content({"application/json": schema}),
        }
    return responses


def _content(by_type: Mapping[str, Schema]) -> dict[str, Any]:
    return {kind: {"schema": schema} for kind, schema in by_type.items()}


def _components(models: Sequence[Served], options: ServeOptions) -> dict[str, Schema]:
    rows = options.max_queue_rows
    found = {
        "Error": object_of({"error": {"type": "string"}}, closed=True),
        "Live": object_of({"live": {"type": "boolean"}}),
        "Ready": object_of({"live": {"type": "boolean"}, "ready": {"type": "boolean"}}),
        "Startup": object_of({"live": {"type": "boolean"}, "started": {"type": "boolean"}}),
        "Server": object_of(
            {
                "name": {"type": "string"},
                "version": {"type": "string"},
                "extensions": {"type": "array", "items": {"type": "string"}},
            }
        ),
        "Health": _health(),
        "ModelReady": object_of({"name": {"type": "string"}, "ready": {"type": "boolean"}}),
        "PredictRequest": schemas.predict_request(max_images=rows),
    }
    makers = {
        "InferRequest": lambda model: schemas.infer_request(model, max_rows=rows),
        "InferResponse": schemas.infer_response,
        "Model": schemas.model_metadata,
        "Prediction": schemas.prediction,
    }
    for name, make in makers.items():
        for model in models:
            found[f"{name}.{model.name}.{model.version}"] = make(model)
        refs = [_ref("schemas", f"{name}.{model.name}.{model.version}") for model in models]
        found[name] = make(None) if not refs else refs[0] if len(refs) == 1 else {"anyOf": refs}
    return found


def _health() -> Schema:
    text = {"type": ["string", "null"]}
    version = {"version": {"type": ["integer", "null"]}, "digest": text, "runtime": text, "precision": text}
    variant = object_of({"variant": {"type": "string"}, "weight": {"type": "number"}, **version, "problem": text})
    model = object_of(
        {
            "name": {"type": "string"},
            "ready": {"type": "boolean"},
            "sticky": text,
            "variants": {"type": "array", "items": variant},
            "shadow": object_of({**version, "problem": text}),
        },
        optional=("shadow",),
    )
    return object_of(
        {
            "status": {"enum": ["starting", "ready", "failed", "draining"]},
            "ready": {"type": "boolean"},
            "model": text,
            **version,
            "problem": text,
            "workers": {"type": "integer", "minimum": 0},
            "uptime_s": {"type": "number", "minimum": 0},
            "queue_rows": {"type": "integer", "minimum": 0},
            "models": {"type": "array", "items": model},
        }
    )


def _parameters() -> dict[str, Any]:
    def header(name: str, schema: Schema, description: str) -> dict[str, Any]:
        return {"name": name, "in": "header", "required": False, "schema": schema, "description": description}

    return {
        "request-id": header(
            "X-Request-Id",
            {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
            "Names the request in the answer and in the logs; another one is made where it is missing or malformed.",
        ),
        "timeout": header(
            "X-Request-Timeout-Ms",
            {"type": "integer", "minimum": 1, "maximum": 999_999_999},
            "How long the client waits for the answer, in milliseconds.",
        ),
        "header-length": header(
            "Inference-Header-Content-Length",
            {"type": "integer", "minimum": 0},
            "The bytes of JSON before the tensors, in a body of application/octet-stream.",
        ),
    }


def _response_headers() -> dict[str, Any]:
    return {
        "request-id": {"schema": {"type": "string"}, "description": "The request's id, as given or made."},
        "retry-after": {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds to wait."},
    }
