from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fettle.compress.quantize.layers import QuantizedLinear
from fettle.compress.quantize.numerics.scheme import Scheme
from fettle.core.errors import InvalidInput, UsageError


def slow_linear(layer, x):
    """Evaluation in Python's integers and float64, from the operands."""
    o = layer.operands()
    zero, weights = o.input.zero_point.item(), o.weight.tolist()
    zeros, steps = o.weight_zero.expand(len(weights)).tolist(), o.step.expand(len(weights)).tolist()
    scheme = layer.precision.output
    result = []
    for row in o.input.quantize(x).tolist():
        for c, column in enumerate(weights):
            total = sum((a - zero) * (b - zeros[c]) for a, b in zip(row, column, strict=True))
            total += o.bias[c].item() if o.bias is not None else 0
            q = round(total * (steps[c] / o.output.scale.item())) + o.output.zero_point.item()
            result.append(max(scheme.lowest, min(scheme.highest, q)))
    return result


@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(2, 8),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_evaluation_equals_python(rows, inputs, outputs, bits, bias, symmetric, seed):
    torch.manual_seed(seed)
    layer = QuantizedLinear.from_float(
        nn.Linear(inputs, outputs, bias=bias),
        weight=Scheme(bits=bits, signed=True, symmetric=symmetric, axis=0),
        activation=Scheme(bits=bits),
        output=Scheme(bits=bits, signed=True),
    )
    x = torch.randn(rows, inputs)
    layer(x)
    whole = layer.eval().forward_integers(layer.operands().input.quantize(x))
    assert whole.flatten().tolist() == slow_linear(layer, x)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 3, 4)])
def test_any_leading_dimensions(generator, lead):
    torch.manual_seed(0)
    module = nn.Linear(5, 3)
    layer = QuantizedLinear.from_float(module, output=Scheme())
    x = torch.randn(*lead, 5, generator=generator)
    layer(x)
    assert layer(x).shape == (*lead, 3)
    found = layer.eval()(x)
    assert found.shape == (*lead, 3)
    assert (found - module(x)).abs().max() < 0.05


@pytest.mark.parametrize("shape", [(), (4,), (2, 6), (5, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_another_shape_is_refused(shape, training):
    layer = QuantizedLinear.from_float(nn.Linear(5, 3))
    layer(torch.ones(1, 5))
    layer.train(training)
    with pytest.raises(InvalidInput, match="must have shape"):
        layer(torch.ones(shape))


@pytest.mark.parametrize("fan_in", [64, 1024, 4608])
def test_a_long_sum_keeps_the_bound(generator, fan_in):
    torch.manual_seed(0)
    layer = QuantizedLinear.from_float(nn.Linear(fan_in, 16), output=Scheme())
    x = torch.randn(64, fan_in, generator=generator)
    layer(x)
    layer.eval()
    apart = (layer(x) - layer.simulate(x)).abs() / layer.operands().output.scale
    assert apart.max() <= 1.001
    assert layer.forward_integers(layer.operands().input.quantize(x)).dtype == torch.int32


def test_sixteen_bits_use_a_wider_accumulator(generator):
    torch.manual_seed(0)
    wide = Scheme(bits=16, signed=True, symmetric=True)
    layer = QuantizedLinear.from_float(nn.Linear(64, 4), weight=wide, activation=wide)
    x = torch.randn(8, 64, generator=generator)
    layer(x)
    assert layer.forward_integers(layer.operands().input.quantize(x)).dtype == torch.int64
    torch.testing.assert_close(layer.eval()(x), layer.simulate(x), rtol=1e-4, atol=1e-5)


def test_a_layer_without_weights_is_refused():
    with pytest.warns(UserWarning, match="zero-element"):
        module = nn.Linear(0, 3)
    with pytest.raises(UsageError, match="must have weights"):
        QuantizedLinear.from_float(module)
