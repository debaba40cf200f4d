"""A registered artifact, and a change of what an alias means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fettle.core.report import Report

Action = Literal["register", "promote", "rollback"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One version of one model. `created` is ISO 8601 in UTC; `parent` the digest it was made from."""

    name: str
    version: int
    digest: str
    created: str
    runtime: str
    precision: str
    size_bytes: int
    parent: str | None = None
    aliases: tuple[str, ...] = ()
    reports: tuple[Report, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One line of the append-only history. `hash` covers this line and the hash of the one before it.

    alias: None for "register"; before, after: version numbers, None where there was none.
    """

    number: int
    time: str
    action: Action
    name: str
    alias: str | None
    before: int | None
    after: int
    actor: str
    reason: str
    hash: str
