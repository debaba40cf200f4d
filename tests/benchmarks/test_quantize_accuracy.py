import importlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("openvino")

N = 1000


@pytest.fixture
def accuracy() -> ModuleType:
    return importlib.import_module("quantize_accuracy")


@pytest.fixture
def claims() -> ModuleType:
    return importlib.import_module("quantize_claims")


@pytest.fixture
def peers() -> ModuleType:
    return importlib.import_module("quantize_peers")


@pytest.fixture
def nets(claims: ModuleType) -> tuple[Any, ...]:
    return (
        claims.Net("first", "a.toml", max_drop=0.003, min_agreement=0.993),
        claims.Net("second", "b.toml", max_drop=0.005),
    )


@pytest.fixture
def problem(peers: ModuleType, tmp_path: Path) -> Any:
    rows = np.eye(4, dtype=np.float32)
    split = (rows, np.arange(4))
    return peers.Problem(
        net="first",
        kind="plain",
        model=torch.nn.Linear(4, 4).eval(),
        example=(torch.zeros(2, 4),),
        calibration=rows,
        validation=split,
        test=split,
        folder=tmp_path,
    )


def row(claims: ModuleType, net: str, by: str, *, differing: int = 0, **changes: Any) -> Any:
    """A row of int8; `differing` of its answers are not float's."""
    timings = {batch: claims.Timing(1.0, 1.0, 1.0, 5, 50) for batch in (1, 32)}
    plain = claims.Row(
        net=net, by=by, name=by, engine="e", precision="int8", note="", n=N, accuracy=0.88, drop=0.001, p=0.5,
        picks=(1, 32) if by == "fettle" else (), agreement=1 - differing / N, differs=tuple(range(differing)),
        validation_agreement=0.99, timings=timings,
    )  # fmt: skip
    return replace(plain, **changes)


def both(claims: ModuleType, *, differing: int = 6, **changes: Any) -> list[Any]:
    """A peer and fettle on both networks; `changes` to fettle's row on the first."""
    rows = [row(claims, net, "peer", differing=8) for net in ("first", "second")]
    return [
        *rows,
        row(claims, "second", "fettle", differing=6),
        row(claims, "first", "fettle", differing=differing, **changes),
    ]


def slower(claims: ModuleType, batch: int, milliseconds: float) -> dict[int, Any]:
    timings = {size: claims.Timing(1.0, 1.0, 1.0, 5, 50) for size in (1, 32)}
    timings[batch] = replace(timings[batch], median_ms=milliseconds)
    return timings


def test_every_claim_holds_where_every_figure_is_within_its_bound(claims: ModuleType, nets: tuple[Any, ...]) -> None:
    rows = both(claims, differing=7, drop=0.003)
    for claim in (claims.claim_closest, claims.claim_agreement, claims.claim_drop, claims.claim_speed):
        assert claim(rows, nets).holds, claim.__name__
    assert "first 99.30% against 99.20% of peer in e" in claims.claim_closest(rows, nets).figures
    assert claims.claim_agreement(rows, nets).figures == "first 99.30% of 99.3%"
    assert "first +0.30 of 0.3 points" in claims.claim_drop(rows, nets).figures


@pytest.mark.parametrize(("differing", "holds"), [(0, True), (7, True), (8, True), (9, False)])
def test_fettle_may_tie_with_the_best_peer_and_no_more(
    claims: ModuleType, nets: tuple[Any, ...], differing: int, holds: bool
) -> None:
    assert claims.claim_closest(both(claims, differing=differing), nets).holds is holds


@pytest.mark.parametrize(
    "changes",
    [{"precision": "float"}, {"precision": "bf16"}, {"precision": "int8-weights"}, {"by": "fettle", "picks": ()}],
)
def test_only_int8_peers_can_beat_fettle(claims: ModuleType, nets: tuple[Any, ...], changes: dict[str, Any]) -> None:
    perfect = replace(row(claims, "first", "peer", validation_agreement=0.5), **changes)
    assert claims.claim_closest([*both(claims), perfect], nets).holds
    assert not claims.claim_closest([*both(claims), row(claims, "first", "peer")], nets).holds


def test_the_difference_between_agreements_is_tested_on_the_same_rows(
    claims: ModuleType, nets: tuple[Any, ...]
) -> None:
    # The peer misses rows 0 to 7, fettle 0 to 5: two rows decide, and two fair coins prove nothing.
    assert "first 99.40% against 99.20% of peer in e (p 0.25)" in claims.claim_closest(both(claims), nets).figures


