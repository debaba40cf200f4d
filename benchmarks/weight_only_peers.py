"""The peers of `weight_only.py`: float engines, and other quantizers of linear layers at their best usual setting."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from engines import Images as Tokens
from engines import Predict, load_onnxruntime, load_openvino
from harness import run_peer
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

PEERS = Path(__file__).parent / "peers"
GROUP = 128
TORCHAO_CONFIGS = ("int8-dynamic", "int8-weights", "int4-weights")


@dataclass(frozen=True, slots=True)
class System:
    """Something to measure. `load(batch)` gives a predictor for that batch size; `size_bytes` of what it reads.

    by: "peer" or "fettle". A peer's `precision` is the one of fettle's that it stands against.
    """

    name: str
    engine: str
    precision: str
    load: Callable[[int], Predict]
    size_bytes: int
    by: str = "peer"


@dataclass(frozen=True, slots=True)
class Apart:
    """What a peer measured in a process of its own: medians in ms by batch size, one a round, and outputs."""

    name: str
    precision: str
    rounds_ms: dict[int, list[float]]
    outputs: Tokens


def build_peers(float_path: Path, folder: Path, *, missing: dict[str, str]) -> list[System]:
    """Every peer that works here; those that do not are added to `missing` with the reason."""
    size_bytes = float_path.stat().st_size
    systems = [
        System("ONNX Runtime", "onnxruntime", "float", lambda _: load_onnxruntime(float_path), size_bytes),
        System("OpenVINO", "openvino", "float", lambda batch: load_openvino(float_path, batch=batch), size_bytes),
        System(
            "OpenVINO",
            "openvino",
            "bf16",
            lambda batch: load_openvino(float_path, precision="bf16", batch=batch),
            size_bytes,
        ),
    ]
    builders: dict[str, Callable[[], System]] = {
        "ORT quantize_dynamic": lambda: quantize_onnxruntime_dynamic(float_path, folder),
        "ORT MatMulNBits 8": lambda: quantize_onnxruntime_blocks(float_path, folder, bits=8),
        "ORT MatMulNBits 4": lambda: quantize_onnxruntime_blocks(float_path, folder, bits=4),
        "NNCF int8": lambda: compress_nncf(float_path, folder, mode="int8_asym", precision="int8-weights"),
        "NNCF int4": lambda: compress_nncf(float_path, folder, mode="int4_sym", precision="int4-weights"),
    }
    for name, build in builders.items():
        try:
            systems.append(build())
        except Exception as problem:
            traceback.print_exc(file=sys.stderr)
            missing[name] = f"{type(problem).__name__}: {problem}"
    return systems


def quantize_onnxruntime_dynamic(float_path: Path, folder: Path) -> System:
    """`quantize_dynamic` per channel, which is its better setting here."""
    path = folder / "ort-dynamic.onnx"
    quantize_dynamic(str(float_path), str(path), per_channel=True, weight_type=QuantType.QInt8)
    return System(
        "ORT quantize_dynamic, per channel",
        "onnxruntime",
        "int8-dynamic",
        lambda _: load_onnxruntime(path),
        path.stat().st_size,
    )


def quantize_onnxruntime_blocks(float_path: Path, folder: Path, *, bits: int) -> System:
    """ORT's own block-wise quantizer, with the accuracy level that is fastest: 4, int8 arithmetic."""
    path = folder / f"ort-nbits-{bits}.onnx"
    quantizer = MatMulNBitsQuantizer(
        onnx.load(float_path), bits=bits, block_size=GROUP, is_symmetric=True, accuracy_level=4
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=False)
    name = f"ORT MatMulNBitsQuantizer, group {GROUP}"
    return System(name, "onnxruntime", f"int{bits}-weights", lambda _: load_onnxruntime(path), path.stat().st_size)


def compress_nncf(float_path: Path, folder: Path, *, mode: str, precision: str) -> System:
    """NNCF in its own environment; what it writes is run by the OpenVINO of this one, at OpenVINO's defaults."""
    path = folder / f"nncf-{mode}.xml"
    run_peer("nncf", PEERS / "nncf_compress.py", [str(float_path), mode, str(GROUP), str(path)])
    size_bytes = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    name = f"NNCF compress_weights, {mode}"
    return System(name, "openvino", precision, lambda batch: load_openvino(path, batch=batch), size_bytes)


def measure_torchao(
    data: Path, folder: Path, *, layers: int, batches: tuple[int, ...], rounds: int, turn_s: float
) -> tuple[list[Apart], dict[str, str]]:
    """torchao under torch.compile, each configuration in a process of its own; and those that do not run, with why."""
    found, missing = [], {}
    for config in ("float", *TORCHAO_CONFIGS):
        path = folder / f"torchao-{config}.npz"
        settings = [",".join(map(str, batches)), str(rounds), str(turn_s)]
        try:
            run_peer("torchao", PEERS / "torchao_linear.py", [str(layers), str(data), config, str(path), *settings])
        except Exception as problem:
            missing[f"torchao {config}"] = str(problem)
            continue
        with np.load(path) as arrays:
            times = {batch: arrays[f"ms_{batch}"].tolist() for batch in batches}
            found.append(Apart("torchao, torch.compile", config, times, arrays["outputs"]))
    return found, missing
