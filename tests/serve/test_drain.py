"""The end of real server processes: SIGTERM under load, in flight, at once, and with clients that say nothing."""

import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

INFER = "/v2/models/tiny/infer"
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("keep", [True, False], ids=["keep-alive", "a connection each"])
@pytest.mark.parametrize("grace_s", [0.0, 0.3])
@pytest.mark.parametrize("delay_s", [0.0, 0.02])
def test_sigterm_under_load_loses_no_request(start, slow, kit, tmp_path, grace_s, delay_s, keep):
    folder = tmp_path / "obs"
    server = start(slow(delay_s).root, process=True, grace_s=grace_s, observations=folder).wait_ready()
    load = kit.Load(server.url, clients=24, keep=keep)
    kit.until(lambda: len(load.answers) > 100)
    server.signal()
    answers = load.end(stop=False)
    assert load.refused == 24
    assert server.wait() == (0, "torch False")
    table = pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))])
    assert sorted(table["request_id"].to_pylist()) == sorted(request_id for request_id, _, _ in answers)
    assert {path.suffix for path in folder.iterdir()} == {".parquet"}


def test_during_the_grace_readiness_is_503_and_requests_are_served(start, shelf, kit):
    server = start(shelf.root, process=True, grace_s=1.5).wait_ready()
    with server.client() as client:
        assert client.get("/health").headers.get("connection") != "close"
        server.signal()
        response = kit.until(lambda: (r := client.get("/health/ready")).status_code == 503 and r)
        assert response.headers["connection"] == "close"
        assert client.get("/health").json()["status"] == "draining"
        assert client.get("/health/live").status_code == 200
        assert client.get("/v2/models/tiny/ready").status_code == 503
        assert client.post(INFER, content=kit.body_of(), headers=JSON).status_code == 200
    assert server.wait()[0] == 0


def test_a_running_request_ends_before_the_process(start, slow, kit):
    server = start(slow(1.0).root, process=True).wait_ready()
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        busy = pool.submit(client.post, INFER, content=kit.body_of(), headers=JSON)
        kit.until(lambda: "fettle_requests_in_flight 2.0" in client.get("/metrics").text)
        server.signal()
        assert busy.result().status_code == 200
    assert server.wait()[0] == 0


def test_work_that_never_ends_is_given_up_with_exit_code_1(start, slow, kit):
    server = start(slow(8.0).root, process=True, drain_timeout_s=0.3).wait_ready()
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        busy = pool.submit(client.post, INFER, content=kit.body_of(), headers=JSON)
        kit.until(lambda: "fettle_requests_in_flight 2.0" in client.get("/metrics").text)
        server.signal()
        started = time.monotonic()
        code, _ = server.wait()
        assert code == 1
        assert time.monotonic() - started < 5
        assert busy.result().status_code == 503


def test_a_second_signal_ends_at_once(start, slow, kit):
    server = start(slow(8.0).root, process=True, grace_s=20.0).wait_ready()
    with server.client() as client:
        server.signal()
        kit.until(lambda: client.get("/health/ready").status_code == 503)
        server.signal()
        started = time.monotonic()
        assert server.wait()[0] == 128 + signal.SIGTERM
        assert time.monotonic() - started < 5


def test_silent_connections_do_not_hold_the_drain(start, shelf):
    server = start(shelf.root, process=True).wait_ready()
    host, port = server.url.removeprefix("http://").split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(5)]
    silent[0].sendall(b"POST /predict HTTP/1.1\r\nHo")
    server.signal()
    started = time.monotonic()
    assert server.wait()[0] == 0
    assert time.monotonic() - started < 5
    for connection in silent:
        connection.close()


def test_sigterm_before_the_first_model_is_ready(start, shelf):
    shelf.point(9)
    server = start(shelf.root, process=True)
    server.signal()
    assert server.wait()[0] == 0


def test_two_servers_follow_each_other_on_one_port(start, shelf):
    first = start(shelf.root, process=True).wait_ready()
    port = int(first.url.rsplit(":", 1)[1])
    with first.client() as client:
        assert client.get("/health").status_code == 200
    first.signal()
    assert first.wait()[0] == 0
    second = start(shelf.root, process=True, port=port).wait_ready()
    with second.client() as client:
        assert client.get("/health").status_code == 200
