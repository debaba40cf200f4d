"""Killed at any line, and used by several processes at once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import fettle.registry
from fettle.core.artifact import Artifact
from fettle.core.home import Home
from fettle.registry import Registry

Make = Callable[..., Artifact]
SOURCE = str(Path(fettle.registry.__file__).parent)


def killed_at(line: int, act: Callable[[], object]) -> bool:
    """Run it in a process that sends itself SIGKILL before the given line of registry code it comes to."""
    pid = os.fork()
    if pid == 0:
        seen = 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal seen
            if not frame.f_code.co_filename.startswith(SOURCE):
                return None
            seen += event == "line"
            if seen == line:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def every_line(prepare: Callable[[], Registry], act: Callable[[Registry], object], *, stride: int) -> list[Registry]:
    """The registries left by a kill at every `stride`-th line until one run comes to its end."""
    left = []
    line = 1
    while True:
        registry = prepare()
        left.append(registry)
        if not killed_at(line, lambda registry=registry: act(registry)):  # type: ignore[misc]
            return left
        line += stride


@pytest.mark.slow
def test_killed_first_put(tmp_path: Path, make_artifact: Make, make_report: Any) -> None:
    artifact, report = make_artifact(), make_report(0.9)
    count = 0

    def prepare() -> Registry:
        nonlocal count
        count += 1
        return Registry(Home(tmp_path / f"home{count}"))

    left = every_line(prepare, lambda registry: registry.put("digits", artifact, reports=[report]), stride=3)
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
def test_killed_change(tmp_path: Path, make_artifact: Make, action: str) -> None:
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
        "put": lambda registry: registry.put("digits", artifacts[2]),
        "promote": lambda registry: registry.promote("digits", 1),
        "rollback": lambda registry: registry.rollback("digits"),
        "open": lambda registry: registry.open("digits"),
        "gc": lambda registry: registry.gc(dry_run=False, age_s=0),
    }
    count = 0

    def prepare() -> Registry:
        nonlocal count
        count += 1
        shutil.copytree(template.home.root, tmp_path / str(count))
        return Registry(Home(tmp_path / str(count)))

    before = template.history()
    left = every_line(prepare, acts[action], stride=7)
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
