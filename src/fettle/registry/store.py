"""The embedded registry: which versions of a model there are, which one serves, and who decided that."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from datetime import datetime

from sqlalchemy import select

from fettle.core.artifact import Artifact
from fettle.core.errors import RegistryError, UsageError
from fettle.core.home import Home
from fettle.core.names import Reference, check_name
from fettle.core.report import Report
from fettle.core.version import Change, Version
from fettle.registry import audit, history, records, sweep, tables
from fettle.registry.blobs import BlobStore
from fettle.registry.database import Database
from fettle.registry.failures import disk_failures
from fettle.registry.folders import ArtifactFolders
from fettle.registry.records import CHAMPION, LATEST, Note

DAY_S = 86400.0


class Registry:
    """Versions, aliases, reports and history in one SQLite file; files in a content-addressed folder beside it.

    Nothing is created on disk before the first `put`; reading an absent registry finds it empty. Any number of
    threads and processes of one machine may use it at once: every change is one transaction.

    Every method raises RegistryError where the database or the disk refuses, and nothing has changed then.

    >>> import tempfile
    >>> from pathlib import Path
    >>> registry = Registry(Home(Path(tempfile.gettempdir()) / "no-such-home"))
    >>> registry.names(), registry.alias_version("digits", "champion")
    ([], None)
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        self._database = Database(home.database)
        self._blobs = BlobStore(home.blobs)
        self._folders = ArtifactFolders(home.root / "artifacts", self._blobs)

    def put(
        self,
        name: str,
        artifact: Artifact,
        *,
        reports: Iterable[Report] = (),
        parent: str | None = None,
        actor: str = "",
        reason: str = "",
    ) -> Version:
        """Register the artifact as the next version of this model; the very first becomes champion.

        parent: the digest it was made from; by default what its provenance says.
        actor: who does it; by default the user of the operating system.

        The same digest again is the version it was, with the reports that are new added. Files are verified, and
        are all on disk before the one transaction that makes the version: a kill at any moment leaves the whole
        version, or none and some blobs for `gc`. Raises CorruptArtifact, ForeignArtifact, UsageError.
        """
        check_name(name, what="a model name")
        row = {"name": name, "digest": artifact.digest, **audit.version_facts(artifact)}
        row["parent"] = records.lineage(artifact, parent)
        note, texts = Note.of(actor, reason), records.report_texts(reports)
        for _ in range(3):
            self._blobs.add_artifact(artifact)
            with self._database.writing() as connection:
                # A collection holds the same lock while it removes, so what is here now stays.
                if self._blobs.holds(artifact):
                    number = records.register(connection, row, texts, note)
                    return records.version(connection, name, number)
        raise RegistryError(f"blobs of {name} disappear from {self.home.blobs} while they are put: what removes them?")

    def get(self, reference: Reference | str) -> Version:
        """The version meant: by number, by alias, or by name alone the champion, else the latest.

        "latest" serves as an alias of the highest number. Raises NotRegistered, UsageError.
        """
        reference = Reference.parse(reference) if isinstance(reference, str) else reference
        check_name(reference.name, what="a model name")
        if reference.alias is not None:
            check_name(reference.alias, what="an alias")
        with self._database.reading() as connection:
            return records.version(connection, reference.name, records.number(connection, reference))

    def open(self, reference: Reference | str) -> Artifact:
        """The artifact, laid out under `artifacts/` in the home and verified, every hash of it, every time.

        A damaged or missing folder is mended from the blobs. Raises CorruptArtifact naming the file where the blob
        is damaged too, and NotRegistered.
        """
        return self._folders.open(self.get(reference).digest)

    def versions(self, name: str) -> list[Version]:
        """All versions of this model, the oldest first; empty for an unknown name."""
        with self._database.reading() as connection:
            return records.versions(connection, check_name(name, what="a model name"))

    def names(self) -> list[str]:
        """Every registered model, in order."""
        with self._database.reading() as connection:
            return records.names(connection)

    def aliases(self, name: str) -> dict[str, int]:
        """Version number by alias, in order of the alias."""
        with self._database.reading() as connection:
            return records.aliases(connection, check_name(name, what="a model name"))

    def alias_version(self, name: str, alias: str) -> int | None:
        """The version number an alias means now, or None: one look-up, cheap enough to poll (below 1 ms)."""
        check_name(name, what="a model name")
        check_name(alias, what="an alias")
        with self._database.reading() as connection:
            return records.alias_version(connection, name, alias)

    def promote(self, name: str, version: int, *, alias: str = CHAMPION, actor: str = "", reason: str = "") -> Change:
        """Let the alias mean this version from now on, and write down who did it and why.

        Where it does already nothing is written, and the Change says so: `before == after`, an empty `hash`, and
        number, time and actor of the line that made it so. A deployment that is run again then succeeds, without a
        line in the history and without a second step for `rollback` to undo.
        Raises NotRegistered for an unknown name or version, UsageError for the alias "latest".
        """
        note = Note.of(actor, reason)
        _check_movable(alias)
        if type(version) is not int:
            raise UsageError(f"a version to promote must be a number, got {version!r}")
        self._require(Reference(name, version=version))
        with self._database.writing() as connection:
            return records.promote(connection, name, version, alias=alias, note=note)

    def rollback(self, name: str, *, alias: str = CHAMPION, actor: str = "", reason: str = "") -> Change:
        """Let the alias mean what it meant before its last promotion; again, what it meant before that.

        Raises NotRegistered for an unknown name or alias, RegistryError where there is nothing to go back to, and
        TamperedHistory where the history does not lead to what the alias means.
        """
        note = Note.of(actor, reason)
        _check_movable(alias)
        self._require(Reference(name))
        with self._database.writing() as connection:
            return records.rollback(connection, name, alias=alias, note=note)

    def history(self, name: str | None = None, *, alias: str | None = None) -> list[Change]:
        """Every change in order, the oldest first; of one model and of one alias where given."""
        if name is not None:
            check_name(name, what="a model name")
        if alias is not None:
            check_name(alias, what="an alias")
        with self._database.reading() as connection:
            return [history.to_change(row) for row in history.read(connection, name=name, alias=alias)]

    def served_at(self, name: str, when: datetime, *, alias: str = CHAMPION) -> Version | None:
        """The version the alias meant at that moment, or None where it meant none yet.

        when: with a time zone, or UsageError: a naive time would be another moment on another machine.
        """
        if when.tzinfo is None:
            raise UsageError(f"the moment must have a time zone, such as datetime.now(UTC), got {when.isoformat()}")
        check_name(name, what="a model name")
        check_name(alias, what="an alias")
        with self._database.reading() as connection:
            lines = history.read(connection, name=name, alias=alias)
            past = [line for line in lines if history.moment(line) <= when]
            return records.version(connection, name, past[-1]["after"]) if past else None

    def verify(self, *, anchor: str | None = None) -> list[str]:
        """Read everything; say in words what was altered, removed or does not fit together. Empty is well.

        anchor: the `hash` of a change noted down earlier, somewhere else; it must still be in the history.

        It checks the chain of the history and its head, the triggers that refuse changes, every version, report and
        alias against the history, and every blob against its hash. It finds any edit that does not also redo the
        chain: a slip, a damaged disk, a row changed by hand. Who can write the files and knows this code can
        compute a new chain and head, and against that only an anchor kept out of their reach helps; likewise only
        an anchor shows that the whole folder was put back to an older state. Actors are what callers say they are.
        """
        try:
            with self._database.reading() as connection:
                problems = audit.database_problems(connection, anchor=anchor)
                versions = [dict(row) for row in connection.execute(select(tables.versions)).mappings()]
            return problems + list(audit.blob_problems(versions, self._blobs))
        except RegistryError as problem:
            return [str(problem)]

    def gc(self, *, dry_run: bool = True, age_s: float = DAY_S) -> list[str]:
        """Remove the blobs and laid-out folders that no version has; return their paths within the home.

        dry_run: only say what would go. age_s: spare what changed in the last so many seconds, since a `put` under
        way has blobs without a version. Versions are never removed, nor anything one of them needs.
        Raises RegistryError where a manifest cannot be read, or where blobs have lost their database.
        """
        if not (age_s >= 0 and math.isfinite(age_s)):
            raise UsageError(f"age_s must be a number of seconds, 0 or more, got {age_s}")
        if not self._database.exists:
            if any(self._blobs.files()):
                raise RegistryError(
                    f"{self.home.database} is gone, and without it every blob looks like garbage: restore it first"
                )
            return []
        with self._database.reading() if dry_run else self._database.writing() as connection:
            live = frozenset(connection.execute(select(tables.versions.c.digest)).scalars())
            with disk_failures("look for garbage"):
                candidates = sweep.garbage(self.home, self._blobs, self._folders, live)
                found = sweep.older_than(candidates, time.time() - age_s)
            if not dry_run:
                sweep.remove(found)
        return [path.relative_to(self.home.root).as_posix() for path in found]

    def _require(self, reference: Reference) -> None:
        """Raise NotRegistered without creating anything, and without reading reports: a rollback needs none."""
        check_name(reference.name, what="a model name")
        with self._database.reading() as connection:
            records.number(connection, reference)


def _check_movable(alias: str) -> None:
    if check_name(alias, what="an alias") == LATEST:
        raise UsageError("'latest' always means the highest version and cannot be moved: choose another alias")
