from __future__ import annotations

import pytest
import torch
from torch import nn

from fettle.compress.capture import capture
from fettle.compress.quantize import PostTraining
from fettle.compress.quantize.graph.errors import layer_errors
from fettle.core.errors import DataError, UsageError
from fettle.testing.models import CASES
from fettle.testing.steps import captured, context_for


def simulated(name, **options):
    case = CASES[name]
    return case, PostTraining(**{"small_share": 0.0} | options).apply(captured(case), context_for(case))


@pytest.mark.parametrize("name", ["residual", "norm_first", "two_inputs", "cross_attention", "parametrized"])
def test_every_layer_is_measured_and_fewer_bits_cost_more(name):
    case, eight = simulated(name)
    _, four = simulated(name, weight_bits=4)
    batches = [case.data(rows=8, seed=seed) for seed in (1, 2)]
    fine, coarse = (layer_errors(model, batches) for model in (eight, four))
    assert list(fine) == list(dict.fromkeys(layer.layer for layer in eight.layers().values()))
    assert all(error.sqnr_db > 20 for error in fine.values())
    assert all(coarse[layer].mse > fine[layer].mse for layer in fine)


def test_it_is_what_hooks_on_both_models_measure():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(3))
    case_context = context_for(CASES["mlp"])
    quantized = PostTraining().apply(model, type(case_context)(example=(x[:2],), calibration=[(x,)]))
    found = layer_errors(quantized, [(x[:8],), (x[8:],)])["2"]
    with torch.no_grad():
        error = quantized(x).double() - model(x).double()
    assert found.count == error.numel()
    assert found.mse == pytest.approx(float(error.square().mean()), rel=1e-5)
    assert found.max_abs == pytest.approx(float(error.abs().max()), rel=1e-5)
    assert found.mean_abs == pytest.approx(float(error.abs().mean()), rel=1e-5)


def test_a_bare_tensor_stands_for_one_input():
    case, model = simulated("mlp")
    (x,) = case.data(rows=8)
    forms = ([x], [(x,)])
    assert len({tuple(layer_errors(model, form).items()) for form in forms}) == 1


def test_what_cannot_be_measured_is_refused():
    case, model = simulated("mlp")
    (x,) = case.data(rows=8)
    with pytest.raises(UsageError, match="need a simulated model, got GraphModule"):
        layer_errors(capture(case.build(), (x,)), [(x,)])
    with pytest.raises(DataError, match="at least one batch"):
        layer_errors(model, [])
    with pytest.raises(DataError, match="NaN or infinity"):
        layer_errors(model, [(x * float("nan"),)])
