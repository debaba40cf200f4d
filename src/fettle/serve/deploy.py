"""From what is declared to what runs: each variant with a switch that loads into the workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from fettle.serve.dispatch import Dispatcher
from fettle.serve.lanes import Lanes, Mounted
from fettle.serve.metrics import Metrics
from fettle.serve.model import Served
from fettle.serve.models import Deployment
from fettle.serve.options import ServeOptions
from fettle.serve.shadow import Shadow
from fettle.serve.source import ModelSource
from fettle.serve.switch import Switch
from fettle.serve.traffic import Traffic


class Deployer:
    """Builds deployments, and takes down what they held. Belongs to the running event loop.

    on_change: called in the loop after each version that answers from now on.
    """

    def __init__(
        self,
        *,
        options: ServeOptions,
        metrics: Metrics,
        lanes: Lanes,
        dispatcher: Dispatcher,
        shadow: Shadow | None,
        on_change: Callable[[], None],
    ) -> None:
        self._options = options
        self._metrics = metrics
        self._lanes = lanes
        self._dispatcher = dispatcher
        self._shadow = shadow
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()

    def build(self, traffic: Traffic) -> Deployment:
        """A deployment whose switches have not begun."""
        switches = [self._switch(one.source, self._lanes, self._dispatcher) for one in traffic.variants]
        shadow = None
        if traffic.shadow is not None and self._shadow is not None:
            shadow = self._switch(traffic.shadow, self._shadow.lanes, self._shadow.dispatcher)
        return Deployment(traffic, switches, metrics=self._metrics, shadow=shadow)

    def _switch(self, source: ModelSource, lanes: Lanes, dispatcher: Dispatcher) -> Switch:
        return Switch(
            source,
            options=self._options,
            metrics=self._metrics,
            mount=partial(self._mount, lanes),
            on_change=partial(self._changed, dispatcher),
        )

    def retire(self, deployment: Deployment, switch: Switch, model: Mounted) -> None:
        """Let the workers forget what a switch held, once its last request has ended."""
        shadow = self._shadow if switch is deployment.shadow else None
        (shadow.dispatcher if shadow is not None else self._dispatcher).retire(model)

    def _mount(self, lanes: Lanes, served: Served, root: str) -> Mounted:
        """Called by a switch's thread."""
        return asyncio.run_coroutine_threadsafe(lanes.mount(served, root), self._loop).result()

    def _changed(self, dispatcher: Dispatcher, model: Mounted, before: Mounted | None) -> None:
        """Called by a switch's thread for each version that answers from now on."""
        if before is not None:
            self._loop.call_soon_threadsafe(dispatcher.retire, before)
        self._loop.call_soon_threadsafe(self._on_change)
