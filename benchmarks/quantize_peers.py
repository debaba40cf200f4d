"""The peers of `quantize_accuracy.py`: float engines, and every other quantizer that can be had.

All calibrate on the same rows. What one chooses for itself it chooses on validation; none sees the test rows but to
answer them.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from engines import Images, Predict, export_onnx, load_compiled, load_eager, load_onnxruntime, load_openvino
from harness import ROOT, run_peer
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from fettle.core.machine import adds_products_in_16_bits

SCRIPTS = Path(__file__).resolve().parent / "peers"
NNCF_MODES = {
    "performance": "quantize, performance",
    "mixed": "quantize, mixed",
    "accuracy-control": "accuracy control",
}
CALIBRATION_METHODS = ("MinMax", "Entropy", "Percentile")
CALIBRATION_ROWS = 32
LARGEST_BATCH = 4096
# On a CPU whose int8 kernels overflow, every peer is given its own switch for such CPUs; the default rows go without.
NARROW = adds_products_in_16_bits()
PEER_LIMIT_S = 900.0

Split = tuple[Images, NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Apart:
    """What a peer did in a process of its own, where its times can only be compared with a float model beside it.

    logits: (n, classes) for the test rows; ratio: int8 over float milliseconds, by batch size.
    """

    logits: NDArray[Any]
    ratio: dict[int, float]


@dataclass(frozen=True, slots=True)
class System:
    """Something to measure. `load(batch)` gives a predictor for that batch size, `load(None)` one for any size.

    load: None where the system ran `apart`. by: "peer" or "fettle"; picks: the batch sizes for which it is fettle's own
    choice among its candidates.
    """

    name: str
    engine: str
    precision: str
    load: Callable[[int | None], Predict] | None
    note: str = ""
    by: str = "peer"
    picks: tuple[int, ...] = ()
    apart: Apart | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """One network with what every quantizer may use: the same calibration rows, and validation for its choices.

    calibration: (n, ...) float32; kind: "transformer" for quantizers with rules of their own for one, else "plain".
    """

    net: str
    kind: str
    model: nn.Module
    example: tuple[Tensor, ...]
    calibration: Images
    validation: Split
    test: Split
    folder: Path


@dataclass(frozen=True, slots=True)
class Wishes:
    """Which peers a run has. compiles: those of torch.compile too, whose compilation takes half a minute a network.

    batches, rounds, turn_s: how one that runs apart times itself.
    """

    methods: tuple[str, ...]
    nncf_modes: tuple[str, ...]
    compiles: bool
    batches: tuple[int, ...]
    rounds: int
    turn_s: float


def build_peers(problem: Problem, wishes: Wishes, *, missing: dict[str, str]) -> list[System]:
    """Every peer that works here; those that do not are added to `missing` with the reason."""
    float_path = export_onnx(problem.model, problem.example, problem.folder / "float.onnx")
    builders: dict[str, Callable[[], list[System]]] = {
        "float engines": lambda: load_floats(problem, float_path, compiles=wishes.compiles),
        "ORT quantize_static, default": lambda: [quantize_by_default(problem, float_path)],
    }
    for method in wishes.methods:
        builders[f"ORT quantize_static, {method}"] = lambda method=method: quantize_static_best(
            problem, float_path, method=method
        )
    for mode in wishes.nncf_modes:
        builders[f"NNCF {NNCF_MODES[mode]}"] = lambda mode=mode: [quantize_nncf(problem, float_path, mode=mode)]
    if wishes.compiles:
        builders["torchao PT2E"] = lambda: [quantize_torchao(problem, wishes)]
    else:
        missing[f"torchao PT2E ({problem.net})"] = "left out of a quick run"
    systems = []
    for name, build in builders.items():
        systems += attempt(problem, name, build, missing=missing)
    return systems


def attempt(problem: Problem, name: str, build: Callable[[], list[System]], *, missing: dict[str, str]) -> list[System]:
    """What `build` returns, or nothing and its name among the missing: one that fails must not stop the others."""
    try:
        return build()
    except Exception as failure:
        missing[f"{name} ({problem.net})"] = explain(failure, problem)
        return []


def those_that_answer(
    problem: Problem, systems: list[System], *, batches: tuple[int, ...], missing: dict[str, str]
) -> list[System]:
    """The systems that load and answer at every batch size; the others are added to `missing`, and stop nobody."""
    good = []
    for system in systems:
        try:
            if system.load is not None:
                for batch in (None, *batches):
                    system.load(batch)(problem.validation[0][: batch or 1])
            good.append(system)
        except Exception as failure:
            missing[f"{system.name} in {system.engine} ({problem.net})"] = explain(failure, problem)
    return good


def explain(failure: Exception, problem: Problem) -> str:
    """The reason in one line, for the tables; the traceback goes to stderr."""
    traceback.print_exception(failure, file=sys.stderr)
    reason = f"{type(failure).__name__}: {failure}".strip().splitlines()[0]
    for folder in (problem.folder, ROOT):  # the reason goes into the README, where these say nothing
        reason = reason.replace(f"{folder}/", "")
    return reason


def load_floats(problem: Problem, float_path: Path, *, compiles: bool) -> list[System]:
    """The model as it is, in each engine."""
    systems = [
        System("torch eager", "torch", "float", lambda _: load_eager(problem.model)),
        System("ONNX Runtime", "onnxruntime", "float", lambda _: load_onnxruntime(float_path)),
        System("OpenVINO", "openvino", "float", lambda batch: load_openvino(float_path, batch=batch)),
    ]
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        half = System(
            "OpenVINO", "openvino", "bf16", lambda batch: load_openvino(float_path, precision="bf16", batch=batch)
        )
        systems.append(half)
    if compiles:
        systems.insert(1, System("torch.compile", "torch inductor", "float", lambda _: load_compiled(problem.model)))
    return systems


def quantize_by_default(problem: Problem, float_path: Path) -> System:
    """`quantize_static` as it comes: no pre-processing, signed activations, weights per tensor."""
    path = problem.folder / "ort-default.onnx"
    with contextlib.redirect_stdout(io.StringIO()):  # calibration narrates every tensor
        quantize_static(str(float_path), str(path), Calibration(problem.calibration))
    return System("ORT quantize_static, default", "onnxruntime", "int8", lambda _: load_onnxruntime(path))


def quantize_static_best(problem: Problem, float_path: Path, *, method: str) -> list[System]:
    """`quantize_static` at its best: pre-processed, uint8 activations, int8 weights per channel; in both engines.

    Entropy comes out as MinMax does: 128 bins for 128 steps leave it one threshold to choose, and `quantize_static`
    takes no other number of bins.
    """
    prepared_path, path = problem.folder / "ort-prepared.onnx", problem.folder / f"ort-{method}.onnx"
    with contextlib.redirect_stdout(io.StringIO()):
        if not prepared_path.is_file():
            quant_pre_process(str(float_path), str(prepared_path), skip_symbolic_shape=True)
        quantize_static(
            str(prepared_path),
            str(path),
            Calibration(problem.calibration),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[method],
            reduce_range=NARROW,
        )
    name = f"ORT quantize_static, {method}{', reduce_range' if NARROW else ''}"
    return [
        System(name, "onnxruntime", "int8", lambda _: load_onnxruntime(path)),
        System(name, "openvino", "int8", lambda batch: load_openvino(path, batch=batch)),
    ]


def quantize_nncf(problem: Problem, float_path: Path, *, mode: str) -> System:
    """NNCF in its own environment; what it writes is run by the OpenVINO of this one."""
    data_path, path = problem.folder / "nncf.npz", problem.folder / f"nncf-{mode}.xml"
    if not data_path.is_file():
        validation, labels = problem.validation
        np.savez(data_path, calibration=problem.calibration, validation=validation, labels=labels)
    arguments = [str(float_path), str(data_path), mode, problem.kind, str(path), str(int(NARROW))]
    printed = run_peer("nncf", SCRIPTS / "nncf_quantize.py", arguments, limit_s=PEER_LIMIT_S)
    quantizers = json.loads(printed.splitlines()[-1])["quantizers"]
    return System(
        f"NNCF {NNCF_MODES[mode]}",
        "openvino",
        # Accuracy control may give every layer back: then it is a float model, and must not pass for an int8 one.
        "int8" if quantizers else "float",
        lambda batch: load_openvino(path, batch=batch),
        note=f"{quantizers} quantizers{', overflow_fix' if NARROW else ''}",
    )


def quantize_torchao(problem: Problem, wishes: Wishes) -> System:
    """torchao's PT2E with its x86 quantizer, under torch.compile: quantized, run and timed in its own process."""
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    program = torch.export.export(problem.model, problem.example, dynamic_shapes=({0: batch},))
    float_path, data_path = problem.folder / "float.pt2", problem.folder / "torchao.npz"
    output_path = problem.folder / "torchao-logits.npz"
    torch.export.save(program, float_path)
    np.savez(data_path, calibration=problem.calibration, test=problem.test[0])
    sizes = ",".join(map(str, wishes.batches))
    arguments = [str(float_path), str(data_path), str(output_path), sizes, str(wishes.rounds), str(wishes.turn_s)]
    arguments.append(str(int(NARROW)))
    run_peer("torchao", SCRIPTS / "torchao_quantize.py", arguments, limit_s=PEER_LIMIT_S)
    with np.load(output_path) as found:
        ratio = {size: statistics.median(found[f"int8_{size}"] / found[f"float_{size}"]) for size in wishes.batches}
        logits = found["logits"]
    shown = " and ".join(f"{value:.2f}" for value in ratio.values())
    note = f"apart: {shown} × float under torch.compile{', reduce_range' if NARROW else ''}"
    return System("torchao PT2E", "torch inductor", "int8", None, note=note, apart=Apart(logits, ratio))


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    """The calibration rows as ONNX Runtime wants them."""

    def __init__(self, images: Images) -> None:
        starts = range(0, len(images), CALIBRATION_ROWS)
        self._batches: Iterator[dict[str, Images]] = iter(
            [{"images": images[start : start + CALIBRATION_ROWS]} for start in starts]
        )

    def get_next(self) -> dict[str, Images] | None:
        return next(self._batches, None)
