"""What a killed run leaves, and what a changed byte does: refused in words, and nothing lost."""

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fettle
from fettle.core.errors import CorruptArtifact

PATIENCE_S = 60


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.01)


@pytest.fixture
def spoiled(tiny, tmp_path):
    """A home in which one byte of the model's weights is another."""
    home = Path(shutil.copytree(tiny.home, tmp_path / "home"))
    artifact = fettle.Registry(fettle.Home(home)).open("tiny")
    entry = next(file for file in artifact.manifest.files if file.name in ("model.onnx", "weights.safetensors"))
    shutil.rmtree(home / "artifacts")
    flip_byte(home / "blobs" / entry.sha256[:2] / entry.sha256)
    return home


def test_load_refuses_a_changed_blob(spoiled):
    with pytest.raises(CorruptArtifact, match="SHA-256"):
        fettle.load("tiny", home=fettle.Home(spoiled))


def test_serve_never_answers_from_a_changed_blob(spoiled):
    command = [sys.executable, "-m", "fettle", "serve", "tiny", "--port", "0", "--json"]
    environment = {**os.environ, "FETTLE_HOME": str(spoiled)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            ready, _, _ = select.select([process.stdout, process.stderr], [], [], PATIENCE_S)
            assert ready
            assert process.stdout not in ready or process.stdout.readline() == ""
            said = process.stderr.readline()
            assert "SHA-256" in said
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=PATIENCE_S)


def test_the_monitor_refuses_a_changed_blob(run, spoiled):
    assert "SHA-256" in run("monitor", "report", "tiny", home=spoiled).refused(1)


def test_optimize_again_mends_a_changed_blob(run, spoiled, tiny):
    artifact = next((spoiled / "runs" / "tiny").glob(f"{_folder(tiny)}/manifest.json")).parent
    registry = fettle.Registry(fettle.Home(spoiled))
    assert registry.verify()
    registry.put("tiny", fettle.Artifact.open(artifact))
    assert registry.verify() == []


def _folder(tiny):
    best = tiny.ran.json["best"]
    return f"{best['precision']}-{best['runtime']}"


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["float-eager/manifest.json", "int8-onnxruntime/model.onnx"])
def test_killed_while_it_runs_then_run_again(process, tiny, tmp_path, moment):
    home = tmp_path / "home"
    command = [sys.executable, "-m", "fettle", "optimize", str(tiny.project), "--json"]
    environment = {**os.environ, "FETTLE_HOME": str(home)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as killed:
        until(lambda: (home / "runs" / "tiny" / moment).exists() or killed.poll() is not None)
        assert killed.poll() is None
        killed.kill()
    assert fettle.Registry(fettle.Home(home)).names() == []
    again = process("optimize", tiny.project, "--json", home=home)
    assert again.code == 0, again.err
    assert fettle.Registry(fettle.Home(home)).verify() == []
    digests = [each["digest"] for each in again.json["candidates"]]
    assert digests == [each["digest"] for each in tiny.ran.json["candidates"]]
