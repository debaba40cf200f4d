"""Incidents: one message each, through failures, restarts, kill -9 and two monitors at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fettle.core.errors import MonitorError, UsageError
from fettle.core.home import Home
from fettle.monitor.alerts._base import Alert, AlertChannel, DeliveryFailed
from fettle.monitor.incidents import Incidents, read_incidents, struck_off, take_note, update_incidents
from fettle.monitor.verdict import Finding, Judgement

OLD, NEW = "a" * 64, "b" * 64


def judged(verdict: str, digest: str = OLD) -> Judgement:
    finding = Finding(
        feature="p1",
        test="ks",
        unit="D",
        p_value=0.0,
        corrected_p=0.0,
        effect=0.5,
        minimum=0.2,
        statistic=0.5,
        null_mean=0.1,
        drifted=verdict == "drift",
    )
    return Judgement(
        digest=digest,
        verdict=verdict,
        sentence=f"{verdict} it is.",
        alpha=0.001,
        power=0.8,
        size=100,
        reference_size=100,
        findings=(finding,),
        sensitivities=(),
    )


@dataclass
class Channel(AlertChannel):
    """Remembers what it delivered; fails while `broken` is set."""

    name: str = "one"
    broken: Exception | None = None
    alerts: list[Alert] = field(default_factory=list)

    @property
    def identity(self) -> str:
        return self.name

    def deliver(self, alert: Alert) -> None:
        if self.broken is not None:
            raise self.broken
        self.alerts.append(alert)

    @property
    def events(self) -> list[str]:
        return [alert.event for alert in self.alerts]


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


@pytest.fixture
def look(home):
    """One look of a monitor that keeps nothing in memory: every call is a restart."""

    def update(verdict: str, *channels: AlertChannel, digest: str = OLD, version: int | None = 1) -> Incidents:
        return update_incidents(home, "digits", judged(verdict, digest), channels=channels, version=version)

    return update


def test_drift_is_told_once_however_long_it_lasts(look):
    channel = Channel()
    for _ in range(20):
        state = look("drift", channel)
    assert channel.events == ["drift"]
    assert state.open.looks == 20
    assert state.open.told == ("one",)
    alert = channel.alerts[0]
    assert (alert.model, alert.version, alert.digest, alert.incident) == ("digits", 1, OLD, 1)
    assert alert.features == ("p1",)
    assert alert.sentence == "drift it is."


def test_the_end_is_told_once(look):
    channel = Channel()
    for verdict in ("drift", "drift", "no drift", "no drift"):
        state = look(verdict, channel)
    assert channel.events == ["drift", "resolved"]
    assert state.open is None
    assert state.closed[0].reason == "no drift it is."
    assert state.closed[0].closed is not None
    assert channel.alerts[0].key != channel.alerts[1].key


def test_not_enough_data_changes_nothing(look):
    channel = Channel()
    assert look("not enough data", channel).open is None
    before = look("drift", channel)
    assert look("not enough data", channel) == before
    assert channel.events == ["drift"]


def test_no_drift_without_an_incident_writes_nothing(look, home):
    assert look("no drift", Channel()) == Incidents(model="digits")
    assert not list(home.incidents.glob("*.json"))


def test_the_next_drift_is_another_incident(look):
    channel = Channel()
    for verdict in ("drift", "no drift", "drift"):
        state = look(verdict, channel)
    assert channel.events == ["drift", "resolved", "drift"]
    assert state.open.number == 2
    assert len({alert.key for alert in channel.alerts}) == 3


@pytest.mark.parametrize("verdict", ["drift", "no drift", "not enough data"])
def test_another_artifact_closes_the_incident(look, verdict):
    channel = Channel()
    look("drift", channel)
    state = look(verdict, channel, digest=NEW, version=2)
    assert channel.events == ["drift", "resolved", "drift"][: 3 if verdict == "drift" else 2]
    assert state.closed[0].digest == OLD
    assert state.closed[0].reason == "Replaced by version 2."
    assert (state.open is not None) == (verdict == "drift")


@pytest.mark.parametrize("error", [DeliveryFailed("no answer"), RuntimeError("password=hunter2"), KeyError("x")])
def test_a_failing_channel_stops_nobody_and_is_tried_again(look, error):
    bad, good = Channel("bad", broken=error), Channel("good")
    state = look("drift", bad, good)
    assert good.events == ["drift"]
    assert [each.channel for each in state.outbox] == ["bad"]
    assert state.outbox[0].problem
    assert "hunter2" not in state.outbox[0].problem
    look("drift", bad, good)
    bad.broken = None
    state = look("not enough data", bad, good)
    assert (bad.events, good.events) == (["drift"], ["drift"])
    assert state.outbox == ()
    assert state.open.told == ("good", "bad")


def test_an_interrupt_is_not_swallowed_and_nothing_is_lost(look):
    bad, good = Channel("bad", broken=KeyboardInterrupt()), Channel("good")
    with pytest.raises(KeyboardInterrupt):
        look("drift", bad, good)
    bad.broken = None
    look("drift", bad, good)
    assert (bad.events, good.events) == (["drift"], ["drift"])


def test_the_end_reaches_a_channel_that_missed_the_beginning(look):
    """Its opening may have arrived: a monitor killed after delivering does not know."""
    bad = Channel(broken=DeliveryFailed("down"))
    look("drift", bad)
    bad.broken = None
    look("no drift", bad)
    assert bad.events == ["resolved"]


def test_a_channel_added_later_is_told_of_the_open_incident(look):
    first, second = Channel("first"), Channel("second")
    look("drift")
    look("drift", first)
    look("drift", first, second)
    assert (first.events, second.events) == (["drift"], ["drift"])


def test_a_channel_left_out_for_a_while_keeps_its_messages(look):
    channel = Channel(broken=DeliveryFailed("down"))
    look("drift", channel)
    assert len(look("drift").outbox) == 1
    channel.broken = None
    assert look("drift", channel).outbox == ()
    assert channel.events == ["drift"]


def test_two_channels_of_one_identity_are_refused(look):
    with pytest.raises(MonitorError, match="must differ"):
        look("drift", Channel(), Channel())


def test_state_stays_small_whatever_happens(home):
    """A thousand incidents with a channel that never comes back."""
    state = Incidents(model="digits")
    for i in range(1000):
        for verdict in ("drift", "no drift"):
            state = take_note(state, judged(verdict), channels=("dead",), version=1, time=str(i))
    assert len(state.closed) == 100
    assert len(state.outbox) <= 100
    assert state.closed[-1].number == 1000


@given(
    looks=st.lists(
        st.tuples(
            st.sampled_from(["drift", "no drift", "not enough data"]),
            st.sampled_from([OLD, NEW]),
            st.sets(st.sampled_from(["x", "y"])),
            st.sets(st.sampled_from(["x", "y"])),
        ),
        max_size=25,
    )
)
def test_whatever_happens_no_channel_hears_a_thing_twice(looks):
    """looks: verdict, artifact, channels configured, and those that are down."""
    state, heard, keys = Incidents(model="digits"), {"x": [], "y": []}, []
    for i, (verdict, digest, channels, down) in enumerate(looks):
        state = take_note(state, judged(verdict, digest), channels=sorted(channels), version=None, time=str(i))
        assert (state.open is not None) or verdict != "drift"
        for delivery in state.outbox:
            if delivery.channel in channels:
                if delivery.channel not in down:
                    heard[delivery.channel].append((delivery.alert.incident, delivery.alert.event))
                    keys.append((delivery.channel, delivery.alert.key))
                state = struck_off(state, delivery, "down" if delivery.channel in down else None)
    assert len(set(keys)) == len(keys)
    for messages in heard.values():
        assert len(set(messages)) == len(messages)
        assert messages == sorted(messages)  # "drift" before "resolved", incident by incident


def test_times_are_those_of_the_looks(home):
    first, second = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)
    update_incidents(home, "digits", judged("drift"), channels=(), now=first)
    state = update_incidents(home, "digits", judged("drift"), channels=(), now=second)
    assert (state.open.opened, state.open.seen) == (first.isoformat(), second.isoformat())


@pytest.mark.parametrize("name", ["../evil", "a/b", "", "UPPER", "a..b"])
def test_a_name_that_is_no_name_is_refused(home, name):
    with pytest.raises(UsageError):
        update_incidents(home, name, judged("drift"), channels=())
    assert not home.root.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"format": 2}',
        b'{"format": 1, "model": "other"}',
        b'{"format": 1, "model": "digits", "surprise": 1}',
        b'{"format": 1, "model": "digits", "closed": 3}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
    ids=lambda content: repr(content[:40]),
)
def test_a_state_that_is_not_ours_is_refused_and_kept(look, home, content):
    home.incidents.mkdir(parents=True)
    path = home.incidents / "digits.json"
    path.write_bytes(content)
    channel = Channel()
    with pytest.raises(MonitorError, match=r"digits\.json"):
        look("drift", channel)
    assert path.read_bytes() == content
    assert channel.events == []


# What a monitor process does: one look with a channel that appends to a file, and may be killed around it.
MONITOR = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_incidents import Channel, Home, judged, update_incidents
root, verdict, death = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

class ToFile(Channel):
    def deliver(self, alert):
        if death == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        with open(root / "delivered.jsonl", "a") as file:
            file.write(json.dumps([alert.event, alert.key]) + "\\n")
        if death == "after":
            os.kill(os.getpid(), signal.SIGKILL)

print("ready", flush=True)
sys.stdin.readline()
update_incidents(Home(root), "digits", judged(verdict), channels=(ToFile(),), version=1)
"""


