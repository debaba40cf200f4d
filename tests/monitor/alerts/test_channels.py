"""Alert channels as plug-ins, and the log channel."""

from __future__ import annotations

import json
import logging

from fettle.core import plugins
from fettle.monitor.alerts._base import Alert, AlertChannel
from fettle.monitor.alerts.log import Log

ALERT = Alert(
    key="k1",
    event="drift",
    model="digits",
    version=3,
    digest="a" * 64,
    incident=1,
    time="2026-11-01T12:00:00+00:00",
    sentence="Drift in 1 of 15 features.",
    features=("p3",),
)


def test_channels_are_found_by_their_files():
    found = plugins.installed("fettle.monitor.alerts", AlertChannel)
    assert {"log", "webhook"} <= set(found)


def test_the_log_channel_writes_one_json_line(caplog):
    with caplog.at_level(logging.WARNING, logger="fettle.monitor"):
        Log().deliver(ALERT)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("fettle.monitor", "WARNING")
    assert "\n" not in record.getMessage()
    told = json.loads(record.getMessage())
    assert told["sentence"] == ALERT.sentence
    assert told["features"] == ["p3"]


def test_a_percent_sign_is_no_format(caplog):
    with caplog.at_level(logging.WARNING, logger="fettle.monitor"):
        Log().deliver(Alert(**{**{f: getattr(ALERT, f) for f in ALERT.__slots__}, "sentence": "100 %s %d"}))
    assert json.loads(caplog.records[0].getMessage())["sentence"] == "100 %s %d"


def test_the_log_is_one_channel():
    assert Log().identity == Log().identity == "log"
