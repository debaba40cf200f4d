"""Artifacts laid out as folders, so that a runtime can load them: `artifacts/<digest>`, mended from the blobs.

The files are copies. Hard links would save their size once more, and would let one stray write into a folder
damage the blob behind it, and with it every version that shares the blob and the only thing the folder could be
mended from. Compressed models are small; two independent copies are worth their bytes.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fettle.core import codec
from fettle.core.artifact import MANIFEST, Artifact, FileEntry, verify_file
from fettle.core.errors import ArtifactError, CorruptArtifact
from fettle.registry.blobs import BlobStore, check_digest
from fettle.registry.failures import disk_failures

_KNOWN = re.compile(r"[0-9a-f]{64}")


class ArtifactFolders:
    """Folders that `Artifact.open` accepts. Each is a cache: what it holds is also in the blobs."""

    def __init__(self, root: Path, blobs: BlobStore) -> None:
        self.root = root
        self._blobs = blobs

    def open(self, digest: str) -> Artifact:
        """The verified folder of an artifact: laid out first where it is absent, mended where it is damaged.

        Every file is hashed every time. Raises CorruptArtifact naming file and blob where neither the folder nor the
        blob is sound, and RegistryError where the disk refuses.
        """
        check_digest(digest)
        with suppress(ArtifactError, FileNotFoundError):
            return self._opened(digest)
        with disk_failures(f"lay out the artifact in {self.root}"):
            self._mend(digest)
            return self._opened(digest)

    def garbage(self, live: frozenset[str]) -> Iterator[Path]:
        """The folders of artifacts other than these, and what an interrupted write left in the others."""
        if not self.root.is_dir():
            return
        for folder in sorted(self.root.iterdir()):
            if not _KNOWN.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
                continue
            if folder.name not in live:
                yield folder
            else:
                # The files of an artifact never begin with a dot.
                yield from sorted(folder.glob(".*.*"))

    def _opened(self, digest: str) -> Artifact:
        artifact = Artifact.open(self.root / digest)
        if artifact.digest != digest:
            raise CorruptArtifact(
                f"{MANIFEST} in {self.root / digest} must have digest {digest[:12]}…: it was replaced"
            )
        return artifact

    def _mend(self, digest: str) -> None:
        """Replace what is missing or damaged, file by file, the manifest last.

        Each file is whole or absent, and without its manifest a folder is no artifact: several processes may do
        this at once, one may die in the middle, and a server that loads from the folder never finds it gone.
        """
        folder = self.root / digest
        manifest = self._blobs.manifest(digest)
        folder.mkdir(parents=True, exist_ok=True)
        for entry in manifest.files:
            try:
                verify_file(folder / entry.name, entry)
            except (CorruptArtifact, FileNotFoundError):
                self._blobs.verify(entry)
                self._replace(folder / entry.name, entry)
        size_bytes = len(codec.canonical(manifest))
        self._replace(folder / MANIFEST, FileEntry(name=MANIFEST, sha256=digest, size_bytes=size_bytes))

    def _replace(self, target: Path, entry: FileEntry) -> None:
        # No fsync: a folder that a power cut leaves half-written is found by its hashes and mended.
        aside = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        try:
            shutil.copyfile(self._blobs.path(entry.sha256), aside)
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
