import contextlib
import gzip
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from fettle.core.errors import UsageError
from fettle.serve import wire
from fettle.serve.http import Request, Response
from fettle.serve.jobs import Job
from fettle.serve.trace_context import parse_traceparent

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from fettle.serve.tracing import Tracing

INFER = "/v2/models/tiny/infer"
JSON = {"content-type": "application/json"}
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"
MODEL = SimpleNamespace(served=SimpleNamespace(name="tiny", version=3))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    import os

    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def traced():
    """`traced(request, response, jobs)`: the spans of that request, by name; and the tracer as `traced.tracing`."""
    exporter = InMemorySpanExporter()
    tracing = Tracing(version="1", processor=SimpleSpanProcessor(exporter))

    def run(request, response=None, jobs=(), route=INFER):
        tracing.begin(request)
        request.route = SimpleNamespace(template=route) if route else None
        request.jobs, request.answers = jobs, ("tiny", "3") if jobs else None
        if request.span is not None:
            request.span.end(response)
        assert request.span is None
        return exporter.get_finished_spans()

    return run


def job(*, given=0.0, ran=None, rows=1, queued=None):
    made = Job(model=MODEL, kind="json", item=wire.Item("r", 0), payload=b"", rows=rows, deadline=0.0, done=print)
    now = time.monotonic()
    made.queued = now - 0.010 if queued is None else queued
    made.given, made.ran = given, ran
    made.finished = now - 0.001 if ran else 0.0
    return made


def post(**headers):
    return Request("POST", INFER, {name.replace("_", "-"): value for name, value in headers.items()})


def milliseconds(span):
    return (span.end_time - span.start_time) / 1e6


def test_a_request_is_a_server_span_with_its_wait_and_its_batch_below(traced):
    given = time.monotonic() - 0.006
    report = wire.Done(1, [], seconds=0.004, rows=32)
    request = post(host="example.org:8080", user_agent="curl/8", x_request_id="mine")
    queue, inference, server = traced(request, Response(200, b"abc"), [job(given=given, ran=report, rows=2)])
    assert (server.name, server.kind) == (f"POST {INFER}", SpanKind.SERVER)
    assert dict(server.attributes) == {
        "http.request.method": "POST", "url.scheme": "http", "url.path": INFER, "http.route": INFER,
        "http.response.status_code": 200, "http.response.body.size": 3, "user_agent.original": "curl/8",
        "server.address": "example.org:8080", "fettle.request.id": "mine",
        "fettle.model.name": "tiny", "fettle.model.version": 3,
    }  # fmt: skip
    assert server.parent is None
    assert server.status.status_code is StatusCode.UNSET
    for child in (queue, inference):
        assert child.parent.span_id == server.context.span_id
        assert child.context.trace_id == server.context.trace_id
        assert child.status.status_code is StatusCode.UNSET
    assert (queue.name, inference.name) == ("queue", "inference")
    assert dict(inference.attributes) == {
        "fettle.model.name": "tiny", "fettle.model.version": 3, "fettle.rows": 2, "fettle.batch.rows": 32,
        "fettle.engine.seconds": 0.004,
    }  # fmt: skip
    assert milliseconds(queue) == pytest.approx(4, abs=2)
    assert milliseconds(inference) == pytest.approx(5, abs=2)
    assert queue.end_time == inference.start_time
    assert inference.end_time <= server.end_time
    assert abs(server.end_time - time.time_ns()) < 10e9
    resource = server.resource.attributes
    assert (resource["service.name"], resource["service.version"]) == ("fettle", "1")


def test_the_span_is_in_the_callers_trace_and_the_answers_traceparent_names_it(traced):
    request = post(traceparent=PARENT, tracestate="congo=t61rcWkgMzE")
    (server,) = traced(request, Response(200, b""))
    assert (server.parent.trace_id, server.parent.span_id) == (int(TRACE, 16), int(SPAN, 16))
    assert server.parent.is_remote
    assert server.context.trace_state.get("congo") == "t61rcWkgMzE"
    trace_id, span_id, flags = parse_traceparent(request.traced.header)
    assert (int(trace_id, 16), int(span_id, 16), flags & 1) == (server.context.trace_id, server.context.span_id, 1)


def test_without_a_caller_a_trace_begins_and_the_answer_says_which(traced):
    request = post(traceparent="nonsense")
    (server,) = traced(request, Response(200, b""))
    assert server.parent is None
    assert int(request.traced.trace_id, 16) == server.context.trace_id


def test_the_callers_flag_decides_whether_a_request_is_recorded(traced):
    request = post(traceparent=PARENT[:-1] + "0")
    assert traced(request, Response(200, b"")) == ()
    trace_id, span_id, flags = parse_traceparent(request.traced.header)
    assert (trace_id, flags & 1) == (TRACE, 0)
    assert span_id != SPAN


