"""Post-training quantization on CIFAR-10: accuracy, agreement with float, and latency, fettle beside its peers.

ResNet-20 and ResNet-56 as trained (`examples/cifar10`), 512 training images to calibrate every quantizer, validation
images for every choice, test images for the figures. Every system answers from numpy to numpy on one thread; latency
is measured in interleaved rounds. OpenVINO peers are compiled for the batch size they are timed at, torch.compile is
frozen: each peer at its best.

Claimed: fettle's int8 loses at most 0.3 points and gives the float model's class for 99 % of the images, and its pick
takes at most 1.05 times as long as the fastest peer, on both networks at batch 1 and 32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines import Images, load_eager, predict_all
from harness import ROOT, Claim, Options, Result, Table, Timing, finish, interleave, parse_options
from numpy.typing import NDArray
from ptq_peers import CALIBRATION_METHODS, Problem, System, attempt, build_peers

import fettle
from fettle.core.project import Project

NETS = {"ResNet-20": "fettle.toml", "ResNet-56": "resnet56.toml"}
BATCHES = (1, 32)
CALIBRATION_IMAGES = 512
LOADER_BATCH = 128
MAX_DROP = 0.003
MIN_AGREEMENT = 0.99
MAX_RATIO = 1.05

Split = tuple[Images, NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much work a run does."""

    test_images: int
    rounds: int
    turn_s: float
    methods: tuple[str, ...]
    time_limit: str


FULL = Effort(test_images=5000, rounds=25, turn_s=0.1, methods=CALIBRATION_METHODS, time_limit="10m")
QUICK = Effort(test_images=1000, rounds=3, turn_s=0.03, methods=("MinMax",), time_limit="15s")


@dataclass(frozen=True, slots=True)
class Row:
    """One system on one network: `accuracy` and `agreement` are shares of the test images, `timings` by batch size."""

    net: str
    by: str
    name: str
    engine: str
    precision: str
    note: str
    pick: bool
    accuracy: float
    drop: float
    agreement: float
    timings: dict[int, Timing]


def main(options: Options) -> int:
    """Measure both networks, judge, report."""
    torch.set_num_threads(1)
    effort = QUICK if options.quick else FULL
    missing: dict[str, str] = {}
    rows: list[Row] = []
    for net, file in NETS.items():
        with tempfile.TemporaryDirectory() as folder:
            rows += measure_net(net, file, Path(folder), effort=effort, missing=missing)
    result = Result(
        benchmark="ptq_cifar",
        tables=tuple(tabulate(net, [row for row in rows if row.net == net], effort=effort) for net in NETS),
        claims=(claim_quality(rows), claim_speed(rows)),
        details={"rows": [asdict(row) for row in rows], "effort": asdict(effort)},
        missing=missing,
    )
    return finish(result, options)


def measure_net(net: str, file: str, folder: Path, *, effort: Effort, missing: dict[str, str]) -> list[Row]:
    """Every system on one network."""
    project = Project.open(ROOT / "examples" / "cifar10" / file)
    model = project.call("model.build", project.file.model.build)
    example = project.call("model.example", project.file.model.example)
    train = collect(project.call("data.train", project.file.data.train or ""), limit=CALIBRATION_IMAGES)
    validation = collect(project.call("data.validation", project.file.data.validation))
    test = collect(project.call("data.test", project.file.data.test or ""), limit=effort.test_images)
    classes = predict_all(load_eager(model), validation[0]).argmax(axis=1)
    problem = Problem(net, model, example, train[0], validation[0], classes, folder)
    splits = {"train": to_batches(train), "validation": to_batches(validation), "test": to_batches(test)}

    systems = build_peers(problem, methods=effort.methods, missing=missing)
    systems += attempt(f"fettle ({net})", lambda: build_fettle(problem, splits, effort=effort), missing=missing)
    timings = [time_systems(systems, validation[0][:batch], effort=effort) for batch in BATCHES]
    reference = predict_all(load_eager(model), test[0]).argmax(axis=1)
    return [
        judge(system, net, test, reference=reference, timings=dict(zip(BATCHES, times, strict=True)))
        for system, *times in zip(systems, *timings, strict=True)
    ]


def build_fettle(problem: Problem, splits: dict[str, list[Any]], *, effort: Effort) -> list[System]:
    """Every candidate that `fettle.optimize` made, its pick marked."""
    outcome = fettle.optimize(
        problem.model,
        problem.example,
        **splits,
        metric="accuracy",
        budget=fettle.Budget(max_drop=0.005, time_limit=effort.time_limit),
        name=problem.net.lower(),
        home=problem.folder / "fettle",
    )
    systems = []
    for candidate in outcome.candidates:
        runner = candidate.artifact.load(threads=1)
        picked = candidate.artifact.digest == outcome.best.artifact.digest
        name = "fettle, its pick" if picked else "fettle"
        system = System(
            name, candidate.runtime, candidate.precision, lambda _, run=runner: run, by="fettle", pick=picked
        )
        systems.append(system)
    if not any(system.pick for system in systems):
        raise LookupError(f"outcome.best must be one of outcome.candidates, got {outcome.best.artifact.digest[:12]}")
    return systems


