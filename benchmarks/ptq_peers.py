"""The peers of `ptq_cifar.py`: float engines, and other quantizers at their default and at their best."""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from engines import (
    Images,
    Predict,
    export_onnx,
    load_compiled,
    load_eager,
    load_onnxruntime,
    load_openvino,
    predict_all,
)
from harness import run_peer
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

NNCF_SCRIPT = Path(__file__).parent / "peers" / "nncf_quantize.py"
NNCF_PRESETS = {"default": "performance", "mixed preset": "mixed"}
CALIBRATION_METHODS = ("MinMax", "Entropy", "Percentile")
CALIBRATION_ROWS = 32


@dataclass(frozen=True, slots=True)
class System:
    """Something to measure. `load(batch)` gives a predictor for that batch size, `load(None)` one for any size.

    by: "peer" or "fettle"; pick: fettle's own choice among its candidates.
    """

    name: str
    engine: str
    precision: str
    load: Callable[[int | None], Predict]
    note: str = ""
    by: str = "peer"
    pick: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """One network with what every quantizer may use: the same calibration images, and validation data for choices.

    calibration, validation: (n, 3, 32, 32) float32, normalized; validation_classes: what the float model answers.
    """

    net: str
    model: nn.Module
    example: tuple[Tensor, ...]
    calibration: Images
    validation: Images
    validation_classes: NDArray[Any]
    folder: Path


def build_peers(problem: Problem, *, methods: tuple[str, ...], missing: dict[str, str]) -> list[System]:
    """Every peer that works here; those that do not are added to `missing` with the reason."""
    float_path = export_onnx(problem.model, problem.example, problem.folder / "float.onnx")
    systems = [
        System("torch eager", "torch", "float", lambda _: load_eager(problem.model)),
        System("torch.compile", "torch inductor", "float", lambda _: load_compiled(problem.model)),
        System("ONNX Runtime", "onnxruntime", "float", lambda _: load_onnxruntime(float_path)),
        System("OpenVINO", "openvino", "float", lambda batch: load_openvino(float_path, batch=batch)),
        System("OpenVINO", "openvino", "bf16", lambda batch: load_openvino(float_path, precision="bf16", batch=batch)),
    ]
    builders: dict[str, Callable[[], list[System]]] = {
        "ORT quantize_static": lambda: quantize_onnxruntime(problem, float_path, methods=methods)
    }
    for label, preset in NNCF_PRESETS.items():
        builders[f"NNCF quantize, {label}"] = lambda label=label, preset=preset: [
            quantize_nncf(problem, float_path, label=label, preset=preset)
        ]
    for name, build in builders.items():
        systems += attempt(f"{name} ({problem.net})", build, missing=missing)
    return systems


def attempt(name: str, build: Callable[[], list[System]], *, missing: dict[str, str]) -> list[System]:
    """What `build` returns, or nothing and its name among the missing: one that fails must not stop the others."""
    try:
        return build()
    except Exception as problem:
        traceback.print_exc(file=sys.stderr)
        missing[name] = f"{type(problem).__name__}: {problem}"
        return []


def quantize_onnxruntime(problem: Problem, float_path: Path, *, methods: tuple[str, ...]) -> list[System]:
    """`quantize_static` untuned; and after pre-processing with uint8 activations and int8 weights per channel.

    Of the latter, the calibration method is chosen that agrees most often with the float model on validation: accuracy
    on 2000 images cannot tell them apart. The chosen file also runs in OpenVINO, as a fourth peer.
    """
    default_path = problem.folder / "ort-default.onnx"
    prepared_path = problem.folder / "ort-prepared.onnx"
    with contextlib.redirect_stdout(io.StringIO()):  # calibration narrates every tensor
        quantize_static(str(float_path), str(default_path), Calibration(problem.calibration))
        quant_pre_process(str(float_path), str(prepared_path), skip_symbolic_shape=True)
        agreements = {}
        for method in methods:
            path = problem.folder / f"ort-{method}.onnx"
            quantize_static(
                str(prepared_path),
                str(path),
                Calibration(problem.calibration),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod[method],
            )
            classes = predict_all(load_onnxruntime(path), problem.validation).argmax(axis=1)
            agreements[method] = float(np.mean(classes == problem.validation_classes))
    best = max(agreements, key=lambda method: agreements[method])
    best_path = problem.folder / f"ort-{best}.onnx"
    note = f"u8 s8 per channel, {best}"
    return [
        System("ORT quantize_static, default", "onnxruntime", "int8", lambda _: load_onnxruntime(default_path)),
        System("ORT quantize_static, best", "onnxruntime", "int8", lambda _: load_onnxruntime(best_path), note),
        System(
            "ORT quantize_static, best", "openvino", "int8", lambda batch: load_openvino(best_path, batch=batch), note
        ),
    ]


def quantize_nncf(problem: Problem, float_path: Path, *, label: str, preset: str) -> System:
    """NNCF in its own environment; what it writes is run by the OpenVINO of this one."""
    calibration_path = problem.folder / "calibration.npz"
    np.savez(calibration_path, images=problem.calibration)
    path = problem.folder / f"nncf-{preset}.xml"
    run_peer("nncf", NNCF_SCRIPT, [str(float_path), str(calibration_path), preset, str(path)])
    return System(f"NNCF quantize, {label}", "openvino", "int8", lambda batch: load_openvino(path, batch=batch))


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    """The calibration images as ONNX Runtime wants them."""

    def __init__(self, images: Images) -> None:
        starts = range(0, len(images), CALIBRATION_ROWS)
        self._batches: Iterator[dict[str, Images]] = iter(
            [{"images": images[start : start + CALIBRATION_ROWS]} for start in starts]
        )

    def get_next(self) -> dict[str, Images] | None:
        return next(self._batches, None)
