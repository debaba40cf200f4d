"""What the registry says where the disk or the database refuses, with everything still there afterwards."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest

from fettle.core.artifact import Artifact
from fettle.core.errors import RegistryError
from fettle.core.home import Home
from fettle.registry import Registry, database

Make = Callable[..., Artifact]
Apart = Callable[..., tuple[int, list[Any]]]


@pytest.fixture
def open_home(make_artifact: Make) -> Iterator[Home]:
    """A home with one version, which every user may read and nobody but its owner may write."""
    root = Path(tempfile.mkdtemp())
    home = Home(root / "home")
    Registry(home).put("digits", make_artifact())
    Registry(home).open("digits")
    try:
        for path in [root, *root.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield home
    finally:
        for path in root.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        root.chmod(0o755)
        shutil.rmtree(root)


def test_read_only_home_is_read(open_home: Home, apart: Apart) -> None:
    calls = (
        methodcaller("alias_version", "digits", "champion"),
        methodcaller("get", "digits"),
        methodcaller("open", "digits"),
        methodcaller("verify"),
        methodcaller("gc"),
    )
    status, outcomes = apart(Registry(open_home), *calls, unprivileged=True)
    assert status == 0
    champion, version, artifact, damaged, collected = outcomes
    assert (champion, version.version, artifact.manifest.runtime, damaged, collected) == (1, 1, "null", [], [])


def test_read_only_home_is_not_written(open_home: Home, make_artifact: Make, apart: Apart) -> None:
    artifact = make_artifact(1)
    copy = Path(tempfile.mkdtemp()) / "copy"
    shutil.copytree(artifact.root, copy)
    for path in copy.iterdir():
        path.chmod(0o644)
    copy.parent.chmod(0o755)
    registry = Registry(open_home)
    calls = (
        methodcaller("put", "digits", Artifact.open(copy)),
        methodcaller("put", "digits", registry.open("digits"), reports=(), reason="same blobs"),
        methodcaller("promote", "digits", 1, alias="canary"),
        methodcaller("versions", "digits"),
    )
    try:
        status, (new, same, promoted, versions) = apart(registry, *calls, unprivileged=True)
    finally:
        shutil.rmtree(copy.parent)
    assert status == 0
    assert [type(refusal) for refusal in (new, same, promoted)] == [RegistryError] * 3
    assert re.search(r"cannot store the artifact: Permission denied.*right to write", str(new))
    assert "right to write" in str(same)
    assert "right to write" in str(promoted)
    assert [version.version for version in versions] == [1]
    assert len(Registry(open_home).history()) == 2


def test_home_that_cannot_be_made(tmp_path: Path, make_artifact: Make) -> None:
    (tmp_path / "file").write_text("in the way")
    registry = Registry(Home(tmp_path / "file" / "home"))
    with pytest.raises(RegistryError, match="a file is where a folder must be"):
        registry.put("digits", make_artifact())
    with pytest.raises(RegistryError, match="a file is where a folder must be"):
        registry.names()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no fettle registry"),
        (b"not a database" * 100, "is no SQLite file"),
        (b"SQLite format 3\0" + b"\xff" * 4096, r"registry\.db "),
    ],
)
def test_foreign_file(home: Home, make_artifact: Make, content: bytes, message: str) -> None:
    home.root.mkdir()
    home.database.write_bytes(content)
    registry = Registry(home)
    for act in (registry.names, registry.history, lambda: registry.put("digits", make_artifact())):
        with pytest.raises(RegistryError, match=message):
            act()
    assert len(registry.verify()) == 1
    assert home.database.read_bytes() == content


def test_database_of_another_program(home: Home, registry: Registry, make_artifact: Make) -> None:
    home.root.mkdir()
    connection = sqlite3.connect(home.database)
    connection.execute("CREATE TABLE versions (name TEXT)")
    connection.close()
    before = home.database.read_bytes()
    with pytest.raises(RegistryError, match=r"another program's database.*move it away"):
        registry.put("digits", make_artifact())
    assert home.database.read_bytes() == before


def test_later_format(home: Home, registry: Registry, make_artifact: Make) -> None:
    registry.put("digits", make_artifact())
    connection = sqlite3.connect(home.database)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(RegistryError, match="must be a registry of format 1, got 2: use the fettle that wrote it"):
        registry.get("digits")


def test_database_is_a_folder(home: Home, registry: Registry) -> None:
    home.database.mkdir(parents=True)
    with pytest.raises(RegistryError, match="cannot be opened"):
        registry.names()


@pytest.mark.parametrize("keep", [0.3, 0.6])
def test_cut_off_file(home: Home, registry: Registry, make_artifact: Make, keep: float) -> None:
    for seed in range(5):
        registry.put("digits", make_artifact(seed))
    content = home.database.read_bytes()
    home.database.write_bytes(content[: int(len(content) * keep)])
    assert registry.verify()
    with pytest.raises(RegistryError, match="is damaged: restore it from a backup"):
        [registry.put("digits", make_artifact(9)), registry.history()]
    home.database.write_bytes(content)
    assert registry.verify() == []


@pytest.mark.parametrize("path", ["a b", "what?", "50%41#x", "ünïcode", "quote'\""])
def test_odd_folder_names(tmp_path: Path, make_artifact: Make, path: str) -> None:
    registry = Registry(Home(tmp_path / path))
    registry.put("digits", make_artifact())
    assert registry.open("digits").root.is_relative_to(tmp_path / path)
    assert registry.verify() == []
    assert [found.name for found in tmp_path.iterdir() if found.name != "made"] == [path]


def test_relative_home(tmp_path: Path, make_artifact: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make_artifact()
    monkeypatch.chdir(tmp_path)
    registry = Registry(Home(Path("here")))
    registry.put("digits", artifact)
    assert Registry(Home(tmp_path / "here")).get("digits").version == 1
    assert registry.gc() == []


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("function", ["os.fsync", "os.replace", "os.link", "shutil.copyfileobj", "tempfile.mkstemp"])
def test_full_disk(registry: Registry, make_artifact: Make, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    artifact = make_artifact()
    with monkeypatch.context() as patch:
        patch.setattr(function, no_space)
        with pytest.raises(RegistryError, match="No space left on device: free some space"):
            registry.put("digits", artifact)
    assert registry.names() == []
    assert not [path for path in registry.home.root.rglob("*") if path.name.startswith(".")]
    assert registry.put("digits", artifact).version == 1
    assert registry.verify() == []


def test_full_disk_while_laying_out(registry: Registry, make_artifact: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.put("digits", make_artifact())
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", no_space)
        with pytest.raises(RegistryError, match=r"lay out the artifact.*No space left"):
            registry.open("digits")
    assert registry.open("digits").digest == registry.get("digits").digest


def test_full_disk_in_the_transaction(registry: Registry, make_artifact: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite itself finds no room for the next page, part of the way through."""
    registry.put("digits", make_artifact())
    plain = database.connect

    def crammed(path: Path, mode: str) -> sqlite3.Connection:
        connection = plain(path, mode)
        connection.execute("PRAGMA max_page_count = 1")  # SQLite takes the current size instead
        return connection

    def fill(index: int) -> None:
        registry.promote("digits", 1, alias=f"canary{index}", reason="r" * 2000)

    with monkeypatch.context() as patch:
        patch.setattr(database, "connect", crammed)
        with pytest.raises(RegistryError, match="cannot grow, the disk is full"):
            list(map(fill, range(5)))
    assert registry.verify() == []
    assert registry.promote("digits", 1, alias="later", reason="r" * 2000).after == 1


