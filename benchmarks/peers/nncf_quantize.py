"""Runs in `.peers/nncf`: quantize a float ONNX file with NNCF, save it as OpenVINO IR, say how much was quantized.

usage: nncf_quantize.py FLOAT.onnx DATA.npz MODE KIND OUTPUT.xml NARROW

DATA.npz holds `calibration` (n, ...) float32, all of which is used, and `validation` (m, ...) with `labels` (m,).
MODE is "performance" (symmetric activations), "mixed" (asymmetric activations) or "accuracy-control": from the
performance preset, layers go back to float until validation accuracy drops by at most MAX_DROP.
KIND is "transformer", for which NNCF has rules of its own, or "plain". NARROW is "1" to round all weights to 7 bits,
which CPUs without VNNI need, or "0" for NNCF's own default.

The last line printed is JSON: {"quantizers": how many FakeQuantize operations the result holds}.
"""

import json
import os
import sys
from collections.abc import Iterable

os.environ["NNCF_CI"] = "1"  # before the import: NNCF sends usage statistics otherwise

import nncf
import numpy as np
import openvino as ov

MAX_DROP = 0.003


def main(float_path: str, data_path: str, mode: str, kind: str, output_path: str, narrow: str) -> None:
    with np.load(data_path) as data:
        calibration, validation, labels = data["calibration"], data["validation"], data["labels"]
    model = ov.Core().read_model(float_path)
    shared = {
        "target_device": nncf.TargetDevice.CPU,
        "subset_size": len(calibration),
        "model_type": nncf.ModelType.TRANSFORMER if kind == "transformer" else None,
    }
    advanced = nncf.AdvancedQuantizationParameters(
        overflow_fix=nncf.OverflowFix.ENABLE if narrow == "1" else nncf.OverflowFix.FIRST_LAYER
    )
    images = nncf.Dataset([image[None] for image in calibration])
    if mode == "accuracy-control":
        rows = nncf.Dataset(
            [(image[None], label) for image, label in zip(validation, labels, strict=True)], lambda row: row[0]
        )
        quantized = nncf.quantize_with_accuracy_control(
            model, images, rows, accuracy, max_drop=MAX_DROP, advanced_quantization_parameters=advanced, **shared
        )
    else:
        quantized = nncf.quantize(
            model, images, preset=nncf.QuantizationPreset(mode), advanced_parameters=advanced, **shared
        )
    ov.save_model(quantized, output_path, compress_to_fp16=False)
    print(json.dumps({"quantizers": sum(op.get_type_name() == "FakeQuantize" for op in quantized.get_ops())}))


def accuracy(model: ov.CompiledModel, rows: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[float, list[float]]:
    """The share of rows given their label, and 1.0 or 0.0 for each, by which NNCF ranks the layers."""
    hits = [float(model(image)[0].argmax() == label) for image, label in rows]
    return float(np.mean(hits)), hits


if __name__ == "__main__":
    main(*sys.argv[1:])
