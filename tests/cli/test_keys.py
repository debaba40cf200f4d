"""`fettle keys` as a process: a secret is told once, the file is its owner's, and nobody's change undoes another's."""

import json
import os
import re
import stat
import subprocess
import sys
from contextlib import ExitStack
from hashlib import sha256

PATIENCE_S = 60
SECRET = re.compile(r"fettle_[A-Za-z0-9_-]{43}")
# Says when it is ready, waits for a line, and then runs one command after the other.
MANY = """
import sys
from fettle.cli import main
names = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
for name in names:
    sys.argv = ["fettle", "keys", "add", name]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
"""


def test_a_key_is_added_told_once_listed_and_removed(process, tmp_path):
    home = tmp_path / "home"
    added = process("keys", "add", "ci", "--models", "digits", "--actions", "infer", "--actions", "read", home=home)
    assert (added.code, SECRET.fullmatch(added.out.strip()) is not None) == (0, True)
    secret = added.out.strip()
    file = home / "keys.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert secret not in added.err
    listed = process("keys", "list", "--json", home=home)
    digest = sha256(secret.encode()).hexdigest()
    assert listed.json == [{"name": "ci", "models": ["digits"], "actions": ["infer", "read"], "sha256": digest}]
    table = process("keys", "list", home=home)
    assert "ci" in table.out
    for text in (file.read_text(), listed.out, table.out):
        assert SECRET.search(text) is None
    again = process("keys", "add", "ci", home=home)
    assert "there is a key 'ci' already" in again.refused(2)
    assert again.out == ""
    removed = process("keys", "remove", "ci", home=home)
    assert (removed.code, removed.out) == (0, "")
    assert process("keys", "list", "--json", home=home).json == []
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "there is no key 'ci'" in process("keys", "remove", "ci", home=home).refused(2)


def test_a_file_that_others_could_read_is_closed_by_the_next_change(process, tmp_path):
    file = tmp_path / "team.json"
    file.write_text('{"keys": []}')
    file.chmod(0o644)
    assert process("keys", "add", "ci", "--file", file, home=tmp_path / "home").code == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not (tmp_path / "home").exists()


def test_processes_that_add_at_the_same_time_lose_nothing(tmp_path):
    names = [[f"{who}-{number}" for number in range(20)] for who in ("a", "b")]
    environment = {**os.environ, "FETTLE_HOME": str(tmp_path)}
    with ExitStack() as stack:
        running = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", MANY, *some],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )
            for some in names
        ]
        for one in running:
            stack.callback(one.kill)
            assert one.stdout.readline() == "ready\n"
        for one in running:
            one.stdin.write("go\n")
            one.stdin.flush()
        said = [one.communicate(timeout=PATIENCE_S) for one in running]
    assert [one.returncode for one in running] == [0, 0], said
    kept = {entry["name"]: entry["sha256"] for entry in json.loads((tmp_path / "keys.json").read_text())["keys"]}
    secrets = [SECRET.findall(out) for out, _ in said]
    told = {
        name: sha256(secret.encode()).hexdigest()
        for some, texts in zip(names, secrets, strict=True)
        for name, secret in zip(some, texts, strict=True)
    }
    assert kept == told
