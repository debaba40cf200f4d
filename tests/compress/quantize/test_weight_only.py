"""Weights in few bits: which layers, how near to float, what the file holds, and that both engines agree."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from fettle.compress.capture import export_program
from fettle.compress.quantize.weight_only import WeightOnly
from fettle.compress.step import Context, Step
from fettle.core import plugins
from fettle.core.errors import DataError, UsageError
from fettle.core.runner import RuntimeBase
from fettle.runtime._onnx import write_onnx
from fettle.runtime._operations import LINEAR_BLOCKS, LINEAR_ROWS
from fettle.testing.models import CASES, LARGE
from fettle.testing.runtimes import export_case, named_data, seal
from fettle.testing.steps import answers, captured, context_for, similarity


def apply(model, example, **options):
    """The small model and what was noted."""
    notes = []
    return WeightOnly(**options).apply(model, Context(example=example, note=notes.append)), notes


def small_layers(graph):
    return [node for node in graph.graph.nodes if node.target in (LINEAR_BLOCKS, LINEAR_ROWS)]


@pytest.mark.parametrize(("bits", "least"), [(8, 0.9999), (4, 0.985)])
@pytest.mark.parametrize("group", [32, 64, 128, 256, None])
def test_it_stays_near_float(bits, least, group):
    case = LARGE["linear"]
    model, data = case.build(), case.data(rows=64, seed=5)
    small, notes = apply(captured(case), case.data(rows=2), bits=bits, group=group)
    assert len(small_layers(small)) == 3
    assert similarity(answers(model, data)[0], answers(small, data)[0]) > least
    assert notes == ["4: linear layer stays float: 512 weights are too few to gain, 4096 are wanted"]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_model_is_taken(case):
    model = case.build()
    small, notes = apply(captured(case), case.data(rows=1), smallest=0)
    data = case.data(rows=8, seed=3)
    for want, have in zip(answers(model, data), answers(small, data), strict=True):
        assert similarity(want, have) > 0.999
    assert notes or small_layers(small)


def test_smaller_groups_are_nearer():
    case = LARGE["linear"]
    model, data = case.build(), case.data(rows=64, seed=5)
    want = answers(model, data)[0]
    found = [answers(apply(captured(case), data, bits=4, group=group)[0], data)[0] for group in (32, 256)]
    assert (found[0] - want).square().mean() < (found[1] - want).square().mean()


@pytest.mark.parametrize(
    ("inputs", "group", "block"),
    [(256, 128, 128), (192, 128, 64), (96, 128, 32), (64, 256, 64), (256, 32, 32)],
)
def test_the_block_is_what_fits_the_row(inputs, group, block):
    small, _ = apply(nn.Linear(inputs, 64).eval(), (torch.zeros(2, inputs),), group=group)
    (layer,) = small_layers(small)
    assert getattr(small, layer.args[1].target).shape == (64, inputs // block, block)


def test_eight_bits_have_a_scale_a_row_unless_a_group_is_asked_for():
    small, _ = apply(nn.Linear(1024, 64).eval(), (torch.zeros(2, 1024),))
    (layer,) = small_layers(small)
    stored, scales = (getattr(small, node.target) for node in layer.args[1:3])
    assert (layer.target, stored.shape, stored.dtype, scales.shape) == (LINEAR_ROWS, (1024, 64), torch.int8, (64,))
    small, _ = apply(nn.Linear(1024, 64).eval(), (torch.zeros(2, 1024),), bits=4)
    (layer,) = small_layers(small)
    assert getattr(small, layer.args[2].target).shape == (64, 8)


@pytest.mark.parametrize("inputs", [80, 100, 33])
def test_a_row_that_no_block_divides_stays_float(inputs):
    small, notes = apply(nn.Linear(inputs, 128).eval(), (torch.zeros(2, inputs),))
    assert not small_layers(small)
    assert f"its {inputs} inputs are no multiple of 32" in notes[0]
    assert notes[-1].startswith("nothing was quantized")


def test_attention_projections_are_taken():
    encoder = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True).eval()
    small, notes = apply(encoder, (torch.randn(2, 6, 64),))
    assert len(small_layers(small)) == 4
    assert notes == []
    x = torch.randn(5, 6, 64, generator=torch.Generator().manual_seed(1))
    assert similarity(answers(encoder, (x,))[0], answers(small, (x,))[0]) > 0.9999


def test_convolutions_stay_float_and_are_named():
    case = LARGE["convolution"]
    small, notes = apply(captured(case), case.data(rows=2))
    assert not small_layers(small)
    assert "2 convolutions stay float, from 0.conv to 1.conv" in notes[1]
    assert notes[-1].startswith("nothing was quantized")


class Shared(nn.Module):
    """One weight read by two layers, and one read as a plain product from both sides."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.matrix = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x):
        x = self.layer(torch.relu(self.layer(x)))
        return nn.functional.linear(x @ self.matrix, self.matrix)


