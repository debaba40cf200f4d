"""What the server says of itself, and the one rule for "ready": a proven model, and not on the way out."""

from __future__ import annotations

import time
from typing import Any, Literal

from fettle.serve.lanes import Lanes
from fettle.serve.models import Models

State = Literal["starting", "ready", "failed", "draining"]


class Health:
    """Reads the switches, and remembers whether the server drains. Never waits on anything."""

    def __init__(self, models: Models, lanes: Lanes) -> None:
        self.draining = False
        self._models = models
        self._lanes = lanes
        self._started = time.monotonic()

    @property
    def state(self) -> State:
        """Draining wins; workers that keep dying are "failed"; so is a failed first load until one succeeds."""
        if self.draining:
            return "draining"
        if self._lanes.problem is not None:
            return "failed"
        waiting = [one.switch for one in self._models if one.switch.active is None]
        if not waiting:
            return "ready"
        return "failed" if any(switch.attempted for switch in waiting) else "starting"

    @property
    def ready(self) -> bool:
        """True where a load balancer should send traffic."""
        return self.state == "ready"

    def summary(self) -> dict[str, Any]:
        """The body of `/health`."""
        first = self._models.first
        model = first.switch.active.served if first.switch.active else None
        return {
            "status": self.state,
            "ready": self.ready,
            "model": first.name,
            "version": model.version if model else None,
            "digest": model.digest if model else None,
            "runtime": model.runtime if model else None,
            "precision": model.precision if model else None,
            "problem": self._lanes.problem or first.switch.problem,
            "workers": sum(lane.alive for lane in self._lanes.all),
            "uptime_s": round(time.monotonic() - self._started, 3),
        }
