"""Whole lives of real servers: start, load, switch under load, drain, end."""

import asyncio
import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest

from fettle.core.errors import UsageError
from fettle.serve.listener import address_of, bind
from fettle.serve.options import ServeOptions
from fettle.serve.server import serve_until

INFER = "/v2/models/tiny/infer"
JSON = {"content-type": "application/json"}


# Start


def test_serving_needs_no_torch_and_ends_with_0(start, shelf, kit):
    server = start(shelf.root, process=True).wait_ready()
    with server.client() as client:
        assert client.post(INFER, content=kit.body_of(), headers=JSON).status_code == 200
    server.signal(signal.SIGINT)
    assert server.wait() == (0, "torch False")


def test_a_port_in_use_is_a_clear_error(shelf):
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"127\.0\.0\.1:{port}.*choose another"):
            asyncio.run(serve_until(asyncio.Event(), shelf, options=ServeOptions(port=port)))


@pytest.mark.parametrize("host", ["999.1.1.1", "not a host", "192.0.2.1"])
def test_a_bad_address_is_a_clear_error(host):
    with pytest.raises(UsageError, match="cannot listen"):
        bind(host, 0)


def test_addresses():
    with bind("127.0.0.1", 0) as bound:
        assert address_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
    if socket.has_ipv6:
        with bind("::1", 0) as bound:
            assert address_of(bound) == f"http://[::1]:{bound.getsockname()[1]}"


def spoil_truncate(kit, root):
    path = root / "model.onnx"
    path.write_bytes(path.read_bytes()[:-3])


def spoil_flip(kit, root):
    path = root / "golden.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def spoil_missing(kit, root):
    (root / "manifest.json").unlink()


def spoil_manifest(kit, root):
    (root / "manifest.json").write_text("[" * 100_000)


def spoil_golden(kit, root):
    for path in root.iterdir():
        path.unlink()
    root.rmdir()
    kit.image_artifact(root, spoil=lambda golden: golden["output:logits"].__iadd__(0.1))


@pytest.mark.parametrize("spoil", [spoil_truncate, spoil_flip, spoil_missing, spoil_manifest, spoil_golden])
def test_a_bad_version_at_start_stays_unready_alive_and_says_why(start, shelf, kit, spoil):
    spoil(kit, shelf.root / "1")
    server = start(shelf)
    with server.client() as client:
        body = kit.until(lambda: (b := client.get("/health").json())["status"] == "failed" and b)
        assert body["problem"].startswith("version 1 was refused:")
        assert str(shelf.root) not in json.dumps(body)
        assert client.get("/health").status_code == 503
        assert client.get("/health/ready").status_code == 503
        assert client.get("/v2/health/ready").status_code == 503
        assert client.get("/v2/models/tiny/ready").status_code == 503
        assert client.get("/health/live").status_code == 200
        for response in (
            client.post(INFER, content=kit.body_of(), headers=JSON),
            client.post("/predict", json={"image": "aGk="}),
            client.get("/v2/models/tiny"),
        ):
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert "/health" in response.json()["error"]
        assert client.post("/v2/models/other/infer").status_code == 404
        shelf.point(2)
        server.wait_ready()
        assert client.get("/health").json()["version"] == 2
    assert server.stop() == 0


# Load


def test_many_clients_get_their_own_answers(start, shelf, kit):
    server = start(shelf).wait_ready()
    loads = [kit.Load(server.url, clients=4, body=kit.body_of(value)) for value in (-0.5, 0.25, 1.0)]
    kit.until(lambda: all(len(load.answers) > 150 for load in loads))
    for load, value in zip(loads, (-0.5, 0.25, 1.0), strict=True):
        for _, _, content in load.end():
            assert json.loads(content)["outputs"][0]["data"] == pytest.approx([5 * value] * 3)