def time_systems(systems: list[System], images: Images, *, effort: Effort) -> list[Timing]:
    """Latency of each system on these images, interleaved."""
    calls = {}
    for number, system in enumerate(systems):
        predict = system.load(len(images))
        predict(images)  # compilation belongs to no round
        calls[f"{number} {system.name}"] = lambda predict=predict: predict(images)
    return list(interleave(calls, rounds=effort.rounds, turn_s=effort.turn_s).values())


def judge(system: System, net: str, test: Split, *, reference: NDArray[np.int64], timings: dict[int, Timing]) -> Row:
    """Accuracy on the test images, and agreement with `reference`, the float model's classes for them."""
    images, labels = test
    classes = predict_all(system.load(None), images).argmax(axis=1)
    accuracy = float(np.mean(classes == labels))
    return Row(
        net=net,
        by=system.by,
        name=system.name,
        engine=system.engine,
        precision=system.precision,
        note=system.note,
        pick=system.pick,
        accuracy=accuracy,
        drop=float(np.mean(reference == labels)) - accuracy,
        agreement=float(np.mean(classes == reference)),
        timings=timings,
    )


def claim_quality(rows: list[Row]) -> Claim:
    """The worst of fettle's int8 candidates on each network, whatever runtime it is for."""
    statement = f"fettle int8 loses at most {100 * MAX_DROP:.1f} points and agrees with float on {MIN_AGREEMENT:.0%}"
    figures, holds = [], True
    for net in NETS:
        candidates = [row for row in rows if row.net == net and row.by == "fettle" and row.precision == "int8"]
        if not candidates:
            return Claim(statement, holds=False, figures=f"no int8 candidate of fettle was measured on {net}")
        drop = max(row.drop for row in candidates)
        agreement = min(row.agreement for row in candidates)
        # Half an image of slack: shares of 5000 images do not add up exactly in binary.
        holds &= drop <= MAX_DROP + 1e-4 and agreement >= MIN_AGREEMENT - 1e-4
        figures.append(f"{net} int8 drop {100 * drop:+.2f} points, agreement {agreement:.2%}")
    return Claim(statement, holds=holds, figures=", ".join(figures))


def claim_speed(rows: list[Row]) -> Claim:
    """fettle's pick beside the fastest peer, on each network at each batch size."""
    statement = f"fettle's pick takes at most {MAX_RATIO} times as long as the fastest peer"
    figures, holds = [], True
    for net in NETS:
        picks = [row for row in rows if row.net == net and row.pick]
        peers = [row for row in rows if row.net == net and row.by == "peer"]
        if not picks:
            return Claim(statement, holds=False, figures=f"no pick of fettle was measured on {net}")
        for batch in BATCHES:
            fastest = min(peers, key=lambda row: row.timings[batch].median_ms)
            ratio = picks[0].timings[batch].median_ms / fastest.timings[batch].median_ms
            holds &= ratio <= MAX_RATIO
            figures.append(f"{net} batch {batch} {ratio:.2f} × {fastest.name}")
    return Claim(statement, holds=holds, figures=", ".join(figures))


def tabulate(net: str, rows: list[Row], *, effort: Effort) -> Table:
    """Peers first, then fettle's candidates; within each in the order they were built."""
    cells = tuple(
        (
            row.name,
            row.engine,
            row.precision,
            f"{row.accuracy:.4f}",
            f"{row.agreement:.4f}",
            *(f"{row.timings[batch].median_ms:.3f}" for batch in BATCHES),
            row.note,
        )
        for row in rows
    )
    latency = tuple(f"batch {batch}, ms" for batch in BATCHES)
    columns = ("system", "engine", "precision", "accuracy", "agreement", *latency, "chosen on validation")
    return Table(f"{net} on {effort.test_images} test images of CIFAR-10 (JPEG), one thread", columns, cells)


def collect(loader: Iterable[tuple[torch.Tensor, torch.Tensor]], *, limit: int | None = None) -> Split:
    """The first `limit` images of a loader and their labels, as two arrays."""
    images, labels, count = [], [], 0
    for batch, targets in loader:
        images.append(batch.numpy())
        labels.append(targets.numpy())
        count += len(batch)
        if limit is not None and count >= limit:
            break
    return np.concatenate(images)[:limit], np.concatenate(labels)[:limit]


def to_batches(split: Split) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The arrays as a loader, as a user of fettle would have it."""
    images, labels = (torch.from_numpy(array) for array in split)
    return list(zip(images.split(LOADER_BATCH), labels.split(LOADER_BATCH), strict=True))


if __name__ == "__main__":
    raise SystemExit(main(parse_options(__doc__)))
