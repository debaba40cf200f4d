"""Quantization on five networks: accuracy, agreement with float, and latency, fettle beside its peers.

ResNet-20 and ResNet-56, a net of depthwise-separable convolutions and one with squeeze-and-excitation gates
(`examples/cifar10`), and a transformer encoder (`examples/encoder`). 512 training rows to calibrate every quantizer,
validation rows for every choice, test rows for the figures. Every system answers from numpy to numpy on one thread;
latency is measured in interleaved rounds. OpenVINO peers are compiled for the batch size they are timed at,
torch.compile is frozen: each peer at its best. torchao has a process of its own and a float baseline in it.

agreement: the share of test rows given the class that the float model gives. p: McNemar's test (mid-p) of whether the
system and the float model are right equally often.

fettle optimizes once for each batch size, as its user would who serves batches of it (`fettle.optimize(batch=...)`),
and its pick may differ: which int8 is fastest depends on the batch, and so does which layers cost nothing in float.
Peers quantize without a batch size, and each is timed at both.

Claimed, on each network, for each pick of fettle (its best int8 on validation where it picked something else): no int8
system agrees with float more often; on the ResNets at least 99.3 % agree; the accuracy drops by at most 0.3 points on
the ResNets and 0.5 on the others; and at its batch size the pick takes at most 1.05 times as long as the fastest int8
system.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines import Images, load_eager, predict_all
from harness import ROOT, Options, Result, Table, Timing, finish, interleave, parse_options
from numpy.typing import NDArray
from quantize_claims import Net, Row, claim_agreement, claim_closest, claim_drop, claim_speed
from quantize_peers import (
    CALIBRATION_METHODS,
    NNCF_MODES,
    Problem,
    Split,
    System,
    Wishes,
    attempt,
    build_peers,
    those_that_answer,
)

import fettle
from fettle.core.project import Project
from fettle.evaluate.paired import compare_paired

CALIBRATION_ROWS = 512
LOADER_BATCH = 128
BATCHES = (1, 32)
# Answers are given at a batch size that is timed. More rows in one call would wrong a peer: OpenVINO 2026.4 computes
# NNCF's int8 encoder right up to 64 rows and wrong from 100 on (accuracy 0.64 instead of 0.95).
ANSWER_ROWS = BATCHES[-1]


NETS = (
    Net("ResNet-20", "cifar10/fettle.toml", max_drop=0.003, min_agreement=0.993),
    Net("ResNet-56", "cifar10/resnet56.toml", max_drop=0.003, min_agreement=0.993),
    Net("Depthwise", "cifar10/depthwise.toml", max_drop=0.005),
    Net("Squeeze-excite", "cifar10/squeeze.toml", max_drop=0.005),
    Net("Encoder", "encoder/fettle.toml", max_drop=0.005, kind="transformer", data="made-up signals"),
)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much work a run does."""

    nets: tuple[Net, ...]
    test_rows: int
    time_limit: str
    peers: Wishes


FULL = Effort(
    nets=NETS,
    test_rows=5000,
    time_limit="10m",
    peers=Wishes(
        methods=CALIBRATION_METHODS,
        nncf_modes=tuple(NNCF_MODES),
        compiles=True,
        batches=BATCHES,
        rounds=15,
        turn_s=0.1,
    ),
)
QUICK = Effort(
    nets=(NETS[0], NETS[4]),
    test_rows=1000,
    time_limit="30s",
    peers=Wishes(
        methods=("MinMax",), nncf_modes=("performance",), compiles=False, batches=BATCHES, rounds=3, turn_s=0.03
    ),
)


