from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fettle.compress.quantize.layers import QuantizedConv2d
from fettle.compress.quantize.numerics.scheme import Scheme
from fettle.core.errors import InvalidInput, UsageError


def calibrated(module, x, **arguments):
    layer = QuantizedConv2d.from_float(module, **arguments)
    layer(x)
    return layer.eval()


def slow_conv2d(module, layer, x):
    """Evaluation in Python's integers, the geometry read from the float module."""
    o = layer.operands()
    q = (o.input.quantize(x).to(torch.int64) - int(o.input.zero_point)).tolist()
    w = (o.weight.to(torch.int64) - o.weight_zero.reshape(-1, 1, 1, 1)).tolist()
    out, height, width = module(x).shape[1:]
    (sr, sc), (dr, dc), (pr, pc) = module.stride, module.dilation, module.padding
    result = []
    for row, c, i, j in itertools.product(q, range(out), range(height), range(width)):
        total = int(o.bias[c]) if o.bias is not None else 0
        first = c // (out // module.groups) * len(w[c])
        for k, a, b in itertools.product(range(len(w[c])), range(len(w[c][0])), range(len(w[c][0][0]))):
            y, z = i * sr + a * dr - pr, j * sc + b * dc - pc
            if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]:
                total += row[first + k][y][z] * w[c][k][a][b]
        step = o.step.expand(out)[c].item() / o.output.scale.item()
        value = round(total * step) + int(o.output.zero_point)
        result.append(max(o.output.scheme.lowest, min(o.output.scheme.highest, value)))
    return result


@st.composite
def geometries(draw):
    pair = lambda low, high: draw(st.tuples(st.integers(low, high), st.integers(low, high)))  # noqa: E731
    groups = draw(st.integers(1, 3))
    return {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": pair(1, 3),
        "stride": pair(1, 3),
        "padding": pair(0, 2),
        "dilation": pair(1, 2),
        "groups": groups,
        "bias": draw(st.booleans()),
    }


@given(geometries(), st.integers(2, 8), st.sampled_from([(False, False), (True, True), (True, False)]), st.integers(0))
def test_evaluation_equals_python(geometry, bits, kind, seed):
    torch.manual_seed(seed % 2**31)
    module = nn.Conv2d(**geometry)
    x = torch.randn(1, geometry["in_channels"], 5, 5)
    layer = calibrated(
        module,
        x,
        weight=Scheme(bits=bits, signed=kind[0], symmetric=kind[1], axis=0),
        activation=Scheme(bits=bits),
        output=Scheme(bits=bits),
    )
    whole = layer.forward_integers(layer.operands().input.quantize(x))
    assert whole.flatten().tolist() == slow_conv2d(module, layer, x)


CASES = {
    "plain": {"kernel_size": 3},
    "same": {"kernel_size": 3, "padding": "same"},
    "same, even kernel": {"kernel_size": (4, 2), "padding": "same"},
    "same, dilated": {"kernel_size": (2, 3), "padding": "same", "dilation": (3, 2)},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "uneven": {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 6},
    "grouped, dilated": {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2},
    "pointwise": {"kernel_size": 1, "bias": False},
    "as large as the input": {"kernel_size": 9},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own layer, the reference
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rescaling", ["float", "integer"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_geometry_keeps_the_bound_and_comes_near_to_float(generator, case, rescaling, bits):
    torch.manual_seed(0)
    module = nn.Conv2d(6, 12, **CASES[case])
    x = torch.randn(4, 6, 9, 9, generator=generator)
    layer = calibrated(
        module,
        x,
        weight=Scheme(bits=bits, signed=True, symmetric=True, axis=0),
        activation=Scheme(bits=bits),
        output=Scheme(bits=bits),
        rescaling=rescaling,
    )
    found, scale = layer(x), layer.operands().output.scale
    assert found.shape == module(x).shape
    assert ((found - layer.simulate(x)).abs() / scale).max() <= 1.001
    assert (found - module(x)).abs().mean() < 3 * scale


@pytest.mark.parametrize("training", [True, False])
def test_an_image_without_a_batch(generator, training):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6, generator=generator)
    layer = calibrated(nn.Conv2d(3, 4, 3), x, output=Scheme())
    layer.freeze_ranges()
    layer.train(training)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


@pytest.mark.parametrize("shape", [(6, 6), (2, 4, 6, 6), (1, 2, 3, 6, 6), (2, 3, 2, 6), (2, 3, 6, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_another_shape_is_refused(shape, training):
    layer = calibrated(nn.Conv2d(3, 4, 3), torch.ones(1, 3, 6, 6))
    layer.train(training)
    with pytest.raises(InvalidInput, match=r"must have shape|at least as large"):
        layer(torch.ones(shape))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_paddings_are_refused(mode):
    with pytest.raises(UsageError, match="pads with zeros"):
        QuantizedConv2d.from_float(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode))


@pytest.mark.parametrize("module", [nn.Conv1d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3), nn.Linear(3, 4)])
def test_other_layers_are_refused(module):
    with pytest.raises(UsageError, match=r"made from an nn\.Conv2d"):
        QuantizedConv2d.from_float(module)


def test_the_border_is_an_exact_zero():
    """A range that zero is far from the middle of: padding with the integer 0 would show."""
    module = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    module.weight.data.fill_(1.0)
    x = torch.full((1, 1, 3, 3), 5.0)
    layer = calibrated(module, x - 4 * torch.eye(3), activation=Scheme(bits=8, signed=True))
    found = layer(torch.full((1, 1, 3, 3), 5.0))
    torch.testing.assert_close(found, module(x).detach(), rtol=0.01, atol=0.0)