def test_health_never_waits_for_inference(start, slow, kit):
    server = start(slow(2.0), workers=1).wait_ready()
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        busy = pool.submit(client.post, INFER, content=kit.body_of(), headers=JSON)
        started = time.monotonic()
        for _ in range(20):
            assert client.get("/health").status_code == 200
            assert client.get("/metrics").status_code == 200
        assert time.monotonic() - started < 1.9
        assert not busy.done()
        assert busy.result().status_code == 200


def test_a_request_that_takes_too_long_is_504(start, slow, kit):
    server = start(slow(1.0), workers=1, request_timeout_s=0.2).wait_ready()
    with server.client() as client:
        response = client.post(INFER, content=kit.body_of(), headers=JSON)
        assert response.status_code == 504
        assert "deadline" in response.json()["error"]


def test_a_client_may_ask_for_an_answer_sooner(start, slow, kit):
    server = start(slow(2.0), workers=1).wait_ready()
    with server.client() as client:
        started = time.monotonic()
        headers = {**JSON, "x-request-timeout-ms": "100"}
        assert client.post(INFER, content=kit.body_of(), headers=headers).status_code == 504
        assert time.monotonic() - started < 1.8
        for bad in ("0", "-5", "x", "1" * 20):
            response = client.post(INFER, content=kit.body_of(), headers={**JSON, "x-request-timeout-ms": bad})
            assert "X-Request-Timeout-Ms" in kit.error_of(response, 400)


def test_what_would_come_too_late_is_refused_at_once(start, slow, kit):
    server = start(slow(0.6), workers=1, max_batch_rows=1).wait_ready()
    with server.client() as client, ThreadPoolExecutor(4) as pool:
        assert client.post(INFER, content=kit.body_of(), headers=JSON).status_code == 200  # the server learns the time
        busy = [pool.submit(client.post, INFER, content=kit.body_of(), headers=JSON) for _ in range(4)]
        kit.until(lambda: client.get("/health").json()["queue_rows"] >= 3)
        started = time.monotonic()
        late = client.post(INFER, content=kit.body_of(), headers={**JSON, "x-request-timeout-ms": "700"})
        assert time.monotonic() - started < 0.6
        assert "too late" in kit.error_of(late, 429)
        assert int(late.headers["retry-after"]) >= 1
        assert [future.result().status_code for future in busy] == [200] * 4


def test_a_full_queue_is_429_with_retry_after(start, slow, kit):
    server = start(slow(0.3), workers=1, max_batch_rows=1, max_queue_rows=2).wait_ready()
    with server.client() as client, ThreadPoolExecutor(12) as pool:
        send = [pool.submit(client.post, INFER, content=kit.body_of(), headers=JSON) for _ in range(12)]
        found = [future.result() for future in send]
        codes = [response.status_code for response in found]
        assert set(codes) == {200, 429}
        assert codes.count(200) >= 3
        assert all(r.headers["retry-after"] == "1" for r in found if r.status_code == 429)
        assert "fettle_requests_shed_total" in client.get("/metrics").text


def test_load_is_batched(start, slow, kit):
    server = start(slow(0.05), workers=1).wait_ready()
    with server.client() as client, ThreadPoolExecutor(16) as pool:
        send = [pool.submit(client.post, INFER, content=kit.body_of(i), headers=JSON) for i in range(32)]
        for i, future in enumerate(send):
            assert future.result().json()["outputs"][0]["data"] == pytest.approx([5.0 * i] * 3)
        text = client.get("/metrics").text
    batches = float(text.split('fettle_batch_rows_count{model="tiny",version="1"} ')[1].split()[0])
    assert batches < 20


# Switch


def test_versions_switch_back_and_forth_under_load_without_a_failed_request(start, shelf, kit):
    server = start(shelf).wait_ready()
    load = kit.Load(server.url)
    with server.client() as client:
        for version in (2, 1, 2, 1, 2):
            shelf.point(version)
            kit.until(lambda version=version: client.get("/health").json()["version"] == version)
            seen = len(load.answers)
            kit.until(lambda seen=seen: len(load.answers) > seen + 50)
        assert "failed" not in client.get("/health").text
    answers = load.end()
    assert {version for _, version, _ in answers} == {1, 2}
    for _, version, content in answers:
        assert json.loads(content)["outputs"][0]["data"] == pytest.approx([0, 0, 1.0 if version == 2 else 0])


