"""What the server says of itself, and the one rule for "ready": each model has a proven version, and none is going.

A variant that is missing does not make the server unready, for the others answer in its place; nor does a shadow,
which answers nobody.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from fettle.serve.lanes import Lanes, Mounted
from fettle.serve.models import Deployment, Models
from fettle.serve.shadow import Shadow

State = Literal["starting", "ready", "failed", "draining"]


class Health:
    """Reads the switches, and remembers whether the server drains. Never waits on anything."""

    def __init__(self, models: Models, lanes: Lanes, *, shadow: Shadow | None = None) -> None:
        self.draining = False
        self._models = models
        self._lanes = lanes
        self._shadow = shadow
        self._started = time.monotonic()
        self._was_up = False

    @property
    def state(self) -> State:
        """Draining wins; workers that keep dying are "failed"; so is a failed first load until one succeeds."""
        if self.draining:
            return "draining"
        if self._lanes.problem is not None:
            return "failed"
        waiting = [one for one in self._models if not one.active]
        if not waiting:
            return "ready"
        return "failed" if any(one.attempted for one in waiting) else "starting"

    @property
    def ready(self) -> bool:
        """True where a load balancer should send traffic."""
        return self.state == "ready"

    @property
    def started(self) -> bool:
        """True from the first time that each model had a proven version: what happens later is not the start's."""
        self._was_up = self._was_up or all(one.active for one in self._models)
        return self._was_up

    def answers(self, deployment: Deployment) -> bool:
        """True where this model takes traffic, whatever becomes of the others."""
        return not self.draining and self._lanes.problem is None and bool(deployment.active)

    def summary(self) -> dict[str, Any]:
        """The body of `/health`. What stands at its top level is of the first model."""
        first = next(iter(self._models), None)
        active = first.active if first is not None else []
        return {
            "status": self.state,
            "ready": self.ready,
            "model": first.name if first is not None else None,
            **_version(active[0] if active else None),
            "problem": self._lanes.problem or (first.problem if first is not None else None),
            "workers": sum(lane.alive for lane in self._lanes.all),
            "uptime_s": round(time.monotonic() - self._started, 3),
            "models": [self._model(one) for one in self._models],
        }

    def _model(self, deployment: Deployment) -> dict[str, Any]:
        found: dict[str, Any] = {
            "name": deployment.name,
            "ready": self.answers(deployment),
            "sticky": str(deployment.sticky) if deployment.sticky is not None else None,
            "variants": [
                {
                    "variant": one.label,
                    "weight": one.weight,
                    **_version(one.switch.active),
                    "problem": one.switch.problem,
                }
                for one in deployment.variants
            ],
        }
        if self._shadow is not None and deployment.shadow is not None:
            problem = self._shadow.lanes.problem or deployment.shadow.problem
            found["shadow"] = {**_version(deployment.shadow.active), "problem": problem}
        return found


def _version(model: Mounted | None) -> dict[str, Any]:
    served = model.served if model is not None else None
    return {
        "version": served.version if served else None,
        "digest": served.digest if served else None,
        "runtime": served.runtime if served else None,
        "precision": served.precision if served else None,
    }
