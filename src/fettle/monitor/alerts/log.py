"""Alerts as one JSON line each in the process's log."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from fettle.core import codec
from fettle.monitor.alerts._base import Alert, AlertChannel

_LOGGER = logging.getLogger("fettle.monitor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Log(AlertChannel):
    """Writes to the logger "fettle.monitor" at WARNING; the host program decides where that goes.

    "resolved" is a warning too: below WARNING Python's default would drop the end of what it reported.
    """

    @property
    def identity(self) -> str:
        return "log"

    def deliver(self, alert: Alert) -> None:
        _LOGGER.warning("%s", codec.canonical(alert).decode())