def test_a_weight_read_twice_is_stored_once_and_a_product_is_a_layer():
    model = Shared().eval()
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    small, _ = apply(model, (x,))
    assert len(small_layers(small)) == 4
    assert len({name for name, _ in small.named_buffers() if name.endswith("int8")}) == 3
    assert not dict(small.named_parameters()).keys() & {"layer.weight", "matrix"}
    assert similarity(answers(model, (x,))[0], answers(small, (x,))[0]) > 0.999


def test_batch_norm_is_folded_before():
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)).eval()
    with torch.no_grad():
        model[1].running_var.mul_(9.0)
    x = torch.randn(4, 64)
    small, _ = apply(model, (x,))
    assert [node.target for node in small.graph.nodes if node.op == "call_function"] == [LINEAR_ROWS]
    assert similarity(answers(model, (x,))[0], answers(small, (x,))[0]) > 0.999


def test_named_layers_stay_float():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    small, notes = apply(model, (torch.zeros(2, 64),), keep_float=("2",))
    assert len(small_layers(small)) == 1
    assert notes == ["2: linear layer stays float: kept in float on request"]
    with pytest.raises(UsageError, match="nothing that would be quantized: 'head'"):
        apply(model, (torch.zeros(2, 64),), keep_float=("head",))


def test_a_layer_in_double_stays_as_it_is():
    small, notes = apply(nn.Linear(64, 64).double().eval(), (torch.zeros(2, 64, dtype=torch.float64),))
    assert not small_layers(small)
    assert "it computes in float64" in notes[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    with torch.no_grad():
        model[1].weight[3, 4] = bad
    with pytest.raises(DataError, match="infinity in 1"):
        apply(model, (torch.zeros(2, 64),))


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"bits": 3}, "bits must be 4 or 8, got 3"),
        ({"group": 48}, "group must be 32, 64, 128, 256 or None, got 48"),
        ({"group": 16}, "got 16"),
        ({"group": 0}, "got 0"),
        ({"group": -32}, "got -32"),
        ({"group": 512}, "got 512"),
        ({"smallest": -1}, "smallest must be 0 or more weights, got -1"),
    ],
)
def test_bad_options_are_refused(options, rule):
    with pytest.raises(UsageError, match=rule):
        WeightOnly(**options)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_precision_follows_the_bits_through_json(bits):
    step = plugins.load("fettle.compress.quantize", "weight_only", Step).from_spec(WeightOnly(bits=bits).spec())
    assert step == WeightOnly(bits=bits)
    assert step.precision == f"int{bits}-weights"


@pytest.mark.parametrize("bits", [4, 8])
def test_the_file_really_holds_so_few_bits(bits, tmp_path):
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()
    small, _ = apply(model, (torch.zeros(2, 256),), bits=bits)
    program = export_program(small, (torch.zeros(2, 256),))
    write_onnx(program, tmp_path / "model.onnx", inputs=["x"], outputs=["y"])
    weights, scales = 2 * 256 * 512, 2 * 256 * 512 // 128
    assert (tmp_path / "model.onnx").stat().st_size < weights * bits / 8 + 4 * scales + 8000
    # What rearranges rows into blocks is done when the engine loads the file, never in a call.
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node]
    assert kinds == ["MatMulNBits", "Relu", "MatMulNBits"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_engines_answer_as_the_simulation(name, bits, tmp_path):
    case = LARGE["linear"]
    small, _ = apply(captured(case), case.data(rows=2), bits=bits)
    runtime = plugins.load("fettle.runtime", name, RuntimeBase)()
    signature = export_case(runtime, case, tmp_path / "model", model=small)
    runner = runtime.load(seal(tmp_path / "model", signature, precision=f"int{bits}-weights"), threads=1)
    for rows in (1, 3, 64):
        want = answers(small, case.data(rows=rows, seed=7))[0].numpy()
        found = runner.run(named_data(case, rows=rows, seed=7))["output_9"]
        # What the engines add by rounding x: up to 2 percent of the spread in blocks of 256.
        assert np.sqrt(np.square(found - want).mean()) < 0.04 * answers(small, case.data(rows=64, seed=7))[0].std()


def test_progress_ends_at_one():
    shares = []
    case = LARGE["linear"]
    WeightOnly().apply(captured(case), Context(example=case.data(rows=1), progress=shares.append))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_data_is_not_needed_and_not_read():
    def refuse():
        raise AssertionError("calibration data must not be read")
        yield

    case = LARGE["linear"]
    context = context_for(case)
    small = WeightOnly().apply(captured(case), Context(example=context.example, calibration=refuse()))
    assert small(*case.data(rows=3)).shape == (3, 4)
