"""Whatever is changed behind the registry's back, `verify` says so in words."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fettle.core.artifact import Artifact
from fettle.core.errors import FettleError, RegistryError, TamperedHistory
from fettle.registry import Registry, history, tables

Make = Callable[..., Artifact]


@pytest.fixture(autouse=True)
def _filled(registry: Registry, make_artifact: Make, make_report: Callable[[float], Any]) -> None:
    """Lines: 1 register 1, 2 promote 1, 3 register 2, 4 promote 2, 5 register 3, 6 promote 3 as canary, 7 rollback."""
    registry.put("digits", make_artifact(0), reports=[make_report(0.9), make_report(0.8)])
    registry.put("digits", make_artifact(1), parent=make_artifact(0).digest)
    registry.promote("digits", 2, actor="ada", reason="better")
    registry.put("digits", make_artifact(2))
    registry.promote("digits", 3, alias="canary")
    registry.rollback("digits", actor="bob", reason="worse")
    assert registry.verify() == []


def tamper(path: Path, *statements: str, keep_guards: bool = False) -> None:
    """Change the file as somebody with sqlite3 at hand would, past the triggers."""
    connection = sqlite3.connect(path, isolation_level=None)
    guards = dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"))
    try:
        if not keep_guards:
            for name in guards:
                connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(statement)
        if not keep_guards:
            for sql in guards.values():
                connection.execute(sql)
    finally:
        connection.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE history SET actor = 'eve' WHERE number = 4",
        "DELETE FROM history WHERE number = 7",
        "DELETE FROM history",
        "INSERT OR REPLACE INTO history SELECT number, time, action, name, alias, before, after, 'eve', reason, "
        "details, hash FROM history WHERE number = 4",
        "REPLACE INTO versions SELECT name, version, digest, created, 'openvino', precision, size_bytes, parent "
        "FROM versions",
        "UPDATE versions SET parent = NULL",
        "DELETE FROM versions",
        "UPDATE reports SET content = '{}'",
        "DELETE FROM reports",
        "REPLACE INTO reports SELECT name, version, number, digest, '{}' FROM reports",
    ],
)
def test_triggers_refuse(registry: Registry, statement: str) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="only ever grows"):
        tamper(registry.home.database, statement, keep_guards=True)
    assert registry.verify() == []


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("time", "'2020-01-01T00:00:00.000000+00:00'"),
        ("action", "'rollback'"),
        ("name", "'other'"),
        ("alias", "'canary'"),
        ("before", "NULL"),
        ("after", "3"),
        ("actor", "'eve'"),
        ("reason", "''"),
        ("details", "'{}'"),
        ("hash", "'" + "0" * 64 + "'"),
    ],
)
def test_every_column_of_a_line_is_covered(registry: Registry, column: str, value: str) -> None:
    tamper(registry.home.database, f"UPDATE history SET {column} = {value} WHERE number = 4")
    problems = registry.verify()
    assert any("history line 4" in problem and "does not match its hash" in problem for problem in problems)


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        (["DELETE FROM history WHERE number = 5"], "history line 5 is missing before line 6"),
        (["DELETE FROM history WHERE number IN (3, 4)"], "history lines from 3 are missing before line 5"),
        (["DELETE FROM history WHERE number = 7"], "ends at line 6, but line 7 was written"),
        (["DELETE FROM history"], "ends at line 0, but line 7 was written"),
        (["DELETE FROM head"], "the head of the history is missing"),
        (["UPDATE head SET hash = 'x'"], "which is not the line 7 that its head names"),
        (["UPDATE head SET number = 6"], "history ends at line 7, which is not the line 6"),
        (["UPDATE history SET number = 8 WHERE number = 7"], "history line 8 .* does not match its hash"),
        (["UPDATE aliases SET version = 3 WHERE alias = 'champion'"], "digits@champion is version 3, but the history"),
        (["DELETE FROM aliases WHERE alias = 'canary'"], "digits@canary is version None, but the history says 3"),
        (["INSERT INTO aliases VALUES ('digits', 'extra', 2)"], "digits@extra is version 2, but the history says None"),
        (["UPDATE versions SET digest = 'x' WHERE version = 3"], "another artifact than version 3 is now"),
        (["UPDATE versions SET runtime = 'openvino' WHERE version = 2"], "digits:2 differs from history line 3"),
        (["UPDATE versions SET runtime = 'openvino' WHERE version = 2"], "digits:2: the registry must repeat"),
        (["UPDATE versions SET size_bytes = 1 WHERE version = 2"], "digits:2 differs"),
        (["UPDATE versions SET parent = NULL WHERE version = 2"], "digits:2 differs"),
        (["UPDATE versions SET created = '' WHERE version = 2"], "digits:2 differs"),
        (["DELETE FROM versions WHERE version = 3"], "names version 3, which is gone"),
        (["UPDATE versions SET version = 9 WHERE version = 3"], "digits:9 has no line in the history"),
        (["UPDATE reports SET content = replace(content, '0.9', '0.99')"], "report 1 of digits:1 does not match"),
        (["UPDATE reports SET digest = 'x' WHERE number = 2"], "the reports of digits:1 are not those"),
        (["DELETE FROM reports WHERE number = 1"], "the reports of digits:1 are not those"),
        (["INSERT INTO reports VALUES ('digits', 2, 1, 'x', '{}')"], "the reports of digits:2 are not those"),
        (["INSERT INTO versions VALUES ('new', 1, 'x', '', '', '', 0, NULL)"], "new:1 has no line in the history"),
    ],
)
def test_changes_behind_its_back(registry: Registry, statements: list[str], message: str) -> None:
    tamper(registry.home.database, "PRAGMA foreign_keys = OFF", *statements)
    problems = registry.verify()
    assert any(re.search(message, problem) for problem in problems), problems


@pytest.mark.parametrize("name", sorted(tables.guards()))
def test_missing_trigger(registry: Registry, name: str) -> None:
    tamper(registry.home.database, f"DROP TRIGGER {name}", keep_guards=True)
    assert [name in problem for problem in registry.verify()] == [True]


def test_weakened_trigger(registry: Registry) -> None:
    name = "history_refuse_update"
    weak = f"CREATE TRIGGER {name} BEFORE UPDATE ON history BEGIN SELECT 1; END"
    tamper(registry.home.database, f"DROP TRIGGER {name}", weak, keep_guards=True)
    assert registry.verify() == [
        f"the trigger {name}, which keeps rows from being changed or removed, is gone or altered"
    ]


def test_one_change_is_one_broken_link(registry: Registry) -> None:
    tamper(registry.home.database, "UPDATE history SET reason = 'x' WHERE number = 4")
    assert len(registry.verify()) == 1


@pytest.mark.parametrize("damage", ["gone", "altered", "longer"])
@pytest.mark.parametrize("name", ["model.bin", "manifest.json"])
def test_blobs(registry: Registry, make_artifact: Make, damage: str, name: str) -> None:
    artifact = make_artifact(1)
    hashes = {entry.name: entry.sha256 for entry in artifact.manifest.files} | {"manifest.json": artifact.digest}
    blob = registry.home.blobs / hashes[name][:2] / hashes[name]
    blob.chmod(0o644)
    if damage == "gone":
        blob.unlink()
    else:
        content = blob.read_bytes()
        blob.write_bytes(content + b"x" if damage == "longer" else b"x" + content[1:])
    (problem,) = registry.verify()
    assert problem.startswith("digits:2: ")
    assert name in problem
    assert str(blob) in problem
    registry.put("digits", artifact)
    assert registry.verify() == []


def test_a_cut_log_is_not_written_on(registry: Registry) -> None:
    tamper(registry.home.database, "DELETE FROM history WHERE number = 7")
    with pytest.raises(TamperedHistory, match="lines were removed or altered"):
        registry.promote("digits", 3)
    with pytest.raises(TamperedHistory, match="must lead to version 1"):
        registry.rollback("digits")
    assert registry.alias_version("digits", "champion") == 1
    assert len(registry.history()) == 6


def test_an_alias_moved_by_hand_is_not_rolled_back(registry: Registry) -> None:
    tamper(registry.home.database, "UPDATE aliases SET version = 3 WHERE alias = 'champion'")
    for act in (lambda: registry.rollback("digits"), lambda: registry.promote("digits", 3)):
        with pytest.raises(TamperedHistory, match="must lead to version 3, and does not"):
            act()


def rewrite(path: Path) -> None:
    """What an attacker with the files and this code can do: cut the last line and redo alias and head."""
    connection = sqlite3.connect(path)
    (last,) = connection.execute("SELECT hash FROM history WHERE number = 6").fetchone()
    connection.close()
    tamper(
        path,
        "DELETE FROM history WHERE number = 7",
        f"UPDATE head SET number = 6, hash = '{last}'",
        "UPDATE aliases SET version = 2 WHERE alias = 'champion'",
    )


def test_an_anchor_shows_what_the_file_alone_cannot(registry: Registry) -> None:
    anchor = registry.history()[-1].hash
    assert registry.verify(anchor=anchor) == []
    assert registry.verify(anchor=registry.history()[2].hash) == []
    rewrite(registry.home.database)
    assert registry.verify() == []  # the documented limit
    (problem,) = registry.verify(anchor=anchor)
    assert problem.startswith(f"no history line has the hash {anchor[:12]}")


def test_chain_by_hand(registry: Registry) -> None:
    """The hashes follow from the formula in the docstring, computed with nothing but json and hashlib."""
    connection = sqlite3.connect(registry.home.database)
    cursor = connection.execute("SELECT * FROM history ORDER BY number")
    columns = [column[0] for column in cursor.description]
    previous = ""
    for row in cursor.fetchall():
        line = dict(zip(columns, row, strict=True))
        stored = line.pop("hash")
        text = json.dumps({**line, "previous": previous}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert hashlib.sha256(text.encode()).hexdigest() == stored
        previous = stored
    assert connection.execute("SELECT number, hash FROM head").fetchall() == [(7, previous)]
    connection.close()


def test_clock_that_goes_back(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    class Earlier(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2020, 1, 1, tzinfo=tz)

    last = registry.history()[-1]
    monkeypatch.setattr(history, "datetime", Earlier)
    change = registry.promote("digits", 3)
    assert (datetime.fromisoformat(change.time) - datetime.fromisoformat(last.time)).total_seconds() == 1e-6
    assert registry.verify() == []


def dump(path: Path) -> list[list[Any]]:
    connection = sqlite3.connect(path)
    try:
        return [sorted(connection.execute(f"SELECT * FROM {name}"), key=str) for name in tables.metadata.tables]
    finally:
        connection.close()


@pytest.mark.parametrize("seed", range(10))
def test_flipped_bytes(registry: Registry, make_artifact: Make, seed: int) -> None:
    """A damaged database is told by `verify`, and answered by every method with an error of ours, or rightly."""
    path = registry.home.database
    good, rows = path.read_bytes(), dump(path)
    acts: list[Callable[[], object]] = [
        registry.names,
        registry.history,
        lambda: registry.versions("digits"),
        lambda: registry.open("digits"),
        lambda: registry.served_at("digits", datetime.max.replace(tzinfo=UTC)),
        registry.gc,
        lambda: registry.rollback("digits", alias="canary"),
        lambda: registry.promote("digits", 2),
        lambda: registry.put("digits", make_artifact(5)),
    ]
    rng = np.random.default_rng(seed)
    used = np.flatnonzero(np.frombuffer(good, np.uint8))
    for _ in range(6):
        damaged = bytearray(good)
        for index in rng.choice(used, size=rng.integers(1, 4)):
            damaged[index] ^= rng.integers(1, 256)
        path.write_bytes(damaged)
        if not registry.verify():
            assert dump(path) == rows
        for act in acts:
            with suppress(FettleError):
                act()
        path.write_bytes(good)
    assert registry.verify() == []
    assert not [path for path in Path("/proc/self/fd").glob("*") if "registry.db" in os.path.realpath(path)]


def test_rollback_needs_no_report(registry: Registry) -> None:
    registry.promote("digits", 2)
    tamper(registry.home.database, "UPDATE reports SET content = '{'")
    with pytest.raises(RegistryError, match="a report of digits:1 is no JSON"):
        registry.versions("digits")
    assert registry.rollback("digits").after == 1


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (
            "UPDATE history SET time = 'noon' WHERE number = 7",
            "history line 7 .* must have an ISO 8601 time, got 'noon'",
        ),
        ("UPDATE history SET action = 'x' WHERE number = 7", "history line 7.*action"),
        ("UPDATE versions SET digest = '../../x' WHERE version = 1", "a digest must be 64 hexadecimal digits"),
        ("DELETE FROM versions WHERE version = 1", "digits:1 must be in the registry and is gone"),
        ("UPDATE reports SET content = CAST(x'ff' AS TEXT)", "Could not decode"),
    ],
)
def test_reading_what_was_altered(registry: Registry, statement: str, message: str) -> None:
    tamper(registry.home.database, "PRAGMA foreign_keys = OFF", statement)
    assert registry.verify()

    def read_all() -> None:
        registry.served_at("digits", datetime.max.replace(tzinfo=UTC))
        registry.history()
        registry.open("digits")

    with pytest.raises(FettleError, match=message):
        read_all()
