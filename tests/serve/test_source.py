"""Sources: a registry's reference, and a folder."""

from types import SimpleNamespace

import pytest

from fettle.core.errors import CorruptArtifact, NotRegistered, UsageError
from fettle.core.names import Reference
from fettle.serve.source import FolderSource, registry_source


class Registry:
    def __init__(self):
        self.opened = []
        self.aliases = {"champion": 2}

    def get(self, reference):
        return SimpleNamespace(version=self.aliases.get("champion", 5))

    def open(self, reference):
        self.opened.append(reference)
        return "artifact"

    def alias_version(self, name, alias):
        return self.aliases.get(alias)


@pytest.mark.parametrize(("text", "version"), [("m", 2), ("m@champion", 2), ("m:7", 7)])
def test_what_a_reference_means(text, version):
    registry = Registry()
    source = registry_source(registry, text)
    assert (source.name, source.current()) == ("m", version)
    assert source.open(version) == "artifact"
    assert registry.opened == [Reference("m", version=version)]


@pytest.mark.parametrize("text", ["m", "m@champion"])
def test_a_promotion_is_followed(text):
    registry = Registry()
    source = registry_source(registry, Reference.parse(text))
    registry.aliases["champion"] = 3
    assert source.current() == 3


def test_an_alias_that_is_not_there():
    with pytest.raises(NotRegistered, match="m@gone"):
        registry_source(Registry(), "m@gone").current()


def test_a_folder(kit, tmp_path):
    artifact = kit.image_artifact(tmp_path / "a")
    source = FolderSource("tiny", tmp_path / "a", version=4)
    assert source.current() == 4
    assert source.open(4).digest == artifact.digest
    with pytest.raises(NotRegistered):
        source.open(5)
    (tmp_path / "a" / "model.onnx").write_bytes(b"")
    with pytest.raises(CorruptArtifact):
        source.open(4)


def test_a_folder_needs_a_good_name(tmp_path):
    with pytest.raises(UsageError):
        FolderSource("../x", tmp_path)


def test_the_real_registry_fits():
    store = pytest.importorskip("fettle.registry.store")
    for name in ("get", "open", "alias_version"):
        assert callable(getattr(store.Registry, name))
