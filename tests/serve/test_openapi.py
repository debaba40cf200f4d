import base64
import json
import math
import re

import numpy as np
import pytest

from fettle.serve.openapi import _operations, document
from fettle.serve.options import ServeOptions

INFER = "/v2/models/{model}/infer"
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH")
# Words of a schema that say nothing about what is valid.
SILENT = {"title", "description", "examples", "contentEncoding", "format"}


class Document:
    """The document of a server, and whether values are as it says: the slow, obvious way, for the words it uses."""

    def __init__(self, content):
        self.content = content

    def operation(self, method, path):
        return self.content["paths"][path][method.lower()]

    def resolve(self, node):
        while "$ref" in node:
            found = self.content
            for part in node["$ref"].removeprefix("#/").split("/"):
                found = found[part]
            node = found
        return node

    def problems(self, value, schema, where="$"):
        """Every way in which the value is not as the schema says."""
        schema = self.resolve(schema)
        found = []
        for word, rule in schema.items():
            if word in SILENT or word == "required":
                continue
            found += getattr(self, f"_{word}")(value, rule, schema, where)
        return found

    def valid(self, value, schema):
        problems = self.problems(value, schema)
        assert not problems, problems[:5]

    def _type(self, value, rule, schema, where):
        kinds = {
            "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
            "integer": int, "number": (int, float),
        }  # fmt: skip
        for kind in [rule] if isinstance(rule, str) else rule:
            if isinstance(value, kinds[kind]) and (kind == "boolean" or not isinstance(value, bool)):
                return []
        return [f"{where}: {value!r:.80} is no {rule}"]

    def _enum(self, value, rule, schema, where):
        return [] if value in rule else [f"{where}: {value!r:.80} is none of {rule}"]

    def _const(self, value, rule, schema, where):
        return [] if value == rule else [f"{where}: {value!r:.80} is not {rule!r}"]

    def _minimum(self, value, rule, schema, where):
        return [f"{where}: {value} < {rule}"] if isinstance(value, int | float) and value < rule else []

    def _maximum(self, value, rule, schema, where):
        return [f"{where}: {value} > {rule}"] if isinstance(value, int | float) and value > rule else []

    def _pattern(self, value, rule, schema, where):
        return [] if not isinstance(value, str) or re.search(rule, value) else [f"{where}: {value!r} is not {rule}"]

    def _minItems(self, value, rule, schema, where):
        return [f"{where}: too short"] if isinstance(value, list) and len(value) < rule else []

    def _maxItems(self, value, rule, schema, where):
        return [f"{where}: too long"] if isinstance(value, list) and len(value) > rule else []

    def _items(self, value, rule, schema, where):
        values = value if isinstance(value, list) else []
        return [p for n, one in enumerate(values) for p in self.problems(one, rule, f"{where}[{n}]")]

    def _prefixItems(self, value, rule, schema, where):
        pairs = zip(value, rule, strict=False) if isinstance(value, list) else ()
        return [p for n, (one, of) in enumerate(pairs) for p in self.problems(one, of, f"{where}[{n}]")]

    def _minProperties(self, value, rule, schema, where):
        return [f"{where}: too few"] if isinstance(value, dict) and len(value) < rule else []

    def _properties(self, value, rule, schema, where):
        if not isinstance(value, dict):
            return []
        missing = [f"{where}: {name} is missing" for name in schema.get("required", ()) if name not in value]
        return missing + [p for n in rule if n in value for p in self.problems(value[n], rule[n], f"{where}.{n}")]

    def _additionalProperties(self, value, rule, schema, where):
        others = [n for n in value if n not in schema.get("properties", {})] if isinstance(value, dict) else []
        if rule is False:
            return [f"{where}: {name} is not allowed" for name in others]
        return [p for name in others for p in self.problems(value[name], rule, f"{where}.{name}")]

    def _anyOf(self, value, rule, schema, where):
        tried = [self.problems(value, one, where) for one in rule]
        return [] if not all(tried) else min(tried, key=len)

    def _oneOf(self, value, rule, schema, where):
        right = [one for one in rule if not self.problems(value, one, where)]
        return [] if len(right) == 1 else [f"{where}: {len(right)} of {len(rule)} fit"]


