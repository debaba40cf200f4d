"""Real shadows: they answer nobody, and whatever becomes of them, the version that answers does not notice."""

import contextlib
import os
import signal
import statistics
import subprocess
import time

import pytest
from pyarrow import parquet

from fettle.serve import process
from fettle.serve.source import FolderSource
from fettle.serve.traffic import Traffic, Variant

INFER = "/v2/models/tiny/infer"
JSON = {"content-type": "application/json"}
PNG = {"content-type": "image/png"}


@pytest.fixture
def pids(monkeypatch):
    """Process ids of the shadow's workers, which keep their priority: on a busy machine they would wait for all."""
    found = []
    monkeypatch.setattr(process, "give_way", found.append)
    return found


def shadowed(root, shadow="2"):
    return Traffic((Variant(FolderSource("tiny", root / "1", 1)),), shadow=FolderSource("tiny", root / shadow, 2))


def counts(client):
    """What became of the copies, by result, and of their rows."""
    found = {}
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(("fettle_shadow_requests_total", "fettle_shadow_rows_total")):
            assert 'model="tiny"' in line
            assert 'version="2"' in line
            found[line.split('result="')[1].split('"')[0]] = float(line.split()[-1])
        elif line.startswith(("fettle_shadow_worker_deaths_total", "fettle_shadow_difference_")):
            found[line.split()[0]] = float(line.split()[-1])
    return found


def shadow_of(client):
    return client.get("/health").json()["models"][0]["shadow"]


def ready(server, client, kit):
    kit.until(lambda: shadow_of(client)["version"] == 2)
    return server


def test_each_request_is_copied_compared_and_logged_and_the_answer_is_the_primarys(start, shelf, kit, pids, tmp_path):
    server = start(shadowed(shelf.root), workers=1, observations=tmp_path / "obs").wait_ready()
    with server.client() as client:
        ready(server, client, kit)
        assert len(pids) == 1
        for _ in range(3):  # version 2 adds 1 to blue: on gray it says blue, where version 1 says red
            answer = client.post(INFER, content=kit.body_of(0.5, rows=2), headers=JSON).json()
            assert answer["model_version"] == "1"
            assert answer["outputs"][0]["data"] == pytest.approx([2.5] * 6)
        answer = client.post("/predict", content=kit.picture(), headers={**PNG, "x-request-id": "one"}).json()
        assert (answer["version"], answer["class"]) == (1, "red")
        assert client.post(INFER, content=b"{}", headers=JSON).status_code == 400
        kit.until(lambda: (c := counts(client)).get("answered") == 4 and c.get("failed") == 1)
        found = counts(client)
        assert (found["agreed"], found["disagreed"]) == (1, 6)
        assert "dropped" not in found
        assert client.get("/v2/models/tiny").json()["versions"] == ["1"]
        assert client.post("/v2/models/tiny/versions/2/infer", content=kit.body_of(), headers=JSON).status_code == 404
    assert server.stop() == 0
    rows = [row for path in (tmp_path / "obs").glob("*.parquet") for row in parquet.read_table(path).to_pylist()]
    assert sorted(row["version"] for row in rows) == [1] * 7 + [2] * 7
    assert sorted(row["version"] for row in rows if row["request_id"] == "one") == [1, 2]


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="this system has no idle priority")
def test_its_worker_takes_only_what_time_others_leave(start, shelf, kit):
    def lowest():
        found = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True, check=False)
        count = 0
        for pid in map(int, found.stdout.split()):
            with contextlib.suppress(ProcessLookupError):
                idle = os.sched_getscheduler(pid) == os.SCHED_IDLE
                count += idle and os.getpriority(os.PRIO_PROCESS, pid) == 19
        return count

    server = start(shadowed(shelf.root), workers=2).wait_ready()
    kit.until(lambda: lowest() == 1)
    with server.client() as client:
        assert client.post(INFER, content=kit.body_of(), headers=JSON).status_code == 200
    assert server.stop() == 0


