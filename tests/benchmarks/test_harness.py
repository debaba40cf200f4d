import importlib
import json
import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = importlib.import_module("harness")
    monkeypatch.setattr(module, "PEERS", tmp_path / "peers")
    monkeypatch.setattr(module, "REQUIREMENTS", tmp_path)
    return module


def test_options_default_to_a_full_run(harness: ModuleType) -> None:
    assert harness.parse_options("d", arguments=[]) == harness.Options(quick=False, json=None)
    given = harness.parse_options("d", arguments=["--quick", "--json", "a/b.json"])
    assert given == harness.Options(quick=True, json=Path("a/b.json"))


@pytest.mark.parametrize("arguments", [["--slow"], ["--json"], ["surplus"]])
def test_wrong_options_exit_with_two(harness: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        harness.parse_options("d", arguments=arguments)


def test_rounds_rotate_and_every_turn_counts_at_least_three_calls(harness: ModuleType) -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = harness.interleave(calls, rounds=3, turn_s=0.0, warmup=2)
    turns = [name for number, name in enumerate(order) if number % 5 == 0]
    assert order == [name for name in turns for _ in range(5)]
    assert turns == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert list(timings) == ["a", "b", "c"]
    assert {(timing.rounds, timing.calls) for timing in timings.values()} == {(3, 9)}


def test_a_timing_is_the_median_and_the_quartiles_of_the_rounds(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds_s = iter([[0.005] * 3, [0.001] * 3, [0.004] * 3, [0.002] * 3, [0.003] * 3])
    monkeypatch.setattr(harness, "_turn", lambda call, **_: next(rounds_s))
    timing = harness.interleave({"a": lambda: None}, rounds=5)["a"]
    assert (timing.low_ms, timing.median_ms, timing.high_ms) == pytest.approx((2.0, 3.0, 4.0))
    assert timing.median_ms == pytest.approx(statistics.median([1, 2, 3, 4, 5]))


def test_one_round_is_enough(harness: ModuleType) -> None:
    timing = harness.interleave({"a": lambda: None}, rounds=1, turn_s=0.0)["a"]
    assert timing.low_ms == timing.median_ms == timing.high_ms


def test_a_table_reads_well_in_both_forms(harness: ModuleType) -> None:
    table = harness.Table("T", ("system", "ms"), (("a|b", "1.5"), ("c", "10.0")))
    assert table.text().splitlines() == ["T", "system  ms", "------  ----", "a|b      1.5", "c       10.0"]
    assert table.markdown().splitlines()[2:] == ["| system | ms |", "| --- | ---: |", "| a\\|b | 1.5 |", "| c | 10.0 |"]


def test_a_table_without_rows_is_still_a_table(harness: ModuleType) -> None:
    assert harness.Table("T", ("a", "b"), ()).markdown().splitlines()[-1] == "| --- | --- |"


def test_a_row_of_another_length_is_refused(harness: ModuleType) -> None:
    with pytest.raises(ValueError, match="must have 2 cells"):
        harness.Table("T", ("a", "b"), (("1",),))


@pytest.mark.parametrize(
    ("kept", "code", "last"),
    [
        ([True, True], 0, "CLAIM holds: f0; f1"),
        ([True, False], 1, "CLAIM falls short: f0; f1"),
        ([], 1, "CLAIM falls short: nothing was measured"),
    ],
)
def test_the_last_line_and_the_exit_code_agree(
    harness: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: list[bool], code: int, last: str
) -> None:
    claims = tuple(harness.Claim("s", holds=holds, figures=f"f{index}") for index, holds in enumerate(kept))
    table = harness.Table("T", ("a",), (("1",),))
    result = harness.Result("b", (table,), claims, {"raw": [1.25]}, {"peer": "why"})
    path = tmp_path / "new" / "b.json"
    assert harness.finish(result, harness.Options(quick=True, json=path)) == code
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == last
    assert "missing: peer: why" in printed
    written = json.loads(path.read_text(encoding="utf-8"))
    assert (written["benchmark"], written["quick"], written["verdict"]) == ("b", True, last)
    assert written["tables"][0]["rows"] == [["1"]]
    assert written["details"] == {"raw": [1.25]}


def test_a_peer_runs_in_an_environment_made_once(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "peer.txt").write_text("# nothing to install\n", encoding="utf-8")
    (tmp_path / "script.py").write_text("import sys; print(sys.prefix, *sys.argv[1:])", encoding="utf-8")
    printed = harness.run_peer("peer", tmp_path / "script.py", ["x", "y"])
    assert printed.split() == [str(tmp_path / "peers" / "peer"), "x", "y"]
    monkeypatch.setattr(harness.sys, "executable", "/nowhere")  # a second making would fail
    assert harness.peer_python("peer").is_file()


def test_a_peer_that_cannot_be_installed_is_named_with_the_reason(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "peer.txt").write_text("./absent.whl\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # a failed installation is not taken for a whole one
        with pytest.raises(harness.PeerMissing, match=r"pip install.*absent\.whl"):
            harness.peer_python("peer")


def test_a_peer_that_fails_or_hangs_is_missing(harness: ModuleType) -> None:
    with pytest.raises(harness.PeerMissing, match="ZeroDivisionError"):
        harness._run_peer([sys.executable, "-c", "1 / 0"], limit_s=60)
    with pytest.raises(harness.PeerMissing, match="timed out"):
        harness._run_peer([sys.executable, "-c", "import threading; threading.Event().wait()"], limit_s=0.2)
    with pytest.raises(harness.PeerMissing, match="could not run"):
        harness._run_peer(["/nowhere/python"], limit_s=1)
