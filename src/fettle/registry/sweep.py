"""Finds and removes what no version needs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from fettle.core.errors import ArtifactError, RegistryError
from fettle.core.home import Home
from fettle.registry.blobs import BlobStore
from fettle.registry.failures import disk_failures
from fettle.registry.folders import ArtifactFolders


def garbage(home: Home, blobs: BlobStore, folders: ArtifactFolders, live: frozenset[str]) -> Iterator[Path]:
    """Blobs, folders and leftovers of interrupted writes that belong to no artifact among `live`, by digest.

    Raises RegistryError where the manifest of a live artifact cannot be read: what it needs is then unknown.
    """
    needed = set(live)
    for digest in live:
        try:
            needed.update(entry.sha256 for entry in blobs.manifest(digest).files)
        except ArtifactError as problem:
            raise RegistryError(
                f"garbage can be told only where every version's manifest can be read: {problem}. Nothing was removed"
            ) from None
    yield from (path for path in blobs.files() if path.name not in needed)
    yield from folders.garbage(live)
    yield from sorted(home.root.glob(f".{home.database.name}.*"))


def older_than(paths: Iterable[Path], moment_s: float) -> list[Path]:
    """Those last changed before this moment, in seconds since the epoch."""
    found = []
    for path in paths:
        try:
            changed_s = path.lstat().st_mtime
        except FileNotFoundError:
            continue
        if changed_s < moment_s:
            found.append(path)
    return found


def remove(paths: Iterable[Path]) -> None:
    """Remove files and whole folders; what is gone already is no failure."""
    for path in paths:
        with disk_failures(f"remove {path}"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