def test_a_bad_new_version_keeps_the_old_under_load(start, shelf, kit):
    spoil_truncate(kit, shelf.root / "2")
    server = start(shelf).wait_ready()
    load = kit.Load(server.url, clients=4)
    shelf.point(2)
    with server.client() as client:
        body = kit.until(lambda: (b := client.get("/health").json())["problem"] and b)
        assert (body["status"], body["version"]) == ("ready", 1)
        assert client.get("/health/ready").status_code == 200
        assert 'fettle_switches_total{result="failed"} 1.0' in client.get("/metrics").text
    seen = len(load.answers)
    kit.until(lambda: len(load.answers) > seen + 50)
    assert {version for _, version, _ in load.end()} == {1}


def test_a_promotion_and_a_rollback_in_a_real_registry_are_followed(start, tmp_path, kit):
    from fettle.core.home import Home
    from fettle.registry.store import Registry
    from fettle.serve.source import registry_source

    registry = Registry(Home(tmp_path / "home"))
    for bias in ((0.0, 0.0, 0.0), (0.0, 0.0, 1.0)):
        registry.put("tiny", kit.image_artifact(tmp_path / str(bias[2]), bias=bias))
    registry.promote("tiny", 1)
    server = start(registry_source(registry, "tiny@champion")).wait_ready()
    load = kit.Load(server.url, clients=4)
    with server.client() as client:
        for change, version in ((lambda: registry.promote("tiny", 2), 2), (lambda: registry.rollback("tiny"), 1)):
            change()
            kit.until(lambda version=version: client.get("/health").json()["version"] == version)
    assert {version for _, version, _ in load.end()} == {1, 2}


# The prediction log


def test_every_answered_prediction_is_logged_and_nothing_else(start, shelf, kit, tmp_path):
    server = start(shelf, observations=tmp_path / "obs").wait_ready()
    with server.client() as client:
        client.post("/predict", content=kit.picture(), headers={"content-type": "image/png", "x-request-id": "one"})
        files = [("i", (f"{n}.png", kit.picture((0, 255, 0)))) for n in range(3)]
        client.post("/predict", files=files, headers={"x-request-id": "three"})
        client.post(INFER, content=kit.body_of(0.5, rows=2), headers={**JSON, "x-request-id": "two"})
        client.post("/predict", content=b"bad", headers={"content-type": "image/png"})
        client.post(INFER, content=kit.body_of(777.0), headers=JSON)
        client.post(INFER, content=kit.body_of(666.0), headers=JSON)
        client.get("/health")
    assert server.stop() == 0
    (path,) = (tmp_path / "obs").iterdir()
    found = pq.read_table(path).to_pylist()
    assert [row["request_id"] for row in found] == ["one", "three", "three", "three", "two", "two"]
    assert [row["predicted"] for row in found] == [0, 1, 1, 1, 0, 0]
    assert found[0]["confidence"] == max(found[0]["probabilities"])
    assert found[4]["statistics"] == [0.5, 0.0, 0.5, 0.5, 0.0]
    assert all(row["latency_ms"] > 0 and row["version"] == 1 and row["model"] == "tiny" for row in found)


def test_a_disk_that_takes_nothing_fails_no_request(start, shelf, tmp_path, kit):
    (tmp_path / "file").write_text("")
    server = start(shelf, observations=tmp_path / "file" / "obs", log_rows=1).wait_ready()
    with server.client() as client:
        for _ in range(5):
            assert client.post(INFER, content=kit.body_of(), headers=JSON).status_code == 200
    assert server.stop() == 0
