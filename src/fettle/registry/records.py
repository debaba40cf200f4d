"""What a transaction reads and writes: versions with their reports and aliases, and the three changes."""

from __future__ import annotations

import getpass
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, select

from fettle.core import codec
from fettle.core.artifact import Artifact
from fettle.core.errors import NotRegistered, RegistryError, TamperedHistory, UsageError
from fettle.core.names import Reference
from fettle.core.report import Report
from fettle.core.version import Action, Change, Version
from fettle.registry import audit, history
from fettle.registry.history import Entry
from fettle.registry.tables import aliases as aliases_table
from fettle.registry.tables import reports as reports_table
from fettle.registry.tables import versions as versions_table

CHAMPION = "champion"
LATEST = "latest"
_NOTE_LIMIT = 2000
_Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Note:
    """Who does it, and why."""

    actor: str
    reason: str

    @classmethod
    def of(cls, actor: str, reason: str) -> Note:
        """The note, with the user of the operating system where no actor is named. Raises UsageError.

        >>> Note.of("ada", "better on Mondays")
        Note(actor='ada', reason='better on Mondays')
        """
        for what, text in (("actor", actor), ("reason", reason)):
            if len(text) > _NOTE_LIMIT or re.search("[\0\ud800-\udfff]", text):
                rule = f"must be at most {_NOTE_LIMIT} characters of Unicode text without NUL"
                raise UsageError(f"{what} {rule}, got {len(text)} beginning {text[:40]!a}")
        return cls(actor or _user(), reason)


def lineage(artifact: Artifact, parent: str | None) -> str | None:
    """The digest the artifact was made from: as given, else what its provenance says. Raises UsageError."""
    if parent is None:
        known = artifact.manifest.provenance.get("parent", "")
        return known if re.fullmatch(r"[0-9a-f]{64}", known) else None
    if not re.fullmatch(r"[0-9a-f]{64}", parent):
        raise UsageError(f"parent must be a digest of 64 hexadecimal digits, got {parent!r}")
    return parent


def report_texts(reports: Iterable[Report]) -> list[str]:
    """Canonical JSON of each. Raises UsageError for one that would not read back as it is: JSON has no NaN."""
    texts = []
    for report in reports:
        try:
            text = codec.canonical(report).decode()
            same = codec.from_json(Report, json.loads(text), where="report") == report
        except (TypeError, ValueError, UsageError) as problem:
            raise UsageError(_unfit(report, str(problem))) from None
        if not same:
            raise UsageError(_unfit(report, "it reads back as another one"))
        texts.append(text)
    return texts


def names(connection: Connection) -> list[str]:
    """Every registered model, in order."""
    query = select(versions_table.c.name).distinct().order_by(versions_table.c.name)
    return list(connection.execute(query).scalars())


def versions(connection: Connection, name: str, *, number: int | None = None) -> list[Version]:
    """The versions of a model, or the one of this number, with their reports and aliases."""
    query = select(versions_table).where(versions_table.c.name == name).order_by(versions_table.c.version)
    kept = select(reports_table).where(reports_table.c.name == name).order_by(reports_table.c.number)
    if number is not None:
        query = query.where(versions_table.c.version == number)
        kept = kept.where(reports_table.c.version == number)
    reports: dict[int, list[Report]] = {}
    for row in connection.execute(kept):
        reports.setdefault(row.version, []).append(_report(row.content, where=f"a report of {name}:{row.version}"))
    held = aliases(connection, name)
    return [
        Version(
            **row,
            aliases=tuple(alias for alias in held if held[alias] == row["version"]),
            reports=tuple(reports.get(row["version"], ())),
        )
        for row in connection.execute(query).mappings()
    ]


def version(connection: Connection, name: str, number: int) -> Version:
    """The one version of this number. Raises RegistryError where the history knows it and the table does not."""
    found = versions(connection, name, number=number)
    if not found:
        raise RegistryError(f"{name}:{number} must be in the registry and is gone: see `fettle registry verify`")
    return found[0]


def aliases(connection: Connection, name: str) -> dict[str, int]:
    """Version number by alias, in order of the alias."""
    query = select(aliases_table.c.alias, aliases_table.c.version).where(aliases_table.c.name == name)
    return {row.alias: row.version for row in connection.execute(query.order_by(aliases_table.c.alias))}


def alias_version(connection: Connection, name: str, alias: str) -> int | None:
    """The number an alias means, "latest" being the highest there is."""
    if alias == LATEST:
        highest = select(func.max(versions_table.c.version)).where(versions_table.c.name == name)
        return connection.execute(highest).scalar()
    query = select(aliases_table.c.version).where(aliases_table.c.name == name, aliases_table.c.alias == alias)
    return connection.execute(query).scalar()


def number(connection: Connection, reference: Reference) -> int:
    """The version number a reference means. Raises NotRegistered, naming what there is."""
    name = reference.name
    highest = alias_version(connection, name, LATEST)
    if highest is None:
        raise NotRegistered(f"no model '{name}' is registered{codec.nearest(name, names(connection))}")
    if reference.version is not None:
        if 1 <= reference.version <= highest:  # numbers have no gaps: versions are never removed
            return reference.version
        raise NotRegistered(f"{name} has the versions 1 to {highest}, got {reference.version}")
    if reference.alias is None:
        return alias_version(connection, name, CHAMPION) or highest
    found = alias_version(connection, name, reference.alias)
    if found is None:
        known = [*aliases(connection, name), LATEST]
        raise NotRegistered(f"{name} has no alias '{reference.alias}'{codec.nearest(reference.alias, known)}")
    return found


