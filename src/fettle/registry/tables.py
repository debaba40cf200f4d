"""The registry's tables. Versions, reports and history only ever grow, and triggers hold them to it."""

from __future__ import annotations

from sqlalchemy import (
    CheckConstraint,
    Column,
    Connection,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

# In the header of the SQLite file: "fttl", so that another program's database is never taken for a registry.
APPLICATION_ID = 0x6674746C
FORMAT = 1

metadata = MetaData()

versions = Table(
    "versions",
    metadata,
    Column("name", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("digest", Text, nullable=False),
    Column("created", Text, nullable=False),
    Column("runtime", Text, nullable=False),
    Column("precision", Text, nullable=False),
    Column("size_bytes", Integer, nullable=False),
    Column("parent", Text),
    UniqueConstraint("name", "digest"),
    CheckConstraint("version >= 1"),
)

# `digest` is over `content`, which is the canonical JSON of a core.report.Report.
reports = Table(
    "reports",
    metadata,
    Column("name", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("digest", Text, nullable=False),
    Column("content", Text, nullable=False),
    ForeignKeyConstraint(["name", "version"], ["versions.name", "versions.version"]),
    UniqueConstraint("name", "version", "digest"),
)

# What the history replays to, kept so that a server's poll is one look-up.
aliases = Table(
    "aliases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("alias", Text, primary_key=True),
    Column("version", Integer, nullable=False),
    ForeignKeyConstraint(["name", "version"], ["versions.name", "versions.version"]),
)

# `details` is canonical JSON: what the line says beyond a core.version.Change, see history.py.
history = Table(
    "history",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("time", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("name", Text, nullable=False, index=True),
    Column("alias", Text),
    Column("before", Integer),
    Column("after", Integer, nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("details", Text, nullable=False),
    Column("hash", Text, nullable=False),
)

# One row: the last line of the history. Without it, lines cut off the end would not be missed.
head = Table(
    "head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("number", Integer, nullable=False),
    Column("hash", Text, nullable=False),
    CheckConstraint("id = 1"),
)

GROWING = (versions, reports, history)


def guards() -> dict[str, str]:
    """The triggers, by name, that refuse to change or remove a row of a growing table.

    INSERT OR REPLACE removes the old row without firing a delete trigger, so an insert over an existing row is
    refused by a trigger of its own.
    """
    found = {}
    for table in GROWING:
        same = " AND ".join(f"{column.name} = NEW.{column.name}" for column in table.primary_key)
        refuse = f"BEGIN SELECT RAISE(ABORT, '{table.name} only ever grows'); END"
        exists = f"EXISTS (SELECT 1 FROM {table.name} WHERE {same})"
        for event, when in (("UPDATE", ""), ("DELETE", ""), ("INSERT", f"WHEN {exists} ")):
            name = f"{table.name}_refuse_{event.lower()}"
            found[name] = f"CREATE TRIGGER {name} BEFORE {event} ON {table.name} FOR EACH ROW {when}{refuse}"
    return found


def create(connection: Connection) -> None:
    """Make the tables, the triggers and the empty head; the caller's transaction makes it whole or nothing."""
    metadata.create_all(connection)
    for statement in guards().values():
        connection.exec_driver_sql(statement)
    connection.execute(head.insert().values(id=1, number=0, hash=""))
    connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.exec_driver_sql(f"PRAGMA user_version = {FORMAT}")
