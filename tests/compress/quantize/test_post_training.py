"""Numerics of the whole step: against float, and against what ONNX Runtime computes from the written file."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from fettle.compress.capture import export_program
from fettle.compress.quantize.post_training import PostTraining
from fettle.compress.step import Context
from fettle.core.errors import DataError, UsageError
from fettle.runtime._device import exact_weight_bits
from fettle.runtime._onnx import write_onnx
from fettle.testing.models import CASES
from fettle.testing.steps import answers, captured, context_for, similarity

every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# ONNX Runtime turns linear layers of three-dimensional inputs into MatMulNBits, which rounds activations its own way.
ATTENTION = ("norm_first", "norm_last", "cross_attention")
# A model whose every layer can run in integers leaves no float product behind.
INTEGER = [name for name in CASES if name not in ATTENTION]
FLOAT_PRODUCTS = {"Conv", "FusedConv", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "NhwcFusedConv"}


def quantize(case, **options):
    """All its layers, the small ones too, with weights as wide as this machine multiplies exactly."""
    return PostTraining(**{"small_share": 0.0, "weight_bits": exact_weight_bits()} | options).apply(
        captured(case), context_for(case)
    )


def write(model, case, path):
    inputs = [f"input_{index}" for index in range(len(case.shapes))]
    outputs = [f"output_{index}" for index in range(case.outputs)]
    write_onnx(export_program(model, case.data(rows=2)), path, inputs=inputs, outputs=outputs)
    return onnx.load(path)


def session(path, optimized):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function: case -> its model with all layers quantized, the file of it, and what the file holds."""

    @functools.cache
    def of(case):
        quantized, path = quantize(case), tmp_path_factory.mktemp(case.name) / "model.onnx"
        return quantized, path, write(quantized, case, path)

    return of


@every
def test_the_file_is_integer_and_answers_as_the_simulation_and_as_float(case, whole, tmp_path):
    model, data = case.build(), case.data(rows=64, seed=5)
    quantized, path, written = whole(case)
    run = session(path, tmp_path / "optimized.onnx")
    found = run.run(None, {f"input_{index}": tensor.numpy() for index, tensor in enumerate(data)})
    for want, simulated, have in zip(answers(model, data), answers(quantized, data), found, strict=True):
        assert similarity(want, simulated) > 0.99
        assert similarity(want, torch.from_numpy(have)) > 0.99
        # Two steps of an eight-bit scale over the spread of the answers, about six standard deviations.
        allowed = (0.1 if case.name in ATTENTION else 2 * 6 / 255) * want.std().item()
        assert np.abs(have - simulated.numpy()).max() <= allowed
    kinds = [tensor.data_type for tensor in written.graph.initializer]
    assert kinds.count(onnx.TensorProto.INT8) >= case.anchors
    floats = [t for t in written.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 128]
    assert case.name in ATTENTION or not floats, [t.name for t in floats]
    left = [
        node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node if node.op_type in FLOAT_PRODUCTS
    ]
    assert case.name not in INTEGER or not left, f"float products are left: {left}"


@pytest.mark.parametrize("name", ["shared_relu", "residual", "grouped", "relu6", "pooled"])
def test_biases_are_int32_and_weights_int8(name, whole):
    case = CASES[name]
    written = whole(case)[2]
    kinds = {tensor.name: tensor.data_type for tensor in written.graph.initializer}
    biases = [kind for key, kind in kinds.items() if "bias" in key and not key.endswith(("_scale", "_zero"))]
    assert biases.count(onnx.TensorProto.INT32) == case.anchors
    weights = [kind for key, kind in kinds.items() if "weight" in key and not key.endswith(("_scale", "_zero"))]
    assert set(weights) == {onnx.TensorProto.INT8}


@pytest.mark.parametrize("observer", ["histogram_mse", "min_max"])
def test_both_observers_agree_with_float(observer):
    case = CASES["residual"]
    data = case.data(rows=64, seed=5)
    assert similarity(answers(case.build(), data)[0], answers(quantize(case, observer=observer), data)[0]) > 0.99