@pytest.mark.parametrize(("differing", "holds"), [(7, True), (8, False)])
def test_the_bound_on_agreement_is_for_networks_that_have_one(
    claims: ModuleType, nets: tuple[Any, ...], differing: int, holds: bool
) -> None:
    rows = both(claims, differing=differing)
    rows[2] = row(claims, "second", "fettle", differing=500)
    assert claims.claim_agreement(rows, nets).holds is holds


@pytest.mark.parametrize(("drop", "holds"), [(-0.01, True), (0.003, True), (0.0032, False)])
def test_the_drop_has_a_bound_for_each_network(
    claims: ModuleType, nets: tuple[Any, ...], drop: float, holds: bool
) -> None:
    assert claims.claim_drop(both(claims, drop=drop), nets).holds is holds


@pytest.mark.parametrize(("milliseconds", "holds"), [(1.0, True), (1.04, True), (1.06, False)])
@pytest.mark.parametrize("batch", [1, 32])
def test_the_speed_claim_needs_every_batch_size(
    claims: ModuleType, nets: tuple[Any, ...], milliseconds: float, holds: bool, batch: int
) -> None:
    assert claims.claim_speed(both(claims, timings=slower(claims, batch, milliseconds)), nets).holds is holds


def test_the_speed_claim_is_about_the_pick_even_where_it_is_float(claims: ModuleType, nets: tuple[Any, ...]) -> None:
    slow_float = both(claims, precision="float", timings=slower(claims, 1, 2.0))
    assert not claims.claim_speed(slow_float, nets).holds
    assert not claims.claim_closest(slow_float, nets).holds  # and it has no int8 at all


def test_a_system_that_ran_apart_takes_no_part_in_the_speed_claim(claims: ModuleType, nets: tuple[Any, ...]) -> None:
    apart = row(claims, "first", "peer", differing=9, timings={}, validation_agreement=math.nan)
    assert claims.claim_speed([*both(claims), apart], nets).holds
    assert claims.claim_closest([*both(claims), apart], nets).holds


def test_where_the_pick_is_float_the_best_int8_on_validation_stands_for_it(
    claims: ModuleType, nets: tuple[Any, ...]
) -> None:
    pick = row(claims, "first", "fettle", precision="float")
    good = row(claims, "first", "fettle", picks=(), validation_agreement=0.995, name="good")
    better_on_test = row(claims, "first", "fettle", picks=(), validation_agreement=0.99, agreement=1.0)
    assert claims.int8_of_fettle([pick, better_on_test, good], nets[0]) == [good]
    mixed = row(claims, "first", "fettle", precision="int8+float", validation_agreement=0.5)
    assert claims.int8_of_fettle([good, mixed, better_on_test], nets[0]) == [mixed]
    assert claims.int8_of_fettle([pick], nets[0]) == []


def test_each_pick_is_claimed_for_at_its_own_batch_size(claims: ModuleType, nets: tuple[Any, ...]) -> None:
    for_one = row(claims, "first", "fettle", differing=5, picks=(1,), timings=slower(claims, 32, 9.0))
    for_many = row(claims, "first", "fettle", differing=7, picks=(32,), timings=slower(claims, 1, 9.0))
    rows = [*both(claims)[:3], for_one, for_many]
    assert claims.claim_speed(rows, nets).holds
    assert "first 99.50% against" in claims.claim_closest(rows, nets).figures
    assert "first 99.30% against" in claims.claim_closest(rows, nets).figures
    assert not claims.claim_closest([*rows[:4], replace(for_many, agreement=0.99)], nets).holds
    assert not claims.claim_speed([*rows[:4], replace(for_many, timings=slower(claims, 32, 2.0))], nets).holds


def test_nothing_measured_is_no_claim_kept(claims: ModuleType, nets: tuple[Any, ...]) -> None:
    only_peers = both(claims)[:2]
    for claim in (claims.claim_closest, claims.claim_agreement, claims.claim_drop, claims.claim_speed):
        found = claim(only_peers, nets)
        assert not found.holds
        assert "first: no " in found.figures
    assert not claims.claim_closest(both(claims)[2:], nets).holds


@pytest.mark.parametrize(("limit", "wanted"), [(None, 10), (4, 4), (5, 5), (10, 10), (99, 10)])
def test_collect_stops_at_the_limit(accuracy: ModuleType, limit: int | None, wanted: int) -> None:
    rows = torch.arange(10, dtype=torch.float32)
    loader = list(zip(rows.split(4), rows.long().split(4), strict=True))
    found, labels = accuracy.collect(loader, limit=limit)
    assert found.tolist() == list(range(wanted))
    assert labels.tolist() == list(range(wanted))


