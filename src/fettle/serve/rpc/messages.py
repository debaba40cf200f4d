"""The protocol's messages, as classes of protobuf in a pool of their own.

Every client library of this protocol registers the same names in protobuf's default pool, where a second definition is
an error. And code that protoc generates is bound to the version of protobuf it was made for; descriptors are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from fettle.serve.refusal import Refusal


def _filled() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    content = Path(__file__).with_name("descriptors.binpb").read_bytes()
    for file in descriptor_pb2.FileDescriptorSet.FromString(content).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


POOL = _filled()


def _class(name: str) -> Any:
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))


ServerLiveResponse = _class("inference.ServerLiveResponse")
ServerReadyResponse = _class("inference.ServerReadyResponse")
ServerMetadataResponse = _class("inference.ServerMetadataResponse")
ModelReadyRequest = _class("inference.ModelReadyRequest")
ModelReadyResponse = _class("inference.ModelReadyResponse")
ModelMetadataRequest = _class("inference.ModelMetadataRequest")
ModelMetadataResponse = _class("inference.ModelMetadataResponse")
ModelInferRequest = _class("inference.ModelInferRequest")
ModelInferResponse = _class("inference.ModelInferResponse")
HealthCheckRequest = _class("grpc.health.v1.HealthCheckRequest")
HealthCheckResponse = _class("grpc.health.v1.HealthCheckResponse")


def parse(kind: Any, content: bytes | memoryview) -> Any:
    """The bytes as a message of this kind. Raises Refusal 400."""
    try:
        return kind.FromString(content)
    except DecodeError:
        name = kind.DESCRIPTOR.full_name
        raise Refusal(400, f"the message must be a valid {name}, got one that is damaged") from None