def register(connection: Connection, row: _Row, texts: Sequence[str], note: Note) -> int:
    """Make the version, or find the one of this digest, and add its new reports; return its number.

    row: the fields of the versions table but for version and created. The first version of a name becomes champion.
    """
    name = row["name"]
    same = select(versions_table).where(versions_table.c.name == name, versions_table.c.digest == row["digest"])
    existing = connection.execute(same).mappings().first()
    if existing is not None:
        _add_reports(connection, dict(existing), texts, note)
        return int(existing["version"])
    after = (alias_version(connection, name, LATEST) or 0) + 1
    fresh = {hashlib.sha256(text.encode()).hexdigest(): text for text in texts}
    details = audit.version_details(row, list(fresh))
    entry = Entry(action="register", name=name, before=None, after=after, details=details, **_told(note))
    born = history.append(connection, entry)
    connection.execute(versions_table.insert().values({**row, "version": after, "created": born.time}))
    _insert_reports(connection, name, after, fresh, start=1)
    if after == 1:
        _move(connection, "promote", name, alias=CHAMPION, after=1, note=Note(note.actor, "first version"))
    return after


def promote(connection: Connection, name: str, version: int, *, alias: str, note: Note) -> Change:
    """Let the alias mean this version; see Registry.promote."""
    if alias_version(connection, name, alias) != version:
        return _move(connection, "promote", name, alias=alias, after=version, note=note)
    lines = history.read(connection, name=name, alias=alias)
    if not lines or lines[-1]["after"] != version:
        raise _tampered(name, alias, version)
    since = lines[-1]
    reason = f"nothing changed: {name}@{alias} is version {version} since {since['time']}"
    return history.to_change({**since, "before": version, "reason": reason, "hash": ""})


def rollback(connection: Connection, name: str, *, alias: str, note: Note) -> Change:
    """Let the alias mean what it meant before; see Registry.rollback."""
    before = number(connection, Reference(name, alias=alias))
    stacks, problems = history.replay(history.read(connection, name=name, alias=alias))
    stack = stacks.get((name, alias), [])
    if problems or stack[-1:] != [before]:
        raise _tampered(name, alias, before)
    if len(stack) < 2:
        raise RegistryError(f"{name}@{alias} must have an earlier version to go back to, and {before} is its first")
    return _move(connection, "rollback", name, alias=alias, after=stack[-2], note=note)


def _move(connection: Connection, action: Action, name: str, *, alias: str, after: int, note: Note) -> Change:
    before = alias_version(connection, name, alias)
    this = (aliases_table.c.name == name) & (aliases_table.c.alias == alias)
    if before is None:
        connection.execute(aliases_table.insert().values(name=name, alias=alias, version=after))
    else:
        connection.execute(aliases_table.update().where(this).values(version=after))
    query = select(versions_table.c.digest).where(versions_table.c.name == name, versions_table.c.version == after)
    details = {"digest": connection.execute(query).scalar_one()}
    entry = Entry(action=action, name=name, alias=alias, before=before, after=after, details=details, **_told(note))
    return history.append(connection, entry)


def _add_reports(connection: Connection, version: _Row, texts: Sequence[str], note: Note) -> None:
    """Add those the version does not have. A line of the history fixes them: "register" with before == after."""
    name, held_by = version["name"], version["version"]
    query = select(reports_table.c.digest).where(reports_table.c.name == name, reports_table.c.version == held_by)
    held = list(connection.execute(query).scalars())
    fresh = {hashlib.sha256(text.encode()).hexdigest(): text for text in texts}
    fresh = {digest: text for digest, text in fresh.items() if digest not in held}
    if fresh:
        details = audit.version_details(version, list(fresh))
        entry = Entry(action="register", name=name, before=held_by, after=held_by, details=details, **_told(note))
        history.append(connection, entry)
        _insert_reports(connection, name, held_by, fresh, start=len(held) + 1)


def _insert_reports(connection: Connection, name: str, version: int, fresh: dict[str, str], *, start: int) -> None:
    for index, (digest, content) in enumerate(fresh.items(), start):
        row = {"name": name, "version": version, "number": index, "digest": digest, "content": content}
        connection.execute(reports_table.insert().values(row))


def _told(note: Note) -> dict[str, Any]:
    return {"actor": note.actor, "reason": note.reason}


def _tampered(name: str, alias: str, version: int) -> TamperedHistory:
    return TamperedHistory(
        f"the history of {name}@{alias} must lead to version {version}, and does not: nothing was changed; "
        "see `fettle registry verify`, and restore registry.db from a backup"
    )


def _report(content: str, *, where: str) -> Report:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as problem:
        raise RegistryError(f"{where} is no JSON: {problem}: see `fettle registry verify`") from None
    return codec.from_json(Report, data, where=where, error=RegistryError)


def _unfit(report: Report, problem: str) -> str:
    odd = [f"{m.name} = {m.value!r}" for m in report.measurements if not _fits(m.value)]
    seen = f" ({', '.join(odd)})" if odd else ""
    return f"a report must hold finite Python numbers and plain text{seen}: {problem}"


def _fits(value: object) -> bool:
    # Exactly these: the JSON encoder refuses subclasses such as numpy's float64.
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid {os.getuid()}"
