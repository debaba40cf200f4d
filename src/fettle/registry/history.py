r"""The audit log: a chain of lines in which each hash covers its line and the hash before it.

With c the canonical JSON (`core.codec.canonical`) of the line's fields and of the previous hash,

    hash_n = SHA-256(c(line_n, hash_{n-1})),    hash_0 = ""

so changing, inserting, removing or reordering lines breaks every hash that follows, and the head row, which repeats
number and hash of the last line, shows that lines were cut off the end. (S. Haber, W. S. Stornetta, "How to
time-stamp a digital document", Journal of Cryptology 3, 1991.)

An alias is a stack of version numbers: promote pushes, rollback pops. The aliases table repeats the tops.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, select

from fettle.core import codec
from fettle.core.errors import RegistryError, TamperedHistory
from fettle.core.version import Action, Change
from fettle.registry import tables

_COVERED = ("number", "time", "action", "name", "alias", "before", "after", "actor", "reason", "details")

Row = Mapping[str, Any]
Alias = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A line that is about to be written.

    details: what the line fixes beyond a Change: always "digest", of the artifact behind `after`; for "register"
        also the other fields of the version, and "reports", the digests of the reports it adds.
    """

    action: Action
    name: str
    alias: str | None = None
    before: int | None
    after: int
    actor: str
    reason: str
    details: dict[str, Any] = field(default_factory=dict)


def line_hash(line: Row, previous: str) -> str:
    """SHA-256 over the line and the hash before it, as 64 hexadecimal digits.

    >>> line = dict.fromkeys(("number", "time", "action", "name", "alias", "before", "after", "actor", "reason"))
    >>> line_hash({**line, "details": ""}, "") == line_hash({**line, "details": ""}, "0")
    False
    """
    return codec.digest({**{key: line[key] for key in _COVERED}, "previous": previous})


def next_time(previous: datetime | None, now: datetime) -> str:
    """ISO 8601 in UTC with microseconds, always later than the previous line's, even where the clock went back.

    >>> next_time(datetime(2026, 1, 1, microsecond=9, tzinfo=UTC), datetime(2025, 1, 1, tzinfo=UTC))
    '2026-01-01T00:00:00.000010+00:00'
    """
    if previous is not None:
        now = max(now, previous + timedelta(microseconds=1))
    return now.astimezone(UTC).isoformat(timespec="microseconds")


def moment(line: Row) -> datetime:
    """When the line was written. Raises TamperedHistory where its time is none."""
    try:
        return datetime.fromisoformat(line["time"])
    except (TypeError, ValueError):
        raise TamperedHistory(
            f"{describe(line)} must have an ISO 8601 time, got {line['time']!r}: see `fettle registry verify`"
        ) from None


def append(connection: Connection, entry: Entry) -> Change:
    """Write the next line and move the head. Raises TamperedHistory where the log does not end at its head."""
    query = select(tables.history).order_by(tables.history.c.number.desc()).limit(1)
    found = connection.execute(query).mappings().first()
    line: Row | None = None if found is None else dict(found)
    number, previous = (line["number"], line["hash"]) if line is not None else (0, "")
    if _head(connection) != (number, previous):
        raise TamperedHistory(
            "the audit log must end at the line that its head names, and does not: lines were removed or altered. "
            "Nothing was changed; see `fettle registry verify`, and restore registry.db from a backup"
        )
    row: dict[str, Any] = {
        "number": number + 1,
        "time": next_time(None if line is None else moment(line), datetime.now(UTC)),
        "action": entry.action,
        "name": entry.name,
        "alias": entry.alias,
        "before": entry.before,
        "after": entry.after,
        "actor": entry.actor,
        "reason": entry.reason,
        "details": codec.canonical(entry.details).decode(),
    }
    row["hash"] = line_hash(row, previous)
    connection.execute(tables.history.insert().values(row))
    connection.execute(tables.head.update().values(number=row["number"], hash=row["hash"]))
    return to_change(row)


