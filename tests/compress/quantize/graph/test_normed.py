from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fettle.compress.quantize.graph.fold import FoldedNorm
from fettle.compress.quantize.graph.modules import ActivationQuantizer, SimulatedLayer, weight_scheme
from fettle.compress.quantize.graph.normed import NormedLayer
from fettle.compress.quantize.graph.trainable import (
    FollowingQuantizer,
    freeze_norms,
    freeze_ranges,
    make_trainable,
    refit_weights,
    scales_of,
    settle,
    unrounded,
)
from fettle.compress.quantize.numerics.grid import (
    Grid,
    best_grid,
    fake_quantize,
    grid_for,
    grid_for_range,
    refit_scales,
)
from fettle.compress.quantize.numerics.scheme import Scheme
from fettle.compress.quantize.post_training import PostTraining
from fettle.compress.step import Context
from fettle.core.errors import DataError
from fettle.testing.models import CASES
from fettle.testing.steps import captured

aten = torch.ops.aten
BITS = (2, 4, 8)
ACTIVATION = Scheme(bits=8)


def layer_of(weight, scales, bits):
    """A layer that rounds this weight with these scales."""
    layer = SimulatedLayer(
        layer="fc", operation=aten.linear.default, settings=(), weight=nn.Parameter(weight), bias=None
    )
    layer.scheme, layer.scales = weight_scheme(bits), scales
    return layer


def quantizer_of(scale, zero_point):
    grid = Grid(scale=torch.tensor(scale), zero_point=torch.tensor(zero_point, dtype=torch.int32), scheme=ACTIVATION)
    return ActivationQuantizer(grid, layer="relu")


def rounded(weight, scales, highest):
    return fake_quantize(weight, scales, 0, lowest=-highest, highest=highest, axis=0)


def folded_norm(generator, *, channels=6, shape=(4, 3, 3), bias=False, gamma=None):
    def random(*sizes):
        return torch.randn(*sizes, generator=generator)

    return FoldedNorm(
        weight=random(channels, *shape),
        bias=random(channels) if bias else None,
        gamma=random(channels) if gamma is None else gamma,
        beta=random(channels),
        mean=random(channels),
        variance=torch.rand(channels, generator=generator) + 0.1,
        epsilon=1e-3,
    )


def normed(generator, *, bits=4, **options):
    norm = folded_norm(generator, **options)
    weight, bias = norm.folded()
    linear = weight.ndim == 2
    plain = SimulatedLayer(
        layer="conv",
        operation=aten.linear.default if linear else aten.conv2d.default,
        settings=() if linear else ([1, 1], [1, 1], [1, 1], 1),
        weight=nn.Parameter(weight, requires_grad=False),
        bias=nn.Parameter(bias, requires_grad=False),
    )
    plain.set_bits(bits)
    return NormedLayer(plain, norm), plain, norm


def images(generator, rows=8):
    return torch.randn(rows, 4, 5, 5, generator=generator)


# Rounding


@pytest.mark.parametrize("bits", BITS)
def test_learned_and_plain_rounding_answer_alike(bits, generator):
    weight = torch.randn(5, 7, generator=generator)
    scales = best_grid(weight, weight_scheme(bits)).scale
    learned = layer_of(weight, scales.clone().requires_grad_(True), bits)
    assert torch.equal(learned.rounded_weight(), layer_of(weight, scales, bits).rounded_weight())
    assert torch.equal(learned.rounded_weight(), learned.grid.dequantize(learned.deployed()[0]))
    x = torch.randn(6, 9, generator=generator)
    plain = ActivationQuantizer(grid_for_range(-1.0, 2.0, ACTIVATION), layer="relu")
    learning = copy.deepcopy(plain)
    learning.scale.requires_grad_(True)
    assert torch.equal(learning(x), plain(x))
    assert torch.equal(plain(x), plain.grid.dequantize(plain.grid.quantize(x)))


def test_a_quantizer_keeps_no_tensor_of_the_grid_it_was_made_of():
    grid = grid_for_range(0.0, 1.0, ACTIVATION)
    quantizer = FollowingQuantizer(ActivationQuantizer(grid, layer="relu")).train()
    quantizer(torch.full((4, 3), 1000.0))
    assert float(quantizer.scale) > 2 * float(grid.scale)


def lsq_by_hand(x, scale, low, high, share):
    """Esser et al. 2020, equations 3 and 5, one entry at a time."""
    of_x, of_scale = [], 0.0
    for value in x.flatten().tolist():
        ratio = value / scale
        inside = low < ratio < high
        of_x.append(1.0 if inside else 0.0)
        of_scale += (round(ratio) - ratio) if inside else (low if ratio <= low else high)
    return torch.tensor(of_x).reshape(x.shape), of_scale * share


