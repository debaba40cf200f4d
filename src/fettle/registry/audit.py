"""Reads everything the registry holds and says in words what does not fit together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, select

from fettle.core.artifact import Artifact
from fettle.core.errors import ArtifactError
from fettle.registry import history, tables
from fettle.registry.blobs import BlobStore
from fettle.registry.history import Row

_FIXED = ("digest", "runtime", "precision", "size_bytes", "parent")
_Key = tuple[str, int]


def version_facts(artifact: Artifact) -> dict[str, Any]:
    """What the versions table repeats of a manifest."""
    manifest = artifact.manifest
    return {"runtime": manifest.runtime, "precision": manifest.precision, "size_bytes": artifact.size_bytes}


def version_details(version: Mapping[str, Any], reports: Sequence[str]) -> dict[str, Any]:
    """What a "register" line fixes: the fields of the versions row and the digests of the reports it adds."""
    return {**{key: version[key] for key in _FIXED}, "reports": list(reports)}


def database_problems(connection: Connection, *, anchor: str | None) -> list[str]:
    """What is wrong inside the database, in words.

    anchor: the hash of a line, noted down earlier in another place; it must still be in the chain.
    """
    lines = history.read(connection)
    stacks, contradictions = history.replay(lines)
    problems = [f"SQLite's own check: {row[0]}" for row in connection.exec_driver_sql("PRAGMA integrity_check")]
    problems = [] if problems == ["SQLite's own check: ok"] else problems
    problems += _missing_guards(connection)
    problems += history.broken_links(lines)
    problems += history.missing_tail(connection, lines)
    if anchor is not None and anchor not in {line["hash"] for line in lines}:
        problems.append(f"no history line has the hash {anchor[:12]}… that was noted down: the history was rewritten")
    problems += contradictions
    problems += _alias_problems(connection, stacks)
    problems += _version_problems(connection, lines)
    problems += _report_problems(connection, lines)
    return problems


def blob_problems(versions: Sequence[Row], blobs: BlobStore) -> Iterator[str]:
    """What is missing or altered among the files of these versions. Every blob is read once."""
    checked: set[str] = set()
    for version in versions:
        label = f"{version['name']}:{version['version']}"
        try:
            manifest = blobs.manifest(version["digest"])
        except ArtifactError as problem:
            yield f"{label}: {problem}"
            continue
        stored = Artifact(digest=version["digest"], manifest=manifest, root=blobs.root)
        if version_facts(stored) != {key: version[key] for key in version_facts(stored)}:
            yield f"{label}: the registry must repeat its manifest's {version_facts(stored)}, and does not"
        for entry in manifest.files:
            if entry.sha256 in checked:
                continue
            checked.add(entry.sha256)
            try:
                blobs.verify(entry)
            except ArtifactError as problem:
                yield f"{label}: {problem}"


def _missing_guards(connection: Connection) -> list[str]:
    found = {
        name: " ".join(text.split())
        for name, text in connection.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
    }
    return [
        f"the trigger {name}, which keeps rows from being changed or removed, is gone or altered"
        for name, statement in tables.guards().items()
        if found.get(name) != " ".join(statement.split())
    ]


def _alias_problems(connection: Connection, stacks: Mapping[history.Alias, list[int]]) -> list[str]:
    held = {(row.name, row.alias): row.version for row in connection.execute(select(tables.aliases))}
    tops = {alias: stack[-1] for alias, stack in stacks.items() if stack}
    return [
        f"{name}@{alias} is version {held.get((name, alias))}, but the history says {tops.get((name, alias))}"
        for name, alias in sorted(held.keys() | tops.keys(), key=str)
        if held.get((name, alias)) != tops.get((name, alias))
    ]


def _version_problems(connection: Connection, lines: Sequence[Row]) -> list[str]:
    """Each version must be what the line that registered it says, and every line must name a version there is."""
    held = {(row["name"], row["version"]): row for row in connection.execute(select(tables.versions)).mappings()}
    births: dict[_Key, Row] = {}
    problems = []
    for line in lines:
        key = (line["name"], line["after"])
        version = held.get(key)
        if line["action"] == "register":
            births.setdefault(key, line)
        if version is None:
            problems.append(f"{history.describe(line)} names version {line['after']}, which is gone")
        elif history.details_of(line).get("digest") != version["digest"]:
            problems.append(
                f"{history.describe(line)} was about another artifact than version {line['after']} is now: "
                "the version was altered"
            )
    for (name, number), version in held.items():
        birth = births.get((name, number))
        if birth is None:
            problems.append(f"{name}:{number} has no line in the history that registers it")
        elif birth["time"] != version["created"] or any(
            history.details_of(birth).get(key) != version[key] for key in _FIXED
        ):
            problems.append(f"{name}:{number} differs from {history.describe(birth)}, which registered it")
    return problems


def _report_problems(connection: Connection, lines: Sequence[Row]) -> list[str]:
    """The reports of a version must be those its "register" lines added, in order and unaltered."""
    expected: dict[_Key, list[str]] = {}
    for line in lines:
        if line["action"] == "register":
            expected.setdefault((line["name"], line["after"]), []).extend(history.details_of(line).get("reports", []))
    found: dict[_Key, list[str]] = {}
    problems = []
    columns = tables.reports.c
    for row in connection.execute(select(tables.reports).order_by(columns.name, columns.version, columns.number)):
        found.setdefault((row.name, row.version), []).append(row.digest)
        if hashlib.sha256(row.content.encode()).hexdigest() != row.digest:
            problems.append(
                f"report {row.number} of {row.name}:{row.version} does not match its digest: it was altered"
            )
    problems += [
        f"the reports of {name}:{number} are not those the history says were registered"
        for name, number in sorted(expected.keys() | found.keys())
        if expected.get((name, number), []) != found.get((name, number), [])
    ]
    return problems
