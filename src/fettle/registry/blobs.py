"""Files by the hash of their content: `blobs/<first two digits>/<SHA-256>`, each whole or absent."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fettle.core import codec
from fettle.core.artifact import MANIFEST, Artifact, FileEntry, Manifest, parse_manifest, verify_file
from fettle.core.errors import ArtifactError, CorruptArtifact, ForeignArtifact
from fettle.core.files import sha256_file, sync_directory
from fettle.registry.failures import disk_failures

_CHUNK_BYTES = 2**20


class BlobStore:
    """The content of every registered artifact.

    A manifest is stored in its canonical form, whose SHA-256 is the artifact's digest: from a digest alone
    everything is found, and everything is checked.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, sha256: str) -> Path:
        """Where the file of this hash is, or would be. Raises CorruptArtifact for what is no hash."""
        check_digest(sha256)
        return self.root / sha256[:2] / sha256

    def add_artifact(self, artifact: Artifact) -> None:
        """Store its files, then its manifest; verified on the way in and again as written.

        Raises CorruptArtifact or ForeignArtifact, and RegistryError where the disk refuses. Storing twice is cheap
        and mends a damaged blob.
        """
        content = canonical_manifest(artifact)
        with disk_failures("store the artifact"):
            for entry in artifact.manifest.files:
                self._add(artifact.root / entry.name, entry)
            entry = FileEntry(name=MANIFEST, sha256=artifact.digest, size_bytes=len(content))
            if not self._keep(entry):
                with self._incoming(entry) as file:
                    file.write(content)

    def holds(self, artifact: Artifact) -> bool:
        """Whether every blob of the artifact is there; a look at the folder, not at the content."""
        hashes = [artifact.digest, *(entry.sha256 for entry in artifact.manifest.files)]
        return all(self.path(sha256).is_file() for sha256 in hashes)

    def manifest(self, digest: str) -> Manifest:
        """The manifest of an artifact. Raises CorruptArtifact naming the blob, RegistryError where the disk refuses."""
        path = self.path(digest)
        if path.is_symlink() or not path.is_file():
            raise CorruptArtifact(f"{MANIFEST} is missing, blob {path}: put the artifact again to mend it")
        with disk_failures(f"read {MANIFEST}"):
            found = sha256_file(path)
            if found != digest:
                raise CorruptArtifact(
                    f"{MANIFEST} must have SHA-256 {digest[:12]}…, got {found[:12]}…, blob {path}: "
                    "put the artifact again to mend it"
                )
            return parse_manifest(path.read_bytes())

    def verify(self, entry: FileEntry) -> None:
        """Raise CorruptArtifact naming file and blob unless the blob is what the entry says."""
        path = self.path(entry.sha256)
        try:
            with disk_failures(f"read {entry.name}"):
                verify_file(path, entry)
        except CorruptArtifact as problem:
            raise CorruptArtifact(f"{problem} (blob {path}; putting the artifact again mends it)") from None

    def files(self) -> Iterator[Path]:
        """Every blob and every leftover of an interrupted write; what is not ours to name is passed over."""
        if not self.root.is_dir():
            return
        for folder in sorted(self.root.iterdir()):
            if re.fullmatch(r"[0-9a-f]{2}", folder.name) and folder.is_dir() and not folder.is_symlink():
                known = re.compile(rf"{folder.name}[0-9a-f]{{62}}|\.{folder.name}[0-9a-f]{{62}}\..+")
                yield from (path for path in sorted(folder.iterdir()) if known.fullmatch(path.name))

    def _add(self, source: Path, entry: FileEntry) -> None:
        verify_file(source, entry)
        if self._keep(entry):
            return
        with self._incoming(entry) as file, source.open("rb") as content:
            shutil.copyfileobj(content, file, _CHUNK_BYTES)

    def _keep(self, entry: FileEntry) -> bool:
        """Whether a sound blob is there already; if so it is made young, out of reach of a collection under way."""
        path = self.path(entry.sha256)
        try:
            verify_file(path, entry)
        except (CorruptArtifact, FileNotFoundError):
            return False
        with suppress(PermissionError, FileNotFoundError):  # another user's blob keeps its age
            os.utime(path)
        return True

    @contextmanager
    def _incoming(self, entry: FileEntry) -> Iterator[BinaryIO]:
        """A file to write the content into; it becomes the blob where it turns out to be what the entry says."""
        target = self.path(entry.sha256)
        make_durable(target.parent)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        aside = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            verify_file(aside, entry)
            # Blobs are shared by versions and never change: a slip of the hand shall not write into one.
            aside.chmod(0o444)
            os.replace(aside, target)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        sync_directory(target.parent)


def check_digest(digest: str) -> None:
    """Raise CorruptArtifact unless it is a SHA-256: a damaged database must not lead out of the folder.

    >>> check_digest("../x")
    Traceback (most recent call last):
    fettle.core.errors.CorruptArtifact: a digest must be 64 hexadecimal digits, got '../x': see `fettle registry verify`
    """
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise CorruptArtifact(f"a digest must be 64 hexadecimal digits, got {digest!r}: see `fettle registry verify`")


def canonical_manifest(artifact: Artifact) -> bytes:
    """The manifest's canonical JSON. Raises unless it reads back as the same manifest and hashes to the digest."""
    content = codec.canonical(artifact.manifest)
    names = [entry.name for entry in artifact.manifest.files]
    if MANIFEST in names or len(set(names)) != len(names):
        raise ForeignArtifact(f"an artifact must name each file once, and no {MANIFEST} among them, got {names}")
    if codec.digest(artifact.manifest) != artifact.digest:
        raise CorruptArtifact(f"the manifest must hash to the digest {artifact.digest[:12]}…: open the artifact again")
    try:
        same = codec.digest(parse_manifest(content)) == artifact.digest
    except ArtifactError:
        same = False
    if not same:
        raise ForeignArtifact(f"{MANIFEST} must read back as it was written: is a number in it not finite?")
    return content


def make_durable(folder: Path) -> None:
    """Make the folder and its parents, so that they survive a power cut."""
    if folder.is_dir():
        return
    make_durable(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_directory(folder.parent)
