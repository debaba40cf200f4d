"""The SQLite file: made whole or not at all, one connection per transaction, every failure in words."""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.pool import NullPool

from fettle.core.errors import RegistryError
from fettle.core.files import sync_directory
from fettle.registry import tables
from fettle.registry.failures import database_failures, disk_failures

BUSY_TIMEOUT_S = 10.0


class Database:
    """Transactions on one SQLite file.

    Each transaction opens and closes a connection of its own (0.2 ms): nothing is shared between threads or carried
    through a fork, and a file restored from a backup is seen at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._reader = _engine(lambda: connect(self.path, self._reading_mode()), begin="BEGIN")
        self._writer = _engine(lambda: connect(self.path, "mode=rw"), begin="BEGIN IMMEDIATE")
        self._absent = _engine(lambda: sqlite3.connect(":memory:", isolation_level=None), begin="BEGIN")

    @property
    def exists(self) -> bool:
        """Whether anything has ever been written. Raises RegistryError where the folder cannot be looked into."""
        with disk_failures("look for the registry"):
            try:
                self.path.stat()
            except FileNotFoundError:
                return False
            return True

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A read transaction, which sees one state throughout. An absent registry reads as an empty one."""
        with database_failures(self.path):
            if not self.exists:
                with self._absent.begin() as connection:
                    tables.create(connection)
                    yield connection
                return
            with self._reader.begin() as connection:
                self._check(connection)
                yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A write transaction: the only one at its time, committed where the block ends without an exception."""
        with database_failures(self.path):
            if not self.exists:
                self._create()
            with self._writer.begin() as connection:
                self._check(connection)
                yield connection

    def _check(self, connection: Connection) -> None:
        application = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
        if application != tables.APPLICATION_ID:
            raise RegistryError(f"{self.path} is another program's database, no fettle registry: move it away")
        found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if found != tables.FORMAT:
            raise RegistryError(
                f"{self.path} must be a registry of format {tables.FORMAT}, got {found}: use the fettle that wrote it"
            )

    def _create(self) -> None:
        """Build the file aside and link it into place: a link, unlike a rename, never replaces what a rival made."""
        aside = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
        with disk_failures("create the registry"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                engine = _engine(lambda: connect(aside, "mode=rwc"), begin="BEGIN IMMEDIATE")
                with engine.begin() as connection:
                    tables.create(connection)
                _turn_on_wal(aside)
                try:
                    os.link(aside, self.path)
                except FileExistsError:
                    return
                sync_directory(self.path.parent)
            finally:
                for leftover in ("", "-journal", "-wal", "-shm"):
                    aside.with_name(aside.name + leftover).unlink(missing_ok=True)

    def _reading_mode(self) -> str:
        """How to open for reading.

        A WAL database needs its folder writable even for a reader, so on a read-only mount SQLite must be told that
        the file does not change. That holds while no writer is at work, and a writer leaves a "-wal" file beside it.
        """
        log = self.path.with_name(self.path.name + "-wal")
        if os.access(self.path.parent, os.W_OK) or log.exists():
            return "mode=rw"
        return "mode=ro&immutable=1"


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """A connection in autocommit, so that the engine's own BEGIN decides what a transaction is."""
    # A path becomes a URI because only a URI can say "do not create"; as_uri escapes '?', '#' and '%'.
    connection = sqlite3.connect(f"{path.as_uri()}?{mode}", uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_S)
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        # WAL with the usual NORMAL can forget the last commits in a power cut; a registry must not.
        connection.execute("PRAGMA synchronous = FULL")
    except BaseException:
        connection.close()
        raise
    return connection


def _turn_on_wal(path: Path) -> None:
    connection = connect(path, "mode=rw")
    try:
        connection.execute("PRAGMA journal_mode = WAL")
    finally:
        connection.close()


def _engine(creator: object, *, begin: str) -> Engine:
    engine = create_engine("sqlite://", creator=creator, poolclass=NullPool)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
    return engine
