"""`fettle monitor report` before anything was served, and with what cannot be."""

import shutil

import pytest


@pytest.fixture
def home(tiny, tmp_path):
    return shutil.copytree(tiny.home, tmp_path / "home")


def test_no_log_is_not_enough_data(run, home):
    ran = run("monitor", "report", "tiny", "--json", home=home)
    assert ran.code == 0
    assert ran.json["verdict"] == "not enough data"
    assert ran.json["sentence"].startswith("Not enough data")
    people = run("monitor", "report", "tiny", "--window", "1h", home=home)
    assert people.code == 0
    assert "tiny:1: not enough data" in people.out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nope"], 1, ["nope", "tiny"]),
        (["tiny:7"], 1, ["7"]),
        (["tiny", "--window", "soon"], 2, ["soon", "30m"]),
        (["tiny", "--window", "0m"], 2, ["0m"]),
        (["tiny", "--webhook", "not-a-url"], 1, ["webhook", "http://"]),
    ],
)
def test_refused(run, home, arguments, code, words):
    line = run("monitor", "report", *arguments, home=home).refused(code)
    for word in words:
        assert word in line


def test_last_must_be_positive(run, home):
    assert run("monitor", "report", "tiny", "--last", "0", home=home).code == 2
