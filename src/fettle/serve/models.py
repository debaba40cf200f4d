"""Which models this server has, by name, and which version of one answers a request; models come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol
from weakref import WeakValueDictionary

from fettle.core.errors import FettleError
from fettle.serve.assign import Turns, by_key, seed_of
from fettle.serve.lanes import Mounted
from fettle.serve.metrics import Metrics
from fettle.serve.refusal import Refusal, quote, reason_of
from fettle.serve.source import ModelSource
from fettle.serve.switch import Switch
from fettle.serve.traffic import Traffic, Variant, declared

_NO_HEADERS: Mapping[str, str] = {}


class LiveVariant:
    """A variant and the switch that follows what its source means now."""

    def __init__(self, model: str, variant: Variant, switch: Switch) -> None:
        self.label = variant.label
        self.weight = variant.weight
        self.seed = seed_of(model, variant.label)
        self.switch = switch


class Deployment:
    """One model: its variants, and its shadow where it has one. unloaded: a request that found it came too late."""

    def __init__(
        self, traffic: Traffic, switches: Iterable[Switch], *, metrics: Metrics, shadow: Switch | None = None
    ) -> None:
        self.name = traffic.name
        self.sticky = traffic.sticky
        self.shadow = shadow
        self.unloaded = False
        self.variants = tuple(
            LiveVariant(traffic.name, variant, switch)
            for variant, switch in zip(traffic.variants, switches, strict=True)
        )
        self._turns = Turns()
        self._metrics = metrics

    @property
    def active(self) -> list[Mounted]:
        """Every version that answers, in the order of the variants, each once."""
        found = {one.served.version: one for one in self._active()}
        return list(found.values())

    def _active(self) -> Iterator[Mounted]:
        for variant in self.variants:
            if (model := variant.switch.active) is not None:
                yield model

    @property
    def problem(self) -> str | None:
        """Why the latest load of a variant failed, or None."""
        return next((one.switch.problem for one in self.variants if one.switch.problem), None)

    @property
    def attempted(self) -> bool:
        """Whether the first load of every variant has ended, well or not."""
        return all(one.switch.attempted for one in self.variants)

    @property
    def switches(self) -> list[Switch]:
        """Of the variants, then of the shadow."""
        return [*(one.switch for one in self.variants), *([self.shadow] if self.shadow else [])]

    def find(self, version: str = "") -> Mounted:
        """The version that is named, any that answers where none is. Raises Refusal 404 or 503."""
        first: Mounted | None = None
        for model in self._active():
            if not version or version == str(model.served.version):
                return model
            first = first or model
        if first is None:
            raise self._none_ready()
        has = f"{self.name} answers as {', '.join(str(one.served.version) for one in self.active)}"
        raise Refusal(404, f"version {quote(version, 16)} is not served; {has}")

    def choose(self, version: str = "", *, headers: Mapping[str, str] = _NO_HEADERS, body: bytes = b"") -> Mounted:
        """The version that answers a request; while draining too. Ask once for each request: the choice is counted.

        version: the one that is asked for, "" for the one it is assigned to. headers: with lower-case names, and
        body, as sent: where a sticky key may stand. A variant that is not ready yields to those that are.
        Raises Refusal 503 where none is ready, 404 where a version is asked for that does not answer.
        """
        if version or len(self.variants) == 1:
            active = self.variants[0].switch.active  # without a detour: most models have one variant
            return active if active is not None and not version else self.find(version)
        ready = [(one, model) for one in self.variants if (model := one.switch.active) is not None]
        if not ready:
            raise self._none_ready()
        weights = [one.weight for one, _ in ready]
        key = None if self.sticky is None else self.sticky.key_of(headers, body)
        place = self._turns.next(weights) if key is None else by_key(key, [one.seed for one, _ in ready], weights)
        variant, chosen = ready[place]
        self._metrics.assigned_to(self.name, variant.label, str(chosen.served.version))
        return chosen

    def _none_ready(self) -> Refusal:
        if self.unloaded:
            return Refusal(404, f"{self.name} is not loaded any more")
        return Refusal(503, f"no version of {self.name} is ready: see /health", retry_after_s=1)


class Catalogue(Protocol):
    """The models that could be loaded. Called from threads; may raise FettleError."""

    def names(self) -> list[str]:
        """All of them."""

    def source(self, name: str) -> ModelSource:
        """Where the model comes from. Raises NotRegistered."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A model, or one version of it, as a repository's index lists it. version: "" where none is known."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNAVAILABLE"]
    reason: str = ""


