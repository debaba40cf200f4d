"""Where the model to serve comes from: something that knows which version is meant now, and can open it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fettle.core.artifact import Artifact
from fettle.core.errors import NotRegistered
from fettle.core.names import Reference, check_name

if TYPE_CHECKING:
    from fettle.core.version import Version


class ModelSource(Protocol):
    """One model by name. Called from one background thread, never from the event loop."""

    @property
    def name(self) -> str:
        """The model's name, as it stands in URLs, labels and the prediction log."""

    def current(self) -> int:
        """The version that should be served now; asked several times a second, so it must be cheap."""

    def open(self, version: int) -> Artifact:
        """The verified artifact of that version. Raises ArtifactError or RegistryError."""


class RegistryView(Protocol):
    """What serving needs of `fettle.registry`."""

    def get(self, reference: Reference | str, /) -> Version: ...

    def open(self, reference: Reference | str, /) -> Artifact: ...

    def alias_version(self, name: str, alias: str, /) -> int | None: ...


class RegistryListing(RegistryView, Protocol):
    """What a catalogue needs besides."""

    def names(self) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class RegistrySource:
    """A reference into a registry: an alias is followed, a number stays as it is.

    A bare name means the champion, else the latest version, as everywhere in fettle.
    """

    registry: RegistryView
    reference: Reference

    @property
    def name(self) -> str:
        """The model's name."""
        return self.reference.name

    def current(self) -> int:
        """The version the reference means now. Raises NotRegistered."""
        if self.reference.version is not None:
            return self.reference.version
        if self.reference.alias is None:
            return self.registry.get(self.reference).version
        version = self.registry.alias_version(self.reference.name, self.reference.alias)
        if version is None:
            raise NotRegistered(f"{self.reference} names no version: promote one with `fettle registry promote`")
        return version

    def open(self, version: int) -> Artifact:
        """The artifact of that version, every hash verified."""
        return self.registry.open(Reference(self.reference.name, version=version))


def registry_source(registry: RegistryView, reference: str | Reference) -> RegistrySource:
    """Serve "name", "name@alias" or "name:version" out of a registry."""
    return RegistrySource(registry, Reference.parse(reference) if isinstance(reference, str) else reference)


@dataclass(frozen=True, slots=True)
class RegistryCatalogue:
    """Every model of a registry, each as its bare name means it: the champion, else the latest version."""

    registry: RegistryListing

    def names(self) -> list[str]:
        """All of them."""
        return self.registry.names()

    def source(self, name: str) -> RegistrySource:
        """Where this model comes from. Raises NotRegistered, or UsageError for what can be no name."""
        reference = Reference(check_name(name, what="a model name"))
        self.registry.get(reference)
        return RegistrySource(self.registry, reference)


@dataclass(frozen=True, slots=True)
class FolderSource:
    """One artifact's folder, as a container image or an edge bundle holds it: a version that never changes."""

    name: str
    root: Path
    version: int = 1

    def __post_init__(self) -> None:
        check_name(self.name, what="a model name")

    def current(self) -> int:
        """The only version there is."""
        return self.version

    def open(self, version: int) -> Artifact:
        """The artifact in the folder, every hash verified."""
        if version != self.version:
            raise NotRegistered(f"{self.name} has only version {self.version} here, got {version}")
        return Artifact.open(self.root)
