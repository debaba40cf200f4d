"""Checks of the protocol's gRPC half: health, metadata, typed and raw tensors, and what must be refused.

Skipped unless the server's gRPC address is given. Sources: inference_grpc.md and open_inference_grpc.proto of
kserve/open-inference-protocol. They name no codes, so that any which gRPC has for a fault of the client will do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from fettle.testing.oip import answers
from fettle.testing.oip.answers import Answer, same_outputs
from fettle.testing.oip.client import Skipped, short
from fettle.testing.oip.server import Server
from fettle.testing.oip.tensors import Array, Spec, array_from_bytes, array_from_json, read_specs, to_bytes

_SERVICE = "/inference.GRPCInferenceService/"
_UNKNOWN = "oip-check-no-such-name"
# Lists of InferTensorContents; FP16 has none.
_LISTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
_OF_CLIENTS = {"INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE", "FAILED_PRECONDITION", "UNIMPLEMENTED"}


class _Refused(Exception):
    """A call that failed. code: by name."""

    def __init__(self, code: str, details: str) -> None:
        super().__init__(f"{code}: {short(details)}")
        self.code = code


class _Port:
    """The gRPC side of a server. Raises Skipped where there is none, or nothing here to ask it with."""

    def __init__(self, server: Server) -> None:
        if not server.grpc:
            raise Skipped("the gRPC address was not given: --grpc HOST:PORT")
        try:
            import grpc

            from fettle.serve.rpc import messages
        except ModuleNotFoundError:
            raise Skipped("needs grpcio and protobuf: pip install 'fettle-ml[grpc]'") from None
        self.server = server
        self._grpc, self._messages = grpc, messages

    @cached_property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.server.token}"),) if self.server.token else ()

    def message(self, kind: str, **fields: Any) -> Any:
        """A message by its name."""
        return getattr(self._messages, kind)(**fields)

    def call(self, method: str, content: bytes = b"") -> Any:
        """The answer, parsed. Raises _Refused; AssertionError where it is no such message."""
        with self._grpc.insecure_channel(self.server.grpc) as channel:
            try:
                answer = channel.unary_unary(_SERVICE + method)(
                    content, timeout=self.server.timeout_s, metadata=self._metadata
                )
            except self._grpc.RpcError as problem:
                raise _Refused(problem.code().name, problem.details() or "") from None
        kind = getattr(self._messages, f"{method}Response")
        try:
            return kind.FromString(answer)
        except Exception:
            raise AssertionError(f"{method} must be answered with a {kind.__name__}, got {short(answer)}") from None

    def must(self, method: str, content: bytes = b"") -> Any:
        """The answer to a call that must be answered."""
        try:
            return self.call(method, content)
        except _Refused as problem:
            raise AssertionError(f"{method} must be answered, got {problem}") from None

    def refuses(self, method: str, content: bytes, what: str, *, also: frozenset[str] = frozenset()) -> None:
        """The call fails by a fault of the client, and a good one is answered after it."""
        found = ""
        try:
            found = f"the answer {short(str(self.call(method, content)))}"
        except _Refused as problem:
            if problem.code not in _OF_CLIENTS | also:
                found = str(problem)
        assert not found, f"{what} must be refused with INVALID_ARGUMENT or its like, got {found}"
        self.must("ModelInfer", self.good().SerializeToString())

    def good(self, *, raw: bool = True, **more: Any) -> Any:
        """A request that must be answered. more: id, outputs. Raises Skipped where a tensor has no such form."""
        server = self.server
        message = self.message("ModelInferRequest", model_name=server.model, model_version=server.version, **more)
        for spec in server.inputs:
            array = server.arrays()[spec.name]
            tensor = message.inputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
            if raw:
                message.raw_input_contents.append(to_bytes(array))
            else:
                getattr(tensor.contents, _list_of(spec)).extend(array.ravel().tolist())
        return message

    def infer(self, message: Any) -> Answer:
        """The answer to a request that must be answered, held to the model's metadata."""
        return _read(self.server, self.must("ModelInfer", message.SerializeToString()))


def _list_of(spec: Spec) -> str:
    if spec.datatype not in _LISTS:
        raise Skipped(f"{spec.name} is {spec.datatype}, which has no typed contents")
    return _LISTS[spec.datatype]


