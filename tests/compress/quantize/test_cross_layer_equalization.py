from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from fettle.compress.capture import capture, layer_of
from fettle.compress.quantize import PostTraining
from fettle.compress.quantize.cross_layer_equalization import CrossLayerEqualization
from fettle.compress.quantize.graph.channels import LAYERS
from fettle.compress.quantize.graph.prepare import prepare
from fettle.compress.step import Context, Step
from fettle.core.errors import CaptureError, DataError, UsageError
from fettle.testing.models import CASES, FixedBatch
from fettle.testing.steps import answers, captured, context_for

every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def seeded(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval().requires_grad_(False)


def equalized(model, x, **options):
    notes: list[str] = []
    graph = CrossLayerEqualization(**options).apply(model, Context(example=(x,), note=notes.append))
    return graph, notes


def weights_of(graph):
    """Weight and bias of each convolution and linear layer, in order, as the graph holds them."""
    state = graph.state_dict()
    layers = [node for node in graph.graph.nodes if node.target in LAYERS]
    return [[state[str(arg.target)] for arg in node.args[1:3] if arg is not None] for node in layers]


def sqnr_db(want, have):
    return 10 * math.log10(float(want.double().square().sum() / (want.double() - have.double()).square().sum()))


@every
def test_the_function_stays_the_same(case):
    model, data = case.build(), case.data(rows=5)
    graph = CrossLayerEqualization().apply(captured(case), context_for(case))
    for want, have in zip(answers(model, data), answers(graph, data), strict=True):
        torch.testing.assert_close(have, want, atol=2e-6, rtol=1e-5)


@every
def test_layers_keep_their_names_for_the_steps_after(case):
    graph = CrossLayerEqualization().apply(captured(case), context_for(case))
    before, after = captured(case), capture(graph, case.data(rows=2))
    for each in (before, after):
        prepare(each)
    named = [[layer_of(node) for node in each.graph.nodes if node.target in LAYERS] for each in (before, after)]
    assert named[0] == named[1]


def test_it_is_found_by_its_file_and_changes_no_precision():
    assert issubclass(CrossLayerEqualization, Step)
    assert CrossLayerEqualization.step_name() == "quantize.cross_layer_equalization"
    assert CrossLayerEqualization.precision == ""


@pytest.mark.parametrize("seed", range(3))
def test_one_pair_by_loops(seed):
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.ReLU(), nn.Conv2d(5, 4, 3)), seed)
    graph, _ = equalized(model, torch.ones(2, 3, 8, 8))
    (first,), (second, bias) = weights_of(graph)
    for channel in range(5):
        r = max(abs(w) for w in model[0].weight[channel].flatten().tolist())
        q = max(abs(w) for row in range(4) for w in model[2].weight[row, channel].flatten().tolist())
        s = math.sqrt(r / q)
        torch.testing.assert_close(first[channel], model[0].weight[channel] / s)
        torch.testing.assert_close(second[:, channel], model[2].weight[:, channel] * s)
    assert torch.equal(bias, model[2].bias)


def test_the_bias_is_divided_too():
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    with torch.no_grad():
        model[0].weight.mul_(8)
    graph, _ = equalized(model, torch.ones(2, 3))
    (weight, bias), _ = weights_of(graph)
    for channel in range(4):
        r, q = float(model[0].weight[channel].abs().max()), float(model[2].weight[:, channel].abs().max())
        torch.testing.assert_close(weight[channel], model[0].weight[channel] / math.sqrt(r / q))
        torch.testing.assert_close(bias[channel], model[0].bias[channel] / math.sqrt(r / q))


@pytest.mark.parametrize("seed", range(3))
def test_a_depthwise_triple_meets_the_closed_form(seed):
    """Each of the three ranges becomes the cube root of their product (equation 10 of the paper, for three layers)."""
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, groups=6, bias=False),
            nn.ReLU(),
            nn.Conv2d(6, 4, 1, bias=False),
        ),
        seed,
    )
    graph, notes = equalized(model, torch.ones(2, 3, 6, 6))
    (first,), (filters,), (last,) = weights_of(graph)
    for channel in range(6):
        before = [model[0].weight[channel], model[2].weight[channel], model[4].weight[:, channel]]
        cube_root = math.prod(float(w.abs().max()) for w in before) ** (1 / 3)
        for after in (first[channel], filters[channel], last[:, channel]):
            assert float(after.abs().max()) == pytest.approx(cube_root, rel=2e-3)
    assert "2 pairs of layers were equalized (after 0, 2)" in notes[0]


def test_a_long_chain_converges_to_equal_ranges():
    widths = [3, 8, 6, 7, 5, 4]
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b, bias=False), nn.ReLU())]
    model = seeded(lambda: nn.Sequential(*layers))
    graph, _ = equalized(model, torch.ones(2, 3))
    weights = [weight for (weight,) in weights_of(graph)]
    for one, two in pairwise(weights):
        torch.testing.assert_close(one.abs().amax(dim=1), two.abs().amax(dim=0), rtol=5e-3, atol=0.0)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_convolutions_are_equalized_group_by_group(groups):
    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.Conv2d(4, 8, 1, groups=groups)))
    x = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    graph, _ = equalized(model, x)
    torch.testing.assert_close(graph(x), model(x), atol=1e-6, rtol=1e-5)
    (first,), (second, _) = weights_of(graph)
    width, outputs = 4 // groups, 8 // groups
    for channel in range(4):
        group = channel // width
        column = second[group * outputs : (group + 1) * outputs, channel % width]
        torch.testing.assert_close(first[channel].abs().max(), column.abs().max())


