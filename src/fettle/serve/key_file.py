"""The file that API keys are kept in: read, followed while a server runs, and changed in one step.

{"keys": [{"name": "ci", "sha256": "<64 hexadecimal digits>", "models": ["digits"], "actions": ["infer"]}]}
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from fettle.core.errors import UsageError
from fettle.core.files import state_of, write_atomic
from fettle.serve.keys import MAX_FILE_BYTES, Key, Keys

_log = logging.getLogger("fettle.serve")
_CHECK_S = 1.0


class _Content(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[Key]


def read_keys(path: Path) -> Keys:
    """The keys in a file. Raises UsageError where there is none, where it is no key file, or where anyone may write."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as problem:
        raise UsageError(f"the key file {path} cannot be read: {problem.strerror or problem}") from None
    if mode & stat.S_IWOTH:
        raise UsageError(f"the key file {path} must not be writable for everyone: chmod 600 it")
    if len(content) > MAX_FILE_BYTES:
        raise UsageError(f"the key file {path} may have at most {MAX_FILE_BYTES} bytes")
    try:
        return Keys(msgspec.json.decode(content, type=_Content).keys)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, UsageError) as problem:
        raise UsageError(f"the key file {path} is not as documented: {str(problem)[:200]}") from None


class KeyFile:
    """The keys of a running server: read again within a second of a change; what cannot be read changes nothing.

    Raises UsageError, like `read_keys`, where the file cannot be used at first.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._seen = state_of(path)
        self._keys = read_keys(path)
        self._due = clock() + _CHECK_S

    @property
    def keys(self) -> Keys:
        """The keys that count now. Costs a look at the clock, and once a second one at the file."""
        now = self._clock()
        if now >= self._due:
            self._due = now + _CHECK_S
            state = state_of(self._path)
            if state != self._seen:
                self._seen = state
                self._read_again()
        return self._keys

    def _read_again(self) -> None:
        try:
            self._keys = read_keys(self._path)
        except UsageError as problem:
            _log.error("the API keys stay as they were: %s", problem)
        else:
            _log.info("the API keys were read again: %d of them", len(self._keys.entries))


def change_keys(path: Path, change: Callable[[tuple[Key, ...]], list[Key]]) -> None:
    """Replace what the file holds, for its owner's eyes only; one change at a time. Raises UsageError.

    change: from the entries there are (none where there is no file yet) to those there should be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = read_keys(path).entries if path.exists() else ()
        after = Keys(change(before)).entries
        content = msgspec.json.format(msgspec.json.encode(_Content(list(after))), indent=2)
        write_atomic(path, content + b"\n", mode=0o600)


def add_key(path: Path, key: Key) -> None:
    """Add an entry. Raises UsageError where its name is taken."""

    def added(before: tuple[Key, ...]) -> list[Key]:
        if key.name in (entry.name for entry in before):
            raise UsageError(f"there is a key '{key.name}' already: remove it first, or choose another name")
        return [*before, key]

    change_keys(path, added)


def remove_key(path: Path, name: str) -> None:
    """Remove an entry; a server that follows the file refuses it within a second. Raises UsageError."""

    def removed(before: tuple[Key, ...]) -> list[Key]:
        names = [entry.name for entry in before]
        if name not in names:
            raise UsageError(f"there is no key {name!r} in {path}; there are: {', '.join(names) or 'none'}")
        return [entry for entry in before if entry.name != name]

    change_keys(path, removed)
