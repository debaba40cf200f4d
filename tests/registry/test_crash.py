"""Killed at any line, and used by several processes at once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest

from fettle.core.artifact import Artifact
from fettle.core.home import Home
from fettle.registry import Registry

Make = Callable[..., Artifact]
Apart = Callable[..., tuple[int, list[Any]]]


def every_line(
    prepare: Callable[[], Registry], act: Callable[[Registry], object], apart: Apart, *, stride: int
) -> list[Registry]:
    """The registries left by a kill at every `stride`-th line until one run comes to its end."""
    left = []
    line = 1
    while True:
        registry = prepare()
        left.append(registry)
        status, outcomes = apart(registry, act, line=line)
        if not os.WIFSIGNALED(status):
            assert status == 0
            assert not [outcome for outcome in outcomes if isinstance(outcome, Exception)]
            return left
        line += stride


@pytest.mark.slow
def test_killed_first_put(tmp_path: Path, make_artifact: Make, make_report: Any, apart: Apart) -> None:
    artifact, report = make_artifact(), make_report(0.9)
    count = 0

    def prepare() -> Registry:
        nonlocal count
        count += 1
        return Registry(Home(tmp_path / f"home{count}"))

    left = every_line(prepare, methodcaller("put", "digits", artifact, reports=[report]), apart, stride=3)
    assert len(left) > 50
    whole = 0
    for registry in left:
        assert registry.verify() == []
        for version in registry.versions("digits"):
            whole += 1
            assert (version.digest, version.aliases, version.reports) == (artifact.digest, ("champion",), (report,))
            assert registry.open("digits").digest == artifact.digest
        assert registry.put("digits", artifact, reports=[report]).version == 1
        registry.gc(dry_run=False, age_s=0)
        assert registry.verify() == []
        kept = [path for path in registry.home.root.rglob("*") if path.is_file()]
        blobs = {entry.sha256 for entry in artifact.manifest.files} | {artifact.digest}
        assert {path.name for path in kept if path.is_relative_to(registry.home.blobs)} == blobs
        assert not [path for path in kept if path.name.startswith(".")]
    assert whole < len(left)


@pytest.mark.parametrize("action", ["put", "promote", "rollback", "open", "gc"])
def test_killed_change(tmp_path: Path, make_artifact: Make, apart: Apart, action: str) -> None:
    artifacts = [make_artifact(seed) for seed in range(4)]
    template = Registry(Home(tmp_path / "template"))
    template.put("orphaned", artifacts[3])
    shutil.move(template.home.blobs, tmp_path / "orphans")
    shutil.rmtree(template.home.root)
    for artifact in artifacts[:2]:
        template.put("digits", artifact)
    template.promote("digits", 2)
    shutil.copytree(tmp_path / "orphans", template.home.blobs, dirs_exist_ok=True)
    acts: dict[str, Callable[[Registry], object]] = {
        "put": methodcaller("put", "digits", artifacts[2]),
        "promote": methodcaller("promote", "digits", 1),
        "rollback": methodcaller("rollback", "digits"),
        "open": methodcaller("open", "digits"),
        "gc": methodcaller("gc", dry_run=False, age_s=0),
    }
    count = 0

    def prepare() -> Registry:
        nonlocal count
        count += 1
        shutil.copytree(template.home.root, tmp_path / str(count))
        return Registry(Home(tmp_path / str(count)))

    before = template.history()
    left = every_line(prepare, acts[action], apart, stride=7)
    assert len(left) > 5
    for registry in left:
        assert registry.verify() == []
        history = registry.history()
        assert history[: len(before)] == before
        assert len(history) - len(before) in ((0,) if action in ("open", "gc") else (0, 1))
        changed = len(history) > len(before)
        expected = 1 if changed and action != "put" else 2
        assert registry.alias_version("digits", "champion") == expected
        assert registry.open("digits").digest == artifacts[expected - 1].digest
        assert registry.put("digits", artifacts[2]).version == 3
        assert registry.verify() == []


PUT = """
import sys
from pathlib import Path
from fettle.core.artifact import Artifact
from fettle.core.home import Home
from fettle.registry import Registry
registry = Registry(Home(Path(sys.argv[1])))
for path in sys.argv[2:]:
    registry.put("digits", Artifact.open(Path(path)), actor=str(sys.argv[2:].index(path)))
"""


@pytest.mark.parametrize("blobs", [1, 3, 5, 8, 12])
def test_killed_from_outside(registry: Registry, make_artifact: Make, blobs: int) -> None:
    """Another process puts versions; it is killed as soon as so many files lie among the blobs."""
    artifacts = [make_artifact(seed, size_bytes=200_000) for seed in range(8)]
    command = [sys.executable, "-c", PUT, str(registry.home.root), *(str(artifact.root) for artifact in artifacts)]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while sum(1 for _ in registry.home.blobs.glob("*/*")) < blobs:
        assert time.monotonic() < deadline
        assert process.poll() is None
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert registry.verify() == []
    held = registry.versions("digits")
    assert [version.digest for version in held] == [artifact.digest for artifact in artifacts[: len(held)]]
    for artifact in artifacts:
        registry.put("digits", artifact)
    assert [version.version for version in registry.versions("digits")] == list(range(1, 9))
    assert registry.verify() == []


WORK = """
import sys
from pathlib import Path
from fettle.core.artifact import Artifact
from fettle.core.errors import RegistryError
from fettle.core.home import Home
from fettle.registry import Registry
registry = Registry(Home(Path(sys.argv[1])))
print("ready", flush=True)
sys.stdin.readline()
for path in sys.argv[3:]:
    version = registry.put("digits", Artifact.open(Path(path)), actor=sys.argv[2])
    registry.promote("digits", version.version, actor=sys.argv[2])
    registry.open("digits@champion")
    registry.gc(dry_run=False)
    try:
        registry.rollback("digits", actor=sys.argv[2])
    except RegistryError as problem:
        if "earlier version" not in str(problem):
            raise
"""


def test_many_processes(registry: Registry, make_artifact: Make) -> None:
    """Three processes put, promote, open, collect and roll back at once, one artifact being the same for all."""
    shared = make_artifact(99)
    mine = [[make_artifact(10 * worker + index) for index in range(3)] for worker in range(3)]
    workers = []
    for worker, artifacts in enumerate(mine):
        roots = [str(artifact.root) for artifact in [*artifacts, shared]]
        command = [sys.executable, "-c", WORK, str(registry.home.root), f"worker{worker}", *roots]
        pipe = subprocess.PIPE
        workers.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
    for process in workers:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in workers:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in workers:
        _, complaints = process.communicate(timeout=120)
        assert (process.returncode, complaints) == (0, "")
    held = registry.versions("digits")
    assert [version.version for version in held] == list(range(1, 11))
    assert {version.digest for version in held} == {a.digest for own in mine for a in own} | {shared.digest}
    history = registry.history()
    assert [change.number for change in history] == list(range(1, len(history) + 1))
    assert {change.actor for change in history} == {"worker0", "worker1", "worker2"}
    assert registry.verify() == []
    assert registry.gc(age_s=0) == []
