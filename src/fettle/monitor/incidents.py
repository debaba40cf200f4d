"""Incidents: drift is told once for as long as it lasts, and its end is told once, whatever crashes in between.

One JSON file per model. A look at the window changes the state and lists what is to be delivered to whom in one
atomic write; then every delivery is struck off by another. Killed between delivery and strike-off, the monitor
delivers again with the same key: at least once, and recognizable. Two monitors take turns by a lock on a file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from fettle.core import codec
from fettle.core.errors import MonitorError
from fettle.core.files import write_atomic
from fettle.core.home import Home
from fettle.core.names import check_name
from fettle.monitor.alerts._base import Alert, AlertChannel
from fettle.monitor.verdict import Judgement

_FORMAT = 1
_HISTORY = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """Drift of one artifact, from the first look that saw it to the one that did not.

    told: identities of the channels that have delivered its opening. looks: how many looks saw the drift.
    closed, reason: None and empty while it lasts. Times are ISO 8601 in UTC.
    """

    number: int
    digest: str
    version: int | None
    opened: str
    seen: str
    looks: int
    sentence: str
    features: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    closed: str | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """An alert that a channel still has to deliver; problem: why the last attempt failed."""

    channel: str
    alert: Alert
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incidents:
    """The state of one model: the open incident, the closed ones (the newest 100), and what is not yet delivered."""

    model: str
    open: Incident | None = None
    closed: tuple[Incident, ...] = ()
    outbox: tuple[Delivery, ...] = ()
    format: int = _FORMAT


def read_incidents(home: Home, name: str) -> Incidents:
    """The state as it is on disk. Raises MonitorError where the file is not ours.

    >>> read_incidents(Home(Path("/nowhere")), "digits").open is None
    True
    """
    path = _path(home, name)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Incidents(model=name)
    advice = f"{path} must hold the incidents of '{name}': move it away to start afresh"
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        raise MonitorError(f"{advice}; it is not JSON") from None
    if not isinstance(data, dict) or data.get("format") != _FORMAT or data.get("model") != name:
        raise MonitorError(f"{advice}; it is of another format or another model")
    return codec.from_json(Incidents, data, where=str(path), error=MonitorError)


def update_incidents(
    home: Home,
    name: str,
    judgement: Judgement,
    *,
    channels: Sequence[AlertChannel],
    version: int | None = None,
    now: datetime | None = None,
) -> Incidents:
    """Take note of one judgement, deliver what is due, and return the state as it is then.

    "drift" opens an incident, or adds a look to the open one; each channel is told once for each incident. "no
    drift" closes it, and its channels are told of the end. "not enough data" changes nothing. Another
    artifact closes the old one's incident. Whatever could not be delivered is tried again at every call. A channel that
    fails, even by a defect, never stops another; its problem is in `outbox`.

    Blocks while another process updates the same model. Raises MonitorError where the state cannot be read or
    two channels are the same.
    """
    by_identity = {channel.identity: channel for channel in channels}
    if len(by_identity) != len(channels):
        raise MonitorError(f"alert channels must differ, got {', '.join(sorted(c.identity for c in channels))}")
    time = (now or datetime.now(UTC)).astimezone(UTC).isoformat()
    with _lock(_path(home, name)):
        before = read_incidents(home, name)
        state = take_note(before, judgement, channels=tuple(by_identity), version=version, time=time)
        if state != before:
            _save(home, state)
        for delivery in state.outbox:
            channel = by_identity.get(delivery.channel)
            if channel is None:
                continue
            state = struck_off(state, delivery, _deliver(channel, delivery.alert))
            _save(home, state)
    return state


def take_note(
    state: Incidents, judgement: Judgement, *, channels: Sequence[str], version: int | None, time: str
) -> Incidents:
    """The state after one judgement, with what is to be delivered in its outbox. Pure."""
    if state.open is not None and state.open.digest != judgement.digest:
        label = f"version {version}" if version is not None else f"artifact {judgement.digest[:12]}"
        state = _close(state, time=time, reason=f"Replaced by {label}.")
    if judgement.verdict == "drift":
        return _see(state, judgement, channels=channels, version=version, time=time)
    if judgement.verdict == "no drift" and state.open is not None:
        return _close(state, time=time, reason=judgement.sentence)
    return state


def struck_off(state: Incidents, delivery: Delivery, problem: str | None) -> Incidents:
    """The state after an attempt to deliver: done where problem is None. Pure."""
    others = tuple(each for each in state.outbox if each != delivery)
    if problem is not None:
        return replace(state, outbox=(*others, replace(delivery, problem=problem)))
    incident = state.open
    if incident is not None and delivery.alert.event == "drift" and incident.number == delivery.alert.incident:
        incident = replace(incident, told=(*incident.told, delivery.channel))
    return replace(state, open=incident, outbox=others)


def _see(
    state: Incidents, judgement: Judgement, *, channels: Sequence[str], version: int | None, time: str
) -> Incidents:
    incident = state.open
    if incident is None:
        incident = Incident(
            number=state.closed[-1].number + 1 if state.closed else 1,
            digest=judgement.digest,
            version=version,
            opened=time,
            seen=time,
            looks=0,
            sentence=judgement.sentence,
            features=judgement.drifted,
        )
    incident = replace(incident, seen=time, looks=incident.looks + 1)
    waiting = {each.channel for each in state.outbox if each.alert.key == _key(state.model, incident, "drift")}
    alert = Alert(
        key=_key(state.model, incident, "drift"),
        event="drift",
        model=state.model,
        version=incident.version,
        digest=incident.digest,
        incident=incident.number,
        time=incident.opened,
        sentence=incident.sentence,
        features=incident.features,
    )
    due = tuple(
        Delivery(channel=each, alert=alert) for each in channels if each not in incident.told and each not in waiting
    )
    return replace(state, open=incident, outbox=(*state.outbox, *due))


def _close(state: Incidents, *, time: str, reason: str) -> Incidents:
    """Close the open incident; its end is due wherever its opening was delivered, or may have been."""
    incident = state.open
    assert incident is not None
    alert = Alert(
        key=_key(state.model, incident, "resolved"),
        event="resolved",
        model=state.model,
        version=incident.version,
        digest=incident.digest,
        incident=incident.number,
        time=time,
        sentence=reason,
        features=incident.features,
    )
    # Killed after a delivery, we would not know of it: an opening still in the outbox may have arrived.
    attempted = [each.channel for each in state.outbox if each.alert.incident == incident.number]
    kept = tuple(each for each in state.outbox if each.alert.incident != incident.number)
    outbox = (*kept, *(Delivery(channel=each, alert=alert) for each in (*incident.told, *attempted)))
    closed = replace(incident, closed=time, reason=reason)
    # Bounded even if a channel never comes back: one whose incident has left the history is let go.
    history = (*state.closed, closed)[-_HISTORY:]
    outbox = tuple(each for each in outbox if each.alert.incident >= history[0].number)
    return replace(state, open=None, closed=history, outbox=outbox)


def _deliver(channel: AlertChannel, alert: Alert) -> str | None:
    try:
        channel.deliver(alert)
    except MonitorError as problem:
        return str(problem)
    except Exception as problem:
        # A defect in one channel must not silence the others; its text may hold a secret, its class does not.
        return f"{type(problem).__name__} in the channel"
    return None


def _key(model: str, incident: Incident, event: str) -> str:
    """The same for every attempt, another for every incident, even after the state file was lost."""
    whole = f"{model}\n{incident.number}\n{incident.digest}\n{incident.opened}\n{event}"
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


def _path(home: Home, name: str) -> Path:
    return home.incidents / f"{check_name(name, what='a model name')}.json"


def _save(home: Home, state: Incidents) -> None:
    write_atomic(_path(home, state.model), codec.canonical(state))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the model's lock; the kernel releases it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