@dataclass
class FakeTrial:
    """As `fettle.optimize` returns them, as far as the benchmark looks."""

    runtime: str
    precision: str
    failure: str | None = None

    @property
    def label(self) -> str:
        return f"{self.precision} in {self.runtime}"

    @property
    def candidate(self) -> "FakeTrial":
        return self

    @property
    def artifact(self) -> Any:
        return SimpleNamespace(
            digest=self.label, manifest=SimpleNamespace(recipe=SimpleNamespace(digest=self.precision))
        )

    def load(self, *, threads: int) -> Any:
        assert threads == 1
        return lambda rows: np.roll(rows, 1 if self.precision == "int8" else 0, axis=0)


def pretend(accuracy: ModuleType, monkeypatch: pytest.MonkeyPatch, best: dict[int, FakeTrial]) -> None:
    """`fettle.optimize`, with the best of each batch size."""
    trials = [
        FakeTrial(runtime, precision) for runtime in ("onnxruntime", "openvino") for precision in ("float", "int8")
    ]
    failed = FakeTrial("eager", "int8", failure="it was late")

    def optimize(*_: Any, batch: int, **__: Any) -> Any:
        comparison = SimpleNamespace(candidates=[*trials[:1], failed])
        return SimpleNamespace(candidates=trials, best=best[batch], comparison=comparison)

    monkeypatch.setattr(accuracy.fettle, "optimize", optimize, raising=False)
    monkeypatch.setattr(accuracy.fettle, "Budget", lambda **_: None, raising=False)


