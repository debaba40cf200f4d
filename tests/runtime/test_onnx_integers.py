"""Graphs before and after: the same bits from ONNX Runtime, and integers where they were expected."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from fettle.compress.capture import export_program
from fettle.compress.quantize import PostTraining
from fettle.compress.step import Context
from fettle.core.signature import Signature, TensorSpec
from fettle.runtime._onnx_integers import suit_integer_kernels
from fettle.runtime.onnxruntime import OnnxRuntime
from fettle.runtime.openvino import OpenVino

UINT8, INT8 = np.uint8, np.int8


class Draft:
    """A graph under construction."""

    def __init__(self, shape):
        self.nodes, self.constants = [], []
        self.inputs = [helper.make_tensor_value_info("x", 1, shape)]

    def constant(self, name, value):
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind, inputs, output, **attributes):
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"node_{output}", **attributes))
        return output

    def rounded(self, value, name, *, scale=0.05, zero=110, dtype=UINT8):
        """As QuantizeLinear and DequantizeLinear leave it."""
        scale = self.constant(f"{name}_scale", np.float32(scale))
        zero = self.constant(f"{name}_zero", dtype(zero))
        codes = self.node("QuantizeLinear", [value, scale, zero], f"{name}_codes")
        return self.node("DequantizeLinear", [codes, scale, zero], name)

    def weight(self, codes, name="w", *, zero=0):
        outputs = len(codes)
        self.constant(f"{name}_codes", codes)
        self.constant(f"{name}_scales", np.linspace(0.001, 0.02, outputs, dtype=np.float32))
        self.constant(f"{name}_zeros", np.full(outputs, zero, INT8))
        inputs = [f"{name}_codes", f"{name}_scales", f"{name}_zeros"]
        return self.node("DequantizeLinear", inputs, name, axis=0)

    def model(self, *outputs):
        found = [helper.make_tensor_value_info(name, 1, ["batch", None, None, None]) for name in outputs]
        graph = helper.make_graph(self.nodes, "graph", self.inputs, found, initializer=self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
        model.ir_version = 10
        return model


def codes_of(outputs, channels, height, width, seed=0):
    shape = (outputs, channels, height, width)
    return np.random.default_rng(seed).integers(-127, 128, shape, dtype=INT8)


def convolution(codes, *, zero=110, dtype=UINT8, weight_zero=0, rounds=True, **attributes):
    draft = Draft(["batch", codes.shape[1] * attributes.get("group", 1), 9, 8])
    x = draft.rounded("x", "given", zero=zero, dtype=dtype)
    y = draft.node("Conv", [x, draft.weight(codes, zero=weight_zero)], "product", **attributes)
    return draft.model(draft.rounded(y, "y", scale=0.3, zero=zero, dtype=dtype) if rounds else y)


def padding(*, scale=0.05, zero=110, constant=None, mode="constant", seen=False):
    """A residual's shortcut with more channels. scale, zero: of what comes after it. seen: the values are an output."""
    draft = Draft(["batch", 3, 9, 8])
    x = draft.rounded("x", "given")
    inputs = [x, draft.constant("pads", np.array([0, 2, 0, 0, 0, 1, 0, 0] if mode == "constant" else [0] * 8))]
    if constant is not None:
        inputs.append(draft.constant("value", np.float32(constant)))
    wide = draft.node("Pad", inputs, "wide", mode=mode)
    y = draft.rounded(wide, "y", scale=scale, zero=zero)
    return draft.model(y, *(["wide"] if seen else []))


def suited(model):
    graph = ir.from_proto(onnx.ModelProto.FromString(model.SerializeToString()))
    suit_integer_kernels(graph.graph)
    found = ir.to_proto(graph)
    onnx.checker.check_model(found, full_check=True)
    return found


def answers(model, x):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def kinds(model):
    return Counter(node.op_type for node in model.graph.node)


def same(model, changed, *, rows=3, seed=1):
    shape = (rows, *(side.dim_value for side in model.graph.input[0].type.tensor_type.shape.dim[1:]))
    x = np.random.default_rng(seed).normal(size=shape, scale=4.0).astype(np.float32)
    for one, other in zip(answers(model, x), answers(changed, x), strict=True):
        assert one.tobytes() == other.tobytes()


