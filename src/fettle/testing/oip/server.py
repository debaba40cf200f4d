"""The server under test: where it is, what its metadata says, and requests made up from that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any
from urllib.parse import quote

from fettle.testing.oip.client import Connection, Reply, Skipped, Target, short
from fettle.testing.oip.tensors import Array, Document, Spec, encode, read_specs, request_of, sample

_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Server:
    """An Open Inference Protocol server, seen from outside, and the one model that is tried.

    version: which one to ask for; "" leaves the choice to the server.
    token: sent as `Authorization: Bearer TOKEN` with every request.
    timeout_s: for each request, from connecting to the last byte of the answer.
    free: what free dimensions become in made-up inputs; the first one is the number of rows.
    grpc: HOST:PORT of its gRPC half, in the clear; "" leaves the checks of it out.
    """

    url: str
    _: KW_ONLY
    model: str
    version: str = ""
    token: str = ""
    timeout_s: float = 10.0
    free: int = 1
    grpc: str = ""

    # HTTP

    def connect(self) -> Connection:
        """A connection for several requests."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return Connection(Target.parse(self.url), timeout_s=self.timeout_s, headers=headers)

    def request(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Reply:
        """One request on a connection of its own. Raises Unanswered."""
        with self.connect() as connection:
            return connection.request(method, path, body, headers)

    def get(self, path: str) -> Reply:
        """`GET path`."""
        return self.request("GET", path)

    def path(self, end: str = "", *, model: str | None = None, version: str | None = None) -> str:
        """The model's path with this end: "", "/ready" or "/infer"."""
        model = self.model if model is None else model
        version = self.version if version is None else version
        chosen = f"/versions/{quote(version, safe='')}" if version else ""
        return f"/v2/models/{quote(model, safe='')}{chosen}{end}"

    def infer(
        self, body: bytes | Document, headers: Mapping[str, str] | None = None, *, version: str | None = None
    ) -> Reply:
        """`POST .../infer` with these bytes, or this document as JSON."""
        content = body if isinstance(body, bytes) else encode(body)
        return self.request("POST", self.path("/infer", version=version), content, {**_JSON, **(headers or {})})

    # Metadata

    @cached_property
    def metadata(self) -> Any:
        """The model's metadata object. Raises AssertionError where there is none."""
        reply = self.get(self.path())
        assert reply.status == 200, f"{reply.asked} must be answered with the model's metadata, got {reply}"
        return reply.json()

    @cached_property
    def inputs(self) -> tuple[Spec, ...]:
        """The model's inputs. Raises AssertionError where the metadata does not tell."""
        return read_specs(self.metadata, "inputs")

    @cached_property
    def outputs(self) -> tuple[Spec, ...]:
        """The model's outputs. Raises AssertionError where the metadata does not tell."""
        return read_specs(self.metadata, "outputs")

    @cached_property
    def versions(self) -> tuple[str, ...]:
        """The versions that may be asked for by path. Raises Skipped where the metadata names none."""
        listed = self.metadata.get("versions") if isinstance(self.metadata, dict) else None
        named = listed if isinstance(listed, list) and listed else [self.version]
        versions = tuple(version for version in named if isinstance(version, str) and version)
        if not versions:
            raise Skipped("the metadata names no versions")
        return versions

    @cached_property
    def extensions(self) -> tuple[str, ...]:
        """What `GET /v2` advertises; nothing where it is no metadata, which is a check of its own."""
        reply = self.get("/v2")
        try:
            document = reply.json() if reply.status == 200 else None
        except AssertionError:
            document = None
        listed = document.get("extensions") if isinstance(document, dict) else None
        return tuple(str(each) for each in listed) if isinstance(listed, list) else ()

    # Requests

    @property
    def takes_rows(self) -> bool:
        """Every input and every output has a free first dimension, as a batch has."""
        return all(spec.has_rows for spec in (*self.inputs, *self.outputs))

    def arrays(self, *, rows: int = 1, seed: int = 0) -> dict[str, Array]:
        """A value for each input. rows: of the free first dimensions. Raises Skipped."""
        return {spec.name: sample(spec, rows=rows, free=self.free, seed=seed) for spec in self.inputs}

    def good(self, *, rows: int = 1, seed: int = 0, **more: Any) -> Document:
        """A request that must be answered. more: id, outputs, parameters."""
        return request_of(self.inputs, self.arrays(rows=rows, seed=seed), **more)

    def first_float(self) -> int:
        """The index of the first input of FP16, FP32 or FP64. Raises Skipped."""
        for index, spec in enumerate(self.inputs):
            if spec.is_float:
                return index
        raise Skipped(f"no input is of a float type: {short([spec.datatype for spec in self.inputs])}")