def read(connection: Connection, *, name: str | None = None, alias: str | None = None) -> list[Row]:
    """The lines in order, of one name and one alias where given."""
    query = select(tables.history).order_by(tables.history.c.number)
    if name is not None:
        query = query.where(tables.history.c.name == name)
    if alias is not None:
        query = query.where(tables.history.c.alias == alias)
    # SQLAlchemy's keys are a subclass of str, which the strict codec does not take for one.
    return [{str(key): value for key, value in row.items()} for row in connection.execute(query).mappings()]


def to_change(row: Row) -> Change:
    """The public form of a line. Raises RegistryError for a row no fettle wrote."""
    data = {key: value for key, value in row.items() if key != "details"}
    return codec.from_json(Change, data, where=f"history line {row['number']}", error=RegistryError)


def details_of(row: Row) -> dict[str, Any]:
    """The line's details; empty where they are no JSON object any more, which its hash shows as well."""
    try:
        found = json.loads(row["details"])
    except (TypeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def replay(lines: Iterable[Row]) -> tuple[dict[Alias, list[int]], list[str]]:
    """The stack of every alias after these lines, and what in them contradicts itself.

    >>> line = {"name": "digits", "alias": "champion", "number": 1}
    >>> up = {**line, "action": "promote", "before": None, "after": 1}
    >>> more = {**line, "action": "promote", "before": 1, "after": 2}
    >>> down = {**line, "action": "rollback", "before": 2, "after": 1}
    >>> replay([up, more])[0]
    {('digits', 'champion'): [1, 2]}
    >>> replay([up, more, down])
    ({('digits', 'champion'): [1]}, [])
    """
    stacks: dict[Alias, list[int]] = {}
    problems = []
    for line in lines:
        if line["action"] == "register":
            continue
        stack = stacks.setdefault((line["name"], line["alias"]), [])
        held = stack[-1] if stack else None
        if line["before"] != held:
            problems.append(f"{describe(line)} says it replaced version {line['before']}, where {held} was served")
        if line["action"] == "promote":
            stack.append(line["after"])
            continue
        del stack[-1:]
        if stack[-1:] != [line["after"]]:
            problems.append(f"{describe(line)} went back to version {line['after']}, which was not the one before")
            stack.append(line["after"])
    return stacks, problems


def broken_links(lines: Sequence[Row]) -> list[str]:
    """Where the chain does not hold. After a break it goes on from the stored hash, so one change is one problem."""
    problems = []
    number, previous, time = 0, "", ""
    for line in lines:
        if line["number"] != number + 1:
            gap = f"line {number + 1} is" if line["number"] == number + 2 else f"lines from {number + 1} are"
            problems.append(f"history {gap} missing before line {line['number']}")
        if line_hash(line, previous) != line["hash"]:
            problems.append(f"{describe(line)} does not match its hash: it, or the line before it, was altered")
        if str(line["time"]) <= time:
            problems.append(f"{describe(line)} has the time {line['time']}, not later than {time} of the line before")
        number, previous, time = line["number"], line["hash"], str(line["time"])
    return problems


def missing_tail(connection: Connection, lines: Sequence[Row]) -> list[str]:
    """Whether the last line is the one that the head names."""
    found = (lines[-1]["number"], lines[-1]["hash"]) if lines else (0, "")
    expected = _head(connection)
    if expected is None:
        return ["the head of the history is missing: nothing tells whether lines were removed from its end"]
    if found == expected:
        return []
    if isinstance(expected[0], int) and found[0] < expected[0]:
        return [f"history ends at line {found[0]}, but line {expected[0]} was written: lines were removed from its end"]
    return [f"history ends at line {found[0]}, which is not the line {expected[0]} that its head names"]


def describe(line: Row) -> str:
    """How a message names a line."""
    target = line["name"] if line["alias"] is None else f"{line['name']}@{line['alias']}"
    return f"history line {line['number']} ({line['action']} {target})"


def _head(connection: Connection) -> tuple[int, str] | None:
    row = connection.execute(select(tables.head.c.number, tables.head.c.hash)).first()
    return None if row is None else (row.number, row.hash)