@pytest.mark.parametrize("bits", BITS)
def test_the_gradients_of_learned_weight_scales_are_those_of_the_paper(bits, generator):
    highest = 2 ** (bits - 1) - 1
    weight = torch.randn(3, 4, 5, generator=generator)
    layer = layer_of(weight, (best_grid(weight, weight_scheme(bits)).scale * 0.7).requires_grad_(True), bits)
    layer.rounded_weight().sum().backward()
    for channel in range(3):
        of_x, of_scale = lsq_by_hand(
            weight[channel], float(layer.scales.detach()[channel]), -highest, highest, (20 * highest) ** -0.5
        )
        torch.testing.assert_close(layer.weight.grad[channel], of_x)
        assert float(layer.scales.grad[channel]) == pytest.approx(of_scale, abs=1e-4)


@pytest.mark.parametrize("zero_point", [0, 100, 255])
def test_the_gradients_of_a_learned_activation_scale_are_those_of_the_paper(zero_point, generator):
    x = (3 * torch.randn(4, 6, generator=generator)).requires_grad_(True)
    quantizer = quantizer_of(0.01, zero_point)
    quantizer.scale.requires_grad_(True)
    quantizer(x).sum().backward()
    of_x, of_scale = lsq_by_hand(x.detach(), 0.01, -zero_point, 255 - zero_point, (6 * 255) ** -0.5)
    torch.testing.assert_close(x.grad, of_x)
    assert float(quantizer.scale.grad) == pytest.approx(of_scale, rel=1e-4, abs=1e-3)


def test_a_scale_learns_only_where_gradients_are_wanted():
    layer = layer_of(torch.ones(2, 2), torch.full((2,), 0.1, requires_grad=True), 4)
    with torch.no_grad():
        assert not layer.rounded_weight().requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_in_float32(dtype):
    x = torch.linspace(-1, 1, 50).to(dtype)
    grid = grid_for_range(-1.0, 1.0, ACTIVATION)
    found = ActivationQuantizer(grid, layer="relu")(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, grid.fake(x.float()))


@given(st.integers(0, 10_000), st.sampled_from(BITS))
def test_refitting_never_makes_the_error_larger(seed, bits):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 9, generator=generator)
    weight[0] = 0
    scheme = weight_scheme(bits)
    scales = grid_for(weight, scheme).scale
    before = (rounded(weight, scales, scheme.highest) - weight).square().sum(dim=1)
    for _ in range(3):
        scales = refit_scales(weight, scales, scheme)
        after = (rounded(weight, scales, scheme.highest) - weight).square().sum(dim=1)
        assert bool((after <= before + 1e-5).all())
        before = after
    assert bool((scales > 0).all())


# The layer with its norm


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_training_is_batch_norm_after_the_rounded_layer(bits, bias, generator):
    layer, _, norm = normed(generator, bits=bits, bias=bias)
    x = images(generator)
    found = layer.train()(x)
    y = functional.conv2d(x, best_grid(norm.weight, weight_scheme(bits)).fake(norm.weight), norm.bias, padding=1)
    mean, variance = y.mean(dim=(0, 2, 3)), y.var(dim=(0, 2, 3), unbiased=False)
    along = (1, -1, 1, 1)
    wanted = (y - mean.reshape(along)) / torch.sqrt(variance + norm.epsilon).reshape(along)
    wanted = wanted * norm.gamma.reshape(along) + norm.beta.reshape(along)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.mean, 0.9 * norm.mean + 0.1 * mean)
    unbiased = y.var(dim=(0, 2, 3), unbiased=True)
    torch.testing.assert_close(layer.variance, 0.9 * norm.variance + 0.1 * unbiased)


def test_training_is_the_correction_of_the_literature(generator):
    """Krishnamoorthi 2018: fold with running statistics, round, multiply by σ_running / σ_batch, shift by the batch."""
    layer, _, norm = normed(generator, bits=4)
    x = images(generator)
    spread = torch.sqrt(norm.variance + norm.epsilon)
    gain = norm.gamma / spread
    scales = layer.scales * gain.abs()
    along = (1, -1, 1, 1)
    folded = functional.conv2d(x, rounded(norm.weight * gain.reshape(-1, 1, 1, 1), scales, 7), padding=1)
    unscaled = folded / gain.reshape(along)
    mean, variance = unscaled.mean(dim=(0, 2, 3)), unscaled.var(dim=(0, 2, 3), unbiased=False)
    batch = torch.sqrt(variance + norm.epsilon)
    wanted = folded * (spread / batch).reshape(along) + (norm.beta - norm.gamma * mean / batch).reshape(along)
    torch.testing.assert_close(layer.train()(x), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(4, 3, 3), (4,)])
