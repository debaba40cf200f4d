import asyncio
import importlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Judging and telling


@pytest.mark.parametrize(
    ("body", "right"),
    [(b'{"index": 3}', True), (b'{"index": 4}', False), (b"{}", False), (b"[]", False), (b"nonsense", False)],
)
def test_an_answer_is_right_by_its_index(serve: ModuleType, body: bytes, right: bool) -> None:
    assert serve.judge_by([9, 3])(1, body) is right


def load(serve: ModuleType, per_s: float, **changes: Any) -> Any:
    plain = serve.Load(
        connections=32, seconds=2.0, answered=int(2 * per_s), refused=0, broken=0, p50_ms=1.0, p99_ms=2.0
    )
    return replace(plain, **changes)


def turn(serve: ModuleType, per_s: float = 1000.0, **changes: Any) -> Any:
    checked, few, many = load(serve, 500), load(serve, 300), load(serve, per_s)
    plain = serve.Turn(
        checked=checked, few=few, many=many, ready_s=0.5, cpu_s=1.0, memory_bytes=2**20, elsewhere_cores=0.0,
        ending=serve.Ending(code=0, left=0),
    )  # fmt: skip
    return replace(plain, **changes)


OURS = {"fettle", "fettle, OpenVINO"}


@pytest.mark.parametrize(("ours", "holds"), [(1000.0, True), (1001.0, True), (999.0, False)])
def test_the_speed_claim_needs_the_best_peer(serve: ModuleType, ours: float, holds: bool) -> None:
    turns = {
        "fettle": [turn(serve, ours)],
        "fettle, OpenVINO": [turn(serve, 5000)],
        "slow": [turn(serve, 10)],
        "best": [turn(serve, 900), turn(serve, 1000), turn(serve, 5000)],
    }
    claim = serve.claim_fast(turns, OURS)
    assert claim.holds is holds
    assert f"fettle {ours:.0f} requests/s" in claim.figures
    assert "(best, 1000)" in claim.figures


@pytest.mark.parametrize("present", [(), ("fettle",), ("peer",), ("fettle, OpenVINO", "peer")])
def test_no_comparison_is_no_claim_kept(serve: ModuleType, present: tuple[str, ...]) -> None:
    assert not serve.claim_fast({name: [turn(serve)] for name in present}, OURS).holds


def test_the_right_claim_holds_where_nothing_is_wrong(serve: ModuleType) -> None:
    claim = serve.claim_right({"fettle": [turn(serve)], "peer": [turn(serve)]}, OURS)
    assert claim.holds
    assert claim.figures == "fettle 0 errors in 3600 requests, 0 wrong of 1000 judged"


@pytest.mark.parametrize("part", ["checked", "few", "many"])
@pytest.mark.parametrize("fault", ["refused", "broken"])
@pytest.mark.parametrize(("name", "holds"), [("fettle", False), ("fettle, OpenVINO", False), ("peer", True)])
def test_the_right_claim_falls_with_any_error_of_ours(
    serve: ModuleType, part: str, fault: str, name: str, holds: bool
) -> None:
    turns = {other: [turn(serve), turn(serve)] for other in ("fettle", "fettle, OpenVINO", "peer")}
    turns[name][1] = turn(serve, **{part: load(serve, 500, **{fault: 1})})
    assert turns[name][1].errors == 1
    assert serve.claim_right(turns, OURS).holds is holds


@pytest.mark.parametrize("name", ["fettle", "fettle, OpenVINO", "peer"])
def test_the_right_claim_falls_with_one_wrong_answer_of_anyone(serve: ModuleType, name: str) -> None:
    turns = {other: [turn(serve)] for other in ("fettle", "fettle, OpenVINO", "peer")}
    turns[name] = [turn(serve, checked=load(serve, 500, wrong=1))]
    claim = serve.claim_right(turns, OURS)
    assert not claim.holds
    assert ("1 wrong of" in claim.figures) or ("peer 1 wrong" in claim.figures)


def test_nothing_judged_is_nothing_right(serve: ModuleType) -> None:
    assert not serve.claim_right({}, OURS).holds
    assert not serve.claim_right({"peer": [turn(serve)]}, OURS).holds
    assert not serve.claim_right({"fettle": [turn(serve, checked=load(serve, 0))]}, OURS).holds


