"""A small server of the Open Inference Protocol on http.server, which keeps every rule but the one it is told to break.

It shares no code with the suite that it is there to be tried by.
"""

import contextlib
import json
import math
import random
import socket
import socketserver
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

LIMIT = 4 * 2**20
LENGTH = "Inference-Header-Content-Length"
DTYPES = {"BOOL": "?", "UINT8": "u1", "INT64": "<i8", "FP32": "<f4", "FP64": "<f8", "BYTES": "O"}
KINDS = {"BOOL": bool, "UINT8": int, "INT64": int, "FP32": (int, float), "FP64": (int, float), "BYTES": str}


class Refused(Exception):
    """Becomes `{"error": ...}`."""

    def __init__(self, status, message, **headers):
        super().__init__(message)
        self.status, self.headers = status, headers


def pair(x, n):
    return {"y": 2 * x + n.sum(axis=1, keepdims=True).astype("f4"), "s": n.sum(axis=1) + (x[:, 0] * 8).astype("i8")}


# Name -> inputs, outputs, what the model does.
MODELS = {
    "pair": (
        [("x", "FP32", [-1, 3]), ("n", "INT64", [-1, 2])],
        [("y", "FP32", [-1, 3]), ("s", "INT64", [-1])],
        pair,
    ),
    "single": ([("x", "FP32", [-1, 4])], [("y", "FP64", [-1])], lambda x: {"y": x.astype("f8") @ [1, 2, 3, 4]}),
    "text": (
        [("t", "BYTES", [-1, 1]), ("b", "BOOL", [-1, 2])],
        [("u", "BYTES", [-1, 1]), ("c", "BOOL", [-1, 2])],
        lambda t, b: {"u": t, "c": ~b},
    ),
    "fixed": ([("x", "UINT8", [2, 3])], [("y", "INT64", [2])], lambda x: {"y": x.sum(axis=1).astype("i8")}),
    "wide": ([("x", "FP32", [-1, -1, 2])], [("y", "FP32", [-1, -1])], lambda x: {"y": x.sum(axis=2)}),
}


