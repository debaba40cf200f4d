"""How the requests for one model are shared among its versions: what the user declares, checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from fettle.core.errors import UsageError
from fettle.core.names import check_name
from fettle.serve.source import ModelSource

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}")
_NAMED = ("header", "cookie")
# Of a large payload its ends and its length are its key: hashing 16 MiB would hold the event loop up.
_END_BYTES = 32 * 2**10


@dataclass(frozen=True, slots=True)
class Sticky:
    """What requests that belong together have in common: a header, a cookie or the payload itself.

    >>> Sticky.parse("cookie:session").key_of({"cookie": "theme=dark; session=a1"}, b"")
    b'a1'
    """

    kind: str
    name: str = ""

    def __post_init__(self) -> None:
        if self.kind not in (*_NAMED, "payload"):
            raise UsageError(f"sticky must be header:NAME, cookie:NAME or payload, got {str(self)!r}")
        if self.kind == "payload" and self.name:
            raise UsageError(f"sticky payload takes no name, got {str(self)!r}")
        if self.kind in _NAMED and not _TOKEN.fullmatch(self.name):
            raise UsageError(f"sticky needs a {self.kind}'s name, as in {self.kind}:X-User-Id, got {str(self)!r}")

    @classmethod
    def parse(cls, text: str) -> Sticky:
        """From "header:NAME", "cookie:NAME" or "payload". Raises UsageError."""
        kind, _, name = text.partition(":")
        return cls(kind, name)

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" if self.name else self.kind

    def key_of(self, headers: Mapping[str, str], body: bytes) -> bytes | None:
        """The key of a request, None where it has none. headers: by lower-case name. body: as it was sent."""
        if self.kind == "payload":
            return _digest(body)
        if self.kind == "header":
            value = headers.get(self.name.lower(), "")
        else:
            value = _cookie(headers.get("cookie", ""), self.name)
        return value.encode() if value else None


def _digest(body: bytes) -> bytes:
    found = blake2b(str(len(body)).encode(), digest_size=16)
    if len(body) <= 2 * _END_BYTES:
        found.update(body)
    else:
        found.update(body[:_END_BYTES])
        found.update(body[-_END_BYTES:])
    return found.digest()


def _cookie(text: str, name: str) -> str:
    for pair in text.split(";"):
        key, _, value = pair.partition("=")
        if key.strip() == name:
            return value.strip()
    return ""


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the versions that share a model's requests.

    weight: its share, relative to the weights of the others. label: its name in metrics and `/health`, and for the
    assignment, so it should stay the same from start to start; by default its place among the variants, from 1.
    """

    source: ModelSource
    weight: float = 1.0
    label: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight <= 0:
            raise UsageError(f"a weight must be a positive number, got {self.weight} for {self.label or 'a variant'}")


@dataclass(frozen=True, slots=True)
class Traffic:
    """The versions of one model, all under one name.

    sticky: requests with the same key go to the same variant; None for a well mixed choice for each request.
    shadow: a version that gets a copy of each request, and whose answers are compared and thrown away.

    >>> from fettle.serve.source import FolderSource
    >>> from pathlib import Path
    >>> old, new = (FolderSource("digits", Path(folder), version) for version, folder in enumerate("ab", 1))
    >>> traffic = Traffic((Variant(old, 90), Variant(new, 10)), sticky=Sticky("header", "X-User-Id"))
    >>> traffic.name, [variant.label for variant in traffic.variants]
    ('digits', ['1', '2'])
    """

    variants: tuple[Variant, ...]
    sticky: Sticky | None = None
    shadow: ModelSource | None = None

    def __post_init__(self) -> None:
        if not self.variants:
            raise UsageError("a model needs at least one variant, got none")
        labelled = tuple(
            variant if variant.label else replace(variant, label=str(place))
            for place, variant in enumerate(self.variants, 1)
        )
        object.__setattr__(self, "variants", labelled)
        check_name(self.name, what="a model name")
        names = {variant.source.name for variant in labelled}
        if self.shadow is not None:
            names.add(self.shadow.name)
        if len(names) > 1:
            raise UsageError(f"variants and shadow of a model must have one name, got {', '.join(sorted(names))}")
        labels = [variant.label for variant in labelled]
        if len(set(labels)) < len(labels):
            raise UsageError(f"each variant must have a label of its own, got {', '.join(labels)}")

    @property
    def name(self) -> str:
        """The model's name."""
        return self.variants[0].source.name


Declared = ModelSource | Traffic | Sequence[ModelSource | Traffic]


def declared(models: Declared) -> tuple[Traffic, ...]:
    """One model or several, each as Traffic. Raises UsageError where there is none, or two of one name."""
    several = models if isinstance(models, Sequence) else (models,)
    traffics = tuple(one if isinstance(one, Traffic) else Traffic((Variant(one),)) for one in several)
    if not traffics:
        raise UsageError("a server needs at least one model, got none")
    names = [traffic.name for traffic in traffics]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(
            f"each model may be declared once, got {', '.join(twice)} twice: give its versions as variants"
        )
    return traffics
