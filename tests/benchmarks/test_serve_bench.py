import asyncio
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def turns() -> ModuleType:
    return importlib.import_module("serve_turns")


@pytest.fixture
def claims() -> ModuleType:
    return importlib.import_module("serve_claims")


@pytest.fixture
def tables() -> ModuleType:
    return importlib.import_module("serve_tables")


@pytest.fixture
def systems() -> ModuleType:
    return importlib.import_module("serve_peers.systems")


# The command line


def test_everything_is_measured_unless_the_command_line_says_less(serve: ModuleType) -> None:
    assert serve.parse("d", arguments=[]) == serve.ServeBenchOptions(quick=False, json=None)
    given = serve.parse("d", arguments=["--quick", "--payload", "binary", "--payload", "image", "--peer", "Ray"])
    assert (given.quick, given.payloads, given.peers, given.install) == (True, ("image", "binary"), ("Ray",), False)
    with pytest.raises(SystemExit):
        serve.parse("d", arguments=["--payload", "xml"])


@pytest.mark.parametrize(("failed", "code"), [({}, 0), ({"Ray Serve": "no such version"}, 1)])
def test_peers_can_be_installed_without_measuring(
    serve: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failed: dict[str, str],
    code: int,
) -> None:
    monkeypatch.setattr(serve, "install_peers", lambda: failed)
    assert serve.main(serve.parse("d", arguments=["--install-peers"])) == code
    assert ("missing: Ray Serve: no such version" in capsys.readouterr().out) is bool(failed)


# Invented findings


def load(turns: ModuleType, per_s: float, **changes: Any) -> Any:
    plain = turns.Load(
        connections=32, seconds=2.0, answered=int(2 * per_s), refused=0, broken=0, p50_ms=1.0, p99_ms=2.0
    )
    return replace(plain, **changes)


def part(turns: ModuleType, per_s: float = 1000.0, **changes: Any) -> Any:
    checked, few, many = load(turns, 500), load(turns, 300), load(turns, per_s)
    return replace(turns.Part(checked, few, many, cpu_s=1.0, elsewhere_cores=0.0), **changes)


def opened(turns: ModuleType, factor: float = 2.0, capacity: float = 1000.0, **changes: Any) -> Any:
    """A second of load of which 90 % of the capacity is in time and the rest shed."""
    counts = {"good": 900, "late": 0, "shed": 1100, "refused": 0, "broken": 0, "unanswered": 0}
    counts |= {name: value for name, value in changes.items() if name in counts}
    found = turns.OpenLoad(
        rate_per_s=factor * capacity, seconds=1.0, sent=2000, **counts, p50_ms=50.0, p99_ms=90.0, shed_p50_ms=0.5,
        shed_p99_ms=changes.get("shed_p99_ms", 2.0), lag_p99_ms=1.0, cpu_s=0.1,
    )  # fmt: skip
    return turns.Open(factor, capacity, found, judged=10, wrong=changes.get("wrong", 0))


def turn(turns: ModuleType, per_s: float = 1000.0, **changes: Any) -> Any:
    plain = turns.Turn(
        parts={"image": part(turns, per_s)}, opened=(), ready_s=0.5, first_s=0.6, memory_bytes=2**20,
        ending=turns.Ending(code=0, left=0),
    )  # fmt: skip
    return replace(plain, **changes)


def paired(turns: ModuleType, per_s: float, limits: dict[int, list[float]]) -> list[Any]:
    """Bursts of one speed beside limits by rows in a batch, a burst each."""
    return [turns.Pair(per_s, dict(zip(limits, beside, strict=True))) for beside in zip(*limits.values(), strict=True)]


OURS = {"fettle", "fettle, OpenVINO"}