def _read(server: Server, response: Any) -> Answer:
    assert response.model_name == server.model, f"model_name must be {server.model!r}, got {response.model_name!r}"
    known = {spec.name: spec for spec in server.outputs}
    raw = list(response.raw_output_contents)
    rule = "raw_output_contents must be empty or have one entry for each output"
    assert len(raw) in (0, len(response.outputs)), f"{rule}, got {len(raw)} for {len(response.outputs)}"
    arrays: dict[str, Array] = {}
    for index, output in enumerate(response.outputs):
        assert output.name in known, f"each output must be one of {', '.join(known)}, got {output.name!r}"
        assert output.name not in arrays, f"output {output.name} must come once, got it twice"
        spec, where = known[output.name], f"output {output.name}"
        rule = f"{where}: datatype must be that of the metadata, {spec.datatype}, got {output.datatype!r}"
        assert output.datatype == spec.datatype, rule
        shape = list(output.shape)
        if raw:
            assert not output.contents.ByteSize(), f"{where}: must be raw or typed, got both"
            arrays[output.name] = array_from_bytes(raw[index], spec.datatype, shape, where=where)
            continue
        values = list(getattr(output.contents, _list_of(spec)))
        if spec.datatype == "BYTES":
            values = [value.decode() for value in values]
        arrays[output.name] = array_from_json(values, spec.datatype, shape, where=where)
    return Answer({"id": response.id}, arrays)


# Health and metadata


def says_over_grpc_that_it_is_live_and_ready(server: Server) -> None:
    """ServerLive, ServerReady and ModelReady are true."""
    port = _Port(server)
    assert port.must("ServerLive").live, "ServerLive must say true, got false"
    assert port.must("ServerReady").ready, "ServerReady must say true, got false"
    asked = port.message("ModelReadyRequest", name=server.model, version=server.version)
    assert port.must("ModelReady", asked.SerializeToString()).ready, "ModelReady must say true, got false"


def describes_itself_over_grpc(server: Server) -> None:
    """ServerMetadata has a name and a version."""
    said = _Port(server).must("ServerMetadata")
    assert said.name, f"ServerMetadata must have a name and a version, got {short(str(said))}"
    assert said.version, f"ServerMetadata must have a name and a version, got {short(str(said))}"


def describes_the_model_over_grpc_as_over_rest(server: Server) -> None:
    """ModelMetadata has the same name, inputs and outputs, -1 for free dimensions."""
    port = _Port(server)
    asked = port.message("ModelMetadataRequest", name=server.model, version=server.version)
    said = port.must("ModelMetadata", asked.SerializeToString())
    assert said.name == server.model, f"name must be {server.model!r}, got {said.name!r}"
    for part, wanted in (("inputs", server.inputs), ("outputs", server.outputs)):
        listed = [{"name": one.name, "datatype": one.datatype, "shape": list(one.shape)} for one in getattr(said, part)]
        found = read_specs({part: listed}, part)
        assert found == wanted, f"{part} must be those of REST, {short(wanted)}, got {short(found)}"


# Inference


def _same_as_rest(server: Server, port: _Port, message: Any, rule: str) -> None:
    same_outputs(server, port.infer(message), answers.infer(server, server.good()), rule)


def answers_raw_tensors_as_rest_does(server: Server) -> None:
    """raw_input_contents are little endian, row-major, in the order of the inputs."""
    port = _Port(server)
    _same_as_rest(server, port, port.good(), "raw tensors must be answered as REST answers them")


def answers_typed_tensors_as_rest_does(server: Server) -> None:
    """Contents are in the list of the data type, row-major."""
    port = _Port(server)
    _same_as_rest(server, port, port.good(raw=False), "typed tensors must be answered as REST answers them")


def echoes_the_id_over_grpc(server: Server) -> None:
    """The id of a request is that of its answer."""
    port = _Port(server)
    for name in ("one", "another"):
        found = port.infer(port.good(id=name)).document["id"]
        assert found == name, f"the id must be {name!r}, got {found!r}"


def returns_only_the_outputs_asked_for_over_grpc(server: Server) -> None:
    """Where outputs are named, the others are not returned."""
    port = _Port(server)
    for spec in server.outputs:
        found = list(port.infer(port.good(outputs=[{"name": spec.name}])).arrays)
        assert found == [spec.name], f"only the output {spec.name} was asked for, got {found}"


# Refusals