def test_dead_and_unread_channels_stay():
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[2].weight[:, 2] = 0
        model[0].weight[0] *= 50
    graph, _ = equalized(model, torch.ones(2, 3))
    (weight, bias), (second, _) = weights_of(graph)
    for channel in (1, 2):
        assert torch.equal(weight[channel], model[0].weight[channel])
        assert torch.equal(bias[channel], model[0].bias[channel])
        assert torch.equal(second[:, channel], model[2].weight[:, channel])
    assert not torch.allclose(weight[0], model[0].weight[0])


@pytest.mark.parametrize("limit", [2.0, 10.0])
def test_scales_stay_within_the_limit(limit):
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)))
    with torch.no_grad():
        model[0].weight[0] *= 1e6
        model[0].weight[1] *= 1e-6
    graph, _ = equalized(model, torch.ones(2, 3), limit=limit)
    (weight,), _ = weights_of(graph)
    torch.testing.assert_close(weight[0], model[0].weight[0] / limit)
    torch.testing.assert_close(weight[1], model[0].weight[1] * limit)


def test_no_bias_becomes_larger_than_the_largest_was():
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2)))
    with torch.no_grad():
        model[0].weight[:8] *= 1e-4
        model[0].bias.copy_(torch.linspace(-1, 0.9, 16))
    graph, _ = equalized(model, torch.ones(2, 3))
    (_, bias), _ = weights_of(graph)
    assert float(bias.abs().max()) <= 1.0 + 1e-6
    assert float(bias[:8].abs().min()) > float(model[0].bias[:8].abs().min())


def test_one_round_is_not_many():
    def build():
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    once, often = (weights_of(equalized(seeded(build), torch.ones(2, 3), rounds=n)[0]) for n in (1, 40))
    assert not torch.allclose(once[1][0], often[1][0], rtol=1e-3)


def outlier_net():
    """Every channel is worth the same; one is a thousand times as large on the way."""
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        )
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight[5] *= 1000
        model[0].bias[5] *= 1000
        model[2].weight[:, 5] /= 1000
    return model


def test_a_channel_a_thousand_times_the_others_is_recovered(generator):
    model = outlier_net()
    train, test = (torch.randn(128, 3, 8, 8, generator=generator) for _ in range(2))
    context = Context(example=(train[:2],), calibration=[(train,)])
    want = model(test)
    plain = sqnr_db(want, PostTraining().apply(model, context)(test))
    even = sqnr_db(want, PostTraining().apply(CrossLayerEqualization().apply(model, context), context)(test))
    assert plain < 20
    assert even > plain + 25


def test_relu6_is_exact_by_default_and_passed_on_request(generator):
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU6(), nn.Linear(4, 2)))
    with torch.no_grad():
        model[0].weight[0] *= 20
        model[0].weight[1] /= 20
        model[0].bias.zero_()
    x = 3 * torch.randn(256, 3, generator=generator)
    exact, notes = equalized(model, x)
    assert torch.equal(exact(x), model(x))
    assert notes == ["cross-layer equalization: nothing to equalize"]
    relaxed, notes = equalized(model, x, relax_clips=True)
    assert "1 pairs" in notes[0]
    (clip,) = [node for node in relaxed.graph.nodes if node.target == torch.ops.aten.hardtanh.default]
    scales = [
        math.sqrt(float(model[0].weight[c].abs().max()) / float(model[2].weight[:, c].abs().max())) for c in range(4)
    ]
    assert clip.args[1:] == (0.0, pytest.approx(6 / min(scales), rel=1e-3))
    inside = (model[0](x) < 6).all(dim=1)
    torch.testing.assert_close(relaxed(x)[inside], model(x)[inside], atol=1e-5, rtol=1e-4)


def test_progress_reaches_one():
    case = CASES["mlp"]
    seen: list[float] = []
    CrossLayerEqualization().apply(captured(case), replace(context_for(case), progress=seen.append))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"limit": 1.0}, "limit must be a finite number above 1"),
        ({"limit": float("inf")}, "limit must be a finite number above 1"),
        ({"limit": float("nan")}, "limit must be a finite number above 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        CrossLayerEqualization(**options)


def test_no_calibration_data_is_read():
    case = CASES["mlp"]

    def never():
        raise AssertionError("data was read")
        yield

    same = CrossLayerEqualization().apply(captured(case), replace(context_for(case), calibration=never()))
    torch.testing.assert_close(same(*case.data(rows=4)), case.build()(*case.data(rows=4)), atol=1e-4, rtol=1e-4)


def test_bad_models_are_refused_and_left_as_they_were():
    case = CASES["mlp"]
    with pytest.raises(CaptureError):
        CrossLayerEqualization().apply(FixedBatch(), Context(example=(torch.ones(2, 8),)))
    quantized = PostTraining().apply(captured(case), context_for(case))
    with pytest.raises(UsageError, match=r"put it before quantize\.post_training"):
        CrossLayerEqualization().apply(quantized, context_for(case))
    model = case.build()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(DataError, match="NaN or infinity in 2"):
        CrossLayerEqualization().apply(model, context_for(case))
    assert model[2].weight[0, 0].isnan()


def test_a_model_without_layers_passes():
    graph, notes = equalized(nn.Sequential(nn.ReLU()), torch.ones(2, 3))
    assert torch.equal(graph(-torch.ones(2, 3)), torch.zeros(2, 3))
    assert notes == ["cross-layer equalization: nothing to equalize"]
