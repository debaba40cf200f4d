"""Int8 really runs in int8: the compiled graph says which precision each layer computes in."""

from __future__ import annotations

import numpy as np
import pytest

from fettle.compress.quantize.post_training import PostTraining
from fettle.core import plugins
from fettle.core.runner import RuntimeBase
from fettle.testing.models import CASES, LARGE
from fettle.testing.runtimes import build, export_case, named_data, seal
from fettle.testing.steps import answers, context_for

openvino = pytest.importorskip("openvino")


@pytest.mark.parametrize("name", ["shared_relu", "residual", "pad_shortcut", "grouped", "relu6", "squeeze_excite"])
def test_convolutions_are_compiled_to_integers(name, tmp_path):
    case = CASES[name]
    runtime = plugins.load("fettle.runtime", "openvino", RuntimeBase)()
    model = PostTraining(small_share=0.0).apply(case.build(), context_for(case))
    signature = export_case(runtime, case, tmp_path / "model", model=model)
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


@pytest.mark.parametrize(
    ("precision", "kinds", "group"),
    [("int8-weights", {"i8"}, 64), ("int4-weights", {"u4"}, 64), ("int8-dynamic", {"i8"}, 64)],
)
def test_linear_layers_keep_their_integers_in_the_compiled_graph(precision, kinds, group, tmp_path):
    from fettle.runtime.openvino import activation_group

    case = LARGE["linear"]
    runtime = plugins.load("fettle.runtime", "openvino", RuntimeBase)()
    export_case(runtime, case, tmp_path / "model", precision=precision)
    core = openvino.Core()
    model = core.read_model(tmp_path / "model" / "model.onnx")
    assert activation_group(model) == group
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    layers = [i["runtimePrecision"].astype(str) for i in found if i["layerType"].astype(str) == "FullyConnected"]
    assert sorted(layers) == sorted([*kinds] * 3 + ["f32"])


HALVES = plugins.load("fettle.runtime", "openvino", RuntimeBase).precisions & {"bf16", "fp16"}


@pytest.mark.skipif("bf16" not in HALVES, reason="needs a CPU that multiplies in bfloat16")
@pytest.mark.parametrize("name", ["residual", "squeeze_excite", "norm_first"])
def test_sixteen_bits_are_compiled_to_sixteen_bits(name, tmp_path):
    case = CASES[name]
    runtime = plugins.load("fettle.runtime", "openvino", RuntimeBase)()
    signature = export_case(runtime, case, tmp_path / "model", precision="bf16")
    runner = runtime.load(seal(tmp_path / "model", signature, precision="bf16"), threads=1)
    runner.run(named_data(case, rows=2))
    kinds = set()
    for node in runner._free.get_runtime_model().get_ordered_ops():
        information = node.get_rt_info()
        if information["layerType"].astype(str) in ("Convolution", "FullyConnected"):
            kinds.add(information["runtimePrecision"].astype(str))
    assert kinds == {"bf16"}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_are_answered_on_any_cpu(precision, tmp_path):
    """Where the CPU has no such instructions, in float32: a service must not stop because it moved."""
    case = CASES["residual"]
    runtime = plugins.load("fettle.runtime", "openvino", RuntimeBase)()
    model = build(case, precision)
    signature = export_case(runtime, case, tmp_path / "model", model=model)
    runner = runtime.load(seal(tmp_path / "model", signature, precision=precision), threads=1)
    found = runner.run(named_data(case, rows=7))
    for spec, want in zip(signature.outputs, answers(model, case.data(rows=7)), strict=True):
        np.testing.assert_allclose(found[spec.name], want.numpy(), atol=0.03 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("abilities", "expected"), [(["FP32", "INT8"], set()), (["BF16"], {"bf16"}), (["BF16", "FP16"], {"bf16", "fp16"})]
)
def test_what_the_cpu_can_do_is_what_is_offered(abilities, expected, monkeypatch):
    from fettle.runtime import openvino as module

    class Core:
        def get_property(self, device, name):
            assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
            return abilities

    monkeypatch.setattr(module.openvino, "Core", Core)
    assert module._halves.__wrapped__() == expected
