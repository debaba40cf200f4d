"""One look from log to incident, with a real artifact, a real log and a real receiver of alerts."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from fettle.core import codec
from fettle.core.artifact import Artifact, Manifest
from fettle.core.errors import MonitorError, UsageError
from fettle.core.home import Home
from fettle.core.recipe import Recipe
from fettle.core.signature import Signature, TensorSpec
from fettle.monitor.alerts.log import Log
from fettle.monitor.alerts.webhook import Webhook
from fettle.monitor.report import monitor_report

START = datetime(2026, 11, 1, 12, tzinfo=UTC)
NOW = START + timedelta(hours=1)


@pytest.fixture
def seal(tmp_path, rng):
    def make(reference: bool = True) -> Artifact:
        root = tmp_path / f"artifact{reference}"
        root.mkdir()
        (root / "model.bin").write_bytes(b"weights")
        x = TensorSpec(name="x", dtype="float32", shape=("batch", 2))
        y = TensorSpec(name="y", dtype="float32", shape=("batch", 3))
        manifest = Manifest(
            runtime="null",
            precision="float",
            signature=Signature(inputs=(x,), outputs=(y,)),
            files=(),
            recipe=Recipe(name="float"),
        )
        held = {
            "probabilities": rng.dirichlet(np.full(3, 0.5), 500).astype(np.float32),
            "statistics": rng.normal(size=(500, 5)).astype(np.float32),
        }
        golden = {"input:x": np.zeros((1, 2), np.float32)}
        return Artifact.seal(root, manifest, golden=golden, reference=held if reference else None)

    return make


@pytest.fixture
def served(tmp_path, log, rng):
    """served(artifact, rows, shift) logs that many requests of it and returns the home."""
    home = Home(tmp_path / "home")
    log.folder = home.observations("digits")
    log.folder.parent.mkdir(parents=True)

    def write(artifact: Artifact, rows: int, *, shift: float = 0.0, file: str = "1", start=START) -> Home:
        statistics = rng.normal(shift, size=(rows, 5)).astype(np.float32).tolist()
        log(file, rows, digest=artifact.digest, statistics=statistics, version=4, start=start)
        return home

    return write


def test_no_drift(seal, served):
    artifact = seal()
    report = monitor_report(name="digits", artifact=artifact, home=served(artifact, 600), now=NOW)
    assert report.judgement.verdict == "no drift"
    assert (report.name, report.version, report.digest) == ("digits", 4, artifact.digest)
    assert report.summary.count == 600
    assert report.incident is None
    assert (report.undelivered, report.problems) == ((), ())


def test_drift_opens_an_incident_and_tells_the_log_once(seal, served, caplog):
    artifact = seal()
    home = served(artifact, 600, shift=1.0)
    with caplog.at_level(logging.WARNING, logger="fettle.monitor"):
        for _ in range(3):
            report = monitor_report(name="digits", artifact=artifact, home=home, channels=(Log(),), now=NOW)
    assert report.judgement.verdict == "drift"
    assert report.incident.number == 1
    assert len(caplog.records) == 1
    assert json.loads(caplog.records[0].getMessage())["version"] == 4


def test_an_unreachable_channel_is_reported_and_stops_nothing(seal, served):
    artifact = seal()
    dead = Webhook(url="http://secret:token@127.0.0.1:1/", attempts=1)
    report = monitor_report(
        name="digits", artifact=artifact, home=served(artifact, 600, shift=1.0), channels=(dead, Log()), now=NOW
    )
    (sentence,) = report.undelivered
    assert "incident 1 'drift' has not reached webhook:" in sentence
    assert "token" not in sentence
    assert report.incident.told == ("log",)


def test_only_looking_changes_nothing(seal, served):
    artifact = seal()
    home = served(artifact, 600, shift=1.0)
    report = monitor_report(name="digits", artifact=artifact, home=home, channels=None, now=NOW)
    assert report.judgement.verdict == "drift"
    assert report.incident is None
    assert not home.incidents.exists()


def test_since_and_last_choose_the_rows(seal, served):
    artifact = seal()
    served(artifact, 600, shift=1.0)
    home = served(artifact, 300, file="2", start=START + timedelta(minutes=20))
    look = {"name": "digits", "artifact": artifact, "home": home, "now": NOW, "channels": None}
    assert monitor_report(**look).judgement.verdict == "drift"
    assert monitor_report(**look, last=300).judgement.verdict != "drift"
    assert monitor_report(**look, since=START + timedelta(minutes=20)).judgement.size == 300


def test_an_empty_log_is_not_enough_data(seal, tmp_path):
    report = monitor_report(name="digits", artifact=seal(), home=Home(tmp_path / "none"), now=NOW)
    assert report.judgement.verdict == "not enough data"
    assert report.version is None
    assert not (tmp_path / "none" / "incidents" / "digits.json").exists()


def test_a_broken_log_file_is_named(seal, served):
    artifact = seal()
    home = served(artifact, 600)
    (home.observations("digits") / "2.parquet").write_bytes(b"junk")
    report = monitor_report(name="digits", artifact=artifact, home=home, now=NOW)
    assert report.judgement.size == 600
    assert "2.parquet" in report.problems[0]


def test_an_artifact_without_reference_is_an_error(seal, tmp_path):
    with pytest.raises(MonitorError, match="optimize it with validation data"):
        monitor_report(name="digits", artifact=seal(reference=False), home=Home(tmp_path))


@pytest.mark.parametrize("name", ["../x", "", "A"])
def test_a_name_that_is_no_name_is_refused(seal, tmp_path, name):
    with pytest.raises(UsageError):
        monitor_report(name=name, artifact=seal(), home=Home(tmp_path))


def test_it_is_json_and_one_report(seal, served):
    artifact = seal()
    look = monitor_report(name="digits", artifact=artifact, home=served(artifact, 600), since=START, now=NOW)
    assert json.loads(codec.canonical(look))["judgement"]["verdict"] == "no drift"
    report = look.report()
    assert report["window.count"].value == 600
    assert report["window.rate"].value == pytest.approx(10.0)
    assert report["window.latency.p95"].unit == "ms"
    assert "drift.psi.mean" in report
    assert report.notes[0] == look.judgement.sentence


def test_monitoring_does_not_import_torch():
    code = (
        "import sys; from fettle.core import plugins; from fettle.monitor import report;"
        "from fettle.monitor.drift._base import DriftTest; from fettle.monitor.alerts._base import AlertChannel;"
        "plugins.installed('fettle.monitor.drift', DriftTest);"
        "plugins.installed('fettle.monitor.alerts', AlertChannel);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