class Process:
    """A monitor in a process of its own, waiting for `go`."""

    def __init__(self, root: Path, verdict: str, death: str = "") -> None:
        code = MONITOR.format(tests=str(Path(__file__).parent))
        command = [sys.executable, "-c", code, str(root), verdict, death]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def go(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        assert self.process.stdout.readline() == "ready\n"
        self.process.stdin.write("go\n")
        self.process.stdin.close()

    def wait(self) -> int:
        code = self.process.wait(60)
        self.process.stdout.close()
        return code


def run(root: Path, verdict: str, death: str = "") -> int:
    process = Process(root, verdict, death)
    process.go()
    return process.wait()


def delivered(root: Path) -> list[list[str]]:
    path = root / "delivered.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_killed_before_sending_it_sends_after_a_restart(tmp_path):
    assert run(tmp_path, "drift", "before") == -signal.SIGKILL
    assert delivered(tmp_path) == []
    assert read_incidents(Home(tmp_path), "digits").outbox != ()
    assert run(tmp_path, "drift") == 0
    assert [event for event, _ in delivered(tmp_path)] == ["drift"]


def test_killed_between_sending_and_saving_it_repeats_the_same_key(tmp_path):
    assert run(tmp_path, "drift", "after") == -signal.SIGKILL
    assert run(tmp_path, "drift") == 0
    (first, key), (second, again) = delivered(tmp_path)
    assert (first, second) == ("drift", "drift")
    assert key == again
    assert run(tmp_path, "drift") == 0
    assert len(delivered(tmp_path)) == 2


def test_killed_after_sending_the_beginning_it_still_sends_the_end(tmp_path):
    assert run(tmp_path, "drift", "after") == -signal.SIGKILL
    assert run(tmp_path, "no drift") == 0
    assert [event for event, _ in delivered(tmp_path)] == ["drift", "resolved"]


def test_monitors_at_once_send_one_message(tmp_path):
    processes = [Process(tmp_path, "drift") for _ in range(3)]
    for process in processes:
        process.go()
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert [event for event, _ in delivered(tmp_path)] == ["drift"]
    assert read_incidents(Home(tmp_path), "digits").open.looks == 3


def test_a_file_left_by_a_crash_while_writing_is_ignored(look, home):
    look("drift", Channel())
    (home.incidents / ".digits.json.tmp123").write_bytes(b'{"for')
    assert look("drift").open.looks == 2
    assert os.listdir(home.incidents)
