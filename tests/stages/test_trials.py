"""Which engine's int8 layers are given back for, where some keep the floor and others do not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fettle.stages import trials
from fettle.stages.trials import _Trials


@pytest.mark.parametrize(
    ("metrics", "times_ms", "wanted"),
    [
        ({"a": 0.95, "b": 0.95}, {"a": 1.0, "b": 2.0}, None),
        ({"a": 0.85, "b": 0.8}, {"a": 2.0, "b": 1.0}, "b"),
        ({"a": 0.95, "b": 0.85}, {"a": 2.0, "b": 1.0}, "b"),
        ({"a": 0.95, "b": 0.85}, {"a": 1.0, "b": 2.0}, None),
        ({}, {}, None),
        ({"null": 0.1}, {"null": 1.0}, None),
    ],
    ids=[
        "all keep it",
        "none keeps it",
        "the fastest misses it",
        "a slower one misses it",
        "none was built",
        "one that only pretends",
    ],
)
def test_the_fastest_engine_that_misses_the_floor_is_mended(monkeypatch, metrics, times_ms, wanted):
    built = [
        SimpleNamespace(
            metric=SimpleNamespace(value=value),
            runner=None,
            artifact=SimpleNamespace(manifest=SimpleNamespace(runtime=name)),
        )
        for name, value in metrics.items()
    ]
    monkeypatch.setattr(trials._Trials, "_floor", lambda self: 0.9)
    monkeypatch.setattr(trials, "_runtime", lambda name: SimpleNamespace(computes=name != "null"))
    monkeypatch.setattr(trials._Trials, "_time", lambda self, entries: {name: times_ms[name] for name in entries})
    found = _Trials(None, Path(), (), asked=False)._wanting(built)
    assert (found.artifact.manifest.runtime if found else None) == wanted
