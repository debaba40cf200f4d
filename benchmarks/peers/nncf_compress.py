"""Runs in `.peers/nncf`: compress the weights of a float ONNX file with NNCF and save it as OpenVINO IR.

usage: nncf_compress.py FLOAT.onnx MODE GROUP OUTPUT.xml

MODE is one of NNCF's, such as "int8_asym" (its default) or "int4_sym"; GROUP is weights a scale, for 4 bits only.
All layers are compressed alike: by default NNCF keeps the first and the last of them in 8 bits.
"""

import os
import sys

os.environ["NNCF_CI"] = "1"  # before the import: NNCF sends usage statistics otherwise

import nncf
import openvino as ov


def main(float_path: str, mode: str, group: str, output_path: str) -> None:
    model = ov.Core().read_model(float_path)
    settings = {}
    if mode.startswith("int4"):
        # Without it NNCF refuses a model of which one row is shorter than a group.
        fallback = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
        settings = {"group_size": int(group), "all_layers": True, "ratio": 1.0, "advanced_parameters": fallback}
    compressed = nncf.compress_weights(model, mode=nncf.CompressWeightsMode(mode), **settings)
    ov.save_model(compressed, output_path, compress_to_fp16=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