class Models:
    """All deployments. The first that was declared answers `/predict`. Belongs to one event loop.

    build: makes a deployment, which loads nothing yet. retire: lets the workers forget what a switch held, once its
    last request has ended. catalogue: what else may be loaded. changes: how often a model came or went.
    """

    def __init__(
        self,
        traffics: Iterable[Traffic],
        *,
        build: Callable[[Traffic], Deployment],
        retire: Callable[[Deployment, Switch, Mounted], None],
        catalogue: Catalogue | None = None,
    ) -> None:
        self._declared = {traffic.name: traffic for traffic in traffics}
        self._build = build
        self._retire = retire
        self._catalogue = catalogue
        self._by_name = {name: build(traffic) for name, traffic in self._declared.items()}
        self.changes = 0
        self._changing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._releasing: set[asyncio.Task[None]] = set()
        self._loading: set[str] = set()

    def __iter__(self) -> Iterator[Deployment]:
        return iter(self._by_name.values())

    def start(self) -> None:
        """Begin to load, and to follow what each source means."""
        for switch in self._switches():
            switch.start()

    def close(self) -> None:
        """Stop following. What is loaded stays."""
        for switch in self._switches():
            switch.close(timeout_s=0.0)

    def _switches(self) -> list[Switch]:
        return [switch for deployment in self for switch in deployment.switches]

    @property
    def first(self) -> Deployment:
        """The deployment that is meant where a request names none. Raises Refusal 404 where it was unloaded."""
        return self.find(next(iter(self._declared)))

    def find(self, name: str) -> Deployment:
        """Raises Refusal 404."""
        found = self._by_name.get(name)
        if found is None:
            has = ", ".join(self._by_name) or "none loaded"
            raise Refusal(404, f"unknown model {quote(name)}; this server has {has}")
        return found

    def versions(self) -> Iterator[tuple[str, str, str, str, str]]:
        """Name, version, digest, runtime and precision of all that answer."""
        for served in (model.served for deployment in self for model in deployment.active):
            yield served.name, str(served.version), served.digest, served.runtime, served.precision

    # At run time

    async def load(self, name: str) -> None:
        """Load the model, or what its reference means by now, and return once it answers.

        What was declared is loaded as it was declared, all else from the catalogue. Raises Refusal 404 for a model
        that nobody knows, 400 with the reason where it cannot be loaded: what answered before still answers.
        """
        async with self._changing.setdefault(name, asyncio.Lock()):
            present = self._by_name.get(name)
            deployment = present or self._build(await self._known(name))
            self._loading.add(name)
            try:  # of the variants only: no shadow may delay what answers
                await asyncio.gather(*(asyncio.to_thread(one.switch.retry) for one in deployment.variants))
            finally:
                self._loading.discard(name)
            problem = deployment.problem
            if present is None:
                if not deployment.active:
                    await self._release(deployment)
                    raise Refusal(400, f"{name} cannot be loaded: {problem}")
                self._by_name[name] = deployment
                self.changes += 1
                for switch in deployment.switches:
                    switch.start()
            if problem is not None:
                raise Refusal(400, f"{name} cannot be loaded as its reference says: {problem}")

    async def unload(self, name: str) -> None:
        """Answer 404 from now on; running requests end, then the workers forget the model. Raises Refusal 404."""
        async with self._changing.setdefault(name, asyncio.Lock()):
            deployment = self.find(name)
            del self._by_name[name]
            self.changes += 1
            deployment.unloaded = True
            await self._release(deployment)

    async def index(self) -> list[Entry]:
        """Every version that is served or was refused, and every model that could be loaded, by name."""
        entries = [entry for deployment in self for entry in _entries(deployment)]
        known = {*self._declared, *(await asyncio.to_thread(self._catalogue.names) if self._catalogue else ())}
        for name in known - set(self._by_name):
            state: Literal["LOADING", "UNAVAILABLE"] = "LOADING" if name in self._loading else "UNAVAILABLE"
            entries.append(Entry(name, "", state, "" if state == "LOADING" else "not loaded"))
        return sorted(entries, key=lambda entry: (entry.name, entry.version))

    async def _known(self, name: str) -> Traffic:
        if name in self._declared:
            return self._declared[name]
        if self._catalogue is None:
            raise Refusal(404, f"unknown model {quote(name)}; this server knows {', '.join(self._declared)}")
        try:
            source = await asyncio.to_thread(self._catalogue.source, name)
            (traffic,) = declared(source)
        except FettleError as problem:
            raise Refusal(404, f"unknown model {quote(name)}: {reason_of(problem)}") from None
        return traffic

    async def _release(self, deployment: Deployment) -> None:
        if deployment.shadow is not None:  # a shadow may take for ever to load, and nobody should wait for that
            task = asyncio.ensure_future(self._release_one(deployment, deployment.shadow))
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)
        for variant in deployment.variants:
            await self._release_one(deployment, variant.switch)

    async def _release_one(self, deployment: Deployment, switch: Switch) -> None:
        model = await asyncio.to_thread(switch.release)
        if model is not None:
            self._retire(deployment, switch, model)


def _entries(deployment: Deployment) -> list[Entry]:
    """Of each version that answers, and of each variant that has none or could not take the one it should."""
    name = deployment.name
    found = {Entry(name, str(model.served.version), "READY"): None for model in deployment.active}
    for variant in deployment.variants:
        switch = variant.switch
        if switch.problem is not None:
            found[Entry(name, str(switch.refused or ""), "UNAVAILABLE", switch.problem)] = None
        elif switch.active is None:
            found[Entry(name, "", "LOADING")] = None
    return list(found)
