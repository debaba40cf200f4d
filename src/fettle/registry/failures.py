"""How a disk and a database fail, in words a user can act on."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from fettle.core.errors import RegistryError

_ADVICE = {
    errno.ENOSPC: "free some space and run it again",
    errno.EDQUOT: "raise the quota or free some space and run it again",
    errno.EACCES: "give this user the right to write there, or set FETTLE_HOME to another folder",
    errno.EPERM: "give this user the right to write there, or set FETTLE_HOME to another folder",
    errno.EROFS: "the file system is read-only: set FETTLE_HOME to a folder on another one",
    errno.EEXIST: "a file is where a folder must be: move it away",
    errno.ENOTDIR: "a file is where a folder must be: move it away",
    errno.EISDIR: "a folder is where a file must be: move it away",
    errno.EIO: "the disk reports an error: restore the folder from a backup",
}

# The beginning of SQLite's message, and what it means here.
_DATABASE = {
    "file is not a database": "is no SQLite file: move it away, or restore it from a backup",
    "database disk image is malformed": "is damaged: restore it from a backup; the blobs beside it are untouched",
    "malformed database schema": "is damaged: restore it from a backup; the blobs beside it are untouched",
    "unable to open database file": "cannot be opened: check that this user may read it and write its folder",
    "attempt to write a readonly database": "cannot be written by this user: give the right to write it and its folder",
    "database is locked": "stayed locked by another process for 10 s: run it again",
    "database or disk is full": "cannot grow, the disk is full: free some space and run it again; nothing changed",
    "disk I/O error": "cannot be read or written, the disk reports an error: check the disk; nothing changed",
}


@contextmanager
def disk_failures(doing: str) -> Iterator[None]:
    """Turn an OSError of the block into a RegistryError; `doing` says what was under way."""
    try:
        yield
    except OSError as problem:
        where = f" ({problem.filename})" if problem.filename is not None else ""
        advice = _ADVICE.get(problem.errno or 0, "check the disk and the rights of this folder")
        raise RegistryError(f"cannot {doing}: {problem.strerror or problem}{where}: {advice}") from problem


@contextmanager
def database_failures(path: Path) -> Iterator[None]:
    """Turn an error of the database driver into a RegistryError that names the file."""
    try:
        yield
    except DBAPIError as problem:
        said = str(problem.orig)
        meaning = next((text for start, text in _DATABASE.items() if said.startswith(start)), None)
        raise RegistryError(f"{path} {meaning or f'answered: {said}: restore it from a backup'}") from problem
    except UnicodeDecodeError as problem:  # the driver fails so where SQLite's message quotes damaged text
        raise RegistryError(f"{path} {_DATABASE['malformed database schema']}") from problem