def test_a_clip_before_a_quantizer_disappears():
    for name, clip in (("shared_relu", "relu"), ("relu6", "hardtanh")):
        targets = [str(node.target) for node in quantize(CASES[name]).lowered().graph.nodes]
        assert not any(clip in target for target in targets), name


def test_a_clip_that_cuts_more_than_the_quantizer_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LeakyReLU(), nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    quantized = PostTraining().apply(model, Context(example=(x,), calibration=[(x,)]))
    assert "aten.leaky_relu.default" in [str(node.target) for node in quantized.graph.nodes]


@pytest.mark.parametrize("keep", [("conv1",), ("stem", "head.linear")])
def test_kept_layers_stay_float_and_are_noted(keep, tmp_path):
    case, notes = CASES["residual"], []
    context = Context(example=case.data(rows=1), calibration=[case.data(rows=16)], note=notes.append)
    quantized = PostTraining(keep_float=keep, small_share=0.0).apply(captured(case), context)
    assert all(any(name in note and "on request" in note for note in notes) for name in keep)
    written = write(quantized, case, tmp_path / "model.onnx")
    whole = [t.name for t in written.graph.initializer if t.name.endswith("_weight_int8")]
    assert len(whole) == case.anchors - len(keep)


def test_an_unknown_layer_to_keep_is_an_error_that_lists_the_layers():
    case = CASES["residual"]
    with pytest.raises(UsageError, match=r"nothing that would be quantized: 'conv9'.*conv1, conv2"):
        quantize(case, keep_float=("conv9",))


@pytest.mark.parametrize("batches", [0, -1])
def test_batches_must_be_positive(batches):
    with pytest.raises(UsageError, match="batches must be at least 1"):
        PostTraining(batches=batches)


def test_an_unknown_observer_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'min_max'"):
        quantize(CASES["mlp"], observer="minmax")


