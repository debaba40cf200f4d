"""Calibration of ResNet-20: time and peak memory by number of batches, fettle beside ONNX Runtime.

Batches of 16 CIFAR-10 training images, made when asked for, the same ones over and over. Each figure is taken in a
process of its own on one thread. Time: of the whole call, after one on a single batch (fettle: `PostTraining.apply`,
with capture and conversion; ONNX Runtime: `create_calibrator`, `collect_data` and `compute_data`, without the export
that it needs before). Peak: resident memory above what the process held before either call, with the model loaded;
and how much of it came after batch 10. ONNX Runtime calibrates what `quantize_static` would, by its own defaults.
What passes 6 GB or 5 minutes is stopped, and that is told.

Claimed: the peak of every observer of fettle after the most batches is at most 1.1 times that after 10; and the
histogram observers take no longer than the fastest histogram calibrator of ONNX Runtime.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnxruntime
import torch
from engines import Images, export_onnx
from harness import ROOT, Claim, Options, Result, Table, finish, parse_options
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import create_calibrator
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from onnxruntime.quantization.shape_inference import quant_pre_process

from fettle.compress.quantize import PostTraining
from fettle.compress.step import Context
from fettle.core.project import Project

PROJECT = ROOT / "examples" / "cifar10" / "fettle.toml"
IMAGES, ROWS = 512, 16
HISTOGRAMS = ("histogram_mse", "percentile", "entropy")
OBSERVERS = (*HISTOGRAMS, "moving_average", "min_max")
PEER_HISTOGRAMS = ("Percentile", "Entropy")
PEER_METHODS = (*PEER_HISTOGRAMS, "MinMax")
FEW = 10
MAX_GROWTH = 1.1
LIMIT_BYTES = 6 * 10**9
LIMIT_S = 300
MB = 1e6


@dataclass(frozen=True, slots=True)
class Effort:
    """batches: what fettle is measured on; peer_batches: what ONNX Runtime is; rounds: how often, the fastest counts.

    Only numbers of batches up to `repeated` are measured more than once.
    """

    batches: tuple[int, ...]
    peer_batches: tuple[int, ...]
    observers: tuple[str, ...]
    rounds: int
    repeated: int


FULL = Effort(batches=(FEW, 100, 1000), peer_batches=(100, 1000), observers=OBSERVERS, rounds=2, repeated=100)
QUICK = Effort(batches=(FEW, 50), peer_batches=(50,), observers=("histogram_mse", "min_max"), rounds=1, repeated=0)


@dataclass(frozen=True, slots=True)
class Row:
    """One calibration.

    peak_bytes: above the start; late_bytes: what of it came after batch 10; stopped: why it did not finish, with the
    figures up to there.
    """

    by: str
    method: str
    batches: int
    time_s: float
    peak_bytes: int
    late_bytes: int = 0
    stopped: str = ""


class Stopped(Exception):
    """A limit was reached; the message says which."""


def main(options: Options) -> int:
    """Measure every system at every number of batches, judge, report."""
    effort = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        rows = measure_all(Path(folder), effort)
    result = Result(
        benchmark="calibration",
        tables=(tabulate(rows),),
        claims=(claim_memory(rows), claim_time(rows)),
        details={"rows": [asdict(row) for row in rows], "effort": asdict(effort)},
    )
    return finish(result, options)


def prepare(folder: Path) -> None:
    """What all processes share: the images, and the model as ONNX Runtime's quantizer wants it."""
    project = Project.open(PROJECT)
    kept: list[Images] = []
    for images, _ in project.call("data.train", project.file.data.train or ""):
        kept.append(images.numpy())
        if sum(map(len, kept)) >= IMAGES:
            break
    np.save(folder / "images.npy", np.concatenate(kept)[:IMAGES])
    model = project.call("model.build", project.file.model.build)
    example = project.call("model.example", project.file.model.example)
    float_path = export_onnx(model, example, folder / "float.onnx")
    with contextlib.redirect_stdout(io.StringIO()):
        quant_pre_process(str(float_path), str(folder / "prepared.onnx"), skip_symbolic_shape=True)


