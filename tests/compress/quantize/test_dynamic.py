"""Dynamic int8: which layers, how near to float, and that both engines compute it in integers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fettle.compress.quantize.dynamic import Dynamic
from fettle.compress.step import Context
from fettle.core import plugins
from fettle.core.errors import DataError, UsageError
from fettle.core.runner import RuntimeBase
from fettle.runtime._operations import LINEAR_DYNAMIC
from fettle.testing.models import CASES, LARGE
from fettle.testing.runtimes import export_case, named_data, seal
from fettle.testing.steps import answers, captured, similarity


def apply(model, example, **options):
    """The small model and what was noted."""
    notes = []
    return Dynamic(**options).apply(model, Context(example=example, note=notes.append)), notes


def dynamic_layers(graph):
    return [node for node in graph.graph.nodes if node.target is LINEAR_DYNAMIC]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_stays_near_float(case):
    model = case.build()
    small, _ = apply(captured(case), case.data(rows=1), smallest=0)
    data = case.data(rows=64, seed=3)
    for want, have in zip(answers(model, data), answers(small, data), strict=True):
        assert similarity(want, have) > 0.998


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_no_range_is_exceeded(factor):
    model = nn.Linear(64, 64, bias=False).eval()
    small, _ = apply(model, (torch.zeros(2, 64),))
    x = factor * torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    assert similarity(answers(model, (x,))[0], answers(small, (x,))[0]) > 0.9998


def test_zeros_give_the_bias():
    model = nn.Linear(64, 64).eval()
    small, _ = apply(model, (torch.ones(2, 64),))
    assert torch.equal(small(torch.zeros(3, 64)), model.bias.detach().repeat(3, 1))


def test_layers_too_small_or_named_or_in_double_stay_float():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8)).eval()
    small, notes = apply(model, (torch.zeros(2, 64),), keep_float=("0",))
    assert len(dynamic_layers(small)) == 1
    assert notes == [
        "0: linear layer stays float: kept in float on request",
        "2: linear layer stays float: 512 weights are too few to gain, 4096 are wanted",
    ]
    _, notes = apply(nn.Linear(64, 64).double().eval(), (torch.zeros(2, 64, dtype=torch.float64),))
    assert "it computes in float64" in notes[0]


def test_mistakes_are_refused():
    with pytest.raises(UsageError, match="smallest must be 0 or more weights, got -1"):
        Dynamic(smallest=-1)
    model = nn.Linear(64, 64).eval()
    with pytest.raises(UsageError, match="nothing that would be quantized: 'head'"):
        apply(model, (torch.zeros(2, 64),), keep_float=("head",))
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match="finite"):
        apply(model, (torch.zeros(2, 64),))


@pytest.mark.parametrize(
    ("name", "kinds"), [("onnxruntime", {"DynamicQuantizeMatMul"}), ("openvino", {"DequantizeLinear"})]
)
def test_engines_answer_as_the_simulation(name, kinds, tmp_path):
    case = LARGE["linear"]
    runtime = plugins.load("fettle.runtime", name, RuntimeBase)()
    small, _ = apply(captured(case), case.data(rows=2), weight_bits=runtime.weight_bits())
    signature = export_case(runtime, case, tmp_path / "model", model=small)
    assert kinds <= {node.op_type for node in onnx.load(tmp_path / "model" / "model.onnx").graph.node}
    runner = runtime.load(seal(tmp_path / "model", signature, precision="int8-dynamic"), threads=1)
    for rows in (1, 3, 64):
        want = answers(small, case.data(rows=rows, seed=7))[0].numpy()
        found = runner.run(named_data(case, rows=rows, seed=7))["output_9"]
        # OpenVINO takes a range for each group of a row, ONNX Runtime one for the batch.
        assert np.sqrt(np.square(found - want).mean()) < 0.03 * answers(small, case.data(rows=64, seed=7))[0].std()


def test_seven_bits_stay_within_seven_bits():
    case = LARGE["linear"]
    graph, _ = apply(captured(case), case.data(rows=2), weight_bits=7)
    integers = [value for value in graph.buffers() if value.dtype == torch.int8]
    assert integers
    for value in integers:
        assert int(value.min()) >= -64
        assert int(value.max()) <= 63
    with pytest.raises(UsageError, match="weight_bits must be 7 or 8, got 6"):
        Dynamic(weight_bits=6)
