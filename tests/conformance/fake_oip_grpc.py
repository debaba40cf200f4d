"""The gRPC half of the fake server, on tritonclient's messages: every rule is kept but the one it is told to break.

Shares no code with the suite that it is there to be tried by. Imports gRPC late: it may not be installed.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

FIELDS = {
    "BOOL": "bool_contents", "UINT8": "uint_contents", "INT64": "int64_contents", "FP32": "fp32_contents",
    "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
SERVICE = "inference.GRPCInferenceService"


class Refused(Exception):
    """Becomes a code by that name."""

    def __init__(self, code, details):
        super().__init__(details)
        self.code = code


class FakeGrpc:
    """inputs, outputs, run: of the model. fault: the one rule that is broken; "" breaks none."""

    def __init__(self, model, inputs, outputs, run, dtypes, *, fault=""):
        import grpc
        from tritonclient.grpc import service_pb2

        self.model, self.inputs, self.outputs, self.run, self.dtypes = model, inputs, outputs, run, dtypes
        self.fault, self.token = fault, None
        self._grpc, self._messages = grpc, service_pb2
        methods = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")
        handlers = {name: grpc.unary_unary_rpc_method_handler(self._handler(name)) for name in methods}
        self._server = grpc.server(ThreadPoolExecutor(2))
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def close(self):
        self._server.stop(None).wait()

    def _handler(self, name):
        request_type = getattr(self._messages, f"{name}Request")
        response_type = getattr(self._messages, f"{name}Response")
        method = getattr(self, name)

        def handle(content, context):
            from google.protobuf.message import DecodeError

            if self.token and ("authorization", f"Bearer {self.token}") not in [
                tuple(m) for m in context.invocation_metadata()
            ]:
                context.abort(self._grpc.StatusCode.UNAUTHENTICATED, "no token")
            try:
                request = request_type.FromString(content)
            except DecodeError:
                if self.fault == "answers damage":
                    return response_type().SerializeToString()
                context.abort(self._grpc.StatusCode.INTERNAL, "damaged")
            try:
                answer = method(request)
            except Refused as problem:
                code = "UNKNOWN" if self.fault == "unknown codes" else problem.code
                context.abort(getattr(self._grpc.StatusCode, code), str(problem))
            return b"\xff" if self.fault == "answers are no messages" else response_type(**answer).SerializeToString()

        return handle

    def ServerLive(self, _):
        return {"live": True}

    def ServerReady(self, _):
        return {"ready": self.fault != "never ready"}

    def ModelReady(self, request):
        if self.fault != "any model is ready":
            self._known(request.name)
        return {"ready": True}

    def ServerMetadata(self, _):
        return {"name": "fake", "version": "" if self.fault == "no version" else "1"}

    def ModelMetadata(self, request):
        self._known(request.name)
        one = self.fault == "free dimensions are one"
        parts = (
            [{"name": n, "datatype": d, "shape": [1 if one and size == -1 else size for size in s]} for n, d, s in part]
            for part in (self.inputs, self.outputs)
        )
        return {"name": self.model, **dict(zip(("inputs", "outputs"), parts, strict=True))}

    def _known(self, name):
        if name != self.model and self.fault != "any model":
            raise Refused("NOT_FOUND", f"no model {name}")

    def ModelInfer(self, request):
        self._known(request.model_name)
        arrays = self._arrays(request)
        names = [wanted.name for wanted in request.outputs] or [name for name, _, _ in self.outputs]
        known = {name: datatype for name, datatype, _ in self.outputs}
        if set(names) - set(known):
            if self.fault != "ignores unknown outputs":
                raise Refused("INVALID_ARGUMENT", "no such output")
            names = [name for name in names if name in known]
        if self.fault == "ignores outputs":
            names = list(known)
        found = self.run(**arrays)
        raw = bool(request.raw_input_contents)
        outputs, contents = [], []
        for name in names:
            array = found[name]
            output = {"name": name, "datatype": known[name], "shape": array.shape}
            if raw:
                contents.append(self._packed(array, known[name]))
            else:
                output["contents"] = {FIELDS[known[name]]: array.ravel().tolist()}
            outputs.append(output)
        if self.fault == "forgets a raw output" and contents:
            contents.append(contents[0])
        answered = "" if self.fault == "no id" else request.id
        return {"model_name": self.model, "id": answered, "outputs": outputs, "raw_output_contents": contents}

    def _packed(self, array, datatype):
        if datatype == "BYTES":
            return b"".join(len(value).to_bytes(4, "little") + value for value in array.flat)
        return array.astype(self.dtypes[datatype]).tobytes()

    def _arrays(self, request):
        raw, found = list(request.raw_input_contents), {}
        known = {name: datatype for name, datatype, _ in self.inputs}
        if raw and len(raw) != len(request.inputs) and self.fault != "cuts or fills raw tensors":
            raise Refused("INVALID_ARGUMENT", "raw for each input")
        for index, tensor in enumerate(request.inputs):
            if tensor.name not in known:
                raise Refused("INVALID_ARGUMENT", f"no input {tensor.name}")
            datatype = known[tensor.name]
            size = int(np.prod(list(tensor.shape)))
            if tensor.datatype != datatype and self.fault != "takes any datatype":
                raise Refused("INVALID_ARGUMENT", "another datatype")
            if raw and tensor.contents.ByteSize() and self.fault != "raw goes before typed":
                raise Refused("INVALID_ARGUMENT", "raw and typed")
            values = self._raw(raw[index], datatype, size) if raw else self._typed(tensor.contents, datatype, size)
            found[tensor.name] = values.reshape(list(tensor.shape))
        for name, datatype, shape in self.inputs:
            if name not in found:
                if self.fault != "zeros for missing inputs":
                    raise Refused("INVALID_ARGUMENT", f"no {name}")
                found[name] = np.zeros([abs(side) for side in shape], self.dtypes[datatype])
        return found

    def _raw(self, octets, datatype, size):
        if datatype == "BYTES":
            values, start = [], 0
            while start < len(octets):
                end = start + 4 + int.from_bytes(octets[start : start + 4], "little")
                if start + 4 > len(octets) or end > len(octets):
                    raise Refused("INVALID_ARGUMENT", "a cut text")
                values.append(octets[start + 4 : end])
                start = end
        else:
            dtype = np.dtype(self.dtypes[datatype])
            if self.fault in ("cuts or fills raw tensors", "takes any datatype"):
                octets = octets[: size * dtype.itemsize].ljust(size * dtype.itemsize, b"\0")
            if len(octets) % dtype.itemsize:
                raise Refused("INVALID_ARGUMENT", "a cut element")
            values = np.frombuffer(octets, dtype.newbyteorder(">") if self.fault == "big endian" else dtype)
        return self._sized(np.array(values, self.dtypes[datatype]), size)

    def _typed(self, contents, datatype, size):
        values = list(getattr(contents, FIELDS[datatype]))
        if self.fault == "typed tensors upside down":
            values.reverse()
        if self.fault == "fills up typed values":
            values = [*values, *([0] * size)][:size]
        return self._sized(np.array([*values, None], object)[:-1].astype(self.dtypes[datatype]), size)

    def _sized(self, values, size):
        if len(values) != size:
            raise Refused("INVALID_ARGUMENT", "a wrong number of values")
        return values
