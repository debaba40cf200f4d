from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from fettle.compress.capture import capture, layer_of
from fettle.compress.quantize import PostTraining
from fettle.compress.quantize.graph.channels import LAYER_NORM, LAYERS
from fettle.compress.quantize.smooth_quant import SmoothQuant, smoothing_scales
from fettle.compress.step import Context
from fettle.core.errors import DataError, UsageError
from fettle.testing.models import CASES
from fettle.testing.steps import answers, captured, context_for

every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def seeded(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval().requires_grad_(False)


def smoothed(model, batches, **options):
    notes: list[str] = []
    context = Context(example=batches[0], calibration=iter(batches), note=notes.append)
    return SmoothQuant(**options).apply(model, context), notes


def weights_of(graph):
    """By layer: the weight and the bias that the graph holds."""
    state = graph.state_dict()
    found = {}
    for node in graph.graph.nodes:
        if node.target in (LAYER_NORM, *LAYERS):
            at = 2 if node.target == LAYER_NORM else 1
            found[layer_of(node)] = [state[str(arg.target)] for arg in node.args[at : at + 2] if arg is not None]
    return found


def sqnr_db(want, have):
    return 10 * math.log10(float(want.double().square().sum() / (want.double() - have.double()).square().sum()))


@every
@pytest.mark.parametrize("convolutions", [False, True])
def test_the_function_stays_the_same(case, convolutions):
    model, data = case.build(), case.data(rows=5)
    graph = SmoothQuant(convolutions=convolutions).apply(captured(case), context_for(case))
    for want, have in zip(answers(model, data), answers(graph, data), strict=True):
        torch.testing.assert_close(have, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["norm_first", "norm_last", "mlp", "two_inputs"])
def test_layers_keep_their_names_for_the_steps_after(name):
    case = CASES[name]
    graph = SmoothQuant().apply(captured(case), context_for(case))
    before, after = (
        [layer_of(node) for node in each.graph.nodes if node.target in LAYERS]
        for each in (captured(case), capture(graph, case.data(rows=2)))
    )
    assert before == after


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_scales_by_loops(alpha, generator):
    model = seeded(lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)))
    model[0].weight.copy_(torch.tensor([1.0, 30.0, 0.1, 2.0]))
    model[0].bias.copy_(torch.tensor([0.0, 1.0, 5.0, -2.0]))
    batches = [(torch.randn(rows, 4, generator=generator),) for rows in (7, 3, 12)]
    graph, _ = smoothed(model, batches, alpha=alpha)
    scales = []
    for channel in range(4):
        peak = max(abs(model[0](row)[channel].item()) for (batch,) in batches for row in batch)
        largest = max(abs(w) for w in model[1].weight[:, channel].tolist())
        scales.append(peak**alpha / largest ** (1 - alpha))
    found = weights_of(graph)
    common = float(model[0].weight[0] / found["0"][0][0]) / scales[0]
    for channel, scale in enumerate(scales):
        torch.testing.assert_close(found["0"][0][channel], model[0].weight[channel] / (scale * common))
        torch.testing.assert_close(found["0"][1][channel], model[0].bias[channel] / (scale * common))
        torch.testing.assert_close(found["1"][0][:, channel], model[1].weight[:, channel] * (scale * common))
    if alpha == 1.0:
        peaks = torch.cat([functional.layer_norm(b, [4], *found["0"]) for (b,) in batches])
        torch.testing.assert_close(peaks.abs().amax(dim=0), peaks.abs().max().expand(4), rtol=1e-4, atol=0.0)


def test_the_largest_peak_stays_as_it_was(generator):
    model = seeded(lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)))
    model[0].weight.copy_(torch.tensor([1.0, 100.0, 0.1, 2.0]))
    x = torch.randn(64, 4, generator=generator)
    graph, _ = smoothed(model, [(x,)])
    after = functional.layer_norm(x, [4], *weights_of(graph)["0"])
    torch.testing.assert_close(after.abs().max(), model[0](x).abs().max())


class Projections(nn.Module):
    """Separate query, key and value after one norm, plain products, an output projection."""

    def __init__(self):
        super().__init__()
        self.norm, self.q, self.k, self.v = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        y = self.norm(x)
        weights = (self.q(y) @ self.k(y).transpose(1, 2)).softmax(dim=-1)
        return x + self.out(weights @ self.v(y))