def test_the_sampler_of_the_environment_is_obeyed(monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    exporter = InMemorySpanExporter()
    tracing = Tracing(version="1", processor=SimpleSpanProcessor(exporter))
    for headers in ({}, {"traceparent": PARENT}):
        request = post(**headers)
        tracing.begin(request)
        if request.span:
            request.span.end(Response(200, b""))
    (server,) = exporter.get_finished_spans()
    assert server.context.trace_id == int(TRACE, 16)


@pytest.mark.parametrize(
    ("status", "error", "event"), [(404, None, None), (429, None, "shed"), (500, "500", None), (504, "504", "timeout")]
)
def test_refusals_are_told_and_only_those_of_the_server_are_errors(traced, status, error, event):
    (server,) = traced(post(), Response(status, b""))
    assert server.attributes.get("error.type") == error
    assert server.status.status_code is (StatusCode.ERROR if error else StatusCode.UNSET)
    assert [one.name for one in server.events] == ([event] if event else [])


def test_a_deadline_that_strikes_in_the_queue_or_in_a_worker_is_an_error_of_that_span(traced):
    (queue, server) = traced(post(), Response(504, b""), [job()])
    assert (queue.attributes["error.type"], queue.status.status_code) == ("timeout", StatusCode.ERROR)
    assert queue.end_time == server.end_time


def test_a_deadline_that_strikes_in_a_worker_is_an_error_of_the_inference(traced):
    queue, inference, _ = traced(post(), Response(504, b""), [job(given=time.monotonic())])
    assert "error.type" not in queue.attributes
    assert inference.attributes["error.type"] == "timeout"


def test_a_fault_of_the_model_is_an_error_of_the_inference(traced):
    report = wire.Done(1, [], 0.1, 1)
    _, inference, server = traced(post(), Response(500, b""), [job(given=time.monotonic() - 0.005, ran=report)])
    assert (inference.attributes["error.type"], server.attributes["error.type"]) == ("model", "500")


def test_a_client_that_went_away_ends_its_span(traced):
    (server,) = traced(post(), None)
    assert server.attributes["error.type"] == "cancelled"
    assert "http.response.status_code" not in server.attributes


def test_a_retry_after_the_death_of_a_worker_is_an_event(traced):
    tried = job(given=time.monotonic() - 0.005, ran=wire.Done(1, [], 0.1, 1))
    tried.alone = True
    assert [one.name for one in traced(post(), Response(200, b""), [tried])[-1].events] == ["worker died"]


def test_the_images_of_a_request_are_told_by_batch_and_not_more_than_sixteen(traced):
    report = wire.Done(1, [], 0.001, 8)
    start = time.monotonic() - 1
    jobs = [job(given=start + number // 10 / 100, ran=report, queued=start) for number in range(400)]
    spans = traced(post(), Response(200, b""), jobs, "/predict")
    inferences = [one for one in spans if one.name == "inference"]
    assert len(inferences) == 16
    assert all(one.attributes["fettle.rows"] == 10 for one in inferences)
    assert spans[-1].name == "POST /predict"


def test_probes_and_metrics_have_no_spans(traced):
    for path in ("/health", "/health/ready", "/v2/health/live", "/metrics", "/openapi.json"):
        assert traced(Request("GET", path, {}), Response(200, b"")) == ()


def test_what_a_client_sends_is_cut_and_an_unknown_method_is_no_name(traced):
    request = Request("BREW" * 100, "/" + "x" * 999, {"user-agent": "y" * 999})
    (server,) = traced(request, Response(404, b""), route="")
    assert server.name == "HTTP"
    assert server.attributes["http.request.method"] == "_OTHER"
    assert all(len(value) <= 200 for value in server.attributes.values() if isinstance(value, str))
    assert "http.route" not in server.attributes


def test_a_fault_of_tracing_is_logged_and_reaches_nobody(traced, caplog):
    traced(post(), object())
    assert "could not be traced" in caplog.text


def test_the_environment_names_the_service(monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "digits")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.version=9,team=vision")
    exporter = InMemorySpanExporter()
    tracing = Tracing(version="1", processor=SimpleSpanProcessor(exporter))
    request = post()
    tracing.begin(request)
    request.span.end(Response(200, b""))
    attributes = exporter.get_finished_spans()[0].resource.attributes
    assert [attributes[f"service.{key}"] for key in ("name", "version")] == ["digits", "9"]
    assert attributes["team"] == "vision"
    assert len(attributes["service.instance.id"]) == 36


def test_a_disabled_sdk_records_nothing_and_keeps_the_trace(monkeypatch):
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    tracing = Tracing(version="1", processor=SimpleSpanProcessor(InMemorySpanExporter()))
    request = post(traceparent=PARENT)
    tracing.begin(request)
    assert request.span is None
    assert request.traced.trace_id == TRACE


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
    ],
)
def test_what_there_is_not_is_a_clear_error(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"OTEL.*{value}"):
        Tracing(version="1")


def test_without_the_extra_the_error_names_it(shelf, tmp_path):
    """In a process where nothing of OpenTelemetry can be imported."""
    code = """
import asyncio, sys
sys.modules["opentelemetry"] = None
from fettle.core.errors import MissingExtra
from fettle.serve.options import ServeOptions
from fettle.serve.server import serve_until
try:
    asyncio.run(serve_until(None, None, options=ServeOptions(port=0, trace=True)))
except MissingExtra as problem:
    print(problem)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "trace needs opentelemetry: pip install 'fettle-ml[otel]'"


# A real server and a real collector


class Collector:
    """Takes OTLP over HTTP on loopback. delay: waits for this event before it answers."""

    def __init__(self, *, delay=None):
        self.requests = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.requests.append((self.path, self.headers["content-type"], body))
                if delay is not None:
                    delay.wait(60)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def spans(self):
        """By trace id, then by name: everything that has come; and what the resource said."""
        found = {}
        for path, kind, body in list(self.requests):
            assert (path, kind) == ("/v1/traces", "application/x-protobuf")
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        found.setdefault(span.trace_id.hex(), {})[span.name] = span
        return found


@pytest.fixture
def collector(monkeypatch):
    with contextlib.closing(Collector()) as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        yield found


def attributes(span):
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def test_a_server_exports_the_tree_of_each_request_and_flushes_when_it_drains(
    start, shelf, kit, collector, monkeypatch
):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")  # so that only the end sends
    server = start(shelf.root, process=True, trace=True).wait_ready()
    with server.client() as client:
        good = client.post(INFER, content=kit.body_of(rows=2), headers={**JSON, "traceparent": PARENT})
        bad = client.post(INFER, content=kit.body_of(777.0), headers=JSON)
        client.get("/health")
    assert not collector.requests
    server.signal()
    assert server.wait() == (0, "torch False")
    found = collector.spans()
    assert set(found) == {TRACE, bad.headers["traceparent"].split("-")[1]}
    tree = found[TRACE]
    assert set(tree) == {"POST /v2/models/{model}/infer", "queue", "inference"}
    top, queue, inference = tree["POST /v2/models/{model}/infer"], tree["queue"], tree["inference"]
    assert top.parent_span_id.hex() == SPAN
    assert top.kind == top.SPAN_KIND_SERVER
    assert good.headers["traceparent"] == f"00-{TRACE}-{top.span_id.hex()}-01"
    assert queue.parent_span_id == inference.parent_span_id == top.span_id
    assert attributes(top)["http.response.status_code"] == 200
    told = attributes(inference)
    assert (told["fettle.model.name"], told["fettle.model.version"], told["fettle.batch.rows"]) == ("tiny", 1, 2)
    assert 0 < told["fettle.engine.seconds"] < 20
    times = [
        top.start_time_unix_nano, queue.start_time_unix_nano, queue.end_time_unix_nano,
        inference.start_time_unix_nano, inference.end_time_unix_nano, top.end_time_unix_nano,
    ]  # fmt: skip
    assert times == sorted(times)
    assert abs(times[0] - time.time_ns()) < 300e9
    failed = found[bad.headers["traceparent"].split("-")[1]]["POST /v2/models/{model}/infer"]
    assert attributes(failed)["error.type"] == "500"
    assert failed.status.code == failed.status.STATUS_CODE_ERROR


@pytest.mark.parametrize("hangs", [False, True])
def test_a_collector_that_is_down_or_hangs_slows_no_request_and_no_drain_for_long(
    start, shelf, kit, monkeypatch, hangs
):
    released = threading.Event()
    collector = Collector(delay=released)
    if not hangs:
        collector.close()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    server = start(shelf.root, process=True, trace=True, log_format="json").wait_ready()
    try:
        with server.client() as client:
            slowest = 0.0
            for _ in range(100):  # many more spans than the queue has room for
                started = time.monotonic()
                assert client.post(INFER, content=kit.body_of(), headers=JSON).status_code == 200
                slowest = max(slowest, time.monotonic() - started)
            if hangs:
                kit.until(lambda: collector.requests)
        assert slowest < 5  # the collector's answer would take sixty
        started = time.monotonic()
        server.signal()
        _, err = server.process.communicate(timeout=30)
        assert time.monotonic() - started < 20
    finally:
        released.set()
        if hangs:
            collector.close()
    assert server.process.returncode == 0
    messages = [json.loads(line)["message"] for line in err.splitlines()]
    assert "the collector did not take the last traces within 5 s: they are lost" in messages
    assert messages[-1] == "ended cleanly"
