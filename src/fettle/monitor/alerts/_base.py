"""What an alert channel must do: deliver one message, or say that it could not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from fettle.core.errors import MonitorError

Event = Literal["drift", "resolved"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One message of an incident.

    key: the same for every attempt to deliver this message, so that a receiver can drop repeats.
    incident: its number, counted for each model; digest, version: the artifact that it is about.
    time: when the event was seen, ISO 8601 in UTC. features: those that drifted, most certain first.
    """

    key: str
    event: Event
    model: str
    version: int | None
    digest: str
    incident: int
    time: str
    sentence: str
    features: tuple[str, ...] = ()


class AlertChannel(ABC):
    """One way to reach people, as a plug-in in `fettle.monitor.alerts`."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """What tells this channel from others across restarts. Stored on disk: never holds a secret."""

    @abstractmethod
    def deliver(self, alert: Alert) -> None:
        """Deliver, in bounded time. Raises DeliveryFailed, whose message holds no secret."""


class DeliveryFailed(MonitorError):
    """A channel could not deliver; the monitor tries again at its next look."""