def main(options: Options) -> int:
    """Measure every network, judge, report."""
    torch.set_num_threads(1)
    effort = QUICK if options.quick else FULL
    missing: dict[str, str] = {}
    rows: list[Row] = []
    for net in effort.nets:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure_net(net, Path(folder), effort=effort, missing=missing)
    result = Result(
        benchmark="quantize_accuracy",
        tables=tuple(tabulate(net, [row for row in rows if row.net == net.name]) for net in effort.nets),
        claims=(
            claim_closest(rows, effort.nets),
            claim_agreement(rows, effort.nets),
            claim_drop(rows, effort.nets),
            claim_speed(rows, effort.nets),
        ),
        details={"rows": [to_plain(row) for row in rows], "effort": asdict(effort)},
        missing=missing,
    )
    return finish(result, options)


def measure_net(net: Net, folder: Path, *, effort: Effort, missing: dict[str, str]) -> list[Row]:
    """Every system on one network."""
    project = Project.open(ROOT / "examples" / net.project)
    train = collect(project.call("data.train", project.file.data.train or ""), limit=CALIBRATION_ROWS)
    problem = Problem(
        net=net.name,
        kind=net.kind,
        model=project.call("model.build", project.file.model.build),
        example=project.call("model.example", project.file.model.example),
        calibration=train[0],
        validation=collect(project.call("data.validation", project.file.data.validation)),
        test=collect(project.call("data.test", project.file.data.test or ""), limit=effort.test_rows),
        folder=folder,
    )
    systems = build_peers(problem, effort.peers, missing=missing)
    systems += attempt(
        problem, "fettle", lambda: build_fettle(problem, train, effort=effort, missing=missing), missing=missing
    )
    systems = those_that_answer(problem, systems, batches=BATCHES, missing=missing)
    timed = {batch: time_systems(systems, problem.validation[0][:batch], effort=effort) for batch in BATCHES}
    reference = load_eager(problem.model)
    wanted = tuple(
        predict_all(reference, rows, rows=ANSWER_ROWS).argmax(axis=1) for rows, _ in (problem.validation, problem.test)
    )
    rows = []
    for number, system in enumerate(systems):
        timings = {batch: times[number] for batch, times in timed.items() if number in times}
        rows.append(judge(system, problem, wanted, timings=timings))
    return rows


def build_fettle(problem: Problem, train: Split, *, effort: Effort, missing: dict[str, str]) -> list[System]:
    """Every candidate that `fettle.optimize` made, its picks marked; what it could not make is among the missing.

    A run for each batch size, as one does who serves batches of it: which engine is fastest, and which layers are given
    back to float, depends on it. A recipe that both found, in one engine, is one system.
    """
    found: dict[tuple[str, str], System] = {}
    for batch in BATCHES:
        outcome = fettle.optimize(
            problem.model,
            problem.example,
            train=to_batches(train),
            validation=to_batches(problem.validation),
            test=to_batches(problem.test),
            metric="accuracy",
            budget=fettle.Budget(max_drop=0.005, time_limit=effort.time_limit),
            batch=batch,
            name=problem.net.lower(),
            home=problem.folder / f"fettle-{batch}",
        )
        for candidate in outcome.comparison.candidates:
            if candidate.failure is not None:
                missing[f"fettle {candidate.label} ({problem.net}, batch {batch})"] = candidate.failure
        digests = [trial.artifact.digest for trial in outcome.candidates]
        if outcome.best.artifact.digest not in digests:
            best = outcome.best.artifact.digest[:12]
            raise LookupError(f"outcome.best must be one of outcome.candidates, got {best}")
        for trial, digest in zip(outcome.candidates, digests, strict=True):
            key = (trial.runtime, trial.artifact.manifest.recipe.digest)
            if key not in found:
                found[key] = as_system(trial)
            if digest == outcome.best.artifact.digest:
                system = found[key]
                found[key] = replace(system, name="fettle, its pick", picks=(*system.picks, batch))
    return [name_batches(system) for system in found.values()]


def as_system(trial: Any) -> System:
    """A candidate, as it is timed and judged."""
    runner = trial.load(threads=1)
    return System("fettle", trial.runtime, trial.precision, lambda _: runner, note=trial.candidate.label, by="fettle")


