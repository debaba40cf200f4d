"""The soak benchmark: its judgement by made-up figures, and a run of some seconds; `make soak` is five minutes."""

import importlib
import random
from pathlib import Path
from types import ModuleType

import pytest

SECONDS = 15.0
FRONT = 7


@pytest.fixture
def soak() -> ModuleType:
    return importlib.import_module("soak")


def sizes(slope: float, *, count: int = 100, noise: float = 2**19) -> list[tuple[float, int]]:
    """Samples of a process of 100 MiB that grows by `slope` bytes a second."""
    rng = random.Random(0)
    return [(float(second), int(100 * 2**20 + slope * second + rng.gauss(0, noise))) for second in range(count)]


def tally(soak: ModuleType, *, front: float = 0.0, worker: float = 0.0, **counts: int) -> object:
    return soak.Tally(
        latencies_s=[0.01] * 100,
        sent=100,
        sizes={FRONT: sizes(front), 8: sizes(worker), 9: sizes(1e6, count=5)},
        **counts,
    )


@pytest.mark.parametrize(
    ("slopes", "flat"),
    [({}, True), ({"front": 2**20}, False), ({"worker": 2**20}, False), ({"front": -(2**20)}, True)],
)
def test_memory_is_judged_by_the_process_that_grows_most(
    soak: ModuleType, slopes: dict[str, float], flat: bool
) -> None:
    _, claim = soak.claims_of(tally(soak, **slopes), front=FRONT, missing=0)
    assert claim.holds is flat


def test_a_front_that_nobody_weighed_is_not_flat(soak: ModuleType) -> None:
    assert not soak.claims_of(tally(soak), front=1, missing=0)[1].holds


@pytest.mark.parametrize(
    ("counts", "missing", "holds"),
    [({}, 0, True), ({"wrong": 1}, 0, False), ({"broken": 1}, 0, False), ({"refused": 1}, 0, False), ({}, 1, False),
     ({"shed": 3}, 0, True)],
)  # fmt: skip
def test_only_what_is_shed_may_go_unanswered(
    soak: ModuleType, counts: dict[str, int], missing: int, holds: bool
) -> None:
    assert soak.claims_of(tally(soak, **counts), front=FRONT, missing=missing)[0].holds is holds


def test_a_few_jumps_are_no_growth(soak: ModuleType) -> None:
    found = sizes(0.0)
    for index in (3, 40, 70):
        found[index] = (found[index][0], 2**30)
    assert abs(soak.growth(found)) < 2**20


@pytest.mark.slow
def test_a_server_under_steady_load_loses_nothing(soak: ModuleType, tmp_path: Path) -> None:
    result = soak.run(tmp_path, seconds=SECONDS)
    # That it stays as large as it is takes minutes to tell: `make soak`.
    claims = [claim for claim in result.claims if "memory" not in claim.statement]
    assert len(claims) == 2
    assert all(claim.holds for claim in claims), "\n".join([result.tables[0].text(), *map(str, result.claims)])
    assert result.details["switches"] >= 4
    assert result.details["kills"] >= 1