def measure_all(folder: Path, effort: Effort) -> list[Row]:
    """Round after round, so that a change of the machine's speed hits every system; the fastest round is kept."""
    jobs = [("fettle", method, batches) for batches in effort.batches for method in effort.observers]
    jobs += [("ONNX Runtime", method, batches) for batches in effort.peer_batches for method in PEER_METHODS]
    best: dict[tuple[str, str, int], Row] = {}
    for number in range(effort.rounds):
        for job in jobs:
            if number and job[2] > effort.repeated:
                continue
            row = measure_apart(folder, *job)
            held = best.get(job)
            best[job] = row if held is None else min(row, held, key=lambda each: (bool(each.stopped), each.time_s))
    return [best[job] for job in jobs]


def measure_apart(folder: Path, by: str, method: str, batches: int) -> Row:
    """One calibration in a process of its own."""
    command = [sys.executable, __file__, "measure", str(folder), by, method, str(batches)]
    try:
        # The process stops itself between batches; this is for one that hangs.
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return Row(by, method, batches, 2 * LIMIT_S, 0, stopped=f"killed after {2 * LIMIT_S} s")
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Row(by, method, batches, 0.0, 0, stopped=words[-1])
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def measure(folder: Path, by: str, method: str, batches: int) -> Row:
    """One calibration in this process: once on one batch, then for the figures."""
    torch.set_num_threads(1)
    calibrate = (calibrate_fettle if by == "fettle" else calibrate_onnxruntime)(folder, method)
    images = np.load(folder / "images.npy")
    baseline_bytes = forget_peak()
    calibrate(Stream(images, 1), 1)
    stream, stopped, start = Stream(images, batches), "", time.perf_counter()
    try:
        calibrate(stream, batches)
    except Stopped as reason:
        stopped = str(reason)
    except MemoryError:
        stopped = "out of memory"
    time_s = time.perf_counter() - start
    peak_bytes = memory_bytes("VmHWM")
    late_bytes = peak_bytes - stream.early_peak_bytes if stream.early_peak_bytes else 0
    return Row(by, method, batches, time_s, peak_bytes - baseline_bytes, late_bytes, stopped)


class Stream:
    """`batches` batches of images, cyclically, each made when it is asked for; stops at the limits."""

    def __init__(self, images: Images, batches: int) -> None:
        self.images = images
        self.batches = batches
        self.early_peak_bytes = 0

    def __iter__(self) -> Iterator[Images]:
        start = time.perf_counter()
        for number in range(self.batches):
            used_s, used_bytes = time.perf_counter() - start, memory_bytes("VmRSS")
            if used_bytes > LIMIT_BYTES:
                raise Stopped(f"stopped at {used_bytes / 1e9:.1f} GB after {number} batches")
            if used_s > LIMIT_S:
                raise Stopped(f"stopped at {used_s:.0f} s after {number} batches")
            if number == FEW:
                self.early_peak_bytes = memory_bytes("VmHWM")
            rows = np.arange(number * ROWS, (number + 1) * ROWS) % len(self.images)
            yield self.images[rows]


Calibrate = Callable[[Stream, int], object]


def calibrate_fettle(folder: Path, method: str) -> Calibrate:
    """`PostTraining` with this observer."""
    project = Project.open(PROJECT)
    model = project.call("model.build", project.file.model.build)
    example = project.call("model.example", project.file.model.example)

    def calibrate(stream: Stream, batches: int) -> object:
        tensors = ((torch.from_numpy(images),) for images in stream)
        step = PostTraining(observer=method, batches=batches)
        return step.apply(model, Context(example=example, calibration=tensors))

    return calibrate


def calibrate_onnxruntime(folder: Path, method: str) -> Calibrate:
    """ONNX Runtime's calibrator of this name, on one thread, for the operations that `quantize_static` quantizes."""
    operations = sorted({*QLinearOpsRegistry, *QDQRegistry})

    def calibrate(stream: Stream, batches: int) -> object:
        # The calibrator makes its own session options, on all cores; and it narrates.
        options = patch.object(onnxruntime, "SessionOptions", functools.partial(one_thread, onnxruntime.SessionOptions))
        with options, contextlib.redirect_stdout(io.StringIO()):
            calibrator = create_calibrator(
                str(folder / "prepared.onnx"),
                operations,
                augmented_model_path=str(folder / f"augmented-{method}-{batches}.onnx"),
                calibrate_method=CalibrationMethod[method],
            )
            calibrator.collect_data(Reader(stream))
            return calibrator.compute_data()

    return calibrate


