"""Names of models and aliases, and references such as "digits@champion" or "digits:3"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fettle.core.errors import UsageError

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")


def check_name(name: str, *, what: str = "a name", error: type[Exception] = UsageError) -> str:
    """Return the name, or raise: it becomes a folder, a label and a URL part, so its letters are few.

    >>> check_name("cifar-resnet20")
    'cifar-resnet20'
    """
    if not _NAME.fullmatch(name) or ".." in name:
        rule = "must be 1 to 64 of a-z, 0-9, '.', '_' and '-', beginning and ending with a letter or digit"
        raise error(f"{what} {rule}, got {name!r}")
    return name


@dataclass(frozen=True, slots=True)
class Reference:
    """One version of one model: by number, by alias, or (neither) by the default: champion, else the latest.

    >>> Reference.parse("digits@champion")
    Reference(name='digits', alias='champion', version=None)
    >>> str(Reference.parse("digits:3"))
    'digits:3'
    """

    name: str
    alias: str | None = None
    version: int | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """From "name", "name@alias" or "name:version". Raises UsageError."""
        match = re.fullmatch(r"([^@:]+)(?:@([^@:]+)|:([1-9][0-9]{0,8}))?", text)
        if match is None:
            raise UsageError(f"a version must be named NAME, NAME@alias or NAME:number, got {text!r}")
        name, alias, version = match.groups()
        check_name(name, what="a model name")
        if alias is not None:
            check_name(alias, what="an alias")
        return cls(name, alias, int(version) if version else None)

    def __str__(self) -> str:
        if self.alias is not None:
            return f"{self.name}@{self.alias}"
        return self.name if self.version is None else f"{self.name}:{self.version}"
