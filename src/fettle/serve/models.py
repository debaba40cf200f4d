"""Which models this server has, by name, and which version of one answers a request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fettle.serve.lanes import Mounted
from fettle.serve.refusal import Refusal, quote
from fettle.serve.switch import Switch


class Deployment:
    """One model: the switch that follows what its name means now."""

    def __init__(self, name: str, switch: Switch) -> None:
        self.name = name
        self.switch = switch

    def choose(self, version: str = "") -> Mounted:
        """The version that answers; while draining too. version: the one that is asked for, "" for any.

        Raises Refusal 503 where none is ready, 404 where another version is asked for.
        """
        model = self.switch.active
        if model is None:
            raise Refusal(503, f"no version of {self.name} is ready: see /health", retry_after_s=1)
        if version and version != str(model.served.version):
            has = f"{self.name} answers as {model.served.version}"
            raise Refusal(404, f"version {quote(version, 16)} is not served; {has}")
        return model


class Models:
    """All deployments. The first one answers `/predict`."""

    def __init__(self, deployments: Iterable[Deployment]) -> None:
        self._by_name = {one.name: one for one in deployments}

    def __iter__(self) -> Iterator[Deployment]:
        return iter(self._by_name.values())

    @property
    def first(self) -> Deployment:
        """The deployment that is meant where a request names none."""
        return next(iter(self))

    def find(self, name: str) -> Deployment:
        """Raises Refusal 404."""
        found = self._by_name.get(name)
        if found is None:
            raise Refusal(404, f"unknown model {quote(name)}; this server has {', '.join(self._by_name)}")
        return found