class Fake(ThreadingHTTPServer):
    """`fault`: the one rule that is broken; "" breaks none.

    says: the model's metadata, instead of the right one; index: of the repository extension; token: to be asked for.
    """

    daemon_threads = True

    def __init__(self, model="pair", fault="", extensions=("binary_tensor_data",)):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.fault, self.extensions = model, fault, list(extensions)
        self.closing = threading.Event()
        self.last_id = self.says = self.index = self.token = None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def handle_error(self, request, client_address):
        """A client that went away is no news."""

    def process_request(self, request, client_address):
        # Not `ThreadingHTTPServer`'s own, which keeps every thread that it started.
        threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True).start()

    def close(self):
        self.closing.set()
        self.shutdown()
        self._thread.join()
        socketserver.TCPServer.server_close(self)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        """Nothing on stderr."""

    def fault(self, name):
        return self.server.fault == name

    def any_method(self):
        headers = {}
        try:
            status, body, headers = self.respond()
        except Refused as problem:
            status, headers = problem.status, {name.replace("_", "-"): v for name, v in problem.headers.items()}
            error = {"detail" if self.fault("detail for error") else "error": str(problem)}
            if self.fault("500 for bad requests") and status == 400:
                status = 500
            body = json.dumps(error).encode()
            if self.fault("HTML for unknown paths") and "no path" in str(problem):
                body, headers = b"<h1>Not found</h1>", {"Content-Type": "text/html"}
        except Exception as problem:
            status, body = 500, json.dumps({"error": repr(problem)}).encode()
        self.answer(status, body, headers)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = any_method

    def answer(self, status, body, headers):
        if self.fault("closes without a word after errors") and status >= 400:
            self.close_connection = True
        self.send_response(status)
        headers = {"Content-Type": "application/json", **headers}
        if self.fault("answers are text"):
            headers["Content-Type"] = "text/plain"
        body, coding = self.packed(body)
        if coding:
            headers["Content-Encoding"] = coding
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        if headers.get("Connection") == "close":
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD" or self.fault("HEAD has a body"):
            self.wfile.write(body)

    def packed(self, body):
        asked = self.headers.get("Accept-Encoding", "")
        if self.fault("packs what must be plain") and "gzip" in asked:
            asked = "gzip"
        if asked == "gzip":
            packer = zlib.compressobj(6, zlib.DEFLATED, -15 if self.fault("raw deflate for gzip") else 31)
            return packer.compress(body) + packer.flush(), "gzip"
        return body, ""

    # Routes

    def respond(self):
        body = self.read()
        path = self.path
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            raise Refused(401, "no token")
        if self.server.index and path == "/v2/repository/index":
            return 200, json.dumps(self.server.index).encode(), {}
        if self.fault("hangs on metadata") and path == "/v2":
            self.server.closing.wait()
        if path in ("/v2/health/live", "/v2/health/ready"):
            return self.health(path)
        if path in ("/v2", "/v2/"):
            self.takes("GET", "HEAD")
            if path == "/v2/" and self.fault("redirects the slash"):
                return 307, b"", {"Location": "/v2"}
            known = {"name": "fake", "version": "1", "extensions": self.server.extensions}
            if self.fault("no extensions"):
                del known["extensions"]
            return 200, json.dumps(known).encode(), {}
        return self.model_path(path, body)

    def takes(self, *methods):
        if self.command not in methods:
            if self.fault("500 for wrong methods"):
                raise RuntimeError("no such method")
            allow = {} if self.fault("405 without Allow") else {"Allow": ", ".join(methods)}
            raise Refused(405, f"no method {self.command}", **allow)

    def health(self, path):
        self.takes("GET", "HEAD")
        if path.endswith("live") and self.fault("204 for live"):
            return 204, b"", {}
        if path.endswith("ready") and self.fault("not ready with 200"):
            return 200, b'{"live": true, "ready": false}', {}
        return 200, b'{"live": true}', {}

    def model_path(self, path, body):
        parts = path.split("/")[3:] if path.startswith("/v2/models/") else [""]
        name, rest = parts[0], parts[1:]
        version = ""
        if rest[:1] == ["versions"] and len(rest) > 1:
            version, rest = rest[1], rest[2:]
        if not name or rest not in ([], ["ready"], ["infer"]):
            raise Refused(404, f"no path {path}")
        if name != self.server.model and not self.fault("any model"):
            raise Refused(404, f"no model {name}")
        if version not in ("", "1") and not self.fault("any version"):
            raise Refused(404, f"no version {version}")
        if version and self.fault("no versions by path"):
            raise Refused(404, "no versions here")
        if rest == ["infer"]:
            self.takes("POST")
            return self.infer(body)
        self.takes("GET", "HEAD")
        if rest == ["ready"] and version and self.fault("no version is ready"):
            raise Refused(503, "not ready")
        if rest == ["ready"]:
            ready = {"name": self.server.model, "ready": not self.fault("model not ready with 200")}
            return 200, json.dumps(ready).encode(), {}
        return 200, self.server.says or json.dumps(self.metadata()).encode(), {}

    def metadata(self):
        inputs, outputs, _ = MODELS[self.server.model]
        free = None if self.fault("free dimensions are null") else -1
        inputs, outputs = (
            [{"name": n, "datatype": d, "shape": [free if size == -1 else size for size in s]} for n, d, s in part]
            for part in (inputs, outputs)
        )
        versions = [1] if self.fault("versions are numbers") else ["1"]
        return {
            "name": self.server.model, "versions": versions, "platform": "fake", "inputs": inputs, "outputs": outputs
        }  # fmt: skip

    # From bytes to arrays

    def read(self):
        """The body. Every fault that ends a connection says so, but the ones that must be found."""
        if "Transfer-Encoding" in self.headers:
            if self.fault("chunks are no body"):
                return b""
            raise Refused(411, "needs a length", Connection="close")
        size = int(self.headers.get("Content-Length", 0))
        if size > LIMIT:
            raise Refused(413, "too large", Connection="close")
        if self.fault("leaves bodies unread") and "no-such" in self.path:
            return b""
        body = self.rfile.read(size)
        if len(body) < size and not self.fault("takes cut bodies"):
            raise Refused(400, "the body is cut", Connection="close")
        if len(body) < size:
            body = body.strip()
        return self.unpacked(body)

    def unpacked(self, body):
        coding = self.headers.get("Content-Encoding", "identity").lower()
        if coding == "identity" or self.fault("takes no notice of codings"):
            return body
        if coding not in ("gzip", "deflate"):
            if self.fault("takes unknown codings for plain"):
                return body
            raise Refused(415, f"no coding {coding}")
        if self.fault("400 for compressed bodies"):
            raise Refused(400, "what is this?")
        raw = coding == "deflate" and self.fault("deflate without a head")
        unpacker = zlib.decompressobj(31 if coding == "gzip" else -15 if raw else 15)
        try:
            plain = unpacker.decompress(body, LIMIT)
        except zlib.error as problem:
            raise Refused(400, f"broken {coding}: {problem}") from None
        if unpacker.unconsumed_tail:
            if self.fault("answers bombs"):
                return plain
            raise Refused(413, "too large unpacked")
        if (not unpacker.eof or unpacker.unused_data) and not self.fault("takes cut streams"):
            raise Refused(400, f"{coding} is cut")
        return plain

    def infer(self, body):
        inputs, outputs, run = MODELS[self.server.model]
        length = self.headers.get(LENGTH)
        if length == "0" and len(inputs) == 1 and not self.fault("no bodies of bytes"):
            name, datatype, shape = inputs[0]
            shape = [1 if size == -1 else size for size in shape]
            arrays = {name: self.from_bytes(body, datatype, shape)}
            request = {"parameters": {"binary_data_output": True}}
        else:
            request, tail = self.split(body, length)
            arrays = self.arrays(request, tail, inputs)
        if self.fault("inputs by position"):
            given = [each["name"] for each in request["inputs"]]
            arrays = dict(zip([n for n, _, _ in inputs], [arrays[n] for n in given], strict=True))
        found = run(**arrays)
        return self.write(request, self.spoiled(found), outputs)

    def split(self, body, length):
        """The request object, and the bytes behind it."""
        if length is not None and "Content-Encoding" in self.headers and self.fault("no bytes in packed bodies"):
            raise Refused(400, "bytes and a coding")
        if length is None and self.fault("finds the end of the JSON itself"):
            with contextlib.suppress(ValueError):
                end = json.JSONDecoder().raw_decode(body.decode("latin-1"))[1]
                return self.parsed(body[:end]), body[end:]
        if length is None:
            end = len(body)
        else:
            end = int(length) if length.isdigit() else -1
            if self.fault("500 for wrong lengths"):
                end = int(length)
            if not 0 < end <= len(body):
                if not self.fault("takes lengths beyond the body") or end < 0:
                    raise Refused(400, "wrong length of the JSON")
                end = body.index(b"]}") + 2
        text = body[:end]
        if not text and self.fault("an empty body is a good one"):
            text = json.dumps({"inputs": self.zeros()}).encode()
        request = self.parsed(text)
        if not isinstance(request, dict) or not isinstance(request.get("inputs"), list):
            raise Refused(400, "no inputs")
        if not isinstance(request.get("id", ""), str) and not self.fault("ids of any type"):
            raise Refused(400, "id is a text")
        return request, body[end:]

    def parsed(self, text):
        def no_number(name):
            if self.fault("takes NaN"):
                return 0.0
            raise ValueError(name)

        if self.fault("reads the first JSON text only"):
            with contextlib.suppress(ValueError):
                return json.JSONDecoder().raw_decode(text.decode())[0]
        try:
            return json.loads(text, parse_constant=no_number)
        except RecursionError:
            if self.fault("dies of depth"):
                self.connection.shutdown(socket.SHUT_RDWR)
            raise Refused(400, "too deep") from None
        except ValueError as problem:
            raise Refused(400, f"no JSON: {problem}") from None

    def zeros(self):
        inputs, _, _ = MODELS[self.server.model]
        sized = [(n, d, [abs(size) for size in s]) for n, d, s in inputs]
        return [{"name": n, "datatype": d, "shape": s, "data": [0] * math.prod(s)} for n, d, s in sized]

    def arrays(self, request, tail, inputs):
        found = {}
        known = {name: (datatype, shape) for name, datatype, shape in inputs}
        if tail and self.fault("bytes for all inputs or none") and any("data" in each for each in request["inputs"]):
            raise Refused(400, "bytes and data")
        if "parameters" in request and not request["parameters"] and self.fault("no empty parameters"):
            raise Refused(400, "no parameters")
        for tensor in request["inputs"]:
            if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
                raise Refused(400, "an input has a name")
            name = tensor["name"]
            if name not in known:
                if self.fault("zeros for missing inputs"):
                    continue
                raise Refused(400, f"no input {name}")
            if name in found and not self.fault("the last of two inputs wins"):
                raise Refused(400, f"{name} is given twice")
            found[name], tail = self.tensor(tensor, tail, *known[name])
        if tail and not self.fault("ignores leftover bytes"):
            raise Refused(400, f"{len(tail)} bytes left over")
        for name, (datatype, shape) in known.items():
            if name not in found and not self.fault("zeros for missing inputs"):
                raise Refused(400, f"{name} is missing")
            found.setdefault(name, np.zeros([abs(size) for size in shape], DTYPES[datatype]))
        return found

    def tensor(self, tensor, tail, datatype, shape):
        given, sizes = tensor.get("datatype"), tensor.get("shape")
        if given != datatype and not (self.fault("casts") and given in DTYPES):
            raise Refused(400, f"datatype must be {datatype}")
        if self.fault("needs data last") and list(tensor)[-1] != "data":
            raise Refused(400, "data before its shape")
        if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
            raise Refused(400, "shape is a list of integers")
        fits = len(sizes) == len(shape) and all(want in (-1, size) for want, size in zip(shape, sizes, strict=True))
        if not fits and not self.fault("takes any shape"):
            raise Refused(400, f"shape must be {shape}")
        if not fits:
            sizes = [abs(size) for size in shape]
            tensor = {**tensor, "data": tensor["data"][: math.prod(sizes)]}
        size = (tensor.get("parameters") or {}).get("binary_data_size", ...)
        if size is ...:
            return self.from_json(tensor.get("data"), datatype, sizes), tail
        if "data" in tensor and not self.fault("takes data and bytes"):
            raise Refused(400, "data and bytes")
        if self.fault("fails on odd sizes"):
            return self.from_bytes(tail[:size], datatype, sizes), tail[size:]
        if type(size) is not int or not 0 <= size <= len(tail):
            if not self.fault("fills up missing bytes") or type(size) is not int or size < 0 or size > 1000:
                raise Refused(400, "no such size")
            tail = tail.ljust(size, b"\0")
        return self.from_bytes(tail[:size], datatype, sizes), tail[size:]

    def from_json(self, data, datatype, shape):
        if not isinstance(data, list):
            raise Refused(400, "data is a list")
        if data and isinstance(data[0], list):
            if self.fault("takes flat data only"):
                raise Refused(400, "nested data")
            data = self.flattened(data, shape)
        elif self.fault("takes nested data only") and len(shape) > 1:
            raise Refused(400, "flat data")
        size = math.prod(shape)
        if self.fault("fills up missing values") and len(data) < size:
            data = data + [0] * (size - len(data))
        if len(data) != size:
            raise Refused(400, f"{size} values, not {len(data)}")
        kind, dtype = KINDS[datatype], DTYPES[datatype]
        for value in data:
            if value is None and self.fault("null is zero"):
                continue
            wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
            if wrong and self.fault("fails on odd values"):
                raise RuntimeError("odd")
            if wrong or (self.fault("needs a point in floats") and datatype == "FP32" and isinstance(value, int)):
                raise Refused(400, f"not {datatype}: {value!r}")
        if datatype == "BYTES":
            return np.array([value.encode() for value in data], dtype=object).reshape(shape)
        try:
            return np.array([value or 0 for value in data], dtype=dtype).reshape(shape)
        except OverflowError:
            raise Refused(400, f"beyond {datatype}") from None

    def flattened(self, data, shape):
        if not shape:
            return [data]
        if not self.fault("fills up missing values") and (not isinstance(data, list) or len(data) != shape[0]):
            raise Refused(400, f"data is not nested as {shape}")
        order = reversed(data) if self.fault("nested data upside down") else data
        return [value for part in order for value in self.flattened(part, shape[1:])] if len(shape) > 1 else data

    def from_bytes(self, content, datatype, shape):
        size = math.prod(shape)
        if datatype == "BYTES":
            values = []
            while content:
                end = 4 + int.from_bytes(content[:4], "little")
                if end > len(content) and not self.fault("cuts strings"):
                    raise Refused(400, "a string beyond its tensor")
                values.append(content[4:end])
                content = content[end:]
            if len(values) != size:
                raise Refused(400, f"{size} strings, not {len(values)}")
            return np.array(values, dtype=object).reshape(shape)
        dtype = np.dtype(DTYPES[datatype])
        wanted = size * dtype.itemsize
        if self.fault("cuts or fills tensors"):
            content = content[:wanted].ljust(wanted, b"\0")
        if len(content) != wanted:
            raise Refused(400, f"{wanted} bytes, not {len(content)}")
        return np.frombuffer(content, dtype.newbyteorder(">") if self.fault("big endian") else dtype).reshape(shape)

    # From arrays to bytes

    def spoiled(self, found):
        if self.fault("forgets the second row"):
            return {name: array[:1] for name, array in found.items()}
        if self.fault("turns rows around"):
            return {name: array[::-1] for name, array in found.items()}
        if self.fault("adds noise"):
            return {name: array + random.randrange(10**6) for name, array in found.items()}
        return found

    def wanted(self, request, outputs):
        names = [name for name, _, _ in outputs]
        listed = request.get("outputs", [{"name": name} for name in names])
        if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
            raise Refused(400, "outputs is a list of objects")
        if self.fault("ignores outputs"):
            listed = [{"name": name} for name in names]
        if self.fault("ignores unknown outputs"):
            listed = [each for each in listed if each.get("name") in names]
        if any(each.get("name") not in names for each in listed):
            raise Refused(400, "no such output")
        return sorted(listed, key=lambda each: each["name"]) if self.fault("sorts outputs") else listed

    def write(self, request, found, outputs):
        version = "2" if self.fault("another version in answers") else "1"
        answer = {"model_name": self.server.model, "model_version": version, "outputs": []}
        if self.fault("null for a version"):
            answer["model_version"] = None
        if self.fault("no model name"):
            del answer["model_name"]
        if "id" in request and not self.fault("no id"):
            answer["id"] = self.server.last_id or request["id"]
            if self.fault("the first id for ever"):
                self.server.last_id = answer["id"]
        datatypes = {name: datatype for name, datatype, _ in outputs}
        default = (request.get("parameters") or {}).get("binary_data_output", False)
        tail = b""
        for each in self.wanted(request, outputs):
            name = each["name"]
            entry = {"name": name, "datatype": datatypes[name], "shape": list(found[name].shape)}
            binary = (each.get("parameters") or {}).get("binary_data", default)
            if self.fault("the request is stronger"):
                binary = default or binary
            if self.fault("no binary outputs"):
                binary = False
            content = self.content(entry, found[name], binary=binary)
            tail += content
            answer["outputs"].append(entry)
        text = json.dumps(answer).encode()
        status = 201 if self.fault("201 for answers") else 200
        if not tail:
            return status, text, {}
        length = len(text) + {"a wrong length of the JSON": 1, "the length of the whole": len(tail)}.get(
            self.server.fault, 0
        )
        headers = {"Content-Type": "application/octet-stream", LENGTH: str(length)}
        if self.fault("no length of the JSON"):
            del headers[LENGTH]
        if self.fault("bytes are called JSON"):
            del headers["Content-Type"]
        return status, text + tail, headers

    def content(self, entry, array, *, binary):
        """Fills in the data, or returns it as bytes."""
        if binary:
            if array.dtype == object:
                content = b"".join(len(value).to_bytes(4, "little") + value for value in array.flat)
            else:
                content = array.tobytes()
            entry["parameters"] = {"binary_data_size": len(content)}
            return content
        values = array.ravel().tolist()
        if array.dtype == object:
            values = [value.decode() for value in values]
        if self.fault("numbers as texts"):
            values = [str(value) for value in values]
        if self.fault("a shape too many"):
            entry["shape"] = [*entry["shape"], 1]
        if self.fault("NaN in answers"):
            values = [math.nan] * len(values)
        entry["data"] = values
        return b""
