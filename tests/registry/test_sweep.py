"""Garbage collection takes what no version needs, and nothing else."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fettle.core.artifact import Artifact
from fettle.core.errors import RegistryError, UsageError
from fettle.registry import Registry
from fettle.registry.blobs import BlobStore

Make = Callable[..., Artifact]
DAY_S = 86400.0


def age(path: Path, seconds: float) -> None:
    moment = time.time() - seconds
    os.utime(path, (moment, moment))


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def orphans(registry: Registry, make_artifact: Make) -> set[str]:
    """One version in use and laid out, and the old remains of an artifact that was never registered."""
    registry.put("digits", make_artifact())
    registry.open("digits")
    before = files(registry.home.root)
    BlobStore(registry.home.blobs).add_artifact(make_artifact(1))
    new = files(registry.home.root) - before
    for path in registry.home.root.rglob("*"):
        age(path, 2 * DAY_S)
    return new


def test_orphan_blobs(registry: Registry, orphans: set[str]) -> None:
    whole = files(registry.home.root)
    assert len(orphans) == 2  # model and manifest; the shared files belong to digits:1 too
    assert set(registry.gc()) == orphans
    assert files(registry.home.root) == whole
    assert set(registry.gc(dry_run=False)) == orphans
    assert files(registry.home.root) == whole - orphans
    assert registry.gc(dry_run=False) == []
    assert registry.verify() == []
    assert registry.open("digits").digest == registry.get("digits").digest


def test_age_protects(registry: Registry, orphans: set[str]) -> None:
    young = sorted(orphans)[0]
    age(registry.home.root / young, DAY_S - 600)
    assert set(registry.gc(dry_run=False)) == orphans - {young}
    assert registry.gc(age_s=DAY_S - 1200) == [young]


def test_blobs_used_again_are_young(registry: Registry, orphans: set[str], make_artifact: Make) -> None:
    registry.put("digits", make_artifact(1))
    assert registry.gc(age_s=0) == []


def test_every_version_is_kept(registry: Registry, make_artifact: Make) -> None:
    for seed in range(4):
        registry.put("digits", make_artifact(seed))
        registry.open(f"digits:{seed + 1}")
    registry.promote("digits", 4)
    registry.rollback("digits")
    assert registry.gc(dry_run=False, age_s=0) == []
    assert [registry.open(f"digits:{number}").digest for number in range(1, 5)]


def test_folders_and_leftovers(registry: Registry, orphans: set[str]) -> None:
    home = registry.home
    folder = home.root / "artifacts" / ("a" * 64)
    (folder / "sub").mkdir(parents=True)
    (folder / "model.bin").write_text("x")
    digest = registry.get("digits").digest
    leftovers = [
        folder,
        home.root / "artifacts" / digest / ".model.bin.0011223344556677",
        home.blobs / digest[:2] / f".{digest}.x7f",
        home.root / ".registry.db.0011223344556677",
    ]
    for path in leftovers[1:]:
        path.write_text("half")
    for path in leftovers:
        age(path, 2 * DAY_S)
    expected = orphans | {path.relative_to(home.root).as_posix() for path in leftovers}
    assert set(registry.gc(dry_run=False)) == expected
    assert not any(path.exists() for path in leftovers)
    assert registry.verify() == []


def test_what_is_not_ours_stays(registry: Registry, orphans: set[str], tmp_path: Path) -> None:
    home = registry.home
    strangers = [
        home.blobs / "README",
        home.blobs / "ab" / "notes.txt",
        home.blobs / "ab" / ("cd" * 32),  # a hash in the wrong folder
        home.root / "artifacts" / "mine" / "x",
        home.root / "runs" / "1" / "report.html",
        home.root / "registry.db.backup",
        home.root / "observations" / "digits" / "a.parquet",
    ]
    for path in strangers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("keep me")
        age(path, 9 * DAY_S)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (home.root / "artifacts" / ("b" * 64)).symlink_to(outside)
    (home.blobs / "ff").symlink_to(outside) if not (home.blobs / "ff").exists() else None
    assert set(registry.gc(dry_run=False, age_s=0)) == orphans
    assert all(path.read_text() == "keep me" for path in strangers)
    assert (outside / "precious").exists()


def test_an_unreadable_manifest_stops_it(registry: Registry, orphans: set[str]) -> None:
    digest = registry.get("digits").digest
    blob = registry.home.blobs / digest[:2] / digest
    blob.unlink()
    before = files(registry.home.root)
    for dry_run in (True, False):
        with pytest.raises(RegistryError, match="every version's manifest can be read"):
            registry.gc(dry_run=dry_run)
    assert files(registry.home.root) == before


def test_a_lost_database_stops_it(registry: Registry, orphans: set[str]) -> None:
    shutil.move(registry.home.database, registry.home.root / "elsewhere")
    with pytest.raises(RegistryError, match="without it every blob looks like garbage"):
        registry.gc(dry_run=False)
    shutil.move(registry.home.root / "elsewhere", registry.home.database)
    assert registry.verify() == []


@pytest.mark.parametrize("age_s", [-1.0, float("nan"), float("inf")])
def test_bad_age(registry: Registry, age_s: float) -> None:
    with pytest.raises(UsageError, match="age_s must be"):
        registry.gc(age_s=age_s)


def test_a_put_survives_a_collection_between_its_steps(
    registry: Registry, make_artifact: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blobs are written, then collected as garbage, and only then comes the transaction."""
    registry.put("digits", make_artifact())
    plain = BlobStore.add_artifact
    swept = []

    def swept_once(store: BlobStore, artifact: Artifact) -> None:
        plain(store, artifact)
        if not swept:
            swept.extend(registry.gc(dry_run=False, age_s=0))

    monkeypatch.setattr(BlobStore, "add_artifact", swept_once)
    assert registry.put("digits", make_artifact(1)).version == 2
    assert len(swept) == 2
    assert registry.verify() == []


def test_blobs_that_never_stay(registry: Registry, make_artifact: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.put("digits", make_artifact())
    monkeypatch.setattr(BlobStore, "holds", lambda *_: False)
    with pytest.raises(RegistryError, match="what removes them"):
        registry.put("digits", make_artifact(1))
    assert [version.version for version in registry.versions("digits")] == [1]