def test_tables_have_a_row_for_each_system_and_the_spread_of_its_rounds(serve: ModuleType) -> None:
    turns = {"fettle": [turn(serve, rate) for rate in (900, 1000, 1300)], "peer": [turn(serve, cpu_s=3.0)]}
    table = serve.tabulate_load(turns, note="noise", rounds=3)
    assert table.rows[0][:2] == ("fettle", "1000 (900–1300)")
    assert table.rows[0][-2:] == ("0", "0 of 3000")
    assert "noise" in table.title
    assert "median of 3 rounds" in table.title
    cost = serve.tabulate_cost(turns)
    assert cost.rows[1] == ("peer", "1.50", "1", "0.50", "ended, code 0", "0.00")


@pytest.mark.parametrize(("elsewhere", "told"), [(0.0, False), (0.05, False), (0.1, True), (1.3, True)])
def test_a_busy_machine_is_told(serve: ModuleType, elsewhere: float, told: bool) -> None:
    turns = {"fettle": [turn(serve, elsewhere_cores=elsewhere)], "peer": [turn(serve, elsewhere_cores=elsewhere)]}
    title = serve.tabulate_load(turns, note="noise", rounds=1).title
    assert (f"other work took {elsewhere:.1f} of the cores" in title) is told
    assert "NOT" not in serve.tabulate_load({}, note="noise", rounds=1).title


def test_rounds_begin_with_another_system_and_a_failing_one_is_named_and_left_out(
    serve: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def take(system: Any, folder: Path, **_: Any) -> Any:
        order.append(system.name)
        if system.name == "b" and len(order) > 3:
            raise serve.ServerFailed("it ended with code 1: out of memory")
        return turn(serve)

    monkeypatch.setattr(serve, "take_turn", take)
    systems = [serve.System(name, serve.Launch(()), ()) for name in "abc"]
    missing = {"c2": "not installed"}
    effort = replace(serve.QUICK, rounds=3)
    turns = serve.measure(systems, tmp_path, effort=effort, cores={0}, missing=missing)
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a"]
    assert {name: len(found) for name, found in turns.items()} == {"a": 3, "c": 3}
    assert missing == {"c2": "not installed", "b": "round 2: it ended with code 1: out of memory"}
    assert serve.measure([], tmp_path, effort=effort, cores={0}, missing={}) == {}


def test_a_peer_that_cannot_be_installed_is_named(
    serve: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peer_python(name: str) -> Path:
        if name == "litserve":
            raise serve.PeerMissing("no such version")
        return Path("/usr/bin/python")

    monkeypatch.setattr(serve, "peer_python", peer_python)
    missing: dict[str, str] = {}
    systems = serve.build_peers(tmp_path, (1, 2), missing=missing)
    assert [system.name for system in systems] == ["FastAPI + uvicorn, 1 worker", "FastAPI + uvicorn, 2 workers"]
    assert missing == {"LitServe": "no such version"}
    assert not any(system.ours for system in systems)


# The real thing, without the data


@pytest.mark.slow
def test_a_turn_of_fettle_itself_on_invented_weights(
    serve: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Path:
        raise serve.PeerMissing("not wanted here")

    monkeypatch.setenv("FETTLE_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr(serve, "peer_python", absent)
    monkeypatch.setattr(serve, "generate", in_process(importlib.import_module("serve_peers.generators")))
    missing: dict[str, str] = {}
    systems, note = serve.build(tmp_path, missing=missing)
    assert "random weights" in note
    assert missing.keys() == {"FastAPI + uvicorn", "LitServe"}
    logged = systems[1]
    assert logged.name == "fettle, with prediction log"
    effort = serve.Effort(rounds=1, check_s=0.5, few_s=0.2, many_s=0.3)
    found = serve.take_turn(logged, tmp_path, effort=effort, cores=set(os.sched_getaffinity(0)))
    assert found.checked.answered > 0
    assert (found.errors, found.checked.wrong) == (0, 0)
    assert found.ending == serve.Ending(code=0, left=0)
    assert found.cpu_s_per_1000 > 0
    assert any((tmp_path / "observations").rglob("*.parquet"))


def in_process(generators: ModuleType) -> Callable[..., Any]:
    def generate(port: int, bodies: Path, *, connections: int, seconds: float) -> Any:
        content = bodies.read_bytes().splitlines()
        return asyncio.run(generators.drive(port, content, connections=connections, seconds=seconds))

    return generate