@pytest.mark.parametrize(
    ("ours", "p99_ms", "holds"), [(2500.0, 2.0, True), (2501.0, 1.0, True), (2499.0, 1.0, False), (9000.0, 2.1, False)]
)
def test_the_speed_claim_needs_a_multiple_of_the_best_peer_and_the_lowest_p99_of_any(
    turns: ModuleType, claims: ModuleType, ours: float, p99_ms: float, holds: bool
) -> None:
    found = turns.Findings(
        {
            "fettle": [turn(turns, parts={"image": part(turns, many=load(turns, ours, p99_ms=p99_ms))})],
            "fettle, OpenVINO": [turn(turns, 5000)],
            "calm": [turn(turns, 10)],
            "best": [
                turn(turns, parts={"image": part(turns, many=load(turns, rate, p99_ms=9.0))})
                for rate in (900, 1000, 5000)
            ],
        }
    )
    claim = claims.claim_fast(found, OURS, "image")
    assert claim.holds is holds
    assert f"image: {ours:.0f} requests/s" in claim.figures
    assert "the best peer (best, 1000)" in claim.figures
    assert "(lowest of a peer: calm, 2.0)" in claim.figures


@pytest.mark.parametrize("present", [(), ("fettle",), ("peer",), ("fettle, OpenVINO", "peer")])
def test_no_comparison_is_no_claim_kept(turns: ModuleType, claims: ModuleType, present: tuple[str, ...]) -> None:
    found = turns.Findings({name: [turn(turns)] for name in present})
    assert not claims.claim_fast(found, OURS, "image").holds
    assert not claims.claim_fast(found, OURS, "binary").holds


def test_the_right_claim_holds_where_nothing_is_wrong(turns: ModuleType, claims: ModuleType) -> None:
    both = {"fettle": [turn(turns, opened=[opened(turns)])], "peer": [turn(turns)]}
    claim = claims.claim_right(turns.Findings(both), OURS)
    assert claim.holds
    assert claim.figures == "fettle 0 errors in 3600 requests, 0 wrong of 1010 judged"


@pytest.mark.parametrize("half", ["checked", "few", "many"])
@pytest.mark.parametrize("fault", ["refused", "broken"])
@pytest.mark.parametrize(("name", "holds"), [("fettle", False), ("fettle, OpenVINO", False), ("peer", True)])
def test_the_right_claim_falls_with_any_error_of_ours(
    turns: ModuleType, claims: ModuleType, half: str, fault: str, name: str, holds: bool
) -> None:
    found = {other: [turn(turns), turn(turns)] for other in ("fettle", "fettle, OpenVINO", "peer")}
    bad = part(turns, **{half: load(turns, 500, **{fault: 1})})
    found[name][1] = turn(turns, parts={"image": part(turns), "json": bad})
    assert found[name][1].errors == 1
    assert claims.claim_right(turns.Findings(found), OURS).holds is holds


@pytest.mark.parametrize("where", ["closed", "open"])
@pytest.mark.parametrize("name", ["fettle", "fettle, OpenVINO", "peer"])
def test_the_right_claim_falls_with_one_wrong_answer_of_anyone(
    turns: ModuleType, claims: ModuleType, name: str, where: str
) -> None:
    found = {other: [turn(turns)] for other in ("fettle", "fettle, OpenVINO", "peer")}
    bad = part(turns, checked=load(turns, 500, wrong=1))
    stray = {"parts": {"image": bad}} if where == "closed" else {"opened": [opened(turns, wrong=1)]}
    found[name] = [turn(turns, **stray)]
    claim = claims.claim_right(turns.Findings(found), OURS)
    assert not claim.holds
    assert ("1 wrong of" in claim.figures) or ("peer 1 wrong" in claim.figures)


def test_nothing_judged_is_nothing_right(turns: ModuleType, claims: ModuleType) -> None:
    silent = turn(turns, parts={"image": part(turns, checked=load(turns, 0))})
    for found in ({}, {"peer": [turn(turns)]}, {"fettle": [silent]}):
        assert not claims.claim_right(turns.Findings(found), OURS).holds


