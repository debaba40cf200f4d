"""From the words of `fettle serve` to how each model's requests are shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fettle.core.errors import UsageError
from fettle.core.names import Reference
from fettle.serve.source import ModelSource
from fettle.serve.traffic import Sticky, Traffic, Variant


def split_of(text: str) -> tuple[Reference, float]:
    """From "digits@challenger=10": the reference and its percentage. Raises UsageError.

    >>> reference, percent = split_of("digits@challenger=12.5")
    >>> str(reference), percent
    ('digits@challenger', 12.5)
    """
    name, equals, number = text.rpartition("=")
    try:
        percent = float(number)
    except ValueError:
        percent = 0.0
    if not equals or not 0 < percent < 100:
        raise UsageError(
            f"split must be NAME@alias=PERCENT or NAME:version=PERCENT, more than 0 and less than 100, got {text!r}"
        )
    return Reference.parse(name), percent


def traffic_of(
    models: Sequence[str],
    *,
    splits: Sequence[str],
    sticky: str | None,
    shadows: Sequence[str],
    source: Callable[[Reference], ModelSource],
) -> list[Traffic]:
    """One Traffic for each model. source: finds a reference, or raises. Raises UsageError for what cannot be meant."""
    references = [Reference.parse(text) for text in models]
    shares = [split_of(text) for text in splits]
    shadowed = [Reference.parse(text) for text in shadows]
    names = [reference.name for reference in references]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{name} is given twice: share its requests with split {name}@alias=PERCENT")
    for option, given in (("split", [share for share, _ in shares]), ("shadow", shadowed)):
        for reference in given:
            if reference.name not in names:
                raise UsageError(f"{option} {reference}: {reference.name} is not served, give it as a model too")
    if sticky is not None and not shares:
        raise UsageError("sticky keeps requests with one variant of several: give split too")
    key = None if sticky is None else Sticky.parse(sticky)
    return [
        _one(
            reference,
            [share for share in shares if share[0].name == reference.name],
            sticky=key,
            shadows=[shadow for shadow in shadowed if shadow.name == reference.name],
            source=source,
        )
        for reference in references
    ]


def _one(
    reference: Reference,
    shares: list[tuple[Reference, float]],
    *,
    sticky: Sticky | None,
    shadows: list[Reference],
    source: Callable[[Reference], ModelSource],
) -> Traffic:
    rest = 100 - sum(percent for _, percent in shares)
    if rest <= 0:
        raise UsageError(f"split must leave something for {reference}, got {100 - rest:g} % for the others")
    if len(shadows) > 1:
        raise UsageError(f"a model has one shadow, got {' and '.join(str(shadow) for shadow in shadows)}")
    shared = [(reference, rest), *shares]
    return Traffic(
        tuple(Variant(source(one), percent, str(one)) for one, percent in shared),
        sticky=sticky if shares else None,
        shadow=source(shadows[0]) if shadows else None,
    )


def describe(traffics: Sequence[Traffic]) -> str:
    """What is served, in words.

    >>> from fettle.serve.source import FolderSource
    >>> from pathlib import Path
    >>> source = FolderSource("digits", Path("a"))
    >>> describe([Traffic((Variant(source, 90, "digits@champion"), Variant(source, 10, "digits:3")))])
    'digits@champion (90 %), digits:3 (10 %)'
    """
    words = []
    for traffic in traffics:
        several = len(traffic.variants) > 1
        words += [f"{one.label} ({one.weight:g} %)" if several else one.label for one in traffic.variants]
    return ", ".join(words)