@settings(max_examples=60)
@given(
    outputs=st.integers(16, 40),
    channels=st.integers(1, 11).filter(lambda count: count % 4),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 2),
    padded=st.booleans(),
    zero=st.integers(0, 255),
    seed=st.integers(0, 2**32),
)
def test_channels_are_filled_up_to_the_next_four_and_no_bit_changes(
    outputs, channels, kernel, stride, padded, zero, seed
):
    pads = [side // 2 for side in kernel] * 2 if padded else [0] * 4
    model = convolution(
        codes_of(outputs, channels, *kernel, seed=seed), zero=zero, strides=[stride] * 2, pads=pads, group=1
    )
    changed = suited(model)
    (weight,) = [one for one in changed.graph.initializer if one.name == "w_codes"]
    assert list(weight.dims) == [outputs, (channels + 3) // 4 * 4, *kernel]
    assert kinds(changed) == kinds(model) + Counter(Pad=1)
    same(model, changed, seed=seed % 1000)


def test_signed_activations_are_filled_too():
    model = convolution(codes_of(16, 3, 3, 3), zero=-7, dtype=INT8)
    changed = suited(model)
    assert kinds(changed)["Pad"] == 1
    same(model, changed)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(convolution(codes_of(16, 4, 3, 3)), id="fours"),
        pytest.param(convolution(codes_of(15, 3, 3, 3)), id="few outputs"),
        pytest.param(convolution(codes_of(16, 3, 7, 7), pads=[3, 3, 3, 3]), id="large kernel"),
        pytest.param(convolution(codes_of(16, 3, 3, 3), group=2), id="groups"),
        pytest.param(convolution(codes_of(16, 3, 3, 3), weight_zero=2), id="weights off zero"),
        pytest.param(convolution(codes_of(16, 3, 3, 3), rounds=False), id="computed in float"),
        pytest.param(padding(scale=0.06), id="another scale"),
        pytest.param(padding(zero=111), id="another zero point"),
        pytest.param(padding(constant=0.5), id="another constant"),
        pytest.param(padding(mode="edge"), id="edges"),
        pytest.param(padding(seen=True), id="an output"),
    ],
)
def test_what_would_not_gain_or_would_change_stays_as_it_is(model):
    assert suited(model).SerializeToString() == ir.to_proto(ir.from_proto(model)).SerializeToString()


def test_an_input_with_a_scale_for_each_channel_stays_as_it_is():
    model = convolution(codes_of(16, 3, 3, 3))
    for tensor in model.graph.initializer:
        if tensor.name in ("given_scale", "given_zero"):
            whole = np.full(3, numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(whole, tensor.name))
    assert kinds(suited(model)) == kinds(model)


def test_a_weight_that_two_convolutions_share_stays_as_it_is():
    draft = Draft(["batch", 3, 9, 8])
    x, w = draft.rounded("x", "given"), draft.weight(codes_of(16, 3, 3, 3))
    ys = [draft.rounded(draft.node("Conv", [x, w], f"product{n}"), f"y{n}", scale=0.3) for n in (1, 2)]
    model = draft.model(*ys)
    assert kinds(suited(model)) == kinds(model)


def test_what_else_reads_the_input_reads_it_as_before():
    draft = Draft(["batch", 3, 9, 8])
    x = draft.rounded("x", "given")
    y = draft.rounded(draft.node("Conv", [x, draft.weight(codes_of(16, 3, 3, 3))], "product"), "y", scale=0.3)
    model = draft.model(y, draft.node("Neg", [x], "negative"))
    changed = suited(model)
    assert kinds(changed) == kinds(model) + Counter(Pad=1, DequantizeLinear=1)
    same(model, changed)


@pytest.mark.parametrize("constant", [None, 0.0])
def test_zeros_are_padded_in_integers(constant):
    model = padding(constant=constant)
    changed = suited(model)
    assert kinds(changed) == Counter(QuantizeLinear=1, Pad=1, DequantizeLinear=1)
    (pad,) = [node for node in changed.graph.node if node.op_type == "Pad"]
    assert pad.input[0] == "given_codes"
    same(model, changed)


class Shortcut(torch.nn.Module):
    """A first layer for images, and a block whose shortcut is padded with channels of zeros."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.conv = torch.nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.head = torch.nn.Conv2d(32, 32, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.conv(x) + torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
        return self.head(x.relu())


def test_a_quantized_model_is_changed_for_onnx_runtime_and_left_alone_for_openvino(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, batches = Shortcut().eval(), [(torch.randn(16, 3, 8, 8),) for _ in range(3)]
    context = Context(example=(batches[0][0][:1],), calibration=batches)
    program = export_program(PostTraining().apply(model, context), batches[0])
    signature = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 3, 8, 8)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 32, 4, 4)),),
    )
    found = {}
    for engine in (OnnxRuntime, OpenVino):
        folder = tmp_path / engine.__name__
        folder.mkdir()
        engine().export(program, folder, signature)
        found[engine] = onnx.load(folder / "model.onnx")
    ours, plain = found[OnnxRuntime], found[OpenVino]
    assert [types_of_pads(model) for model in (ours, plain)] == [["uint8", "uint8"], ["float32"]]
    same(plain, ours)


def types_of_pads(model):
    """In what each Pad computes: it reads what QuantizeLinear, or else DequantizeLinear, has made."""
    makers = {output: node.op_type for node in model.graph.node for output in node.output}
    types = {"QuantizeLinear": "uint8", "Slice": "float32", "DequantizeLinear": "float32"}
    return [types[makers[node.input[0]]] for node in model.graph.node if node.op_type == "Pad"]
