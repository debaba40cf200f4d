"""A real server against its own OpenAPI document: schemathesis makes requests from it, right ones and wrong ones.

Which requests must be accepted and which refused is not judged here: a schema cannot say that data must have as many
values as the shape beside it. A 504 is no fault where the request itself set a deadline: one millisecond is soon gone.
FETTLE_FUZZ multiplies how many requests there are.
"""

import os

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CASES = 25 * int(os.environ.get("FETTLE_FUZZ", "1"))
CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance,
]  # fmt: skip
SETTINGS = settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)


@pytest.fixture(params=["image", "echo"])
def server(request, start, tmp_path, kit):
    root = tmp_path / "shelf"
    (kit.image_artifact if request.param == "image" else kit.echo_artifact)(root / "1")
    (root / "current").write_text("1")
    return start(root, process=True).wait_ready()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_the_server_is_as_its_document_says(server, mode, kit):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    with requests.Session() as session:
        session.trust_env = False
        for found in schema.get_all_operations():
            operation = found.ok()

            @seed(0)
            @SETTINGS
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case):
                response = case.call(session=session, timeout=20)
                late = response.status_code == 504 and "X-Request-Timeout-Ms" in (case.headers or {})
                case.validate_response(response, checks=CHECKS, excluded_checks=[not_a_server_error] if late else [])

            ask()
    with server.client() as client:
        assert "\nfettle_worker_deaths_total 0.0" in client.get("/metrics").text