def test_an_empty_calibration_set_is_an_error():
    case = CASES["mlp"]
    with pytest.raises(DataError, match="at least one batch"):
        PostTraining().apply(captured(case), Context(example=case.data(rows=1)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_names_input_and_batch(value):
    case = CASES["mlp"]
    bad = case.data(rows=4)[0]
    bad[1, 2] = value
    context = Context(example=case.data(rows=1), calibration=[case.data(rows=4), (bad,)])
    with pytest.raises(DataError, match="the inputs of batch 1"):
        PostTraining().apply(captured(case), context)


class Exploding(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        nn.init.constant_(self.first.weight, 3e38)

    def forward(self, x):
        return self.second(self.first(x)).mean((2, 3))


def test_an_overflow_inside_names_the_layer():
    x = torch.ones(2, 3, 4, 4)
    with pytest.raises(DataError, match="output of first of batch 0"):
        PostTraining().apply(Exploding(), Context(example=(x,), calibration=[(x,)]))


def test_a_weight_that_is_nan_is_an_error():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(DataError, match="finite"):
        PostTraining().apply(model, Context(example=(torch.ones(1, 3),), calibration=[(torch.ones(4, 3),)]))


def test_no_more_batches_are_read_than_asked_for_and_progress_ends_at_one():
    case, read, shares = CASES["mlp"], [], []

    def batches():
        for index in range(50):
            read.append(index)
            yield case.data(rows=8, seed=index)

    context = Context(example=case.data(rows=1), calibration=batches(), progress=shares.append)
    PostTraining(batches=5).apply(captured(case), context)
    assert len(read) <= 6
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_model_without_layers_is_returned_with_a_note():
    notes = []
    context = Context(example=(torch.ones(1, 3),), calibration=[(torch.ones(2, 3),)], note=notes.append)
    quantized = PostTraining().apply(nn.ReLU(), context)
    assert quantized(torch.tensor([[-1.0, 2.0, 3.0]])).tolist() == [[0.0, 2.0, 3.0]]
    assert "nothing was quantized" in notes[0]


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_tiny_and_huge_activations_keep_their_sign_and_size(scale):
    case = CASES["mlp"]
    model = case.build()
    batches = [(case.data(rows=32, seed=index)[0] * scale,) for index in range(4)]
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.bias.zero_()
    quantized = PostTraining().apply(model, Context(example=case.data(rows=1), calibration=batches))
    assert similarity(answers(model, batches[0])[0], answers(quantized, batches[0])[0]) > 0.99


def test_inputs_that_are_always_zero_do_not_break_it():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    zeros = torch.zeros(4, 3)
    quantized = PostTraining().apply(model, Context(example=(zeros,), calibration=[(zeros,)]))
    torch.testing.assert_close(quantized(zeros), model(zeros), atol=0.02, rtol=0.02)


@every
def test_nothing_is_kept_that_no_node_reads(case, whole):
    quantized = whole(case)[0].lowered()
    read = {str(node.target) for node in quantized.graph.nodes if node.op == "get_attr"}
    assert set(quantized.state_dict()) <= read


class Partial(nn.Module):
    """`spare` is never called; `twin` shares its weight with `first`; attention reads a projection uncalled."""

    def __init__(self):
        super().__init__()
        self.first, self.twin, self.spare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.spare_conv = nn.Conv2d(2, 2, 1)
        self.twin.weight = self.first.weight
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = self.twin(torch.relu(self.first(x)))
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("training", [False, True])
def test_what_the_owner_may_not_expect_is_noted(training):
    x, notes, model = torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(0)), [], Partial().train(training)
    PostTraining().apply(model, Context(example=(x,), calibration=[(x,)], note=notes.append))
    unreached = [note for note in notes if "never reached" in note]
    assert unreached == [f"{name}: never reached by forward, left out" for name in ("spare", "spare_conv")]
    assert ("the model was in training mode; quantized as in evaluation" in notes) == training
    assert all(module.training == training for module in model.modules())


@every
def test_a_model_in_evaluation_whose_layers_all_run_is_no_surprise(case):
    notes = []
    context = Context(example=case.data(rows=2), calibration=[case.data(rows=16)], note=notes.append)
    PostTraining().apply(case.build(), context)
    surprises = [note.partition(":")[0] for note in notes if "never reached" in note or "training mode" in note]
    assert surprises == (["unused", "never"] if case.name == "unused_branch" else [])


def test_a_bare_tensor_is_one_input_not_one_row():
    case = CASES["mlp"]
    (x,) = case.data(rows=32)

    def quantized(calibration):
        return PostTraining().apply(captured(case), Context(example=(x[:2],), calibration=calibration))

    assert torch.equal(quantized([x])(x), quantized([(x,)])(x))


def test_batches_that_are_no_inputs_are_refused():
    case = CASES["mlp"]
    (x,) = case.data(rows=8)
    for batch, message in (
        (
            (x, torch.zeros(8)),
            "calibration batch 0 must be a tuple of the model's inputs, 1 tensor and no targets, got 2",
        ),
        ({"x": x}, "got dict"),
        ((x[:, :-1],), r"calibration batch 0, of shape \[8, \d+\], must fit the model: "),
    ):
        with pytest.raises(DataError, match=message):
            PostTraining().apply(captured(case), Context(example=(x[:2],), calibration=[batch]))


def test_what_is_quantized_already_is_refused():
    case = CASES["mlp"]
    once = quantize(case)
    with pytest.raises(UsageError, match="takes a float model, got one that is quantized already"):
        PostTraining().apply(once, context_for(case))


def test_a_norm_that_reads_its_batch_is_named():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.Flatten(), nn.Linear(288, 2)
    )
    x, notes = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), []
    PostTraining().apply(model.eval(), Context(example=(x[:2],), calibration=[(x,)], note=notes.append))
    assert any(note.startswith("1: batch-norm takes its statistics from the batch in evaluation too") for note in notes)


def test_a_weight_that_is_not_finite_is_named():
    model = CASES["residual"].build()
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = float("nan")
    case = CASES["residual"]
    with pytest.raises(DataError, match="conv1"):
        PostTraining().apply(model, context_for(case))
