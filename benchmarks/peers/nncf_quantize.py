"""Runs in `.peers/nncf`: quantize a float ONNX file with NNCF and save it as OpenVINO IR.

usage: nncf_quantize.py FLOAT.onnx CALIBRATION.npz PRESET OUTPUT.xml

CALIBRATION.npz holds `images` (n, 3, 32, 32) float32; all n are used. PRESET is "performance" (NNCF's default for
this kind of model: symmetric activations) or "mixed" (asymmetric activations, symmetric weights).
"""

import os
import sys

os.environ["NNCF_CI"] = "1"  # before the import: NNCF sends usage statistics otherwise

import nncf
import numpy as np
import openvino as ov


def main(float_path: str, calibration_path: str, preset: str, output_path: str) -> None:
    with np.load(calibration_path) as calibration:
        images = calibration["images"]
    model = ov.Core().read_model(float_path)
    quantized = nncf.quantize(
        model,
        nncf.Dataset([image[None] for image in images]),
        preset=nncf.QuantizationPreset(preset),
        target_device=nncf.TargetDevice.CPU,
        subset_size=len(images),
    )
    ov.save_model(quantized, output_path, compress_to_fp16=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
