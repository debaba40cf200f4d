import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("openvino")


@pytest.fixture
def ptq() -> ModuleType:
    return importlib.import_module("ptq_cifar")


def row(ptq: ModuleType, net: str, by: str, **changes: Any) -> Any:
    timings = {batch: ptq.Timing(1.0, 1.0, 1.0, 5, 50) for batch in ptq.BATCHES}
    plain = ptq.Row(
        net=net, by=by, name=by, engine="e", precision="int8", note="", pick=by == "fettle",
        accuracy=0.88, drop=0.001, agreement=0.992, timings=timings,
    )  # fmt: skip
    return replace(plain, **changes)


def both(ptq: ModuleType, **changes: Any) -> list[Any]:
    """A peer and fettle on both networks; `changes` to fettle's row on the second."""
    rows = [row(ptq, net, by) for net in ptq.NETS for by in ("peer", "fettle")]
    return [*rows[:-1], replace(rows[-1], **changes)]


def test_both_claims_hold_where_every_figure_is_within_its_bound(ptq: ModuleType) -> None:
    rows = both(ptq, drop=0.003, agreement=0.99)
    assert ptq.claim_quality(rows).holds
    assert ptq.claim_speed(rows).holds
    assert "ResNet-56 int8 drop +0.30 points, agreement 99.00%" in ptq.claim_quality(rows).figures


@pytest.mark.parametrize("changes", [{"drop": 0.0034}, {"agreement": 0.9896}])
def test_the_quality_claim_falls_with_one_figure(ptq: ModuleType, changes: dict[str, float]) -> None:
    assert not ptq.claim_quality(both(ptq, **changes)).holds


def test_the_worst_int8_candidate_counts_and_float_ones_do_not(ptq: ModuleType) -> None:
    rows = both(ptq)
    good_float = row(ptq, "ResNet-20", "fettle", precision="float", agreement=0.5, pick=False)
    bad_int8 = row(ptq, "ResNet-20", "fettle", agreement=0.5, pick=False)
    assert ptq.claim_quality([*rows, good_float]).holds
    assert not ptq.claim_quality([*rows, bad_int8]).holds


@pytest.mark.parametrize(("slower", "holds"), [(1.0, True), (1.04, True), (1.06, False)])
@pytest.mark.parametrize("batch", [1, 32])
def test_the_speed_claim_needs_every_batch_size(ptq: ModuleType, slower: float, holds: bool, batch: int) -> None:
    timings = {size: ptq.Timing(1.0, 1.0, 1.0, 5, 50) for size in ptq.BATCHES}
    timings[batch] = replace(timings[batch], median_ms=slower)
    assert ptq.claim_speed(both(ptq, timings=timings)).holds is holds


def test_nothing_measured_is_no_claim_kept(ptq: ModuleType) -> None:
    peers = [row(ptq, net, "peer") for net in ptq.NETS]
    assert "no int8 candidate of fettle" in ptq.claim_quality(peers).figures
    assert "no pick of fettle" in ptq.claim_speed(peers).figures
    assert not ptq.claim_quality(peers).holds
    assert not ptq.claim_speed(peers).holds


@pytest.mark.parametrize(("limit", "wanted"), [(None, 10), (4, 4), (5, 5), (10, 10), (99, 10)])
def test_collect_stops_at_the_limit(ptq: ModuleType, limit: int | None, wanted: int) -> None:
    images = torch.arange(10, dtype=torch.float32)
    loader = list(zip(images.split(4), images.long().split(4), strict=True))
    found, labels = ptq.collect(loader, limit=limit)
    assert found.tolist() == list(range(wanted))
    assert labels.tolist() == list(range(wanted))


@dataclass
class FakeArtifact:
    digest: str

    def load(self, *, threads: int) -> Any:
        assert threads == 1
        return lambda images: images.sum(axis=(2, 3))


def test_fettles_candidates_become_systems_and_its_pick_is_marked(
    ptq: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = [
        SimpleNamespace(runtime=runtime, precision=precision, artifact=FakeArtifact(runtime + precision))
        for runtime in ("onnxruntime", "openvino")
        for precision in ("float", "int8")
    ]
    outcome = SimpleNamespace(candidates=candidates, best=candidates[3])
    monkeypatch.setattr(ptq.fettle, "optimize", lambda *_, **__: outcome, raising=False)
    monkeypatch.setattr(ptq.fettle, "Budget", lambda **_: None, raising=False)
    images = np.ones((4, 3, 32, 32), np.float32)
    problem = ptq.Problem("ResNet-20", torch.nn.Identity(), (), images, images, np.zeros(4), tmp_path)
    systems = ptq.build_fettle(problem, {}, effort=ptq.QUICK)
    assert [(system.engine, system.precision, system.pick) for system in systems] == [
        ("onnxruntime", "float", False),
        ("onnxruntime", "int8", False),
        ("openvino", "float", False),
        ("openvino", "int8", True),
    ]
    test = (images, np.zeros(4, np.int64))
    timings = [ptq.time_systems(systems, images[:batch], effort=ptq.QUICK) for batch in (1, 4)]
    assert [len(found) for found in timings] == [4, 4]
    judged = ptq.judge(systems[3], "ResNet-20", test, reference=np.array([0, 0, 0, 1]), timings={})
    assert (judged.accuracy, judged.agreement, judged.drop) == (1.0, 0.75, -0.25)


def test_a_system_that_fails_is_named_and_the_others_go_on(ptq: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    missing: dict[str, str] = {}
    assert ptq.attempt("broken", lambda: [][0], missing=missing) == []
    assert missing == {"broken": "IndexError: list index out of range"}
    assert "Traceback" in capsys.readouterr().err
