"""`fettle registry ...` and `fettle compare`, on a home in which the tiny project was optimized."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def home(tiny, tmp_path):
    return Path(shutil.copytree(tiny.home, tmp_path / "home"))


@pytest.fixture
def two(home, tiny):
    """The same home with a second version: another candidate of the run."""
    from fettle import Artifact, Home, Registry

    best = tiny.ran.json["best"]["digest"]
    others = [Artifact.open(path.parent) for path in (home / "runs" / "tiny").glob("*/manifest.json")]
    Registry(Home(home)).put("tiny", next(each for each in others if each.digest != best), reason="by hand")
    return home


def test_list(run, two):
    rows = run("registry", "list", "--json", home=two).json
    assert [(row["name"], row["version"], row["aliases"]) for row in rows] == [
        ("tiny", 1, ["champion"]),
        ("tiny", 2, []),
    ]
    assert run("registry", "list", "tiny", "--json", home=two).json == rows
    table = run("registry", "list", home=two)
    assert table.code == 0
    assert "tiny:1" in table.out
    assert "champion" in table.out


def test_list_of_an_empty_home(run, tmp_path):
    assert run("registry", "list", "--json", home=tmp_path / "none").json == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("reference", ["tiny", "tiny:1", "tiny@champion", "tiny@latest"])
def test_show(run, home, tiny, reference):
    shown = run("registry", "show", reference, "--json", home=home).json
    assert shown["digest"] == tiny.ran.json["best"]["digest"]
    assert shown["reports"][0]["subject"] == shown["digest"]
    people = run("registry", "show", reference, home=home)
    assert "metric.accuracy" in people.out
    assert shown["digest"] in people.out


def test_promote_rollback_and_history(run, two):
    change = run("registry", "promote", "tiny:2", "--reason", "smaller", "--json", home=two).json
    assert (change["before"], change["after"], change["reason"]) == (1, 2, "smaller")
    assert run("registry", "show", "tiny", "--json", home=two).json["version"] == 2
    back = run("registry", "rollback", "tiny", home=two)
    assert back.out.strip() == "tiny@champion: tiny:2 -> tiny:1"
    lines = run("registry", "history", "tiny", "--json", home=two).json
    assert [line["action"] for line in lines] == ["register", "promote", "register", "promote", "rollback"]
    assert "smaller" in run("registry", "history", home=two).out


def test_promote_another_alias(run, two):
    said = run("registry", "promote", "tiny:2", "--alias", "canary", home=two)
    assert said.out.strip() == "tiny@canary: nothing -> tiny:2"


def test_verify_and_gc(run, home):
    assert run("registry", "verify", "--json", home=home).json == {"problems": []}
    assert "as it was written" in run("registry", "verify", home=home).out
    assert run("registry", "gc", "--json", home=home).json == {"deleted": False, "paths": []}
    assert run("registry", "gc", "--delete", home=home).out == ""


def test_verify_finds_a_flipped_byte(run, home, tiny):
    blob = next(path for path in (home / "blobs").rglob("*") if path.is_file())
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(content)
    ran = run("registry", "verify", "--json", home=home)
    assert ran.code == 1
    assert any(blob.name[:12] in problem for problem in ran.json["problems"])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["list", "nope"], 1, ["nope", "tiny"]),
        (["history", "nope"], 1, ["nope", "tiny"]),
        (["show", "nope"], 1, ["nope", "tiny"]),
        (["show", "tiny:9"], 1, ["9"]),
        (["show", "tiny@canary"], 1, ["canary"]),
        (["show", "tiny:zero"], 2, ["tiny:zero", "NAME:number"]),
        (["show", "../etc"], 2, ["../etc"]),
        (["promote", "tiny:9"], 1, ["9"]),
        (["promote", "tiny"], 2, ["version number"]),
        (["promote", "tiny@champion"], 2, ["version number"]),
        (["promote", "tiny:1", "--alias", "latest"], 2, ["latest"]),
        (["rollback", "nope"], 1, ["nope"]),
        (["rollback", "tiny"], 1, ["go back"]),
        (["rollback", "tiny", "--alias", "canary"], 1, ["canary"]),
    ],
)
def test_refused(run, home, arguments, code, words):
    before = run("registry", "history", "--json", home=home).json
    line = run("registry", *arguments, home=home).refused(code)
    for word in words:
        assert word in line
    assert run("registry", "history", "--json", home=home).json == before


def test_compare_with_the_original(run, home, tmp_path):
    ran = run("compare", "tiny", "original", "--json", "--html", tmp_path / "page.html", home=home)
    assert (ran.json["a"], ran.json["b"]) == ("original", "tiny")
    rows = {row["name"]: row for row in ran.json["rows"]}
    assert set(rows["size"]) == {"name", "unit", "a", "b", "difference", "ratio", "better"}
    assert rows["latency.p50"]["better"] is True
    assert rows["metric.accuracy"]["a"]["n"] == 60
    assert "<html" in (tmp_path / "page.html").read_text()


def test_compare_two_versions_for_people(run, two):
    ran = run("compare", "tiny:1", "tiny:1", home=two)
    assert ran.code == 0
    assert "latency.p50" in ran.out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["tiny", "nope"], 1, ["nope"]),
        (["nope", "original"], 1, ["nope"]),
        (["tiny", "tiny:2"], 1, ["tiny:2", "no report"]),
        (["tiny:2", "original"], 1, ["tiny:2", "no report"]),
        (["tiny", "Tiny:x"], 2, ["Tiny:x"]),
    ],
)
def test_compare_refused(run, two, arguments, code, words):
    line = run("compare", *arguments, home=two).refused(code)
    for word in words:
        assert word in line


def test_compare_into_a_folder_that_is_not_there(run, home, tmp_path):
    (tmp_path / "file").write_text("")
    line = run("compare", "tiny", "original", "--html", tmp_path / "file" / "page.html", home=home).refused(1)
    assert "file" in line
