"""`fettle demo` as a new user types it, twice in the same home."""

import pytest


@pytest.mark.slow
def test_the_whole_loop_twice_in_one_home(process, run, tmp_path):
    home = tmp_path / "home"
    for _ in range(2):
        ran = process("demo", "--json", home=home, timeout_s=300)
        assert ran.code == 0, ran.err[-3000:] + ran.out[-3000:]
        summary = ran.json
        assert summary["ok"] is True
        assert summary["optimize"]["met_floor"] is True
        steps = summary["steps"]
        assert steps["500 clean images"].endswith("no drift")
        assert steps["500 corrupted images"].endswith(": drift")
        assert steps["alerts on two looks"].startswith("1 ")
        assert steps["drained on SIGTERM"] == "exit code 0"
    assert run("registry", "verify", "--json", home=home).json == {"problems": []}
    actions = {line["action"] for line in run("registry", "history", "digits", "--json", home=home).json}
    assert actions == {"register", "promote", "rollback"}
