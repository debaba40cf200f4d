"""`fettle serve` as a process: the registered tiny model answers over HTTP, without torch, and ends well."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

PATIENCE_S = 60


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


def test_no_log_where_none_is_wanted(home):
    with serving(home, "tiny@champion", "--no-log") as (said, process):
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
    ],
)
def test_refused_at_once(run, home, arguments, code, words):
    line = run("serve", *arguments, "--port", "0", home=home).refused(code)
    for word in words:
        assert word in line


def test_port_in_use(run, home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = run("serve", "tiny", "--port", port, home=home).refused(2)
    assert f"127.0.0.1:{port}" in line


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_no_such_port(run, home, port):
    assert run("serve", "tiny", "--port", port, home=home).code == 2