@pytest.mark.parametrize(
    ("limits", "holds"),
    [
        pytest.param({8: [1000.0, 1428.0, 9000.0]}, True, id="two of three bursts"),
        pytest.param({8: [1430.0, 1430.0, 1000.0]}, False, id="one of three bursts"),
        pytest.param({8: [1428.0] * 3, 16: [1400.0, 1400.0, 9000.0]}, True, id="the batch best by its median"),
        pytest.param({8: [1400.0] * 3, 16: [1430.0] * 3}, False, id="the larger batch is better"),
        pytest.param({8: []}, False, id="no limit"),
    ],
)
def test_the_limit_claim_needs_seven_tenths_of_what_the_cores_could_do(
    turns: ModuleType, claims: ModuleType, limits: dict[int, list[float]], holds: bool
) -> None:
    first, *others = paired(turns, 1000.0, limits) or [None]
    rounds = [[first] if first else [], others]
    found = turns.Findings({"fettle": [turn(turns, pairs={"image": pairs}) for pairs in rounds]})
    assert claims.claim_near_limit(found, "image").holds is holds
    assert not claims.claim_near_limit(found, "json").holds
    assert not claims.claim_near_limit(turns.Findings({"peer": found.turns["fettle"]}), "image").holds


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, True),
        ({"good": 899}, False),
        ({"shed": 1080, "late": 20}, True),
        ({"shed": 1070, "late": 30}, False),
        ({"shed": 1070, "unanswered": 30}, False),
        ({"shed": 1070, "refused": 30}, False),
        ({"shed": 1070, "broken": 30}, False),
        ({"shed_p99_ms": 5.0}, False),
        ({"factor": 1.5}, False),
    ],
)
def test_the_overload_claim_needs_goodput_and_prompt_refusals(
    turns: ModuleType, claims: ModuleType, changes: dict[str, Any], holds: bool
) -> None:
    found = turns.Findings({"fettle": [turn(turns, opened=[opened(turns, **changes)])]})
    assert claims.claim_overload(found).holds is holds


@pytest.mark.parametrize(("ready_s", "holds"), [(0.99, True), (1.0, False)])
def test_the_start_claim_needs_less_than_a_second(
    turns: ModuleType, claims: ModuleType, ready_s: float, holds: bool
) -> None:
    assert claims.claim_start(turns.Findings({"fettle": [turn(turns, ready_s=ready_s)]})).holds is holds
    assert not claims.claim_start(turns.Findings({})).holds


def test_tables_have_a_row_for_each_system_and_the_spread_of_its_rounds(turns: ModuleType, tables: ModuleType) -> None:
    slow = {"image": part(turns, cpu_s=3.0)}
    pairs = {"image": paired(turns, 1000, {8: [4000.0, 6000.0], 16: [100.0, 9000.0]})}
    found = turns.Findings(
        {
            "fettle": [turn(turns, rate, opened=[opened(turns)], pairs=pairs) for rate in (900, 1000, 1300)],
            "peer": [turn(turns, parts=slow)],
        },
    )
    closed, cost, beyond = tables.tables(found, note="noise", rounds=3)
    assert closed.rows[0][:2] == ("fettle", "1000 (900–1300)")
    assert closed.rows[0][-2:] == ("0", "0 of 3000")
    assert closed.rows[2][:2] == ("decoding and inference alone", "5000 (4000–6000)")
    assert "noise" in closed.title
    assert "median of 3 rounds" in closed.title
    assert cost.rows[1] == ("peer", "1.50", "1", "0.50", "0.60", "ended, code 0", "0.00")
    assert [row[:6] for row in beyond.rows] == [("fettle", "2 ×", "2000", "900", "90%", "55.0%")]
    assert tables.tables(turns.Findings({}), note="noise", rounds=1)[0].rows == ()


class FakeLimit:
    """Counts up by a thousand; fails at a number, if any."""

    def __init__(self, turns: ModuleType, said: list[str], *, fails_at: int = 0) -> None:
        self._turns, self._said, self._fails_at = turns, said, fails_at

    def measure(self, kind: str, *, seconds: float) -> dict[int, float]:
        self._said.append(kind)
        if self._said.count(kind) == self._fails_at:
            raise self._turns.LimitFailed("a process was killed")
        return {8: 1000.0 * self._said.count(kind)}