def test_a_slow_shadow_delays_nobody_and_drops_what_it_cannot_take(start, shelf, kit, pids):
    delay_s = 2.0
    kit.image_artifact(shelf.root / "slow", delay_s=delay_s)
    server = start(shadowed(shelf.root, "slow"), workers=1, shadow_rows=2).wait_ready()
    with server.client() as client:
        ready(server, client, kit)
        seconds = []
        for _ in range(40):
            started = time.perf_counter()
            response = client.post(INFER, content=kit.body_of(0.5), headers=JSON)
            seconds.append(time.perf_counter() - started)
            assert response.json()["outputs"][0]["data"] == pytest.approx([2.5] * 3)
        # Had it waited for the shadow only once, that request would have taken two seconds: a quarter of that is far
        # from it, and far above what a busy machine takes for one.
        assert statistics.median(seconds) < delay_s / 4
        found = kit.until(lambda: (c := counts(client)).get("dropped", 0) > 0 and c)
        assert found["dropped"] + found.get("answered", 0) <= 40
        assert client.get("/health/ready").status_code == 200
        assert client.get("/health").json()["queue_rows"] == 0
    started = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - started < 30


def test_a_shadow_that_does_not_load_is_named_and_changes_nothing(start, shelf, kit, pids):
    (shelf.root / "2" / "model.onnx").write_bytes(b"junk")
    server = start(shadowed(shelf.root), workers=1).wait_ready()
    with server.client() as client:
        kit.until(lambda: (shadow_of(client)["problem"] or "").startswith("version 2 was refused"))
        body = client.get("/health").json()
        assert (body["status"], body["problem"], body["models"][0]["shadow"]["version"]) == ("ready", None, None)
        assert client.post(INFER, content=kit.body_of(), headers=JSON).status_code == 200
        assert counts(client).get("dropped") is None
    assert server.stop() == 0


def test_a_shadow_killed_again_and_again_is_given_up_and_the_primary_loses_nothing(start, shelf, kit, pids):
    server = start(shadowed(shelf.root), workers=1, retry_s=1000.0).wait_ready()
    with server.client() as client:
        ready(server, client, kit)
        load = kit.Load(server.url, clients=3, body=kit.body_of(0.5))
        kit.until(lambda: counts(client).get("answered", 0) > 5)
        for death in range(1, 6):
            kit.until(lambda death=death: len(pids) == death)
            os.kill(pids[-1], signal.SIGKILL)
            kit.until(lambda death=death: counts(client)["fettle_shadow_worker_deaths_total"] == death)
        kit.until(lambda: "died 5 times" in (shadow_of(client)["problem"] or ""))
        before, seen = counts(client), len(load.answers)
        kit.until(lambda: len(load.answers) > seen + 50)
        assert counts(client)["dropped"] > before.get("dropped", 0)
        assert client.get("/health/ready").status_code == 200
        assert "fettle_worker_deaths_total 0.0" in client.get("/metrics").text
        for _, version, content in load.end():
            assert version == 1
            assert b"2.5" in content
    assert server.stop() == 0


def test_a_shadow_that_was_given_up_is_tried_again_ever_later(start, shelf, kit, pids, caplog):
    server = start(shadowed(shelf.root), workers=1, retry_s=0.05).wait_ready()
    with server.client() as client:
        ready(server, client, kit)
        load = kit.Load(server.url, clients=2, body=kit.body_of(0.5))
        for death in range(1, 8):  # after five it rests, and after each one more
            kit.until(lambda death=death: len(pids) == death)
            os.kill(pids[-1], signal.SIGKILL)
        kit.until(lambda: len(pids) == 8)
        kit.until(lambda: shadow_of(client)["problem"] is None)
        before = counts(client).get("answered", 0)
        kit.until(lambda: counts(client).get("answered", 0) > before)
        assert client.get("/health/ready").status_code == 200
        assert "fettle_worker_deaths_total 0.0" in client.get("/metrics").text
        assert {version for _, version, _ in load.end()} == {1}
    assert server.stop() == 0
    given_up = [record.message for record in caplog.records if "given up" in record.message]
    often, again = "worker 0 died 5 times within 60 s", "worker 0 died again, soon after its rest"
    assert given_up == [
        f"{why}: given up, and tried again after {rest} s" for why, rest in ((often, 0.05), (again, 0.1), (again, 0.2))
    ]


