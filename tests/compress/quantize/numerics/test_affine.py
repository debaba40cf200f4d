from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fettle.compress.quantize.numerics.affine import affine_for_range, channel_scales, quantize_channels
from fettle.core.errors import DataError

BITS = [(0, 255), (-128, 127), (0, 15), (-2, 1), (0, 3), (-32768, 32767), (0, 65535)]
numbers = st.floats(-(2.0**100), 2.0**100, width=32)


@given(st.tuples(numbers, numbers).map(sorted), st.sampled_from(BITS))
def test_zero_is_exact(ends, bits):
    affine = affine_for_range(*ends, lowest=bits[0], highest=bits[1])
    assert bits[0] <= affine.zero_point <= bits[1]
    assert affine.scale > 0
    assert affine.fake(torch.zeros(1)).item() == 0.0


@given(
    st.tuples(numbers, numbers).map(sorted), st.lists(st.floats(0, 1), min_size=1, max_size=20), st.sampled_from(BITS)
)
def test_the_error_inside_the_range_is_at_most_half_a_step(ends, shares, bits):
    low, high = ends
    assume(high - low > 1e-30)
    affine = affine_for_range(low, high, lowest=bits[0], highest=bits[1])
    x = torch.tensor([min(max(low + share * (high - low), low), high) for share in shares], dtype=torch.float32)
    # The zero point is a whole number, so the range's ends may each move by half a step.
    worst = (affine.fake(x).double() - x.double()).abs().max().item()
    assert worst <= affine.scale * (1 + 1e-3) + x.abs().max().item() * 1e-6


@given(st.floats(1e-3, 1e3), st.sampled_from(BITS))
def test_one_sided_and_symmetric_ranges_keep_half_a_step(high, bits):
    affine = affine_for_range(0.0, high, lowest=bits[0], highest=bits[1])
    x = torch.linspace(0, high, 101, dtype=torch.float64)
    steps = torch.round(x / affine.scale) + affine.zero_point
    assert steps.min() >= bits[0]
    assert steps.max() <= bits[1]
    assert ((affine.fake(x).double() - x).abs().max() <= affine.scale * 0.5 + high * 1e-6).item()


@pytest.mark.parametrize("value", [3.0, -3.0, 1e-3, -1e30, 1e30])
def test_a_constant_keeps_its_value(value):
    affine = affine_for_range(value, value)
    assert affine.fake(torch.tensor([value])).item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_all_zeros_have_scale_one(bits):
    affine = affine_for_range(0.0, 0.0, lowest=bits[0], highest=bits[1])
    assert affine.scale == 1.0
    assert affine.fake(torch.zeros(3)).tolist() == [0.0] * 3


@pytest.mark.parametrize("high", [1e-45, 1e-40, 1e-38, 1e-300])
def test_denormals_keep_a_normal_scale(high):
    affine = affine_for_range(0.0, high)
    assert affine.scale >= torch.finfo(torch.float32).tiny
    assert torch.isfinite(affine.fake(torch.tensor([high]))).all()


@pytest.mark.parametrize(("low", "high"), [(-3e38, 3e38), (-3.4e38, 3.4e38), (0.0, 3.4e38)])
def test_a_huge_range_does_not_overflow(low, high):
    affine = affine_for_range(low, high)
    assert math.isfinite(affine.scale)
    assert affine.fake(torch.zeros(1)).item() == 0.0


@pytest.mark.parametrize(
    ("low", "high"), [(math.nan, 1.0), (0.0, math.nan), (0.0, math.inf), (-math.inf, 0.0), (1.0, -1.0), (-1e300, 1.0)]
)
def test_a_range_that_is_none_is_refused(low, high):
    with pytest.raises(DataError, match="finite in float32 with low <= high"):
        affine_for_range(low, high)


def test_an_empty_tensor_stays_empty():
    affine = affine_for_range(-1.0, 1.0)
    assert affine.quantize(torch.empty(0, 3)).shape == (0, 3)


def test_values_out_of_range_saturate():
    affine = affine_for_range(-1.0, 1.0)
    assert affine.quantize(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2, 2)])
def test_channel_scales_equal_a_slow_search(generator, shape, axis):
    weight = torch.randn(shape, generator=generator) ** 3
    found = channel_scales(weight, axis=axis)
    for channel in range(shape[axis]):
        values = weight.select(axis, channel).flatten().tolist()
        full = max(abs(v) for v in values) / 127
        errors = {}
        for share in torch.linspace(1.0, 0.8, 21).tolist():
            scale = full * share
            errors[scale] = sum((max(-127, min(127, round(v / scale))) * scale - v) ** 2 for v in values)
        chosen = found[channel].item()
        error = sum((max(-127, min(127, round(v / chosen))) * chosen - v) ** 2 for v in values)
        assert error == pytest.approx(min(errors.values()), rel=1e-3)


def test_channels_do_not_share_a_scale():
    weight = torch.tensor([[1000.0, -500.0], [0.001, 0.0005], [0.0, 0.0]])
    scales = channel_scales(weight, axis=0)
    whole = quantize_channels(weight, scales, axis=0)
    assert scales[2] == 1.0
    assert whole.dtype == torch.int8
    assert ((whole * scales[:, None] - weight).abs() <= scales[:, None] * 0.50001).all()
    assert whole.abs().max() <= 127


@pytest.mark.parametrize("value", [1e-45, 1e-38, 3e38])
def test_extreme_weights_have_finite_scales(value):
    weight = torch.tensor([[value, -value]])
    scales = channel_scales(weight, axis=0)
    assert torch.isfinite(scales).all()
    assert (scales > 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(value):
    with pytest.raises(DataError, match="finite"):
        channel_scales(torch.tensor([[1.0, value]]), axis=0)