def test_fettles_candidates_become_systems_its_pick_is_marked_and_its_failures_are_named(
    accuracy: ModuleType, problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = FakeTrial("openvino", "int8")
    pretend(accuracy, monkeypatch, {1: best, 32: best})
    missing: dict[str, str] = {}
    systems = accuracy.build_fettle(problem, problem.test, effort=accuracy.QUICK, missing=missing)
    assert [(system.engine, system.precision, system.picks, system.note) for system in systems] == [
        ("onnxruntime", "float", (), "float in onnxruntime"),
        ("onnxruntime", "int8", (), "int8 in onnxruntime"),
        ("openvino", "float", (), "float in openvino"),
        ("openvino", "int8", (1, 32), "int8 in openvino"),
    ]
    assert missing == {f"fettle int8 in eager (first, batch {batch})": "it was late" for batch in (1, 32)}
    wanted = (np.array([0, 1, 2, 3]), np.array([0, 1, 2, 0]))
    judged = [accuracy.judge(system, problem, wanted, timings={}) for system in systems]
    assert [found.accuracy for found in judged] == [1.0, 0.0, 1.0, 0.0]
    assert [found.validation_agreement for found in judged] == [1.0, 0.0, 1.0, 0.0]
    # Rolled by one the classes are 3, 0, 1, 2: none is right, and float has three right.
    assert (judged[0].drop, judged[0].agreement, judged[0].differs) == (-0.25, 0.75, (3,))
    assert (judged[1].drop, judged[1].agreement, judged[1].differs) == (0.75, 0.0, (0, 1, 2, 3))


def test_each_batch_size_has_its_pick_and_what_both_runs_made_is_one_system(
    accuracy: ModuleType, problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(accuracy, monkeypatch, {1: FakeTrial("openvino", "float"), 32: FakeTrial("openvino", "int8")})
    systems = accuracy.build_fettle(problem, problem.test, effort=accuracy.QUICK, missing={})
    assert [(system.name, system.picks) for system in systems] == [
        ("fettle", ()),
        ("fettle", ()),
        ("fettle, its pick at batch 1", (1,)),
        ("fettle, its pick at batch 32", (32,)),
    ]


def test_a_pick_that_is_no_candidate_is_an_error(
    accuracy: ModuleType, problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(accuracy, monkeypatch, {1: FakeTrial("elsewhere", "int8")})
    with pytest.raises(LookupError, match="one of outcome"):
        accuracy.build_fettle(problem, problem.test, effort=accuracy.QUICK, missing={})


def test_a_system_that_ran_apart_is_judged_by_its_logits_and_not_timed(
    accuracy: ModuleType, peers: ModuleType, problem: Any
) -> None:
    apart = peers.Apart(np.eye(4)[[0, 1, 2, 0]], {1: 0.5})
    away = peers.System("torchao PT2E", "torch inductor", "int8", None, apart=apart)
    here = peers.System("float", "torch", "float", lambda _: lambda rows: rows)
    assert list(accuracy.time_systems([away, here], problem.test[0], effort=accuracy.QUICK)) == [1]
    classes = np.arange(4)
    found = accuracy.judge(away, problem, (classes, classes), timings={})
    assert (found.accuracy, found.differs) == (0.75, (3,))
    assert math.isnan(found.validation_agreement)
    assert json.loads(json.dumps(accuracy.to_plain(found), allow_nan=False))["validation_agreement"] is None
    table = accuracy.tabulate(accuracy.NETS[0], [found])
    assert table.rows[0][-3:-1] == ("–", "–")
    assert table.title == "ResNet-20 on 4 test images of CIFAR-10 (JPEG), one thread"


def test_a_system_that_fails_is_named_without_folders_and_the_others_go_on(
    peers: ModuleType, problem: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> list[Any]:
        raise ValueError(f"{problem.folder}/float.onnx is broken, says {peers.ROOT}/benchmarks/x.py")

    missing: dict[str, str] = {}
    assert peers.attempt(problem, "peer", fail, missing=missing) == []
    assert missing == {"peer (first)": "ValueError: float.onnx is broken, says benchmarks/x.py"}
    assert "Traceback" in capsys.readouterr().err


def test_a_system_that_does_not_answer_at_one_batch_size_is_named_and_the_others_go_on(
    peers: ModuleType, problem: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(batch: int | None) -> Any:
        if batch == 3:
            raise RuntimeError("no kernel for 3 rows\nlong story")
        return lambda rows: rows

    seen: list[tuple[int | None, int]] = []
    good = peers.System("good", "torch", "float", lambda batch: lambda rows: seen.append((batch, len(rows))))
    bad = peers.System("bad", "torch", "int8", load)
    apart = peers.System("apart", "torch", "int8", None)
    missing: dict[str, str] = {}
    assert peers.those_that_answer(problem, [bad, good, apart], batches=(1, 3), missing=missing) == [good, apart]
    assert missing == {"bad in torch (first)": "RuntimeError: no kernel for 3 rows"}
    assert seen == [(None, 1), (1, 1), (3, 3)]
    assert "long story" in capsys.readouterr().err


def test_a_quick_run_names_the_peer_it_leaves_out(
    accuracy: ModuleType, peers: ModuleType, problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "export_onnx", lambda *_: problem.folder / "float.onnx")
    for name in ("quantize_by_default", "quantize_nncf"):
        monkeypatch.setattr(peers, name, lambda *_, name=name, **__: name)
    monkeypatch.setattr(peers, "quantize_static_best", lambda *_, method, **__: [f"ORT {method}"])
    monkeypatch.setattr(peers, "quantize_torchao", lambda *_: "torchao")
    monkeypatch.setattr(peers, "load_floats", lambda *_, compiles: ["compiled"] if compiles else ["floats"])
    missing: dict[str, str] = {}
    found = peers.build_peers(problem, accuracy.QUICK.peers, missing=missing)
    assert found == ["floats", "quantize_by_default", "ORT MinMax", "quantize_nncf"]
    assert missing == {"torchao PT2E (first)": "left out of a quick run"}
    missing.clear()
    found = peers.build_peers(problem, accuracy.FULL.peers, missing=missing)
    methods = ["ORT MinMax", "ORT Entropy", "ORT Percentile"]
    assert found == ["compiled", "quantize_by_default", *methods, *["quantize_nncf"] * 3, "torchao"]
    assert missing == {}


@pytest.mark.parametrize(("narrow", "more"), [(False, ""), (True, ", overflow_fix")])
@pytest.mark.parametrize(("quantizers", "precision"), [(31, "int8"), (0, "float")])
def test_a_model_that_nncf_gave_back_whole_is_a_float_one(
    peers: ModuleType,
    problem: Any,
    monkeypatch: pytest.MonkeyPatch,
    quantizers: int,
    precision: str,
    narrow: bool,
    more: str,
) -> None:
    monkeypatch.setattr(peers, "NARROW", narrow)
    calls: list[list[str]] = []

    def run_peer(name: str, script: Path, arguments: list[str], *, limit_s: float) -> str:
        calls.append(arguments)
        return f'INFO:nncf: done\n{{"quantizers": {quantizers}}}\n'

    monkeypatch.setattr(peers, "run_peer", run_peer)
    system = peers.quantize_nncf(problem, problem.folder / "float.onnx", mode="accuracy-control")
    assert (system.precision, system.note) == (precision, f"{quantizers} quantizers{more}")
    assert calls[0][2:4] == ["accuracy-control", "plain"]
    assert calls[0][-1] == str(int(narrow))
    with np.load(calls[0][1]) as data:
        assert sorted(data) == ["calibration", "labels", "validation"]  # never the test rows


@pytest.mark.parametrize(("narrow", "more"), [(False, ""), (True, ", reduce_range")])
def test_torchaos_answers_and_ratios_come_back_from_its_own_process(
    accuracy: ModuleType, peers: ModuleType, problem: Any, monkeypatch: pytest.MonkeyPatch, narrow: bool, more: str
) -> None:
    monkeypatch.setattr(peers, "NARROW", narrow)
    logits = np.arange(16.0).reshape(4, 4)

    def run_peer(name: str, script: Path, arguments: list[str], *, limit_s: float) -> str:
        assert arguments[-1] == str(int(narrow))
        program = torch.export.load(arguments[0])
        rows = torch.ones(7, 4)
        assert torch.equal(program.module()(rows), problem.model(rows))
        np.savez(
            arguments[2], logits=logits, int8_1=[1.0, 2.0, 9.0], float_1=[2.0, 4.0, 9.0], int8_32=[3.0], float_32=[4.0]
        )
        return ""

    monkeypatch.setattr(peers, "run_peer", run_peer)
    system = peers.quantize_torchao(problem, accuracy.FULL.peers)
    assert system.load is None
    assert system.apart.ratio == {1: 0.5, 32: 0.75}
    assert system.note == f"apart: 0.50 and 0.75 × float under torch.compile{more}"
    np.testing.assert_array_equal(system.apart.logits, logits)


def test_onnx_runtime_quantizes_a_model_and_both_engines_run_it(peers: ModuleType, problem: Any) -> None:
    path = peers.export_onnx(problem.model, problem.example, problem.folder / "float.onnx")
    systems = peers.load_floats(problem, path, compiles=False)
    systems += [peers.quantize_by_default(problem, path), *peers.quantize_static_best(problem, path, method="MinMax")]
    with torch.inference_mode():
        wanted = problem.model(torch.from_numpy(problem.test[0])).numpy()
    assert [system.engine for system in systems[-3:]] == ["onnxruntime", "onnxruntime", "openvino"]
    for system in systems:
        bound = 0.02 if system.precision != "float" else 1e-5
        np.testing.assert_allclose(system.load(None)(problem.test[0]), wanted, atol=bound, err_msg=system.name)


def test_the_calibration_reader_gives_every_row_once(peers: ModuleType) -> None:
    rows = np.arange(70, dtype=np.float32)[:, None]
    parts = [part["images"] for part in iter(peers.Calibration(rows).get_next, None)]
    assert [len(part) for part in parts] == [32, 32, 6]
    np.testing.assert_array_equal(np.concatenate(parts), rows)


def test_every_network_is_a_project_that_is_there(accuracy: ModuleType) -> None:
    for net in accuracy.NETS:
        project = accuracy.Project.open(accuracy.ROOT / "examples" / net.project)
        assert project.file.data.test, net.name
    assert {net.kind for net in accuracy.NETS} == {"plain", "transformer"}
    assert set(accuracy.QUICK.nets) < set(accuracy.FULL.nets)


def test_a_run_reports_every_network_and_its_missing_peers(
    accuracy: ModuleType, claims: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def measure_net(net: Any, folder: Path, *, effort: Any, missing: dict[str, str]) -> list[Any]:
        missing[f"peer ({net.name})"] = "not here"
        return [row(claims, net.name, "peer", differing=8), row(claims, net.name, "fettle", differing=5)]

    monkeypatch.setattr(accuracy, "measure_net", measure_net)
    assert accuracy.main(accuracy.Options(quick=True, json=tmp_path / "found.json")) == 0
    printed = capsys.readouterr().out
    assert "missing: peer (Encoder): not here" in printed
    assert printed.splitlines()[-1].startswith("CLAIM holds: ResNet-20 99.50% against 99.20% of peer")
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [table["title"].split(" on ")[0] for table in found["tables"]] == ["ResNet-20", "Encoder"]
    assert found["benchmark"] == "quantize_accuracy"