def refuses_unknown_models_over_grpc(server: Server) -> None:
    """Metadata of a model that is not there, and inference with it, fail; it is not ready either."""
    port = _Port(server)
    asked = port.message("ModelMetadataRequest", name=_UNKNOWN).SerializeToString()
    port.refuses("ModelMetadata", asked, "metadata of an unknown model", also=frozenset({"UNAVAILABLE"}))
    message = port.good()
    message.model_name = _UNKNOWN
    unknown = message.SerializeToString()
    port.refuses("ModelInfer", unknown, "inference with an unknown model", also=frozenset({"UNAVAILABLE"}))
    try:
        ready = port.call("ModelReady", asked).ready
    except _Refused:
        return
    assert not ready, "an unknown model must not be ready, got true"


def refuses_raw_tensors_of_a_wrong_size(server: Server) -> None:
    """A byte too few or too many for the shape, and an entry too few or too many for the inputs."""
    port = _Port(server)
    for size in (-1, 1):
        message = port.good()
        octets = message.raw_input_contents[0]
        message.raw_input_contents[0] = octets[:size] if size < 0 else octets + bytes(size)
        port.refuses("ModelInfer", message.SerializeToString(), "a raw tensor of a wrong size")
    message = port.good()
    message.raw_input_contents.append(message.raw_input_contents[0])
    port.refuses("ModelInfer", message.SerializeToString(), "an entry of raw_input_contents too many")


def refuses_raw_and_typed_tensors_at_once(server: Server) -> None:
    """Where raw_input_contents is used no input may have contents: open_inference_grpc.proto."""
    port = _Port(server)
    message = port.good()
    for tensor, typed in zip(message.inputs, port.good(raw=False).inputs, strict=True):
        tensor.contents.CopyFrom(typed.contents)
    port.refuses("ModelInfer", message.SerializeToString(), "tensors that are raw and typed")


def refuses_a_wrong_number_of_typed_values(server: Server) -> None:
    """A value too few or too many for the shape, and none at all."""
    port = _Port(server)
    name = _list_of(server.inputs[0])
    values = list(getattr(port.good(raw=False).inputs[0].contents, name))
    for wrong in (values[:-1], [*values, values[0]], []):
        message = port.good(raw=False)
        message.inputs[0].contents.Clear()
        getattr(message.inputs[0].contents, name).extend(wrong)
        port.refuses("ModelInfer", message.SerializeToString(), "a wrong number of typed values")


def refuses_a_wrong_datatype_over_grpc(server: Server) -> None:
    """An input of another data type than the model's, as raw bytes of that type, and of one that does not exist."""
    port = _Port(server)
    spec = server.inputs[0]
    elements = server.arrays()[spec.name].size
    for datatype in ("FP64" if spec.datatype != "FP64" else "INT64", "NONE"):
        message = port.good()
        message.inputs[0].datatype = datatype
        message.raw_input_contents[0] = bytes(8 * elements)
        port.refuses("ModelInfer", message.SerializeToString(), f"an input of {datatype} instead of {spec.datatype}")


def refuses_missing_inputs_over_grpc(server: Server) -> None:
    """A request without the model's inputs."""
    port = _Port(server)
    message = port.message("ModelInferRequest", model_name=server.model, model_version=server.version)
    port.refuses("ModelInfer", message.SerializeToString(), "a request without inputs")


def refuses_an_unknown_output_over_grpc(server: Server) -> None:
    """An output that the model has not."""
    port = _Port(server)
    port.refuses("ModelInfer", port.good(outputs=[{"name": _UNKNOWN}]).SerializeToString(), "an unknown output")


def refuses_what_is_no_message(server: Server) -> None:
    """Bytes that are no message fail, INTERNAL included: that is what libraries of gRPC say of them by themselves."""
    port = _Port(server)
    for content in (b"\xff" * 20, port.good().SerializeToString()[:-1]):
        port.refuses("ModelInfer", content, "a damaged message", also=frozenset({"INTERNAL", "UNKNOWN"}))


CHECKS: tuple[Callable[[Server], None], ...] = (
    says_over_grpc_that_it_is_live_and_ready,
    describes_itself_over_grpc,
    describes_the_model_over_grpc_as_over_rest,
    answers_raw_tensors_as_rest_does,
    answers_typed_tensors_as_rest_does,
    echoes_the_id_over_grpc,
    returns_only_the_outputs_asked_for_over_grpc,
    refuses_unknown_models_over_grpc,
    refuses_raw_tensors_of_a_wrong_size,
    refuses_raw_and_typed_tensors_at_once,
    refuses_a_wrong_number_of_typed_values,
    refuses_a_wrong_datatype_over_grpc,
    refuses_missing_inputs_over_grpc,
    refuses_an_unknown_output_over_grpc,
    refuses_what_is_no_message,
)
