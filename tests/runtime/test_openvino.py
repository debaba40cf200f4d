"""Int8 really runs in int8: the compiled graph says which precision each layer computes in."""

from __future__ import annotations

import pytest

from fettle.core import plugins
from fettle.core.runner import RuntimeBase
from fettle.testing.models import CASES
from fettle.testing.runtimes import build, export_case, named_data, seal

openvino = pytest.importorskip("openvino")


@pytest.mark.parametrize("name", ["shared_relu", "residual", "pad_shortcut", "grouped", "relu6", "squeeze_excite"])
def test_convolutions_are_compiled_to_integers(name, tmp_path):
    case = CASES[name]
    runtime = plugins.load("fettle.runtime", "openvino", RuntimeBase)()
    signature = export_case(runtime, case, tmp_path / "model", model=build(case, "int8"))
    runner = runtime.load(seal(tmp_path / "model", signature, precision="int8"), threads=1)
    runner.run(named_data(case, rows=2))
    core = openvino.Core()
    compiled = core.compile_model(tmp_path / "model" / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        information = node.get_rt_info()
        if information["layerType"].astype(str) in ("Convolution", "GroupConvolution", "FullyConnected"):
            kinds[node.get_friendly_name()] = information["runtimePrecision"].astype(str)
    assert kinds
    assert set(kinds.values()) <= {"i8", "u8"}, kinds