def test_another_version_need_not_wait_for_the_rest_of_a_shadow_that_was_given_up(start, shelf, kit, pids):
    shadow = kit.Shelf(shelf.root, "tiny")
    shadow.point(2)
    traffic = Traffic((Variant(FolderSource("tiny", shelf.root / "1", 1)),), shadow=shadow)
    server = start(traffic, workers=1, retry_s=1000.0).wait_ready()
    with server.client() as client:
        ready(server, client, kit)
        for death in range(1, 6):
            kit.until(lambda death=death: len(pids) == death)
            os.kill(pids[-1], signal.SIGKILL)
        kit.until(lambda: "tried again after 1000 s" in (shadow_of(client)["problem"] or ""))
        shadow.point(1)
        kit.until(lambda: shadow_of(client)["version"] == 1)
        assert shadow_of(client)["problem"] is None
    assert server.stop() == 0


def test_a_shadow_that_hangs_is_ended_and_replaced(start, shelf, kit, pids):
    kit.image_artifact(shelf.root / "hangs", delay_s=60.0)
    server = start(shadowed(shelf.root, "hangs"), workers=1, worker_timeout_s=1.0).wait_ready()
    with server.client() as client:
        ready(server, client, kit)
        assert client.post(INFER, content=kit.body_of(), headers=JSON).status_code == 200
        kit.until(lambda: counts(client)["fettle_shadow_worker_deaths_total"] >= 1)
        assert client.post(INFER, content=kit.body_of(), headers=JSON).status_code == 200
        assert client.get("/health/ready").status_code == 200
    assert server.stop() == 0


def test_the_answers_of_what_is_no_classifier_are_compared_by_their_difference(start, tmp_path, kit, pids):
    root = tmp_path / "echo"
    for version in ("1", "2"):
        kit.echo_artifact(root / version)
    server = start(shadowed(root), workers=1).wait_ready()
    with server.client() as client:
        ready(server, client, kit)
        tensors = [
            {"name": name, "shape": [1, 2], "datatype": datatype, "data": [1, 0]}
            for name, datatype in (("u8", "UINT8"), ("u64", "UINT64"), ("i8", "INT8"), ("i64", "INT64"))
        ]
        tensors += [
            {"name": name, "shape": [1, 2], "datatype": datatype, "data": [0.5, 1.0]}
            for name, datatype in (("f16", "FP16"), ("f32", "FP32"), ("f64", "FP64"))
        ]
        tensors += [
            {"name": "b", "shape": [1, 2], "datatype": "BOOL", "data": [True, False]},
            {"name": "wide", "shape": [1, 2, 1], "datatype": "FP32", "data": [0.5, 1.0]},
        ]
        assert client.post(INFER, json={"inputs": tensors}).status_code == 200
        series = 'fettle_shadow_difference_bucket{le="0.0",model="tiny",version="2"}'
        kit.until(lambda: counts(client).get(series) == 1)


def test_a_shadow_of_another_signature_fails_alone(start, shelf, kit, pids):
    kit.fixed_artifact(shelf.root / "other")
    server = start(shadowed(shelf.root, "other"), workers=1).wait_ready()
    with server.client() as client:
        ready(server, client, kit)
        assert client.post("/predict", content=kit.picture(), headers=PNG).status_code == 200
        assert client.post(INFER, content=kit.body_of(), headers=JSON).status_code == 200
        kit.until(lambda: counts(client).get("failed") == 2)
    assert server.stop() == 0