def test_evaluation_frozen_training_and_the_settled_layer_are_one_bit_for_bit(shape, bits, generator):
    layer, _, _ = normed(generator, bits=bits, bias=True, shape=shape)
    x = images(generator) if len(shape) == 3 else torch.randn(8, 4, generator=generator)
    layer.train()(x)
    settled = layer.settled()
    wanted = settled(x)
    assert torch.equal(layer.eval()(x), wanted)
    layer.train()
    layer.frozen = True
    mean = layer.mean.clone()
    assert torch.equal(layer(x), wanted)
    assert torch.equal(layer.mean, mean)
    assert torch.equal(layer.rounded_weight(), settled.rounded_weight())


@pytest.mark.parametrize("bits", BITS)
def test_it_starts_as_the_folded_layer(bits, generator):
    layer, plain, _ = normed(generator, bits=bits)
    x = images(generator)
    torch.testing.assert_close(layer.eval()(x), plain(x), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(layer.settled().scales, plain.scales, rtol=1e-4, atol=0)


@pytest.mark.parametrize("gamma", [0.0, -0.0, 1e-30, -1e-30, 1e-42])
def test_a_dead_channel_trains_and_settles_without_nan(gamma, generator):
    values = torch.ones(6)
    values[2] = gamma
    layer, _, norm = normed(generator, gamma=values)
    x = images(generator)
    y = layer.train()(x)
    y.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    assert bool(layer.gamma.grad[2] != 0) or gamma == 0, "a dead channel can come back to life"
    settled = layer.settled()
    answer = settled(x)
    assert torch.isfinite(answer).all()
    assert bool((settled.scales > 0).all())
    torch.testing.assert_close(answer[:, 2], torch.full_like(answer[:, 2], float(norm.beta[2])))


def test_negative_gains_only_turn_the_integers_around(generator):
    up, _, _ = normed(generator, gamma=torch.ones(6))
    down, _, _ = normed(torch.Generator().manual_seed(0), gamma=-torch.ones(6))
    torch.testing.assert_close(down.settled().rounded_weight(), -up.settled().rounded_weight())


def test_a_batch_of_one_value_uses_the_running_statistics(generator):
    layer, _, _ = normed(generator, shape=(4,))
    x = torch.randn(1, 4, generator=generator)
    mean = layer.mean.clone()
    assert torch.equal(layer.train()(x), layer.settled()(x))
    assert torch.equal(layer.mean, mean)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_gradients_reach_every_parameter(learned, frozen, generator):
    layer, _, _ = normed(generator, bias=True)
    layer.frozen = frozen
    layer.scales.requires_grad_(learned)
    layer.train()(images(generator)).square().mean().backward()
    for name in ("weight", "bias", "gamma", "beta"):
        gradient = getattr(layer, name).grad
        assert gradient is not None, name
        # Batch statistics take away any bias, so only rounding errors are left of its gradient.
        assert bool(gradient.abs().max() > 0) or (name == "bias" and not frozen), name
    assert (layer.scales.grad is not None) == learned


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_it_trains_under_autocast(dtype, generator):
    layer, _, _ = normed(generator)
    x = images(generator)
    wanted = copy.deepcopy(layer).train()(x)
    with torch.autocast("cpu", dtype=dtype):
        found = layer.train()(x)
    assert layer.mean.dtype == torch.float32
    assert float((found - wanted).detach().abs().max()) < 0.2
    found.sum().backward()


# The quantizer that follows


def test_a_range_follows_as_a_moving_average(generator):
    start = grid_for_range(-1.0, 3.0, ACTIVATION)
    quantizer = FollowingQuantizer(ActivationQuantizer(start, layer="relu")).train()
    low, high = start.ends
    for _ in range(5):
        x = 4 * torch.randn(10, generator=generator)
        quantizer(x)
        low, high = low + 0.01 * (float(x.min()) - low), high + 0.01 * (float(x.max()) - high)
    wanted = grid_for_range(low, high, ACTIVATION)
    assert quantizer.grid.zero_point == wanted.zero_point
    assert float(quantizer.grid.scale) == pytest.approx(float(wanted.scale), rel=1e-5)


@pytest.mark.parametrize("how", ["evaluation", "frozen", "empty"])
def test_a_range_stays_where_it_is_asked_to(how):
    quantizer = FollowingQuantizer(quantizer_of(0.1, 3)).train(how != "evaluation")
    quantizer.frozen = how == "frozen"
    quantizer(torch.full((0 if how == "empty" else 4, 3), 1000.0))
    assert int(quantizer.settled().zero_point) == 3
    assert float(quantizer.settled().scale) == pytest.approx(0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_names_the_layer(value):
    quantizer = FollowingQuantizer(
        ActivationQuantizer(grid_for_range(0.0, 1.0, ACTIVATION), layer="layer1.relu")
    ).train()
    with pytest.raises(DataError, match=r"layer1\.relu"):
        quantizer(torch.tensor([0.5, value]))


# The whole model, there and back


def simulated_case(name, *, bits=8):
    case = CASES[name]
    context = Context(example=case.data(rows=2), calibration=[case.data(rows=32, seed=1)])
    simulated, folded = PostTraining(weight_bits=bits).quantize(captured(case), context)
    return case, simulated, {str(node.target): norm for node, norm in folded.items() if node.op == "call_module"}


def outputs(model, inputs):
    with torch.no_grad():
        found = model(*inputs)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", ["residual", "grouped", "two_outputs", "tied_weights", "norm_last", "conv1d"])
def test_untrained_the_model_settles_to_what_it_was(name):
    case, simulated, norms = simulated_case(name)
    before = outputs(simulated, case.data(rows=9))
    trained = copy.deepcopy(simulated)
    make_trainable(trained, norms, follow=True)
    assert sum(isinstance(module, NormedLayer) for module in trained.modules()) == len(norms)
    settle(trained)
    for want, have in zip(before, outputs(trained, case.data(rows=9)), strict=True):
        torch.testing.assert_close(have, want, atol=0.02, rtol=0.02)
    assert {type(module) for module in trained.layers().values()} == {SimulatedLayer}
    assert {type(module) for module in trained.quantizers().values()} == {ActivationQuantizer}
    assert not any(value.requires_grad for value in (*trained.parameters(), *trained.buffers()))


@pytest.mark.parametrize("follow", [True, False])
def test_settling_after_training_steps_keeps_the_answers_bit_for_bit(follow):
    case, simulated, norms = simulated_case("residual", bits=4)
    make_trainable(simulated, norms, follow=follow)
    simulated.requires_grad_(True).train()
    optimizer = torch.optim.SGD(simulated.parameters(), lr=0.01)
    for seed in range(3):
        simulated(*case.data(rows=16, seed=seed)).square().sum().backward()
        optimizer.step()
        refit_weights(simulated)
    simulated.eval()
    before = outputs(simulated, case.data(rows=9))[0]
    settle(simulated)
    assert torch.equal(outputs(simulated, case.data(rows=9))[0], before)
    assert all(parameter.grad is None for parameter in simulated.parameters())


@pytest.mark.parametrize("name", ["residual", "two_outputs", "tied_weights", "norm_first"])
def test_unrounded_is_the_float_model(name):
    case, simulated, _ = simulated_case(name, bits=4)
    for layer in simulated.layers().values():
        layer.shift_bias(torch.ones(layer.weight.shape[0]))
    twin = unrounded(simulated)
    for want, have in zip(outputs(case.build(), case.data(rows=5)), outputs(twin, case.data(rows=5)), strict=True):
        torch.testing.assert_close(have, want, atol=1e-5, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in twin.parameters())


def test_corrections_are_where_training_starts(generator):
    case, simulated, _ = simulated_case("mlp", bits=3)
    for layer in simulated.layers().values():
        whole = layer.deployed()[0].int()
        other = torch.randint(-1, 2, whole.shape, generator=generator)
        layer.integers = (whole + other).clamp(-layer.highest, layer.highest)
        layer.shift_bias(torch.full((layer.weight.shape[0],), 0.1))
    before = outputs(simulated, case.data(rows=9))[0]
    make_trainable(simulated, {}, follow=False)
    assert all(layer.integers is None and layer.shift is None for layer in simulated.layers().values())
    torch.testing.assert_close(outputs(simulated, case.data(rows=9))[0], before)


def test_freezing_reaches_every_part():
    _, simulated, norms = simulated_case("residual")
    make_trainable(simulated, norms, follow=True)
    parts = [module for module in simulated.modules() if isinstance(module, NormedLayer | FollowingQuantizer)]
    assert len({type(part) for part in parts}) == 2
    for frozen in (True, False):
        freeze_norms(simulated, frozen)
        freeze_ranges(simulated, frozen)
        assert {part.frozen for part in parts} == {frozen}


def test_the_scales_are_the_buffers_themselves():
    _, simulated, norms = simulated_case("tied_weights")
    make_trainable(simulated, norms, follow=False)
    held = {value.data_ptr() for name, value in simulated.named_buffers() if name.endswith(("scale", "scales"))}
    assert {value.data_ptr() for value in scales_of(simulated)} == held
