"""Hashing, and writes that are either whole or absent."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path


def _umask() -> int:
    """The process's umask; it can only be read by setting it, so once, before any thread."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


_UMASK = _umask()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_of(path: Path) -> tuple[int, ...] | None:
    """What differs as soon as the file is another or was written to, without reading it; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev, found.st_mode


def write_atomic(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """Write the file so that a reader, or a crash, sees the old content or the new, never half of it.

    mode: its permissions, by default those of any new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            # mkstemp's 0600 would hide the file from other users
            os.fchmod(file.fileno(), 0o666 & ~_UMASK if mode is None else mode)
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make a rename in this directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
