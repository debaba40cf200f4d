"""Worker processes that die, hang or cannot be started: not one request is lost, and none is answered wrongly."""

import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

INFER = "/v2/models/tiny/infer"
JSON = {"content-type": "application/json"}


def workers_of(server):
    """Process ids of the workers of a server in a process of its own."""
    found = subprocess.run(["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.parametrize("delay_s", [0.0, 0.02])
def test_killing_workers_under_load_loses_no_request(start, slow, kit, delay_s):
    server = start(slow(delay_s).root, process=True).wait_ready()
    loads = [kit.Load(server.url, clients=6, body=kit.body_of(value)) for value in (-0.5, 1.0)]
    with server.client() as client:
        for number in range(3):
            deaths = f"fettle_worker_deaths_total {number}.0"
            kit.until(lambda deaths=deaths: deaths in client.get("/metrics").text)
            kit.until(lambda: client.get("/health").json()["workers"] == 2)
            seen = sum(len(load.answers) for load in loads)
            os.kill(workers_of(server)[0], signal.SIGKILL)
            kit.until(lambda seen=seen: sum(len(load.answers) for load in loads) > seen + 60)
        kit.until(lambda: "fettle_worker_deaths_total 3.0" in client.get("/metrics").text)
        kit.until(lambda: client.get("/health").json()["workers"] == 2)
        assert client.get("/health/ready").status_code == 200
    for load, value in zip(loads, (-0.5, 1.0), strict=True):
        for _, _, content in load.end():
            assert json.loads(content)["outputs"][0]["data"] == pytest.approx([5 * value] * 3)


def test_all_workers_killed_at_once(start, slow, kit):
    server = start(slow(0.01).root, process=True).wait_ready()
    load = kit.Load(server.url, clients=8)
    kit.until(lambda: len(load.answers) > 50)
    for pid in workers_of(server):
        os.kill(pid, signal.SIGKILL)
    seen = len(load.answers)
    kit.until(lambda: len(load.answers) > seen + 100)
    assert load.end()


def test_an_input_that_kills_its_worker_fails_alone(start, shelf, kit):
    server = start(shelf.root, process=True).wait_ready()
    with server.client() as client, ThreadPoolExecutor(9) as pool:
        good = [pool.submit(client.post, INFER, content=kit.body_of(), headers=JSON) for _ in range(8)]
        deadly = pool.submit(client.post, INFER, content=kit.body_of(999.0), headers=JSON)
        assert "died on this input" in kit.error_of(deadly.result(), 500)
        assert [future.result().status_code for future in good] == [200] * 8
        kit.until(lambda: client.get("/health").json()["workers"] == 2)
        assert client.post(INFER, content=kit.body_of(), headers=JSON).status_code == 200
    server.signal()
    assert server.process.wait(20) == 0


def test_workers_that_keep_dying_are_given_up_with_a_clear_state(start, shelf, kit):
    server = start(shelf.root, process=True, workers=1).wait_ready()
    with server.client() as client:
        for _ in range(8):
            client.post(INFER, content=kit.body_of(999.0), headers=JSON)
        body = kit.until(lambda: (b := client.get("/health").json())["status"] == "failed" and b)
        assert "died 5 times" in body["problem"]
        assert client.get("/health/ready").status_code == 503
        assert client.get("/health/live").status_code == 200
        response = client.post(INFER, content=kit.body_of(), headers=JSON)
        assert "no worker is left" in kit.error_of(response, 503)
    server.signal()
    assert server.process.wait(20) == 0


def test_a_worker_that_hangs_is_replaced(start, slow, kit):
    server = start(slow(30.0).root, process=True, workers=1, worker_timeout_s=0.5, request_timeout_s=20.0).wait_ready()
    with server.client() as client:
        response = client.post(INFER, content=kit.body_of(), headers=JSON)
        assert "died on this input" in kit.error_of(response, 500)
        kit.until(lambda: client.get("/health").json()["workers"] == 1)


def test_workers_end_with_their_server(start, shelf, kit):
    server = start(shelf.root, process=True).wait_ready()
    pids = workers_of(server)
    assert len(pids) == 2
    server.signal(signal.SIGKILL)
    server.process.wait(20)
    kit.until(lambda: not any(os.path.exists(f"/proc/{pid}") and "Z" not in status_of(pid) for pid in pids))


def status_of(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_a_worker_that_cannot_start_is_told(start, shelf, kit, monkeypatch):
    from fettle.serve import lanes

    monkeypatch.setattr(lanes, "COMMAND", ["/nonexistent/python"])
    server = start(shelf, workers=1)
    with server.client() as client:
        body = kit.until(lambda: (b := client.get("/health").json())["status"] == "failed" and b)
        assert "given up" in body["problem"]
        assert client.get("/health/live").status_code == 200
