"""An artifact: a folder of files that a runtime can load, addressed by the hash of its manifest.

The manifest holds the name, size and SHA-256 of every file, so its own hash fixes all of them. Tensors are
safetensors, graphs are ONNX or JSON; nothing is ever a pickle. `Artifact.open` checks every hash before anything
is parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from fettle.core import codec, plugins
from fettle.core.errors import CorruptArtifact, ForeignArtifact
from fettle.core.files import sha256_file, write_atomic
from fettle.core.recipe import Recipe
from fettle.core.signature import Array, Signature

if TYPE_CHECKING:
    from fettle.core.runner import Runner

FORMAT = 1
MANIFEST = "manifest.json"
GOLDEN = "golden.safetensors"
REFERENCE = "reference.safetensors"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_MANIFEST_LIMIT_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of an artifact; `name` is plain, never a path."""

    name: str
    sha256: str
    size_bytes: int

    def __post_init__(self) -> None:
        if not _FILE_NAME.fullmatch(self.name) or not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ForeignArtifact(f"a file entry must be a plain name with a SHA-256, got {self.name!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything there is to say of an artifact, as one JSON file.

    runtime: the plug-in of `fettle.runtime` that loads it; precision: "float", "int8", ...
    tolerance: largest absolute difference from the golden outputs that still counts as the same answer.
    left_float: what could not be quantized and why, one sentence each.
    provenance: parent digest, data digests, versions, hardware; strings only, and no time, so that the same
        work gives the same digest.
    """

    runtime: str
    precision: str
    signature: Signature
    files: tuple[FileEntry, ...]
    recipe: Recipe
    tolerance: float = 1e-3
    left_float: tuple[str, ...] = ()
    provenance: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A verified folder. `digest` is the SHA-256 of the canonical manifest."""

    digest: str
    manifest: Manifest
    root: Path

    @classmethod
    def seal(
        cls,
        root: Path,
        manifest: Manifest,
        *,
        golden: Mapping[str, Array],
        reference: Mapping[str, Array] | None = None,
    ) -> Artifact:
        """Finish the folder that a runtime exported into: add golden and reference tensors, hash, write the manifest.

        golden: arrays named "input:<name>" and "output:<name>", a few rows each.
        reference: what the monitor compares with: "probabilities" and "statistics", taken on validation data.
        manifest: its `files` are replaced by what the folder holds.
        """
        safetensors.numpy.save_file({key: np.array(golden[key], order="C") for key in golden}, root / GOLDEN)
        if reference is not None:
            packed = {key: np.array(reference[key], order="C") for key in reference}
            safetensors.numpy.save_file(packed, root / REFERENCE)
        for path in root.iterdir():
            path.chmod(0o644)  # a container's user must be able to read what the builder wrote
        files = tuple(
            FileEntry(name=path.name, sha256=sha256_file(path), size_bytes=path.stat().st_size)
            for path in sorted(root.iterdir())
            if path.name != MANIFEST
        )
        whole = codec.from_json(Manifest, {**codec.to_json(manifest), "files": codec.to_json(files)}, where=MANIFEST)
        content = codec.canonical(whole)
        write_atomic(root / MANIFEST, content)
        return cls.open(root)

    @classmethod
    def open(cls, root: Path) -> Artifact:
        """Read and verify. Raises ForeignArtifact or CorruptArtifact; parses nothing before its hash is right."""
        path = root / MANIFEST
        if not path.is_file():
            raise ForeignArtifact(f"an artifact is a folder with a {MANIFEST}, got {root}")
        if path.stat().st_size > _MANIFEST_LIMIT_BYTES:
            raise ForeignArtifact(
                f"{MANIFEST} must be at most {_MANIFEST_LIMIT_BYTES} bytes, got {path.stat().st_size}"
            )
        manifest = parse_manifest(path.read_bytes())
        for entry in manifest.files:
            verify_file(root / entry.name, entry)
        return cls(digest=codec.digest(manifest), manifest=manifest, root=root)

    @property
    def size_bytes(self) -> int:
        """What a deployment must carry to answer: the model's files, without golden and reference tensors."""
        return sum(entry.size_bytes for entry in self.manifest.files if entry.name not in (GOLDEN, REFERENCE))

    def golden(self) -> dict[str, Array]:
        """Golden tensors, named "input:<name>" and "output:<name>"."""
        return self._tensors(GOLDEN)

    def reference(self) -> dict[str, Array] | None:
        """What the monitor compares with, or None where optimize stored none."""
        held = any(entry.name == REFERENCE for entry in self.manifest.files)
        return self._tensors(REFERENCE) if held else None

    def load(self, *, threads: int = 1) -> Runner:
        """A runner from numpy arrays to numpy arrays, on `threads` threads.

        Raises MissingExtra where the runtime is not installed.
        """
        from fettle.core.runner import RuntimeBase

        runtime = plugins.load("fettle.runtime", self.manifest.runtime, RuntimeBase)
        return runtime().load(self, threads=threads)

    def _tensors(self, name: str) -> dict[str, Array]:
        try:
            return safetensors.numpy.load_file(self.root / name)
        except (OSError, safetensors.SafetensorError) as problem:
            raise CorruptArtifact(f"{name} of artifact {self.digest[:12]} cannot be read: {problem}") from None


def parse_manifest(content: bytes) -> Manifest:
    """The manifest in this JSON text. Raises ForeignArtifact."""
    try:
        data: Any = json.loads(content)
    except (ValueError, RecursionError):
        raise ForeignArtifact(f"{MANIFEST} must be JSON, got {content[:16]!r}...") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        got = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ForeignArtifact(f"{MANIFEST} must have format {FORMAT}, got {got}: written by another fettle?")
    return codec.from_json(Manifest, data, where=MANIFEST, error=ForeignArtifact)


def verify_file(path: Path, entry: FileEntry) -> None:
    """Raise CorruptArtifact unless the file has the size and the hash of its entry."""
    if path.is_symlink() or not path.is_file():
        raise CorruptArtifact(f"{entry.name} is missing from the artifact: fetch or build it again")
    size = path.stat().st_size
    if size != entry.size_bytes:
        raise CorruptArtifact(f"{entry.name} must have {entry.size_bytes} bytes, got {size}: fetch or build it again")
    found = sha256_file(path)
    if found != entry.sha256:
        raise CorruptArtifact(
            f"{entry.name} must have SHA-256 {entry.sha256[:12]}…, got {found[:12]}…: fetch or build it again"
        )