def one_thread(make: Callable[[], Any]) -> Any:
    """Session options for one thread."""
    options = make()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """A stream as ONNX Runtime wants it."""

    def __init__(self, stream: Stream) -> None:
        self._batches = iter(stream)

    def get_next(self) -> dict[str, Images] | None:
        images = next(self._batches, None)
        return None if images is None else {"images": images}


def memory_bytes(key: str) -> int:
    """This process's resident memory: "VmRSS" now, "VmHWM" at its peak."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status must have {key}: this benchmark needs Linux")


def forget_peak() -> int:
    """Start the peak anew from here, and return what is held."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return memory_bytes("VmRSS")


def claim_memory(rows: list[Row]) -> Claim:
    """The worst observer's growth from 10 batches to the most."""
    statement = f"peak memory after the most batches is at most {MAX_GROWTH} times that after {FEW}"
    ours = {(row.method, row.batches): row for row in rows if row.by == "fettle"}
    methods = list(dict.fromkeys(method for method, _ in ours))
    many = max((batches for _, batches in ours), default=0)
    if many <= FEW or any(row.stopped for row in ours.values()):
        return Claim(statement, holds=False, figures="fettle's calibration did not finish")
    growth = {method: ours[method, many].peak_bytes / ours[method, FEW].peak_bytes for method in methods}
    worst = max(growth, key=lambda method: growth[method])
    few, most = (ours[worst, batches].peak_bytes / MB for batches in (FEW, many))
    figures = (
        f"peak {few:.0f} MB at {FEW} and {most:.0f} MB at {many} batches, {growth[worst]:.2f} × ({worst}, the worst)"
    )
    return Claim(statement, holds=growth[worst] <= MAX_GROWTH, figures=figures)


def claim_time(rows: list[Row]) -> Claim:
    """The slowest histogram observer beside the fastest histogram calibrator, at the most batches both finished."""
    statement = "histogram calibration takes no longer than ONNX Runtime's fastest histogram calibrator"
    peers = [row for row in rows if row.by != "fettle" and row.method in PEER_HISTOGRAMS and not row.stopped]
    ours = [row for row in rows if row.by == "fettle" and row.method in HISTOGRAMS and not row.stopped]
    shared = {row.batches for row in peers} & {row.batches for row in ours}
    if not shared:
        return Claim(statement, holds=False, figures="no number of batches was finished by both")
    batches = max(shared)
    fastest = min((row for row in peers if row.batches == batches), key=lambda row: row.time_s)
    slowest = max((row for row in ours if row.batches == batches), key=lambda row: row.time_s)
    figures = (
        f"{slowest.time_s:.1f} s ({slowest.method}, the slowest) against {fastest.time_s:.1f} s "
        f"({fastest.method}, the fastest) on {batches} batches, {slowest.time_s / fastest.time_s:.2f} ×"
    )
    return Claim(statement, holds=slowest.time_s <= fastest.time_s, figures=figures)


def tabulate(rows: list[Row]) -> Table:
    """In the order measured."""
    cells = tuple(
        (
            row.by,
            row.method,
            str(row.batches),
            f"{row.time_s:.2f}",
            f"{row.peak_bytes / MB:.0f}",
            f"{row.late_bytes / MB:.1f}",
            row.stopped,
        )
        for row in rows
    )
    title = f"Calibration of ResNet-20 on batches of {ROWS} images, one thread"
    return Table(
        title, ("by", "method", "batches", "time, s", "peak above start, MB", "after batch 10, MB", "stopped"), cells
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        where, by, method, batches = sys.argv[2:6]
        print(json.dumps(asdict(measure(Path(where), by, method, int(batches)))))
    else:
        raise SystemExit(main(parse_options(__doc__)))
