"""API keys: who may do what with which model. A pure value: no files, no sockets, no protocol.

A key is a random text that its holder sends with each request. Only its SHA-256 is kept: 256 random bits need no slow
hash, and whoever reads the file learns no key.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from typing import Annotated, Literal, get_args

import msgspec

from fettle.core.errors import UsageError
from fettle.core.names import check_name
from fettle.serve.refusal import Refusal, quote

# "read": metadata, metrics and the full health; "admin": to load and unload models, on the admin port only.
Action = Literal["infer", "read", "admin"]
ACTIONS: tuple[Action, ...] = get_args(Action)
PREFIX = "fettle_"
# Every key is compared with each request: so many cost some 20 µs.
MAX_KEYS = 256
MAX_FILE_BYTES = 2**20

_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of a key file. sha256: of the key's text, in hexadecimal.

    models: the names it is good for, or "*" for all. What concerns the whole server (metrics, the list of models) asks
    for the action alone.
    """

    name: str
    sha256: _Digest
    models: Literal["*"] | list[str]
    actions: list[Action]

    def __post_init__(self) -> None:
        check_name(self.name, what="a key's name")
        for model in () if self.models == "*" else self.models:
            check_name(model, what=f"a model of key '{self.name}'")
        if not self.models or not self.actions:
            raise UsageError(f"key '{self.name}' must have at least one model, or '*', and one action")

    def permits(self, model: str | None, action: Action) -> bool:
        """Whether it is good for this. model: None where the whole server is meant."""
        return action in self.actions and (model is None or self.models == "*" or model in self.models)

    def check(self, model: str | None, action: Action) -> str:
        """The key's name. Raises Refusal 403 where it does not permit this."""
        if not self.permits(model, action):
            what = action if model is None else f"{action} of model {quote(model)}"
            raise Refusal(403, f"key '{self.name}' is not good for: {what}")
        return self.name


class Keys:
    """All keys of a server.

    >>> key, text = new_key("ci", models=["digits"], actions=["infer"])
    >>> keys = Keys([key])
    >>> keys.authorize(text, "digits", "infer")
    'ci'
    >>> keys.authorize(text, "digits", "admin")
    Traceback (most recent call last):
    fettle.serve.refusal.Refusal: key 'ci' is not good for: admin of model 'digits'
    """

    def __init__(self, entries: Iterable[Key]) -> None:
        self.entries = tuple(entries)
        self._digests = tuple(bytes.fromhex(entry.sha256) for entry in self.entries)
        names = [entry.name for entry in self.entries]
        if len(set(names)) < len(names) or len(set(self._digests)) < len(names):
            raise UsageError("each key must have a name and a sha256 of its own, got one twice")
        if len(names) > MAX_KEYS:
            raise UsageError(f"there may be at most {MAX_KEYS} keys, got {len(names)}")

    def authorize(self, presented: str | None, model: str | None, action: Action) -> str:
        """The name of the key that was presented, where it permits this.

        presented: what the client sent, None where it sent nothing. model: None where the whole server is meant.
        Raises Refusal 401 for no key or an unknown one, 403 for one that is not good for this.
        """
        return self.identify(presented).check(model, action)

    def identify(self, presented: str | None) -> Key:
        """Raises Refusal 401. Takes the same time wherever the key is in the file, or if it is not."""
        digest = hashlib.sha256((presented or "").encode("utf-8", "replace")).digest()
        found: Key | None = None
        for known, entry in zip(self._digests, self.entries, strict=True):
            if hmac.compare_digest(known, digest):
                found = entry
        if presented is None or found is None:
            what = "an unknown one" if presented is not None else "none"
            raise Refusal(
                401,
                f"this needs an API key, as Authorization: Bearer KEY or X-API-Key: KEY, got {what}",
                headers={"www-authenticate": 'Bearer realm="fettle"'},
            )
        return found

    def may(self, action: Action) -> bool:
        """Whether any key is good for this action."""
        return any(action in entry.actions for entry in self.entries)


def new_key(name: str, *, models: Literal["*"] | list[str], actions: list[Action]) -> tuple[Key, str]:
    """A key of 256 random bits: its entry, and the text for its holder, which nobody can find again."""
    text = PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Key(name=name, sha256=digest, models=models, actions=actions), text