def answer_is_declared(described, method, path, response):
    """The status is one of the operation's, and the body as its schema says."""
    declared = described.operation(method, path)["responses"]
    assert str(response.status_code) in declared, (method, path, response.status_code)
    answer = declared[str(response.status_code)]
    kind = response.headers["content-type"].partition(";")[0]
    assert kind in answer["content"]
    if kind == "application/json":
        described.valid(response.json(), answer["content"][kind]["schema"])
    for name, header in answer["headers"].items():
        schema = described.resolve(header)["schema"]
        given = response.headers.get(name)
        if given is not None:
            described.valid(int(given) if schema["type"] == "integer" else given, schema)
    return response


@pytest.fixture(scope="module")
def described(images):
    return Document(images.get("/openapi.json").json())


def test_the_document_is_openapi_and_every_reference_leads_somewhere(images, described):
    response = images.get("/openapi.json")
    assert response.headers["content-type"] == "application/json"
    assert described.content["openapi"] == "3.1.0"
    references = re.findall(r'"\$ref":"([^"]+)"', response.text)
    assert references
    for reference in references:
        described.resolve({"$ref": reference})
    ids = [one["operationId"] for path in described.content["paths"].values() for one in path.values()]
    assert len(ids) == len(set(ids))
    for name in described.content["components"]["schemas"]:
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name)


def test_every_path_parameter_of_a_path_is_declared(described):
    for path, operations in described.content["paths"].items():
        for operation in operations.values():
            declared = [one["name"] for one in operation["parameters"] if one.get("in") == "path"]
            assert declared == re.findall(r"\{(\w+)\}", path)


def test_each_path_is_routed_and_takes_the_methods_that_are_described_and_no_others(images, described):
    """The server itself is asked, so a path or a method that is only in the document, or only routed, is found."""
    for path, operations in described.content["paths"].items():
        url = path.replace("{model}", "tiny").replace("{version}", "1")
        for method in METHODS:
            response = images.request(method, url, content=b"{}" if method != "GET" else None)
            if method.lower() in operations:
                assert response.status_code not in (404, 405)
                answer_is_declared(described, method, path, response)
            else:
                assert response.status_code == 405
                allowed = {one for one in response.headers["allow"].split(", ") if one != "HEAD"}
                assert allowed == {one.upper() for one in operations}


def test_what_is_described_is_routed_and_what_is_routed_is_described(described):
    paths = described.content["paths"]
    routed = {(method.upper(), path) for path, operations in paths.items() for method in operations}
    assert routed == set(_operations())


def test_a_route_that_nothing_describes_is_an_error_and_no_gap():
    with pytest.raises(KeyError, match="/new"):
        document({"/new": ("GET",)}, names=["tiny"], models=[], options=ServeOptions())


def test_the_examples_are_valid_and_are_answered_with_200(images, described):
    for path in (INFER, "/predict"):
        schema = described.operation("POST", path)["requestBody"]["content"]["application/json"]["schema"]
        (example,) = described.resolve(schema)["examples"]
        described.valid(example, schema)
        response = images.post(path.replace("{model}", "tiny"), json=example)
        assert answer_is_declared(described, "POST", path, response).status_code == 200


def test_the_schemas_are_those_of_the_served_model(described):
    request = described.resolve(described.content["components"]["schemas"]["InferRequest"])
    given = request["properties"]["inputs"]["items"]["properties"]
    assert (given["name"], given["datatype"]) == ({"const": "x"}, {"const": "FP32"})
    rows, *sides = given["shape"]["prefixItems"]
    assert (rows["minimum"], rows["maximum"]) == (1, ServeOptions().max_queue_rows)
    assert sides == [{"const": 3}, {"const": 8}, {"const": 8}]
    answered = described.resolve(described.content["components"]["schemas"]["Prediction"])
    assert answered["properties"]["class"]["examples"] == ["red", "green", "blue"]
    in_path = described.operation("POST", INFER)["parameters"][0]
    assert in_path["schema"]["enum"] == ["tiny"]


