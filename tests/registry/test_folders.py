"""Artifacts laid out for loading: verified every time, mended where they are damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fettle.core.artifact import Artifact
from fettle.core.errors import CorruptArtifact, RegistryError
from fettle.registry import Registry

Make = Callable[..., Artifact]


@pytest.fixture
def folder(registry: Registry, make_artifact: Make) -> Path:
    registry.put("digits", make_artifact())
    return registry.open("digits").root


def test_folder_stays(registry: Registry, folder: Path) -> None:
    assert folder == registry.home.root / "artifacts" / registry.get("digits").digest
    before = (folder / "model.bin").stat().st_ino
    assert registry.open("digits").root == folder
    assert (folder / "model.bin").stat().st_ino == before


def test_folder_and_blob_are_apart(registry: Registry, folder: Path) -> None:
    assert all(path.stat().st_nlink == 1 for path in folder.iterdir())


@pytest.mark.parametrize("name", ["model.bin", "golden.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["altered", "empty", "gone", "link"])
def test_damaged_folder_is_mended(registry: Registry, folder: Path, name: str, damage: str) -> None:
    path = folder / name
    content = path.read_bytes()
    if damage == "link":
        elsewhere = folder.parent.parent / "elsewhere"
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else content[:-1] + bytes([content[-1] ^ 1]))
    assert registry.open("digits").root == folder
    assert path.read_bytes() == content
    assert sorted(found.name for found in folder.iterdir()) == [
        "golden.safetensors",
        "manifest.json",
        "model.bin",
        "shared.json",
    ]
    assert registry.verify() == []


def test_another_artifact_in_its_place(registry: Registry, folder: Path, make_artifact: Make) -> None:
    other = make_artifact(1)
    for path in other.root.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert registry.open("digits").digest == folder.name


@pytest.mark.parametrize("name", ["model.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["altered", "gone"])
def test_damaged_blob_and_folder_are_refused(
    registry: Registry, folder: Path, make_artifact: Make, name: str, damage: str
) -> None:
    artifact = make_artifact()
    hashes = {entry.name: entry.sha256 for entry in artifact.manifest.files} | {"manifest.json": artifact.digest}
    blob = registry.home.blobs / hashes[name][:2] / hashes[name]
    blob.chmod(0o644)
    if damage == "gone":
        blob.unlink()
    else:
        blob.write_bytes(b"x" * blob.stat().st_size)
    assert registry.open("digits").digest == artifact.digest  # the folder is sound: it is what loads
    (folder / name).unlink()
    with pytest.raises(CorruptArtifact, match=f"{name}.*{blob}"):
        registry.open("digits")
    assert any(name in problem for problem in registry.verify())
    registry.put("digits", artifact)
    assert registry.open("digits").digest == artifact.digest
    assert registry.verify() == []


def test_a_file_is_in_the_way(registry: Registry, make_artifact: Make) -> None:
    registry.put("digits", make_artifact())
    (registry.home.root / "artifacts").write_text("not a folder")
    with pytest.raises(RegistryError, match="lay out the artifact"):
        registry.open("digits")