def name_batches(system: System) -> System:
    """Its name with the batch sizes that it was chosen for, where that is not all of them."""
    if not system.picks or system.picks == BATCHES:
        return system
    return replace(system, name=f"{system.name} at batch {system.picks[0]}")


def time_systems(systems: list[System], rows: Images, *, effort: Effort) -> dict[int, Timing]:
    """Latency on these rows, interleaved, by the system's place in the list; without those that ran apart."""
    calls = {}
    for number, system in enumerate(systems):
        if system.load is None:
            continue
        predict = system.load(len(rows))
        predict(rows)  # compilation belongs to no round
        calls[str(number)] = lambda predict=predict: predict(rows)
    timed = interleave(calls, rounds=effort.peers.rounds, turn_s=effort.peers.turn_s)
    return {int(number): timing for number, timing in timed.items()}


def judge(system: System, problem: Problem, wanted: tuple[NDArray[Any], ...], *, timings: dict[int, Timing]) -> Row:
    """Accuracy and agreement. wanted: the float model's classes for the validation rows and for the test rows."""
    rows, labels = problem.test
    validation_agreement = float("nan")
    if system.apart is not None:
        classes = system.apart.logits.argmax(axis=1)
    else:
        assert system.load is not None
        predict = system.load(None)
        classes = predict_all(predict, rows, rows=ANSWER_ROWS).argmax(axis=1)
        chosen = predict_all(predict, problem.validation[0], rows=ANSWER_ROWS).argmax(axis=1)
        validation_agreement = float(np.mean(chosen == wanted[0]))
    paired = compare_paired(wanted[1] == labels, classes == labels)
    return Row(
        net=problem.net,
        by=system.by,
        name=system.name,
        engine=system.engine,
        precision=system.precision,
        note=system.note,
        picks=system.picks,
        n=len(labels),
        accuracy=float(np.mean(classes == labels)),
        drop=0.0 - paired.difference,
        p=paired.p_mid,
        agreement=float(np.mean(classes == wanted[1])),
        differs=tuple(np.flatnonzero(classes != wanted[1]).tolist()),
        validation_agreement=validation_agreement,
        timings=timings,
    )


def tabulate(net: Net, rows: list[Row]) -> Table:
    """Peers first, then fettle's candidates; within each in the order they were built."""
    cells = tuple(
        (
            row.name,
            row.engine,
            row.precision,
            f"{row.accuracy:.4f}",
            f"{100 * row.drop:+.2f}",
            f"{row.p:.3f}",
            f"{row.agreement:.4f}",
            *(f"{row.timings[batch].median_ms:.3f}" if batch in row.timings else "–" for batch in BATCHES),
            row.note,
        )
        for row in rows
    )
    latency = tuple(f"batch {batch}, ms" for batch in BATCHES)
    columns = ("system", "engine", "precision", "accuracy", "drop, points", "p", "agreement", *latency, "note")
    count = rows[0].n if rows else 0
    return Table(f"{net.name} on {count} test {net.data}, one thread", columns, cells)


def to_plain(row: Row) -> dict[str, Any]:
    """For JSON, which knows no nan."""
    plain = asdict(row)
    return plain if row.validation_agreement == row.validation_agreement else {**plain, "validation_agreement": None}


def collect(loader: Iterable[tuple[torch.Tensor, torch.Tensor]], *, limit: int | None = None) -> Split:
    """The first `limit` rows of a loader and their labels, as two arrays."""
    rows, labels, count = [], [], 0
    for batch, targets in loader:
        rows.append(batch.numpy())
        labels.append(targets.numpy())
        count += len(batch)
        if limit is not None and count >= limit:
            break
    return np.concatenate(rows)[:limit], np.concatenate(labels)[:limit]


def to_batches(split: Split) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The arrays as a loader, as a user of fettle would have it."""
    rows, labels = (torch.from_numpy(array) for array in split)
    return list(zip(rows.split(LOADER_BATCH), labels.split(LOADER_BATCH), strict=True))


if __name__ == "__main__":
    raise SystemExit(main(parse_options(__doc__)))
