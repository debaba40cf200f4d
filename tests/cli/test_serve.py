"""`fettle serve` as a process: the registered tiny model answers over HTTP, without torch, and ends well."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from fettle.core.artifact import Artifact
from fettle.core.home import Home
from fettle.registry import Registry

PATIENCE_S = 60
OF_THE_SEAL = ("manifest.json", "golden.safetensors")


@contextmanager
def serving(home, *arguments, before=""):
    code = f"{before}\nfrom fettle.cli import main\nmain()"
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--json", *arguments]
    environment = {**os.environ, "FETTLE_HOME": str(home)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            ready, _, _ = select.select([process.stdout], [], [], PATIENCE_S)
            line = process.stdout.readline() if ready else ""
            assert line, process.communicate(timeout=5)[1] if process.poll() is not None else "not ready in time"
            yield json.loads(line), process
        finally:
            if process.poll() is None:
                process.kill()


@pytest.fixture
def home(tiny, tmp_path):
    return Path(shutil.copytree(tiny.home, tmp_path / "home"))


def test_answers_without_torch_logs_and_drains(home, tiny):
    import fettle

    rows = [[0.1, 0.2, 0.3, -0.1, -0.2, -0.3]]
    with serving(home, "tiny", before="import sys; sys.modules['torch'] = None") as (said, process):
        assert said["model"] == "tiny"
        with httpx.Client(base_url=said["url"]) as client:
            tensor = {"name": "input", "shape": [1, 6], "datatype": "FP32", "data": rows[0]}
            answer = client.post("/v2/models/tiny/infer", json={"inputs": [tensor]})
            assert answer.status_code == 200, answer.text
            (output,) = answer.json()["outputs"]
            assert output["shape"] == [1, 3]
            assert client.get("/health").json()["version"] == 1
            refused = client.post("/v2/models/tiny/infer", json={"inputs": [{**tensor, "shape": [1, 5]}]})
            assert refused.status_code == 400
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert list((home / "observations" / "tiny").glob("*.parquet"))
    import numpy as np

    runner = fettle.load("tiny", home=fettle.Home(home))
    np.testing.assert_allclose(output["data"], runner(np.array(rows, np.float32))[0], atol=1e-4)


def test_a_port_for_grpc_is_announced_and_answers(home):
    grpc = pytest.importorskip("grpc")
    with serving(home, "tiny", "--grpc-port", "0") as (said, process):
        with grpc.insecure_channel(said["grpc"]) as channel:
            # ServerReadyResponse(ready=True): field 1 is true.
            assert channel.unary_unary("/inference.GRPCInferenceService/ServerReady")(b"", timeout=20) == b"\x08\x01"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert "Traceback" not in err


def test_no_log_where_none_is_wanted(home):
    with serving(home, "tiny@champion", "--set", "observations=false") as (said, process):
        assert httpx.get(f"{said['url']}/health").json()["ready"] is True
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert not (home / "observations").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nope"], 1, ["nope", "tiny"]),
        (["tiny:8"], 1, ["8"]),
        (["tiny@canary"], 1, ["canary"]),
        (["tiny:x"], 2, ["tiny:x"]),
        (["tiny", "--host", "256.1.1.1"], 2, ["256.1.1.1"]),
        (["tiny", "nope"], 1, ["nope"]),
        (["tiny", "tiny:1"], 2, ["tiny is given twice", "with split"]),
        (["tiny", "--split", "tiny:1"], 2, ["split must be", "'tiny:1'"]),
        (["tiny", "--split", "tiny:1=0"], 2, ["'tiny:1=0'"]),
        (["tiny", "--split", "tiny:1=100"], 2, ["'tiny:1=100'"]),
        (["tiny", "--split", "tiny:1=nan"], 2, ["'tiny:1=nan'"]),
        (["tiny", "--split", "tiny:1=60", "--split", "tiny@champion=40"], 2, ["leave something for tiny", "100 %"]),
        (["tiny", "--split", "tiny=10"], 2, ["label of its own", "tiny, tiny"]),
        (["tiny", "--split", "tiny:8=10"], 1, ["8"]),
        (["tiny", "--split", "cats:1=10"], 2, ["cats is not served"]),
        (["tiny", "--shadow", "cats:1"], 2, ["cats is not served"]),
        (["tiny", "--shadow", "tiny:1", "--shadow", "tiny"], 2, ["one shadow", "tiny:1 and tiny"]),
        (["tiny", "--shadow", "tiny@canary"], 1, ["canary"]),
        (["tiny", "--sticky", "payload"], 2, ["give split too"]),
        (["tiny", "--split", "tiny:1=10", "--sticky", "ip"], 2, ["header:NAME", "'ip'"]),
        ([], 2, ["at least one MODEL", "models = [...]"]),
        (["tiny", "--set", "wokers=2"], 2, ["unknown key 'wokers'", "'workers'"]),
        (["tiny", "--set", "workers=0"], 2, ["workers must be at least 1"]),
        (["tiny", "--set", "port=1"], 2, ["port is given twice, by --port and by --set"]),
        (["tiny", "--set", "models=[]"], 2, ["models is given twice, by MODEL and by --set"]),
        (["tiny", "--access-log", "--set", "access_log=false"], 2, ["by --access-log and by --set"]),
        (["tiny", "--set", "log_format=xml"], 2, ["the log format must be one of auto, text, json", "'xml'"]),
        (["tiny", "--config", "none.toml"], 2, ["none.toml cannot be read"]),
    ],
)
def test_refused_at_once(run, home, arguments, code, words):
    line = run("serve", *arguments, "--port", "0", home=home).refused(code)
    for word in words:
        assert word in line


def another(artifact, root):
    """The same model under another digest."""
    shutil.copytree(artifact.root, root, ignore=shutil.ignore_patterns(*OF_THE_SEAL))
    manifest = replace(artifact.manifest, files=(), provenance={**artifact.manifest.provenance, "copied": "once"})
    return Artifact.seal(root, manifest, golden=artifact.golden())


def test_several_models_a_split_and_a_shadow(home, tmp_path):
    registry = Registry(Home(home))
    artifact = registry.open("tiny")
    registry.put("tiny", another(artifact, tmp_path / "again"))
    registry.put("cats", artifact)
    arguments = ["tiny:1", "cats", "--split", "tiny:2=50", "--sticky", "header:X-User", "--shadow", "cats:1"]
    tensor = {"name": "input", "shape": [1, 6], "datatype": "FP32", "data": [0.1, 0.2, 0.3, -0.1, -0.2, -0.3]}

    def ask(client, name, user):
        answer = client.post(f"/v2/models/{name}/infer", json={"inputs": [tensor]}, headers={"x-user": user})
        assert answer.status_code == 200, answer.text
        return answer.json()["model_version"]

    with serving(home, *arguments) as (said, process):
        assert said["models"] == ["tiny:1", "tiny:2", "cats"]
        with httpx.Client(base_url=said["url"], timeout=20) as client:
            deadline = time.monotonic() + PATIENCE_S
            while client.get("/v2/models/tiny").json()["versions"] != ["1", "2"]:
                assert time.monotonic() < deadline
            versions = [ask(client, "tiny", f"user-{number}") for number in range(20)]
            assert set(versions) == {"1", "2"}
            assert versions == [ask(client, "tiny", f"user-{number}") for number in range(20)]
            assert ask(client, "cats", "any") == "1"
            models = client.get("/health").json()["models"]
            assert [one["variant"] for one in models[0]["variants"]] == ["tiny:1", "tiny:2"]
            assert "shadow" in models[1]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    for name in ("tiny", "cats"):
        assert list((home / "observations" / name).glob("*.parquet"))


def test_every_flag_is_an_option_of_the_server(run, home, tmp_path):
    flags = ["--host", "::1", "--grpc-port", "0", "--admin-port", "0", "--keys", tmp_path / "keys.json", "--access-log"]
    shared = ["--split", "tiny:1=10", "--sticky", "payload", "--shadow", "tiny:1", "--port", "0", "--log-format=text"]
    line = run("serve", "tiny", *flags, *shared, "--set", "log_rows=0", home=home).refused(2)
    assert line == "fettle: log_rows must be at least 1, got 0"


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("models = []", 2, ["at least one MODEL", "models = [...]"]),
        ("workers = 2", 2, ["at least one MODEL"]),
        ("models = ['tiny:8']", 1, ["8"]),
        ("models = ['tiny']\nprot = 1", 2, ["serve.toml: unknown key 'prot'", "'port'"]),
        ("models = ['tiny']\nworkers = true", 2, ["serve.toml: workers must be a whole number, got true"]),
        ("models = ['tiny']\nworkers = 0", 2, ["workers must be at least 1, got 0"]),
        ("models = ['tiny']\nsplit = ['tiny:1']", 2, ["split must be", "'tiny:1'"]),
        ("models = ['tiny'\nport = 1", 2, ["serve.toml: not valid TOML", "line 2"]),
    ],
)
def test_a_file_that_cannot_be_meant(run, home, tmp_path, text, code, words):
    (tmp_path / "serve.toml").write_text(text)
    line = run("serve", "--config", tmp_path / "serve.toml", "--port", "0", home=home).refused(code)
    for word in words:
        assert word in line


def test_a_file_alone_makes_a_service_and_the_command_line_wins_over_it(home, tmp_path):
    (tmp_path / "conf").mkdir()
    path = tmp_path / "conf" / "serve.toml"
    tensor = {"name": "input", "shape": [1, 6], "datatype": "FP32", "data": [0.1, 0.2, 0.3, -0.1, -0.2, -0.3]}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        # The port is taken and the version unknown: what the command line says of them must win.
        path.write_text(
            f"""
            models = ["tiny"]
            split = ["tiny:8=10"]
            port = {taken.getsockname()[1]}
            workers = 2
            max_body_bytes = 1000
            max_headers = 40
            access_log = true
            log_format = "json"
            observations = "log/{{model}}"
            """
        )
        with serving(home, "--config", str(path), "--set", "split=[]", "--set", "workers=1") as (said, process):
            assert said["models"] == ["tiny"]
            with httpx.Client(base_url=said["url"]) as client:
                assert client.post("/v2/models/tiny/infer", json={"inputs": [tensor]}).status_code == 200
                large = client.post("/v2/models/tiny/infer", content=b" " * 1001)
                assert (large.status_code, "1000 bytes" in large.text) == (413, True)
                crowded = {f"x-{number}": "" for number in range(41)}
                assert client.get("/health/live", headers=crowded).status_code == 431
                assert client.get("/health").json()["workers"] == 1
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert 413 in [json.loads(line).get("status") for line in err.splitlines()]
    assert list((tmp_path / "conf" / "log" / "tiny").glob("*.parquet"))
    assert not (home / "observations").exists()


def test_port_in_use(run, home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = run("serve", "tiny", "--port", port, home=home).refused(2)
    assert f"127.0.0.1:{port}" in line


def test_grpc_port_in_use(run, home):
    pytest.importorskip("grpc")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = run("serve", "tiny", "--port", 0, "--grpc-port", port, home=home).refused(2)
    assert f"127.0.0.1:{port} for gRPC" in line


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_no_such_port(run, home, port):
    assert run("serve", "tiny", "--port", port, home=home).code == 2