@pytest.mark.parametrize("fails_at", [0, 3])
def test_each_burst_is_compared_with_what_is_measured_on_both_of_its_sides(
    turns: ModuleType, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    said: list[str] = []

    @contextmanager
    def limit_of(*_: object, processes: int) -> Iterator[FakeLimit]:
        assert processes == 2
        yield FakeLimit(turns, said, fails_at=fails_at)

    def generate(*_: object, **__: object) -> Any:
        said.append("burst")
        return load(turns, 700)

    monkeypatch.setattr(turns, "limit_of", limit_of)
    monkeypatch.setattr(turns, "generate", generate)
    system = SimpleNamespace(payloads={"image": None, "json": None})
    server, missing = SimpleNamespace(port=1), dict[str, str]()
    effort = replace(turns.QUICK, pairs=2)
    found = turns.compare(server, system, Path(), Path(), effort, {0, 1}, missing)
    around = ["image", "burst", "image", "burst", "image"]
    if fails_at:
        assert (said, found) == (around, {})
        assert missing == {turns.LIMIT: "a process was killed"}
        assert turns.compare(server, system, Path(), Path(), effort, {0, 1}, missing) == {}
        assert said == around
    else:
        assert said == [*around, *(kind.replace("image", "json") for kind in around)]
        assert found["image"] == found["json"] == [turns.Pair(700, {8: 1500.0}), turns.Pair(700, {8: 2500.0})]
        assert missing == {}


def test_an_open_loop_is_set_against_what_the_closed_one_reaches_on_both_of_its_sides(
    turns: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter((1000.0, 500.0, 0.0))
    offered: list[float] = []

    def drive_open(*_: object, rate_per_s: float, **__: object) -> Any:
        offered.append(rate_per_s)
        return opened(turns).load, []

    monkeypatch.setattr(turns, "generate", lambda *_, **__: load(turns, next(rates)))
    monkeypatch.setattr(turns, "drive_open", drive_open)
    payload = SimpleNamespace(requests=lambda _: [])
    system = SimpleNamespace(ours=True, payloads={"image": payload}, judge=lambda _: None)
    server = SimpleNamespace(port=1, settle=lambda *_, **__: None, cpu_s=lambda: 0.0)
    found = turns.take_open(server, system, "image", effort=replace(turns.QUICK, factors=(1.5, 2.0)))
    assert offered == [1500.0, 1000.0]
    assert [(one.factor, one.capacity_per_s, one.goodput) for one in found] == [(1.5, 750.0, 1.2), (2.0, 250.0, 3.6)]


def test_a_computation_that_cannot_be_is_a_failure_of_its_own(tmp_path: Path) -> None:
    compute = importlib.import_module("serve_peers.compute")
    with (
        pytest.raises(compute.LimitFailed, match="ended with code 1"),
        compute.limit_of(tmp_path / "nothing", tmp_path, processes=2),
    ):
        pytest.fail("it began")


@pytest.mark.parametrize(("elsewhere", "told"), [(0.0, False), (0.05, False), (0.1, True), (1.3, True)])
def test_a_busy_machine_is_told(turns: ModuleType, tables: ModuleType, elsewhere: float, told: bool) -> None:
    busy = turn(turns, parts={"image": part(turns, elsewhere_cores=elsewhere)})
    title = tables.tabulate_load(turns.Findings({"fettle": [busy]}), "image", note="noise", rounds=1).title
    assert (f"other work took {elsewhere:.1f} of the cores" in title) is told


# Rounds and peers


def test_rounds_begin_with_another_system_and_a_failing_one_is_named_and_left_out(
    turns: ModuleType, systems: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def take(system: Any, folder: Path, **_: Any) -> Any:
        order.append(system.name)
        if system.name == "b" and len(order) > 3:
            raise turns.ServerFailed("it ended with code 1: out of memory")
        return turn(turns)

    monkeypatch.setattr(turns, "take_turn", take)
    found = [systems.System(name, turns.Server, {}, None) for name in "abc"]
    missing = {"c2": "not installed"}
    effort = replace(turns.QUICK, rounds=3)
    field = systems.Field(found, None, "noise")
    options: dict[str, Any] = {"effort": effort, "cores": {0}}
    measured = turns.measure(field, tmp_path, missing=missing, **options)
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a"]
    assert {name: len(taken) for name, taken in measured.turns.items()} == {"a": 3, "c": 3}
    assert missing == {"c2": "not installed", "b": "round 2: it ended with code 1: out of memory"}
    assert turns.measure(systems.Field([], None, ""), tmp_path, missing={}, **options).turns == {}


def test_a_peer_that_is_not_wanted_or_cannot_be_installed_is_named(
    systems: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peer_python(name: str) -> Path:
        if name == "litserve":
            raise systems.PeerMissing("no such version")
        return Path("/usr/bin/python")

    monkeypatch.setattr(systems, "peer_python", peer_python)
    missing: dict[str, str] = {}
    images = systems.Images([b"jpeg"], np.zeros((1, 3, 2, 2), np.float32))
    right, in_float = object(), object()
    found = systems.build_peers(
        tmp_path, images, right, in_float=in_float, wanted=("fastapi", "LitServe", "flask"), missing=missing
    )
    assert [(one.name, one.expected is right) for one in found] == [
        ("FastAPI + uvicorn, 1 worker", True),
        ("FastAPI + uvicorn, 2 workers", True),
        ("Flask + gunicorn, torch eager", False),
    ]
    assert missing == {"LitServe": "no such version"} | dict.fromkeys(
        ("BentoML", "MLServer", "Ray Serve"), "not asked for"
    )
    assert not any(one.ours for one in found)
    assert systems.install_peers() == {"LitServe": "no such version"}


def test_every_peer_has_a_script_and_pinned_requirements(systems: ModuleType) -> None:
    harness = importlib.import_module("harness")
    for peer in systems.PEERS:
        assert (systems.SCRIPTS / peer.script).is_file()
        lines = (harness.REQUIREMENTS / f"{peer.environment}.txt").read_text().splitlines()
        assert all(line.startswith("#") or "==" in line for line in lines)


# The real thing, without the data


@pytest.mark.slow
def test_a_turn_of_fettle_itself_on_invented_weights(
    turns: ModuleType, systems: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FETTLE_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr(turns, "generate", in_process(importlib.import_module("serve_peers.generators")))
    missing: dict[str, str] = {}
    kinds = ("image", "json", "binary")
    field = systems.build(tmp_path, kinds=kinds, peers=("none",), missing=missing)
    assert "random weights" in field.note
    assert missing == dict.fromkeys([peer.name for peer in systems.PEERS], "not asked for")
    fettle, logged = field.systems[:2]
    assert (fettle.name, logged.name) == ("fettle", "fettle, with prediction log")
    effort = replace(
        turns.QUICK, check_s=0.4, few_s=0.2, many_s=0.3, open_s=0.3, factors=(2.0,), pairs=1, burst_s=0.3, limit_s=0.05
    )
    options: dict[str, Any] = {"effort": effort, "cores": set(os.sched_getaffinity(0)), "missing": missing}
    assert field.artifact is not None
    found = turns.take_turn(fettle, tmp_path, artifact=field.artifact, **options)
    assert list(found.parts) == list(kinds)
    assert all(part.checked.answered > 0 and part.cpu_s_per_1000 > 0 for part in found.parts.values())
    assert (found.errors, found.wrong) == (0, 0)
    assert found.ending == turns.Ending(code=0, left=0)
    (beyond,) = found.opened
    assert beyond.load.good + beyond.load.shed > 0
    assert (beyond.load.broken, beyond.load.unanswered) == (0, 0)
    assert found.pairs.keys() == set(kinds)
    for (pair,) in found.pairs.values():
        assert min(pair.per_s, *pair.limits_per_s.values()) > 0
    found = turns.take_turn(logged, tmp_path, artifact=None, **options)
    assert (list(found.parts), found.errors, found.opened, found.pairs) == (["image"], 0, [], {})
    assert any((tmp_path / "observations").rglob("*.parquet"))
    assert turns.LIMIT not in missing


def in_process(generators: ModuleType) -> Callable[..., Any]:
    def generate(port: int, payload: Any, *, connections: int, seconds: float) -> Any:
        return asyncio.run(generators.drive(port, payload.requests(), connections=connections, seconds=seconds))

    return generate
