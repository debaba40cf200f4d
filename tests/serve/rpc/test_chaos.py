"""Under load: the end of the server, and of workers, loses no call that was begun."""

import os
import signal
import subprocess

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest


@pytest.mark.parametrize("delay_s", [0.0, 0.02])
@pytest.mark.parametrize("grace_s", [0.0, 0.3])
def test_sigterm_under_load_loses_no_call_of_either_port(rpc, start, slow, kit, tmp_path, grace_s, delay_s):
    folder = tmp_path / "obs"
    server = start(slow(delay_s).root, process=True, grace_s=grace_s, observations=folder, grpc_port=0).wait_ready()
    load, other = rpc.GrpcLoad(server.grpc), kit.Load(server.url, clients=8)
    kit.until(lambda: len(load.answers) > 60 and len(other.answers) > 60)
    server.signal()
    answers, others = load.end(stop=False), other.end(stop=False)
    assert load.unavailable == 8
    assert server.wait() == (0, "torch False")
    table = pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))])
    answered = [request_id for request_id, *_ in (*answers, *others)]
    assert sorted(table["request_id"].to_pylist()) == sorted(answered)


def test_a_running_call_ends_before_the_process_and_new_ones_are_unavailable(rpc, start, slow, kit):
    server = start(slow(1.0).root, process=True, grpc_port=0).wait_ready()
    with rpc.Client(server.grpc) as client, server.client() as http:
        busy = client.callable("ModelInfer").future(rpc.image_request(1.0).SerializeToString(), timeout=20)
        kit.until(lambda: "fettle_requests_in_flight 2.0" in http.get("/metrics").text)
        server.signal()

        def refused():
            with rpc.Client(server.grpc, **{"grpc.enable_retries": 0}) as late:
                try:
                    late.call("ServerLive", timeout=5)
                except grpc.RpcError as problem:
                    return problem.code()

        assert kit.until(refused) is grpc.StatusCode.UNAVAILABLE
        assert busy.result()
    assert server.wait()[0] == 0


def test_during_the_grace_calls_are_served_and_readiness_is_false(rpc, start, shelf, kit):
    server = start(shelf.root, process=True, grace_s=1.5, grpc_port=0).wait_ready()
    with rpc.Client(server.grpc) as client:
        assert client.call("ServerReady").ready
        server.signal()
        kit.until(lambda: not client.call("ServerReady").ready)
        assert client.call("ServerLive").live
        assert client.infer(rpc.image_request()).model_name == "tiny"
    assert server.wait()[0] == 0


def test_calls_that_never_end_are_given_up_with_exit_code_1(rpc, start, slow, kit):
    server = start(slow(8.0).root, process=True, drain_timeout_s=0.3, grpc_port=0).wait_ready()
    with rpc.Client(server.grpc) as client, server.client() as http:
        busy = client.callable("ModelInfer").future(rpc.image_request(1.0).SerializeToString(), timeout=20)
        kit.until(lambda: "fettle_requests_in_flight 2.0" in http.get("/metrics").text)
        server.signal()
        assert server.wait()[0] == 1
        assert busy.exception().code() is grpc.StatusCode.UNAVAILABLE


def test_silent_connections_do_not_hold_the_drain(rpc, start, shelf):
    server = start(shelf.root, process=True, grpc_port=0).wait_ready()
    with rpc.Client(server.grpc) as client:
        client.call("ServerLive")
        server.signal()
        assert server.wait()[0] == 0


def workers_of(server):
    found = subprocess.run(["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def test_killing_workers_under_load_loses_no_call(rpc, start, slow, kit):
    server = start(slow(0.01).root, process=True, grpc_port=0).wait_ready()
    loads = [rpc.GrpcLoad(server.grpc, clients=4, value=value) for value in (-0.5, 1.0)]
    with server.client() as http:
        for number in range(3):
            deaths = f"fettle_worker_deaths_total {number}.0"
            kit.until(lambda deaths=deaths: deaths in http.get("/metrics").text)
            kit.until(lambda: http.get("/health").json()["workers"] == 2)
            seen = sum(len(load.answers) for load in loads)
            os.kill(workers_of(server)[0], signal.SIGKILL)
            kit.until(lambda seen=seen: sum(len(load.answers) for load in loads) > seen + 40)
        kit.until(lambda: "fettle_worker_deaths_total 3.0" in http.get("/metrics").text)
    for load, value in zip(loads, (-0.5, 1.0), strict=True):
        for _, logits in load.end():
            np.testing.assert_allclose(logits, [[5 * value] * 3], rtol=1e-5)
