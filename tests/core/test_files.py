from __future__ import annotations

import hashlib
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fettle.core.files import sha256_file, write_atomic
from fettle.core.home import Home


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.binary(max_size=5000))
def test_what_is_written_is_read_and_hashed(tmp_path, content):
    path = tmp_path / "folder" / "file"
    write_atomic(path, content)
    assert path.read_bytes() == content
    assert sha256_file(path) == hashlib.sha256(content).hexdigest()
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_failed_write_keeps_the_old_content_and_leaves_nothing(broken, tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_the_home_is_named_by_the_environment_and_not_created(monkeypatch, tmp_path):
    monkeypatch.setenv("FETTLE_HOME", str(tmp_path / "state"))
    home = Home.default()
    assert home.root == tmp_path / "state"
    assert home.observations("digits").parent == home.root / "observations"
    assert {path.parent for path in (home.database, home.blobs, home.runs, home.incidents)} == {home.root}
    assert not home.root.exists()


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variable_the_home_is_beside_the_work(value, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if value is None:
        monkeypatch.delenv("FETTLE_HOME", raising=False)
    else:
        monkeypatch.setenv("FETTLE_HOME", value)
    assert Home.default().root == tmp_path / ".fettle"
    assert Home.default().root.is_absolute()
