"""JSON in and out for the frozen dataclasses of `core`, and TOML in: typed, and strict about unknown keys."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import threading
import tomllib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from fettle.core.errors import UsageError

T = TypeVar("T")
# msgspec ends the process where two threads convert to a dataclass for the first time at once: each frees what the
# other uses of its description. A thread may come back, from a __post_init__.
_converting = threading.RLock()


def to_json(value: Any) -> Any:
    """Plain dictionaries, lists and scalars of a dataclass, ready for `json.dumps`."""
    return msgspec.to_builtins(value)


def canonical(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces. Digests are taken over this.

    >>> canonical({"b": 1, "a": [1, 2]})
    b'{"a":[1,2],"b":1}'
    """
    return msgspec.json.encode(to_json(value), order="sorted")


def digest(value: Any) -> str:
    """SHA-256 over the canonical JSON, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical(value)).hexdigest()


def from_toml(content: bytes, *, where: str, error: type[Exception] = UsageError) -> dict[str, Any]:
    """The table of a TOML file. where: the file's name, for messages. Raises `error` for what is none.

    >>> from_toml(b"workers = 2", where="serve.toml")
    {'workers': 2}
    """
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError as problem:
        line = content[: problem.start].count(b"\n") + 1
        raise error(f"{where}: not valid TOML: not UTF-8 (at line {line})") from None
    except RecursionError:
        raise error(f"{where}: not valid TOML: too deep") from None
    except ValueError as problem:  # also a number of thousands of digits
        raise error(f"{where}: not valid TOML: {problem}") from None


def from_json(cls: type[T], data: Any, *, where: str, error: type[Exception] = UsageError) -> T:
    """Build the dataclass `cls` from plain JSON data.

    where: what the data is, for the message, such as "fettle.toml".
    error: the type raised for an unknown key (naming the nearest known one), a missing key or a wrong type.
    """
    refuse_unknown(cls, data, where=where, error=error)
    try:
        with _converting:
            return msgspec.convert(data, cls, strict=True)
    except msgspec.ValidationError as problem:
        raise error(f"{where}: {problem}") from None


def refuse_unknown(cls: Any, data: Any, *, where: str, error: type[Exception] = UsageError, path: str = "") -> None:
    """Raise for the first key of `data` that the dataclass `cls` does not have, at any depth."""
    if dataclasses.is_dataclass(cls) and isinstance(data, Mapping):
        known = get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        for key, value in data.items():
            if key not in names:
                raise error(f"{where}: unknown key '{path}{key}'{nearest(str(key), names)}")
            refuse_unknown(known[key], value, where=where, error=error, path=f"{path}{key}.")
        return
    origin = get_origin(cls)
    if origin in (typing.Union, types.UnionType):
        for option in get_args(cls):
            if dataclasses.is_dataclass(option):
                refuse_unknown(option, data, where=where, error=error, path=path)
    elif origin in (tuple, list) and isinstance(data, list | tuple):
        for index, item in enumerate(data):
            refuse_unknown(get_args(cls)[0], item, where=where, error=error, path=f"{path}{index}.")


def nearest(name: str, known: list[str]) -> str:
    """The end of a message about an unknown name.

    >>> nearest("reisze", ["resize", "crop"])
    "; did you mean 'resize'? Known: crop, resize"
    """
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else "."
    return f"{hint} Known: {', '.join(sorted(known)) or 'none'}"
