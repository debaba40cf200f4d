"""What linear and convolution share: modes, ranges, gradients, state, errors; and the bound between the modes."""

from __future__ import annotations

import copy
import io
import math

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fettle.compress.quantize.layers import QuantizedConv2d, QuantizedLinear
from fettle.compress.quantize.numerics.errors import output_errors
from fettle.compress.quantize.numerics.scheme import Scheme
from fettle.core.errors import DataError, InvalidInput, UsageError

KINDS = [(False, False), (True, False), (True, True), (False, True)]  # signed, symmetric
LAYERS = {"linear": (nn.Linear, QuantizedLinear), "conv2d": (nn.Conv2d, QuantizedConv2d)}


def activation(bits, kind):
    return Scheme(bits=bits, signed=kind[0], symmetric=kind[1])


def build(name, *, bias=True, **arguments):
    torch.manual_seed(0)
    module = nn.Linear(6, 4, bias=bias) if name == "linear" else nn.Conv2d(6, 4, 3, padding=1, bias=bias)
    return module, LAYERS[name][1].from_float(module, **arguments)


def batch(name, rows=8, seed=1):
    shape = (rows, 6) if name == "linear" else (rows, 6, 5, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps_apart(layer, x):
    """How many output steps evaluation and simulation differ by, at most."""
    layer.eval()
    whole, simulated = layer(x), layer.simulate(x).detach()
    assert torch.isfinite(whole).all()
    scale = layer.operands().output.scale.double()
    return float(((whole.double() - simulated.double()).abs() / scale).max()) if x.numel() else 0.0


both = pytest.mark.parametrize("name", LAYERS)


@both
@pytest.mark.parametrize("rescaling", ["float", "integer"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [None, 0])
def test_integers_and_simulation_differ_by_at_most_one_step(name, rescaling, bits, kind, axis):
    _, layer = build(
        name,
        weight=Scheme(bits=bits, signed=kind[0], symmetric=kind[1], axis=axis),
        activation=activation(bits, kind),
        output=activation(bits, kind),
        rescaling=rescaling,
    )
    for seed in range(3):
        layer(batch(name, seed=seed))
    # Data ten times wider than calibration, so that saturation is compared too.
    for x in (batch(name, seed=9), batch(name, seed=10) * 10):
        assert steps_apart(layer, x) <= 1.001


@both
@pytest.mark.parametrize("bits", [10, 12, 16])
@pytest.mark.parametrize("rescaling", ["float", "integer"])
def test_wide_integers_stay_within_one_step_of_an_exact_simulation(name, bits, rescaling):
    """In float64 the simulated sum has no error to speak of, so the bound holds at any width."""
    scheme = Scheme(bits=bits, signed=True, symmetric=True)
    module, _ = build(name)
    layer = LAYERS[name][1].from_float(
        module.double(), weight=scheme, activation=Scheme(bits=bits), output=Scheme(bits=bits), rescaling=rescaling
    )
    x = batch(name).double()
    layer(x)
    assert steps_apart(layer, x) <= 1.001


@both
@pytest.mark.parametrize("rescaling", ["float", "integer"])
def test_most_answers_are_the_same(name, rescaling):
    _, layer = build(name, output=Scheme(), rescaling=rescaling)
    x = batch(name, rows=64)
    layer(x)
    layer.eval()
    same = layer(x) == layer.simulate(x)
    assert same.float().mean() > 0.99


@given(
    st.sampled_from(sorted(LAYERS)),
    st.integers(2, 8),
    st.integers(2, 8),
    st.integers(2, 8),
    st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e15]),
    st.sampled_from([0.0, 1e-6, 1.0, 1e6]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_sizes_of_input_weight_and_bias_keep_the_bound(name, wbits, abits, obits, gain, shift, whole, seed):
    generator = torch.Generator().manual_seed(seed)
    module, _ = build(name)
    with torch.no_grad():
        module.weight.mul_(gain).mul_(torch.rand(4, generator=generator).reshape(-1, *[1] * (module.weight.ndim - 1)))
        module.weight[0] = 0.0
        module.bias.mul_(shift)
    layer = LAYERS[name][1].from_float(
        module,
        weight=Scheme(bits=wbits, signed=True, symmetric=True, axis=0),
        activation=Scheme(bits=abits),
        output=Scheme(bits=obits),
        rescaling="integer" if whole else "float",
    )
    x = batch(name, rows=2, seed=seed)
    layer(x)
    assert steps_apart(layer, x) <= 1.001


@both
@pytest.mark.parametrize("bits", [2, 4, 8, 12, 16])
def test_a_float_output_differs_by_float_rounding_alone(name, bits):
    _, layer = build(name, weight=Scheme(bits=bits, signed=True, symmetric=True, axis=0), activation=Scheme(bits=bits))
    x = batch(name)
    simulated = layer(x)
    torch.testing.assert_close(layer.eval()(x), simulated.detach(), rtol=1e-5, atol=1e-5)


@both
def test_more_bits_come_closer_to_float(name):
    errors = []
    x = batch(name, rows=32)
    for bits in (2, 4, 8, 12, 16):
        module, layer = build(
            name,
            weight=Scheme(bits=bits, signed=True, symmetric=True, axis=0),
            activation=Scheme(bits=bits),
            output=Scheme(bits=bits),
        )
        layer(x)
        errors.append((layer.eval()(x) - module(x)).abs().max().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


@both
@pytest.mark.parametrize("rescaling", ["float", "integer"])
def test_integers_go_in_and_out(name, rescaling):
    _, layer = build(name, output=Scheme(bits=4), rescaling=rescaling)
    x = batch(name)
    layer(x)
    operands = layer.eval().operands()
    whole = layer.forward_integers(operands.input.quantize(x))
    assert whole.dtype == torch.int32
    assert whole.min() >= 0
    assert whole.max() <= 15
    assert torch.equal(operands.output.dequantize(whole), layer(x))
    assert operands.weight.dtype == torch.int8


@both
def test_without_an_output_grid_the_accumulator_comes_out(name):
    _, layer = build(name)
    x = batch(name)
    layer(x)
    operands = layer.operands()
    total = layer.forward_integers(operands.input.quantize(x))
    assert total.dtype == torch.int32
    step = operands.step if name == "linear" else operands.step.reshape(-1, 1, 1)
    assert torch.equal((total.double() * step).float(), layer.eval()(x))


@both
def test_the_float_module_stays_as_it_was(name):
    module, layer = build(name)
    before = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(batch(name)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert not torch.equal(layer.weight, module.weight)


@both
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_flow_straight_through(name, bits):
    """Where nothing is clipped, input, weight and bias get the gradients of a float layer on the rounded values."""
    module, layer = build(
        name, weight=Scheme(bits=bits, signed=True, symmetric=True, axis=0), activation=Scheme(bits=bits, signed=True)
    )
    x = batch(name).requires_grad_()
    layer(x).square().sum().backward()
    operands = layer.operands()
    reference = copy.deepcopy(module)
    with torch.no_grad():
        reference.weight.copy_(layer._weight_grid(operands.input).fake(layer.weight))
        step = operands.step
        reference.bias.copy_((torch.round(layer.bias.double() / step) * step).float())
    rounded = operands.input.fake(x.detach()).requires_grad_()
    reference(rounded).square().sum().backward()
    scale, zero = operands.input.scale, operands.input.zero_point
    low, high = ((end - zero) * scale for end in (operands.input.scheme.lowest, operands.input.scheme.highest))
    inside = (x >= low) & (x <= high)
    torch.testing.assert_close(x.grad, torch.where(inside, rounded.grad, 0.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, reference.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, reference.bias.grad, rtol=1e-4, atol=1e-4)


@both
def test_the_range_is_a_moving_average(name):
    _, layer = build(name, momentum=0.25)
    low = high = None
    for seed in range(5):
        x = batch(name, seed=seed)
        layer(x)
        a, b = x.min().item(), x.max().item()
        low, high = (a, b) if low is None else (low + 0.25 * (a - low), high + 0.25 * (b - high))
    assert layer.input_range.low.item() == pytest.approx(low, rel=1e-5)
    assert layer.input_range.high.item() == pytest.approx(high, rel=1e-5)
    assert layer.input_range.batches.item() == 5


@both
def test_a_frozen_range_stays(name):
    _, layer = build(name, output=Scheme())
    layer(batch(name))
    layer.freeze_ranges()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer(batch(name, seed=2) * 100)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    layer.freeze_ranges(False)
    layer(batch(name, seed=2) * 100)
    assert layer.input_range.high > before["input_range.high"]
    assert layer.output_range.high > before["output_range.high"]


@both
def test_evaluation_changes_no_state(name):
    _, layer = build(name, output=Scheme())
    layer(batch(name))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.eval()
    layer(batch(name, seed=3) * 5)
    layer.simulate(batch(name, seed=3) * 5)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


@both
def test_an_edited_weight_is_seen_at_once(name):
    _, layer = build(name)
    x = batch(name)
    layer(x)
    before = layer.eval()(x)
    layer.weight.data.neg_()
    layer.bias.data.neg_()
    torch.testing.assert_close(layer(x), -before)


@both
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rescaling", ["float", "integer"])
def test_state_goes_round(name, bias, rescaling):
    _, layer = build(name, bias=bias, output=Scheme(), rescaling=rescaling)
    x = batch(name)
    layer(x)
    layer.freeze_ranges()
    stored = safetensors.torch.save(layer.state_dict())
    _, other = build(name, bias=bias, output=Scheme(), rescaling=rescaling)
    other.weight.data.zero_()
    other.load_state_dict(safetensors.torch.load(stored))
    assert bool(other.input_range.frozen)
    assert torch.equal(other.eval()(x), layer.eval()(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@both
def test_state_goes_through_torch_save_with_weights_only(name):
    _, layer = build(name)
    layer(batch(name))
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    _, other = build(name)
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(other.eval()(batch(name)), layer.eval()(batch(name)))


@both
def test_a_state_without_ranges_is_refused(name):
    module, layer = build(name)
    with pytest.raises(RuntimeError, match="input_range"):
        layer.load_state_dict(module.state_dict())


@both
@pytest.mark.parametrize("output", [None, Scheme()])
def test_evaluation_before_calibration_is_refused(name, output):
    _, layer = build(name, output=output)
    layer.eval()
    for call in (layer, layer.simulate):
        with pytest.raises(UsageError, match="must see data"):
            call(batch(name))
    with pytest.raises(UsageError, match="must see data"):
        layer.forward_integers(batch(name).to(torch.int8))


@both
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("training", [True, False])
def test_input_that_is_not_finite_is_refused_and_leaves_no_trace(name, value, training):
    _, layer = build(name, output=Scheme())
    layer(batch(name))
    layer.train(training)
    before = {key: item.clone() for key, item in layer.state_dict().items()}
    x = batch(name)
    x[0, 0] = value
    with pytest.raises(InvalidInput, match="NaN or infinity"):
        layer(x)
    assert all(torch.equal(before[key], item) for key, item in layer.state_dict().items())


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool])
@pytest.mark.parametrize("training", [True, False])
def test_input_of_another_type_is_refused(name, dtype, training):
    _, layer = build(name)
    layer(batch(name))
    layer.train(training)
    with pytest.raises(InvalidInput, match=r"must be torch\.float32"):
        layer(batch(name).to(dtype))


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(name, dtype):
    _, layer = build(name)
    x = batch(name).to(dtype)
    layer(x)
    layer.eval()
    assert torch.equal(layer(x), layer(x.float()))


@both
def test_an_empty_batch_gives_an_empty_answer(name):
    module, layer = build(name, output=Scheme())
    empty = batch(name, rows=0)
    with pytest.raises(UsageError, match="must see data"):
        layer(empty)
    layer(batch(name))
    shape = module(empty).shape
    assert layer(empty).shape == shape
    assert layer.eval()(empty).shape == shape
    assert layer.input_range.batches.item() == 1


@both
def test_half_precision_weights_are_refused(name):
    module, _ = build(name)
    with pytest.raises(UsageError, match="float32 or float64"):
        LAYERS[name][1].from_float(module.half())


@both
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize("training", [True, False])
def test_parameters_that_are_not_finite_are_refused(name, value, which, training):
    _, layer = build(name)
    layer(batch(name))
    layer.train(training)
    getattr(layer, which).data[0] = value
    with pytest.raises(DataError, match="NaN or infinity"):
        layer(batch(name))


@both
def test_an_output_that_overflows_leaves_the_range_alone(name):
    _, layer = build(name, output=Scheme())
    layer(batch(name))
    before = layer.output_range.high.clone()
    layer.weight.data.fill_(3e38)
    with pytest.raises(DataError, match="finite in float32"):
        layer(batch(name) * 100)
    assert layer.output_range.high == before


@both
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": Scheme(axis=1)}, "axis 0"),
        ({"weight": Scheme(group=2)}, "axis 0"),
        ({"activation": Scheme(axis=0)}, "per tensor"),
        ({"output": Scheme(group=2)}, "per tensor"),
        ({"momentum": 0.0}, "momentum"),
        ({"momentum": 1.5}, "momentum"),
        ({"momentum": math.nan}, "momentum"),
        ({"rescaling": "shift"}, "rescaling"),
    ],
)
def test_what_integers_cannot_do_is_refused(name, arguments, message):
    with pytest.raises(UsageError, match=message):
        build(name, **arguments)


@both
def test_another_module_is_refused(name):
    with pytest.raises(UsageError, match="is made from an"):
        LAYERS[name][1].from_float(nn.ReLU())


@both
def test_it_says_what_it_is(name):
    _, layer = build(name, weight=Scheme(bits=4, signed=True, symmetric=True, axis=0))
    assert "bits=4" in repr(layer)


@both
def test_a_channel_with_dead_weights_keeps_its_bias(name):
    """Weights of 1e-25 beside a bias of 0.5, as batch-norm leaves them: in their steps the bias is no int32."""
    module, _ = build(name)
    with torch.no_grad():
        module.weight[1] *= 1e-25
        module.bias[1] = 0.5
    layer = LAYERS[name][1].from_float(module, output=Scheme())
    x = batch(name)
    layer(x)
    assert layer.operands().bias.abs().max() <= 2**30 * 1.0001  # the scale is rounded to float32
    found = layer.eval()(x)[:, 1]
    assert (found - 0.5).abs().max() <= layer.operands().output.scale
    assert layer.forward_integers(layer.operands().input.quantize(x)).dtype == torch.int32
    assert steps_apart(layer, x) <= 1.001


@both
def test_a_bias_out_of_all_proportion_is_refused(name):
    module, _ = build(name)
    module.bias.data.fill_(3e38)
    layer = LAYERS[name][1].from_float(module)
    with pytest.raises(DataError, match="cannot be added"):
        layer(batch(name) * 1e-20)


def test_training_in_two_bits_learns(generator):
    """Two-bit weights by fake quantization with straight-through gradients beat rounding the trained float weights."""
    x = torch.randn(512, 8, generator=generator)
    y = (x[:, :4].sum(1) > x[:, 4:].prod(1)).long()

    def train(model, steps):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    def loss(model):
        with torch.no_grad():
            return nn.functional.cross_entropy(model.eval()(x), y).item()

    def quantized(model):
        weight = Scheme(bits=2, signed=True, symmetric=True, axis=0)
        return nn.Sequential(
            *[
                QuantizedLinear.from_float(m, weight=weight, momentum=0.1) if isinstance(m, nn.Linear) else m
                for m in model
            ]
        )

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    train(model, 150)
    rounded, trained = quantized(model), quantized(copy.deepcopy(model))
    with torch.no_grad():
        rounded(x)
    train(trained, 300)
    assert loss(trained) < loss(rounded) * 0.8


def test_layers_of_a_model_are_compared_by_name(generator):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    mine = nn.Sequential(QuantizedConv2d.from_float(model[0]), *model[1:3], QuantizedLinear.from_float(model[3]))
    x = torch.randn(16, 3, 5, 5, generator=generator)
    mine(x)
    found = output_errors(model, mine.eval(), [(x,)], names=["0", "3"])
    assert all(30 < error.sqnr_db < 70 for error in found.values())