def test_what_models_answer_is_as_the_schemas_say(images, described, kit):
    shown = base64.b64encode(kit.picture()).decode()
    for content in ({"image": shown}, {"images": [shown, shown]}):
        answer_is_declared(described, "POST", "/predict", images.post("/predict", json=content))
    files = [("a", ("a.png", kit.picture()))]
    answer_is_declared(described, "POST", "/predict", images.post("/predict", files=files))
    data = np.zeros((2, 3, 8, 8)).tolist()
    one = {"name": "x", "shape": [2, 3, 8, 8], "datatype": "FP32", "data": data}
    body = {"id": "mine", "inputs": [one], "outputs": [{"name": "logits"}]}
    described.valid(body, described.operation("POST", INFER)["requestBody"]["content"]["application/json"]["schema"])
    response = answer_is_declared(described, "POST", INFER, images.post("/v2/models/tiny/infer", json=body))
    assert response.json()["id"] == "mine"
    body["outputs"][0]["parameters"] = {"binary_data": True}
    response = answer_is_declared(described, "POST", INFER, images.post("/v2/models/tiny/infer", json=body))
    assert response.headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize(
    ("path", "options", "status"),
    [
        (INFER, {"content": b""}, 400),
        (INFER, {"content": b"{}", "headers": {"content-type": "text/html"}}, 415),
        (INFER, {"content": b"{}", "headers": {"content-encoding": "br"}}, 415),
        (INFER, {"content": b"x" * 2_000_001}, 413),
        (INFER, {"content": b"{}", "headers": {"x-request-timeout-ms": "0"}}, 400),
        (INFER, {"content": b"{}", "headers": {"x-long": "x" * 20_000}}, 431),
        ("/predict", {"content": b"no picture", "headers": {"content-type": "image/png"}}, 400),
        ("/predict", {"content": b"{}"}, 415),
    ],
)  # fmt: skip
def test_refusals_are_declared(images, described, path, options, status):
    response = images.post(path.replace("{model}", "tiny"), **options)
    assert answer_is_declared(described, "POST", path, response).status_code == status


@pytest.mark.parametrize(
    ("break_it", "what"),
    [
        (lambda body: body.pop("inputs"), "inputs is missing"),
        (lambda body: body["inputs"][0].update(datatype="INT8"), "datatype"),
        (lambda body: body["inputs"][0].update(shape=[1, 3, 8]), "shape"),
        (lambda body: body["inputs"][0].update(shape=[0, 3, 8, 8]), "shape"),
        (lambda body: body["inputs"][0].update(data=["a"]), "data"),
        (lambda body: body.update(outputs=[{"name": "other"}]), "other"),
    ],
)
def test_what_the_schema_calls_wrong_is_refused(images, described, break_it, what):
    schema = described.operation("POST", INFER)["requestBody"]["content"]["application/json"]["schema"]
    body = json.loads(json.dumps(described.resolve(schema)["examples"][0]))
    break_it(body)
    assert what in " ".join(described.problems(body, schema))
    assert images.post("/v2/models/tiny/infer", json=body).status_code == 400


def test_every_data_type_has_an_example_that_is_answered(echo):
    described = Document(echo.get("/openapi.json").json())
    schema = described.operation("POST", INFER)["requestBody"]["content"]["application/json"]["schema"]
    (example,) = described.resolve(schema)["examples"]
    described.valid(example, schema)
    assert len(example["inputs"]) == 9
    answer_is_declared(described, "POST", INFER, echo.post("/v2/models/echo/infer", json=example))


def test_without_a_ready_model_any_is_described_and_unready_is_declared(start, shelf, kit):
    (shelf.root / "1" / "manifest.json").unlink()
    server = start(shelf)
    with server.client() as client:
        described = Document(client.get("/openapi.json").json())
        kit.until(lambda: client.get("/health").json()["status"] == "failed")
        for path in ("/health", "/health/ready", "/v2/health/ready", "/v2/models/{model}/ready", "/v2/models/{model}"):
            response = client.get(path.replace("{model}", "tiny"))
            assert answer_is_declared(described, "GET", path, response).status_code == 503
        generic = described.content["components"]["schemas"]["InferRequest"]
        assert "FP32" in generic["properties"]["inputs"]["items"]["properties"]["datatype"]["enum"]
        shelf.point(2)
        server.wait_ready()
        names = client.get("/openapi.json").json()["components"]["schemas"]
        assert "InferRequest.tiny.2" in names


def test_examples_of_large_models_are_left_out():
    from fettle.core.signature import Signature, TensorSpec
    from fettle.serve.schemas import _example

    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 3, 224, 224))
    assert _example(Signature(inputs=(spec,), outputs=(spec,))) is None
    small = TensorSpec(name="x", dtype="bool", shape=(2, "n"))
    assert _example(Signature(inputs=(small,), outputs=(small,)))["inputs"][0]["data"] == [False] * math.prod((2, 1))
