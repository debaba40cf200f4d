"""The folder of one run. Two runs in one folder would mix their files, so a run holds a lock on it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fettle.core.errors import RegistryError
from fettle.core.home import Home


@contextmanager
def run_folder(home: Home, name: str) -> Iterator[Path]:
    """`runs/<name>`, for this run alone; the system frees the lock of a process that was killed.

    Raises RegistryError where another run holds it.
    """
    root = home.runs / name
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RegistryError(
                f"one run of '{name}' at a time, got a second one in {root}: wait for the first, or set another "
                "FETTLE_HOME"
            ) from None
        yield root
