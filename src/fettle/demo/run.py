"""The whole loop, for real: a server in its own process, requests over HTTP, a webhook that listens."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rich.table import Table

from fettle.core.errors import FettleError, MonitorError
from fettle.core.home import Home
from fettle.core.project import Project
from fettle.core.signature import Array
from fettle.core.version import Version
from fettle.demo.client import Answers, Load, corrupt, send
from fettle.evaluate.table import render_table
from fettle.monitor.alerts.log import Log
from fettle.monitor.alerts.webhook import Webhook
from fettle.monitor.report import MonitorReport, monitor_report
from fettle.monitor.window import read_window
from fettle.pipeline import Outcome, optimize_project
from fettle.registry import Registry

Progress = Callable[[str, float], None]
PROJECT = Path(__file__).parent / "digits"
_WINDOW = 500
_PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What happened, step by step, as (what, result) pairs; `ok` is False where something was not as promised."""

    outcome: Outcome
    steps: tuple[tuple[str, str], ...]
    ok: bool

    @property
    def report(self) -> Path:
        """The page with the pictures."""
        return self.outcome.report

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"ok": self.ok, "steps": dict(self.steps), "optimize": self.outcome.to_json()}

    def tables(self, *, width: int) -> tuple[Table, Table]:
        """For the terminal."""
        table = Table(title="the whole loop", box=None, show_header=False, title_justify="left")
        for what, result in self.steps:
            table.add_row(what, result)
        return render_table(self.outcome.comparison, width=width), table


def run_demo(home: Home, *, progress: Progress) -> Summary:
    """Train, optimize, register, serve, watch clean and corrupted traffic, promote and roll back under load.

    Raises FettleError where a step cannot be done at all; what was done but not as promised is in the summary.
    """
    project = Project.open(PROJECT)
    outcome = optimize_project(project, home=home, progress=lambda what, share: progress(what, 0.5 * share))
    registry = Registry(home)
    first, second = _two_versions(registry, outcome)
    images, labels = _traffic(project)
    alerts: list[dict[str, Any]] = []
    with _webhook(alerts) as hook, _server(home, project.name) as (url, process):
        progress("500 clean images", 0.55)
        clean, clean_verdict = _watch(home, registry, first, url, images, labels, hook)
        progress("500 corrupted images", 0.7)
        bad, bad_verdict = _watch(home, registry, first, url, corrupt(images), labels, hook)
        again = _look(home, registry, first, hook)
        progress("promote and roll back under load", 0.85)
        load = _switch_under_load(registry, first, second, url, images, labels)
        progress("drain", 0.95)
        process.send_signal(signal.SIGTERM)
        code = process.wait(_PATIENCE_S)
    drift_alerts = sum(alert.get("event") == "drift" for alert in alerts)
    best, baseline = outcome.best.candidate, outcome.baseline.candidate
    steps: tuple[tuple[str, str], ...] = (
        ("optimized", f"{best.label}: accuracy {best.metric.value:.4f} ({baseline.metric.value:.4f} before), "
         f"{best.p50_ms:.3f} ms ({baseline.p50_ms:.3f} ms), {best.size_bytes / 1000:.0f} kB "
         f"({baseline.size_bytes / 1000:.0f} kB)"),
        ("registered", ", ".join(f"{each} ({each.runtime}, {each.precision})" for each in (first, second))),
        ("500 clean images", f"{clean.answered} answered, {clean.right} right: {clean_verdict.judgement.verdict}"),
        ("500 corrupted images", f"{bad.answered} answered, {bad.right} right: {bad_verdict.judgement.verdict}"),
        ("alerts on two looks", f"{drift_alerts} ({again.judgement.verdict} both times, one incident)"),
        (f"promoted {second}, rolled back", f"{load.answered} answers under load "
         f"({', '.join(f'v{v}: {n}' for v, n in sorted(load.versions.items()))}), {len(load.failures)} failed"),
        ("drained on SIGTERM", f"exit code {code}"),
    )  # fmt: skip
    failures = [*clean.failures, *bad.failures, *load.failures]
    ok = (
        not failures
        and (clean.answered, bad.answered, code, drift_alerts) == (_WINDOW, _WINDOW, 0, 1)
        and (clean_verdict.judgement.verdict, bad_verdict.judgement.verdict) == ("no drift", "drift")
    )
    if failures:
        steps += (("first failure", failures[0]),)
    return Summary(outcome=outcome, steps=steps, ok=ok)


