"""One look at a served model: window, verdict, incident, in one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from fettle.core.artifact import Artifact
from fettle.core.errors import MonitorError
from fettle.core.home import Home
from fettle.core.names import check_name
from fettle.core.report import Measurement, Report
from fettle.monitor.alerts._base import AlertChannel
from fettle.monitor.incidents import Incident, read_incidents, update_incidents
from fettle.monitor.verdict import Judgement, judge
from fettle.monitor.window import Summary, read_window

DEFAULT_LAST = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorReport:
    """What one look saw.

    version: the newest version number in the window, None where it is empty. since, until: ISO 8601 in UTC.
    incident: the open one. undelivered: one sentence for each alert that still has to reach its channel.
    problems: log files and rows that could not be read.
    """

    name: str
    version: int | None
    digest: str
    since: str | None
    until: str
    summary: Summary
    judgement: Judgement
    incident: Incident | None
    undelivered: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def report(self) -> Report:
        """Everything as measurements of the artifact: current metrics first, then each feature's drift."""
        drift = self.judgement.report()
        known = (
            ("window.count", self.summary.count, ""),
            ("window.confidence.mean", self.summary.mean_confidence, ""),
            ("window.confidence.min", self.summary.min_confidence, ""),
            ("window.latency.mean", self.summary.mean_latency_ms, "ms"),
            ("window.latency.p95", self.summary.p95_latency_ms, "ms"),
            ("window.rate", self.summary.predictions_per_minute, "1/min"),
        )
        metrics = tuple(
            Measurement(name=name, value=float(value), unit=unit, n=self.summary.count)
            for name, value, unit in known
            if value is not None
        )
        return Report(
            subject=self.digest,
            kind="drift",
            measurements=metrics + drift.measurements,
            notes=drift.notes + self.undelivered + self.problems,
        )


def monitor_report(
    *,
    name: str,
    artifact: Artifact,
    home: Home,
    since: datetime | None = None,
    last: int = DEFAULT_LAST,
    channels: Sequence[AlertChannel] | None = (),
    alpha: float = 0.001,
    now: datetime | None = None,
) -> MonitorReport:
    """Judge the newest predictions of one artifact, keep its incident, and alert.

    since: leave out older rows; last: at most so many rows, the newest; now: leave out rows from then on.
    channels: who is told; () keeps the incident without telling anybody; None only looks and changes nothing.
    alpha: chance of a false alarm in one look. Looks at the same rows count once, looks at new rows each.

    Raises MonitorError where the artifact holds no reference, and what `read_window`, `judge` and
    `update_incidents` raise. A channel that fails raises nothing: see `undelivered`.
    """
    check_name(name, what="a model name")
    reference = artifact.reference()
    if reference is None:
        raise MonitorError(
            f"a model is watched against the reference in its artifact, and {artifact.digest[:12]} of '{name}' has "
            "none: optimize it with validation data"
        )
    until = (now or datetime.now(UTC)).astimezone(UTC)
    window = read_window(home.observations(name), digest=artifact.digest, since=since, until=until, last=last)
    judgement = judge(reference, window, alpha=alpha)
    version = int(window.versions[-1]) if len(window) else None
    if channels is None:
        state = read_incidents(home, name)
    else:
        state = update_incidents(home, name, judgement, channels=channels, version=version, now=until)
    return MonitorReport(
        name=name,
        version=version,
        digest=artifact.digest,
        since=None if since is None else since.astimezone(UTC).isoformat(),
        until=until.isoformat(),
        summary=window.summary(),
        judgement=judgement,
        incident=state.open,
        undelivered=tuple(
            f"incident {each.alert.incident} '{each.alert.event}' has not reached {each.channel}: "
            + (each.problem or "the channel is not configured")
            for each in state.outbox
        ),
        problems=window.problems,
    )
