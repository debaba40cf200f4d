"""What a service may be told, in a TOML file or by `--set KEY=VALUE`: every option by its own name, and nothing else.

The names and types are those that the dataclasses declare, so a new option of ServeOptions is known here at once.
TOML has no null: `false` stands for None where an option may be None.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fettle.core import codec
from fettle.core.errors import UsageError
from fettle.serve.options import ServeOptions

_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
# TOML's own bound. Beyond it Python refuses to write a number down, and sockets and clocks to take it.
_MOST_BITS = 63


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficWords:
    """Which models are served and how their requests are shared, in the words of the command line."""

    models: tuple[str, ...] = ()
    split: tuple[str, ...] = ()
    sticky: str | None = None
    shadow: tuple[str, ...] = ()


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a file, see `settings_of`. Raises UsageError also where it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise UsageError(f"{path} cannot be read: {problem.strerror or problem}") from None
    return settings_of(content, folder=path.absolute().parent, where=str(path))


def settings_of(content: bytes, *, folder: Path, where: str) -> dict[str, Any]:
    """What a TOML file says, by name, as ServeOptions and TrafficWords take it.

    folder: what relative paths are relative to. where: the file's name, for messages. Raises UsageError for what is
    not TOML, an unknown name or a wrong type; a value out of range is found when the options are made.

    >>> settings_of(b'keys = "keys.json"', folder=Path("/etc/fettle"), where="serve.toml")["keys"].as_posix()
    '/etc/fettle/keys.json'
    """
    table = codec.from_toml(content, where=where)
    return _checked(table, folder=folder, where=where)


def assigned(words: Iterable[str]) -> dict[str, Any]:
    """The settings that `--set KEY=VALUE` gives. VALUE is TOML, or else a text as it stands. Raises UsageError.

    >>> assigned(["workers=2", "host=::1", 'admin_names=["a.example"]', "promise_s=false"])
    {'workers': 2, 'host': '::1', 'admin_names': ('a.example',), 'promise_s': None}
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UsageError(f"--set must be KEY=VALUE, as --set workers=2, got {word!r}")
        if key in found:
            raise UsageError(f"--set {key} is given twice")
        found |= _checked({key: _toml_or_text(text)}, folder=Path(), where="--set")
    return found


def resolve(settings: Mapping[str, Any]) -> tuple[TrafficWords, ServeOptions]:
    """What the settings ask for; what they do not say has its default. Raises UsageError for values out of range."""
    of_traffic = {field.name for field in fields(TrafficWords)}
    words = {name: value for name, value in settings.items() if name in of_traffic}
    options = {name: value for name, value in settings.items() if name not in of_traffic}
    return TrafficWords(**words), ServeOptions(**options)


@cache
def _known() -> dict[str, Any]:
    return {**get_type_hints(TrafficWords), **get_type_hints(ServeOptions)}


def _checked(table: Mapping[str, Any], *, folder: Path, where: str) -> dict[str, Any]:
    known, found = _known(), {}
    for key, value in table.items():
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}{codec.nearest(key, list(known))}")
        try:
            found[key] = _converted(value, known[key], folder)
        except _Unfit as problem:
            raise UsageError(f"{where}: {key} must be {problem}") from None
    return found


class _Unfit(Exception):
    """The rest of a sentence: what was expected and what was given."""


def _converted(value: Any, hint: Any, folder: Path) -> Any:
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    absent = NoneType in kinds
    if absent and value is False:
        return None
    (kind,) = (one for one in kinds if one is not NoneType)
    if get_origin(kind) is Literal:
        kind = type(get_args(kind)[0])  # which of them, ServeOptions says
    if get_origin(kind) is tuple:
        return _listed(value, get_args(kind)[0], folder)
    if not _fits(value, kind):
        raise _Unfit(f"{_EXPECTED[kind]}{', or false for none' if absent else ''}, got {_shown(value)}")
    return folder / value if kind is Path else kind(value)


def _listed(value: Any, kind: Any, folder: Path) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _Unfit(f'a list, as ["a", "b"], got {_shown(value)}')
    try:
        return tuple(_converted(one, kind, folder) for one in value)
    except _Unfit as problem:
        raise _Unfit(f"a list, each of it {problem}") from None


def _fits(value: Any, kind: Any) -> bool:
    """Whether it is of this kind; a whole number is a number, but true and false are none."""
    if kind is Path:
        return isinstance(value, str) and value != "" and "\0" not in value
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int):
        return kind in (int, float) and value.bit_length() <= _MOST_BITS
    if isinstance(value, str):
        return kind is str and "\0" not in value
    return type(value) is kind


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    if isinstance(value, bool | str):
        return json.dumps(value)
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"one of more than {_MOST_BITS} bits"
    return str(value)


def _toml_or_text(text: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return table["value"] if len(table) == 1 else text  # more than a value would be another key