def test_locked_by_another(registry: Registry, make_artifact: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.put("digits", make_artifact())
    registry.put("digits", make_artifact(1))
    other = sqlite3.connect(registry.home.database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.05)
    with pytest.raises(RegistryError, match="stayed locked by another process"):
        registry.promote("digits", 2)
    assert registry.alias_version("digits", "champion") == 1  # readers do not wait for a writer
    other.execute("COMMIT")
    other.close()
    assert registry.promote("digits", 2).after == 2


def test_threads_share_a_registry(registry: Registry, make_artifact: Make) -> None:
    for seed in range(2):
        registry.put("digits", make_artifact(seed))
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(5):
                registry.promote("digits", number)
                assert registry.alias_version("digits", "champion") in (1, 2)
                assert registry.open("digits").digest
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(1 + index % 2,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert registry.verify() == []


def test_wal_and_sync(registry: Registry, make_artifact: Make) -> None:
    registry.put("digits", make_artifact())
    connection = database.connect(registry.home.database, "mode=rw")
    pragmas = {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")}
    foreign_keys, busy = (connection.execute(f"PRAGMA {n}").fetchone()[0] for n in ("foreign_keys", "busy_timeout"))
    connection.close()
    assert pragmas == {"journal_mode": "wal", "synchronous": 2}
    assert (foreign_keys, busy) == (1, 10_000)


def test_two_create_it_at_once(registry: Registry, make_artifact: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Just before the new file is linked into place, another process has done so and written to it."""
    plain = os.link
    rivals = []

    def late(source: Path, target: Path) -> None:
        if not rivals:
            rivals.append(None)
            rivals.append(Registry(registry.home).put("digits", make_artifact(1)))
        plain(source, target)

    monkeypatch.setattr(os, "link", late)
    assert registry.put("digits", make_artifact()).version == 2
    assert [version.version for version in registry.versions("digits")] == [1, 2]
    assert not [path for path in registry.home.root.iterdir() if path.name.startswith(".")]
    assert registry.verify() == []


def test_a_restored_backup_is_seen_at_once(registry: Registry, make_artifact: Make) -> None:
    registry.put("digits", make_artifact())
    backup = registry.home.database.read_bytes()
    registry.put("digits", make_artifact(1))
    registry.promote("digits", 2)
    registry.home.database.write_bytes(b"damaged")
    with pytest.raises(RegistryError):
        registry.get("digits")
    registry.home.database.write_bytes(backup)
    assert registry.alias_version("digits", "champion") == 1
    assert registry.put("digits", make_artifact(1)).version == 2
    assert registry.verify() == []