def test_separate_projections_share_their_scales_and_values_are_smoothed_too(generator):
    model = seeded(Projections)
    x = torch.randn(16, 5, 8, generator=generator)
    graph, notes = smoothed(model, [(x,)])
    torch.testing.assert_close(graph(x), model(x), atol=1e-5, rtol=1e-5)
    found = weights_of(graph)
    ratio = model.norm.weight / found["norm"][0]
    for name in "qk":
        torch.testing.assert_close(found[name][0], getattr(model, name).weight * ratio)
    by_output = model.out.weight / found["out"][0]
    torch.testing.assert_close(by_output, by_output[:1].expand(8, -1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["v"][0], model.v.weight * ratio * by_output[0][:, None], rtol=1e-4, atol=1e-5)
    assert "the outputs of 2 layers were smoothed (norm, v)" in notes[0]


def test_a_norm_that_a_residual_reads_is_left_and_named():
    case = CASES["norm_last"]
    model = case.build()
    graph, notes = smoothed(model, [case.data(rows=32)])
    assert any(n.startswith("layer.norm1: not smoothed: its output is also read by add") for n in notes)
    assert torch.equal(weights_of(graph)["layer.norm1"][0], model.layer.norm1.weight)
    assert not torch.allclose(weights_of(graph)["layer.norm2"][0], model.layer.norm2.weight)


def outlier_encoder():
    """Two channels after each norm are a hundred times the others, and no more worth."""
    model = CASES["norm_first"].build()
    with torch.no_grad():
        for norm in (model.layer.norm1, model.layer.norm2):
            norm.weight[[3, 11]] *= 100
        for weight in (model.layer.self_attn.in_proj_weight, model.layer.linear1.weight):
            weight[:, [3, 11]] /= 100
    return model.requires_grad_(False)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
def test_outlier_channels_after_a_norm_are_recovered(alpha):
    case, model = CASES["norm_first"], outlier_encoder()
    context = Context(example=case.data(rows=2), calibration=[case.data(rows=64, seed=i) for i in range(4)])
    (test,) = case.data(rows=256, seed=50)
    want = model(test)
    plain = sqnr_db(want, PostTraining().apply(model, context)(test))
    smooth = sqnr_db(want, PostTraining().apply(SmoothQuant(alpha=alpha).apply(model, context), context)(test))
    assert plain < 20
    assert smooth > plain + 15


def test_dead_channels_stay():
    peaks, weights = torch.tensor([0.0, 2.0, 3.0, 8.0]), torch.tensor([1.0, 0.0, 3.0, 2.0])
    free = torch.tensor([True, True, False, True])
    assert smoothing_scales(peaks=peaks, weights=weights, free=free, alpha=0.5)[:3].tolist() == [1.0, 1.0, 1.0]
    nobody = torch.zeros(4, dtype=torch.bool)
    assert smoothing_scales(peaks=peaks, weights=weights, free=nobody, alpha=0.5).tolist() == [1.0] * 4


def test_only_so_many_batches_are_read():
    case = CASES["norm_first"]
    read = 0

    def batches():
        nonlocal read
        while True:
            read += 1
            yield case.data(rows=4, seed=read)

    seen: list[float] = []
    context = replace(context_for(case), calibration=batches(), progress=seen.append)
    SmoothQuant(batches=3).apply(captured(case), context)
    assert read <= 4
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_that_is_not_finite_is_named(value):
    case = CASES["norm_first"]
    bad = case.data(rows=4)[0].clone()
    bad[1, 2, 3] = value
    rule = r"^the output of layer\.\S+ of batch 1: calibration data must stay finite in float32, got .*$"
    with pytest.raises(DataError, match=rule):
        smoothed(captured(case), [case.data(rows=4), (bad,)])


def test_no_data_is_an_error_only_where_it_is_needed():
    with pytest.raises(DataError, match="at least one batch"):
        SmoothQuant().apply(captured(CASES["mlp"]), Context(example=CASES["mlp"].data(rows=2)))
    notes: list[str] = []
    case = CASES["gelu"]
    SmoothQuant().apply(captured(case), Context(example=case.data(rows=2), note=notes.append))
    assert notes == ["SmoothQuant: nothing to smooth: no linear layer reads a layer norm or another layer alone"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "alpha must be between 0 and 1, got -0.1"),
        ({"alpha": 1.1}, "alpha must be between 0 and 1"),
        ({"alpha": float("nan")}, "alpha must be between 0 and 1"),
        ({"batches": 0}, "batches must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        SmoothQuant(**options)


def test_bad_models_are_refused():
    case = CASES["norm_first"]
    quantized = PostTraining().apply(captured(case), context_for(case))
    with pytest.raises(UsageError, match=r"put it before quantize\.post_training"):
        SmoothQuant().apply(quantized, context_for(case))
    model = case.build()
    with torch.no_grad():
        model.layer.linear1.weight[0, 0] = float("inf")
    with pytest.raises(DataError, match=r"NaN or infinity in layer\.linear1"):
        SmoothQuant().apply(model, context_for(case))
