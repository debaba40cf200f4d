"""What the server says of itself, and the one rule for "ready": a proven model, and not on the way out."""

from __future__ import annotations

import time
from typing import Any, Literal

from fettle.serve.lanes import Lanes, Mounted
from fettle.serve.refusal import Refusal
from fettle.serve.switch import Switch

State = Literal["starting", "ready", "failed", "draining"]


class Health:
    """Reads the switch, and remembers whether the server drains. Never waits on anything."""

    def __init__(self, switch: Switch, lanes: Lanes, name: str) -> None:
        self.name = name
        self.draining = False
        self._switch = switch
        self._lanes = lanes
        self._started = time.monotonic()

    @property
    def state(self) -> State:
        """Draining wins; workers that keep dying are "failed"; so is a failed first load until one succeeds."""
        if self.draining:
            return "draining"
        if self._lanes.problem is not None:
            return "failed"
        if self._switch.active is not None:
            return "ready"
        return "failed" if self._switch.attempted else "starting"

    @property
    def ready(self) -> bool:
        """True where a load balancer should send traffic."""
        return self.state == "ready"

    def model(self) -> Mounted:
        """The version that answers now; while draining too. Raises Refusal 503 where there is none."""
        if self._switch.active is None:
            raise Refusal(503, f"no version of {self.name} is ready: see /health", retry_after_s=1)
        return self._switch.active

    def summary(self) -> dict[str, Any]:
        """The body of `/health`."""
        model = self._switch.active.served if self._switch.active else None
        return {
            "status": self.state,
            "ready": self.ready,
            "model": self.name,
            "version": model.version if model else None,
            "digest": model.digest if model else None,
            "runtime": model.runtime if model else None,
            "precision": model.precision if model else None,
            "problem": self._lanes.problem or self._switch.problem,
            "workers": sum(lane.alive for lane in self._lanes.all),
            "uptime_s": round(time.monotonic() - self._started, 3),
        }
