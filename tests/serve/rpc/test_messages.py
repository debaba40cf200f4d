"""The protocol's messages: as the .proto says, as other implementations number them, and beside theirs."""

import subprocess
import sys

import pytest
from google.protobuf import descriptor_pb2

from fettle.serve.rpc import generate, messages


def fields_of(file):
    """Every field of every message: (number, type, label) by the path of names."""
    found = {}

    def walk(prefix, message):
        for field in message.field:
            kind = field.type_name.rpartition(".")[2]
            found[f"{prefix}.{message.name}.{field.name}"] = (field.number, field.type, field.label, kind)
        for nested in message.nested_type:
            walk(f"{prefix}.{message.name}", nested)

    for message in file.message_type:
        walk(file.package, message)
    return found


def file_of(descriptor):
    file = descriptor_pb2.FileDescriptorProto()
    descriptor.CopyToProto(file)
    return file


def test_the_descriptors_are_those_of_the_proto_files():
    pytest.importorskip("grpc_tools")
    made = descriptor_pb2.FileDescriptorSet.FromString(generate.compiled())
    assert [file.name for file in made.file] == list(generate.PROTOS)
    for file in made.file:
        assert file_of(messages.POOL.FindFileByName(file.name)) == file


def test_fields_have_the_numbers_that_tritonclient_gives_them():
    theirs = pytest.importorskip("tritonclient.grpc").service_pb2.DESCRIPTOR
    known = fields_of(file_of(theirs))
    ours = fields_of(file_of(messages.POOL.FindFileByName("open_inference.proto")))
    assert ours
    assert ours == {name: known.get(name) for name in ours}


@pytest.mark.parametrize(
    "order",
    [("tritonclient.grpc", "fettle.serve.rpc.messages")] * 1 + [("fettle.serve.rpc.messages", "tritonclient.grpc")],
)
def test_one_process_can_have_our_messages_and_those_of_a_client(order):
    pytest.importorskip("tritonclient.grpc")
    code = (
        f"import {order[0]}; import {order[1]}; from tritonclient.grpc import service_pb2 as theirs; "
        "from fettle.serve.rpc import messages as ours; "
        "assert theirs.ModelInferRequest(id='a').SerializeToString() == "
        "ours.ModelInferRequest(id='a').SerializeToString()"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_a_server_without_grpc_imports_nothing_of_it():
    code = (
        "import sys, fettle.serve.server, fettle.serve.worker; "
        "assert not {'grpc', 'google.protobuf'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