def _two_versions(registry: Registry, outcome: Outcome) -> tuple[Version, Version]:
    """The best as champion, and the fastest other candidate beside it."""
    name = outcome.comparison.name
    first = registry.get(f"{name}:{outcome.best.version}")
    registry.promote(name, first.version, reason="demo: the best of this run")
    others = [trial for trial in outcome.candidates if trial.artifact.digest != outcome.best.artifact.digest]
    other = min(others, key=lambda trial: trial.candidate.p50_ms)
    second = registry.put(name, other.artifact, reports=(other.report,), reason="demo: the runner-up")
    return first, second


def _traffic(project: Project) -> tuple[Array, Array]:
    """500 images that nothing was trained or chosen on, with their labels."""
    images, labels = project.call("data.test", "data:pixels")
    return images[-_WINDOW:], labels[-_WINDOW:]


def _watch(
    home: Home, registry: Registry, version: Version, url: str, images: Array, labels: Array, hook: str
) -> tuple[Answers, MonitorReport]:
    """Send the images, wait until all are in the prediction log, and look."""
    before = _logged(home, version)
    answers = send(url, list(images), labels.tolist())
    _wait(lambda: _logged(home, version) >= before + answers.answered, "the prediction log to be written")
    return answers, _look(home, registry, version, hook)


def _look(home: Home, registry: Registry, version: Version, hook: str) -> MonitorReport:
    return monitor_report(
        name=version.name,
        artifact=registry.open(str(version)),
        home=home,
        last=_WINDOW,
        channels=[Log(), Webhook(url=hook)],
    )


def _logged(home: Home, version: Version) -> int:
    return len(read_window(home.observations(version.name), digest=version.digest))


def _switch_under_load(
    registry: Registry, first: Version, second: Version, url: str, images: Array, labels: Array
) -> Answers:
    """Promote, see the new version answer, roll back, see the old one answer: all the while requests come in."""
    with Load(url, list(images), labels.tolist()) as load:
        _wait(lambda: load.has_seen(first.version) > 100, "the first version to answer")
        registry.promote(first.name, second.version, reason="demo: try the runner-up")
        _wait(lambda: load.has_seen(second.version) > 100, "the promoted version to answer")
        registry.rollback(first.name, reason="demo: the previous one is better")
        seen = load.has_seen(first.version)
        _wait(lambda: load.has_seen(first.version) > seen + 100, "the first version to answer again")
    return load.answers


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise MonitorError(f"waited {_PATIENCE_S:.0f} s in vain for {what}")
        time.sleep(0.02)


@contextmanager
def _server(home: Home, name: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`fettle serve` as a user would start it; yields its URL."""
    command = [sys.executable, "-m", "fettle", "serve", f"{name}@champion", "--port", "0", "--json"]
    environment = {**os.environ, "FETTLE_HOME": str(home.root)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], _PATIENCE_S)
        line = process.stdout.readline() if ready else ""
        if not line:
            process.kill()
            raise FettleError(f"`fettle serve` did not become ready: {process.communicate()[1][-2000:]}")
        yield json.loads(line)["url"], process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@contextmanager
def _webhook(received: list[dict[str, Any]]) -> Iterator[str]:
    """A receiver of alerts on loopback; yields its URL."""

    class Receiver(BaseHTTPRequestHandler):
        """Keeps what is posted."""

        def do_POST(self) -> None:
            """Take one alert."""
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Stay quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/alerts"
        finally:
            server.shutdown()
            thread.join()
