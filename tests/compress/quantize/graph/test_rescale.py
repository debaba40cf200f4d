from __future__ import annotations

import pytest
import torch
from torch import nn

from fettle.compress.capture import capture
from fettle.compress.quantize import PostTraining
from fettle.compress.quantize.graph.channels import LAYER_NORM, LAYERS, find_streams
from fettle.compress.quantize.graph.rescale import Rescaling, folded_graph
from fettle.compress.step import Context
from fettle.core.errors import DataError, UsageError
from fettle.testing.models import CASES
from fettle.testing.steps import captured, context_for


def only_stream(model, x, sources=LAYERS):
    graph = capture(model, (x,))
    (stream,) = find_streams(graph, (x,), sources=sources)
    return graph, stream


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rows_and_columns_are_the_largest_weights_by_loops(groups, generator):
    first, second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 8, 1, groups=groups)
    x = torch.randn(2, 2, 5, 5, generator=generator)
    graph, stream = only_stream(nn.Sequential(first, nn.ReLU(), second), x)
    rescaling = Rescaling(graph)
    width = 4 // groups
    for channel in range(4):
        rows = max(abs(w) for w in first.weight[channel].flatten().tolist())
        outputs = range(8 // groups * (channel // width), 8 // groups * (channel // width + 1))
        columns = max(abs(w) for output in outputs for w in second.weight[output, channel % width].flatten().tolist())
        assert rescaling.rows(stream)[channel].item() == rows
        assert rescaling.columns(stream)[channel].item() == columns


def test_columns_are_the_largest_over_all_readers():
    case = CASES["two_outputs"]
    model = case.build()
    graph = folded_graph(model, Context(example=case.data(rows=2)), "a step")
    (stream,) = find_streams(graph, case.data(rows=2), sources=LAYERS)
    both = torch.cat([model.first.linear.weight, model.second.linear.weight]).abs().amax(dim=0)
    torch.testing.assert_close(Rescaling(graph).columns(stream), both.double())


def test_a_layer_norm_is_divided_in_weight_and_bias(generator):
    norm = nn.LayerNorm(4)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(4, generator=generator))
        norm.bias.copy_(torch.randn(4, generator=generator))
    linear, x = nn.Linear(4, 3), torch.randn(2, 4, generator=generator)
    graph, stream = only_stream(nn.Sequential(norm, linear), x, sources=(LAYER_NORM,))
    scales = torch.tensor([0.5, 1.0, 2.0, 4.0])
    rescaling = Rescaling(graph)
    rescaling.divide(stream, scales)
    rescaling.store()
    state = {name: value for name, value in graph.named_buffers()}
    torch.testing.assert_close(state["layer_norm_weight"], norm.weight / scales)
    torch.testing.assert_close(state["layer_norm_bias"], norm.bias / scales)
    torch.testing.assert_close(state["linear_weight"], linear.weight * scales)
    assert state["linear_weight"].dtype == torch.float32


def test_dividing_twice_is_dividing_by_the_product(generator):
    model, x = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2)), torch.randn(2, 3, generator=generator)
    graph, stream = only_stream(model, x)
    rescaling = Rescaling(graph)
    rescaling.divide(stream, torch.tensor([2.0, 4.0, 8.0, 16.0]))
    rescaling.divide(stream, torch.tensor([0.5, 0.5, 0.25, 0.125]))
    rescaling.store()
    torch.testing.assert_close(
        graph.get_buffer("linear_weight"), model[0].weight / torch.tensor([[1.0], [2], [2], [2]])
    )
    torch.testing.assert_close(graph(x), model(x))


def test_old_weights_are_forgotten(generator):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(2, 3, generator=generator)
    graph, stream = only_stream(model, x)
    rescaling = Rescaling(graph)
    rescaling.divide(stream, 2 * torch.ones(4))
    rescaling.store()
    assert sum(value.numel() for value in graph.state_dict().values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("parameter", ["0.weight", "0.bias", "2.weight"])
def test_a_weight_that_is_not_finite_is_named(parameter, value):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(2, 3)
    with torch.no_grad():
        model.get_parameter(parameter).view(-1)[0] = value
    graph, stream = only_stream(model, x)
    rescaling = Rescaling(graph)
    with pytest.raises(DataError, match=f"NaN or infinity in {parameter[0]}"):
        rescaling.divide(stream, torch.ones(4))


def test_a_quantized_model_is_refused():
    case = CASES["mlp"]
    quantized = PostTraining().apply(captured(case), context_for(case))
    with pytest.raises(UsageError, match=r"put it before quantize\.post_training"):
        folded_graph(quantized, context_for(case), "quantize.smooth_quant")
