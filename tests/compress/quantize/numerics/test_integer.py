from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fettle.compress.quantize.numerics import integer
from fettle.compress.quantize.numerics.integer import (
    Window,
    accumulator,
    integer_conv2d,
    integer_linear,
    multiplier_for,
    requantize,
    rescale,
)
from fettle.core.errors import DataError, UsageError

TYPES = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32]
INT32 = torch.iinfo(torch.int32)


def integers(dtype, bits=16):
    limits = torch.iinfo(dtype)
    return st.integers(max(limits.min, -(2 ** (bits - 1))), min(limits.max, 2**bits - 1))


def tensor(draw, shape, dtype):
    values = draw(st.lists(integers(dtype), min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(values, dtype=torch.int64).reshape(shape).to(dtype)


@st.composite
def products(draw, types=(torch.uint8, torch.int8, torch.int16, torch.uint16)):
    rows, k, out = draw(st.integers(0, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    x_type, w_type = draw(st.sampled_from(types)), draw(st.sampled_from(types))
    zeros = draw(st.integers(-200, 200) | st.lists(st.integers(-200, 200), min_size=out, max_size=out))
    bias = draw(st.none() | st.lists(st.integers(-(2**30), 2**30), min_size=out, max_size=out))
    return (
        tensor(draw, (rows, k), x_type),
        tensor(draw, (out, k), w_type),
        draw(st.integers(-300, 300)),
        zeros,
        bias,
    )


def as_tensor(zeros):
    return torch.tensor(zeros) if isinstance(zeros, list) else zeros


@given(products())
def test_a_product_equals_python(case):
    x, w, x_zero, zeros, bias = case
    found = integer_linear(
        x, w, x_zero=x_zero, weight_zero=as_tensor(zeros), bias=None if bias is None else torch.tensor(bias)
    )
    per_channel = zeros if isinstance(zeros, list) else [zeros] * len(w)
    expected = [
        [
            sum((a - x_zero) * (b - z) for a, b in zip(row, column, strict=True)) + (bias[o] if bias else 0)
            for o, (column, z) in enumerate(zip(w.tolist(), per_channel, strict=True))
        ]
        for row in x.tolist()
    ]
    assert found.tolist() == expected
    assert found.dtype in (torch.int32, torch.int64)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (0,), (2, 0, 3)])
def test_leading_dimensions_are_kept(generator, lead):
    x = torch.randint(0, 256, (*lead, 7), generator=generator).to(torch.uint8)
    w = torch.randint(-128, 128, (4, 7), generator=generator).to(torch.int8)
    found = integer_linear(x, w, x_zero=3, weight_zero=2)
    assert found.shape == (*lead, 4)
    assert torch.equal(found.long(), (x.long() - 3) @ (w.long() - 2).t())


def slow_convolution(x, w, x_zero, zeros, bias, window):
    """Seven loops over Python's integers."""
    n, _, h, wide = x.shape
    out, fan, kh, kw = w.shape
    left, right, top, bottom = window.padding
    rows = (h + top + bottom - window.dilation[0] * (kh - 1) - 1) // window.stride[0] + 1
    columns = (wide + left + right - window.dilation[1] * (kw - 1) - 1) // window.stride[1] + 1
    values, weights = x.tolist(), w.tolist()
    result = torch.zeros(n, out, rows, columns, dtype=torch.int64)
    for b, o, r, c in itertools.product(range(n), range(out), range(rows), range(columns)):
        total = bias[o] if bias else 0
        first = o // (out // window.groups) * fan
        for i, dr, dc in itertools.product(range(fan), range(kh), range(kw)):
            y = r * window.stride[0] + dr * window.dilation[0] - top
            z = c * window.stride[1] + dc * window.dilation[1] - left
            if 0 <= y < h and 0 <= z < wide:
                total += (values[b][first + i][y][z] - x_zero) * (weights[o][i][dr][dc] - zeros[o])
        result[b, o, r, c] = total
    return result


@st.composite
def convolutions(draw):
    groups, fan, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    window = Window(
        stride=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        padding=draw(st.tuples(*[st.integers(0, 2)] * 4)),
        dilation=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        groups=groups,
    )
    size = [draw(st.integers((k - 1) * d + 1, 6)) for k, d in zip(kernel, window.dilation, strict=True)]
    types = (torch.uint8, torch.int8, torch.int16)
    x = tensor(draw, (draw(st.integers(1, 2)), groups * fan, *size), draw(st.sampled_from(types)))
    w = tensor(draw, (groups * per_group, fan, *kernel), draw(st.sampled_from(types)))
    zeros = draw(st.lists(st.integers(-100, 100), min_size=len(w), max_size=len(w)))
    bias = draw(st.none() | st.lists(st.integers(-(2**30), 2**30), min_size=len(w), max_size=len(w)))
    return x, w, draw(st.integers(0, 100)), zeros, bias, window


@given(convolutions())
def test_a_convolution_equals_python(case):
    x, w, x_zero, zeros, bias, window = case
    found = integer_conv2d(
        x,
        w,
        x_zero=x_zero,
        weight_zero=torch.tensor(zeros),
        bias=None if bias is None else torch.tensor(bias),
        window=window,
    )
    assert torch.equal(found.long(), slow_convolution(x, w, x_zero, zeros, bias, window))


@given(convolutions())
def test_a_device_without_integer_products_gives_the_same(case):
    x, w, x_zero, zeros, _, window = case
    arguments = {"x_zero": x_zero, "weight_zero": torch.tensor(zeros)}
    rows = x.flatten(1)
    matrix = (torch.arange(2 * rows.shape[1]) % 255 - 127).to(torch.int8).reshape(2, -1)
    whole = integer_conv2d(x, w, window=window, **arguments)
    flat = integer_linear(rows, matrix, x_zero=x_zero, weight_zero=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integer, "_carrier", lambda wide, device: torch.float64)
        carried = integer_conv2d(x, w, window=window, **arguments)
        again = integer_linear(rows, matrix, x_zero=x_zero, weight_zero=3)
    assert torch.equal(whole, carried)
    assert whole.dtype == carried.dtype
    assert torch.equal(flat, again)


@pytest.mark.parametrize(
    ("x_type", "k", "expected"),
    [
        (torch.uint8, 66_000, torch.int32),
        (torch.uint8, 67_000, torch.int64),
        (torch.int8, 130_000, torch.int32),
        (torch.int16, 500, torch.int32),
        (torch.int16, 600, torch.int64),
        (torch.uint16, 300, torch.int64),
    ],
)
def test_the_accumulator_grows_before_it_overflows(x_type, k, expected):
    """All-largest operands: the sum is right however large, and the type as documented."""
    weight = torch.full((1, k), 127, dtype=torch.int8)
    largest = torch.iinfo(x_type).max
    assert accumulator(x_type, weight) == expected
    x = torch.full((1, k), largest).to(x_type)
    found = integer_linear(x, weight)
    assert found.dtype == expected
    assert found.item() == k * 127 * largest


def test_terms_and_bias_count_toward_overflow():
    weight = torch.full((1, 1000), 100, dtype=torch.int8)
    assert accumulator(torch.uint8, weight) == torch.int32
    assert accumulator(torch.uint8, weight, bias=torch.tensor([2**31 - 1])) == torch.int64
    assert accumulator(torch.uint8, weight, x_zero=30_000) == torch.int64
    assert accumulator(torch.uint8, weight, weight_zero=2**15) == torch.int64


@given(products(types=(torch.uint8, torch.int8)))
def test_int32_is_promised_only_where_the_worst_input_fits(case):
    x, w, x_zero, zeros, bias = case
    bias = None if bias is None else torch.tensor(bias)
    wide = accumulator(x.dtype, w, x_zero=x_zero, weight_zero=as_tensor(zeros), bias=bias)
    limits = torch.iinfo(x.dtype)
    for end in (limits.min, limits.max):
        worst = torch.full((1, w.shape[1]), end).to(x.dtype)
        found = integer_linear(worst, w, x_zero=x_zero, weight_zero=as_tensor(zeros), bias=bias)
        assert found.dtype == wide
        if wide == torch.int32:
            exact = (worst.long() - x_zero) @ (w.long() - torch.as_tensor(as_tensor(zeros)).reshape(-1, 1)).t()
            assert torch.equal(found.long(), exact + (0 if bias is None else bias))


def test_what_not_even_float64_holds_is_refused():
    weight = torch.full((1, 2**10), 2**31 - 1, dtype=torch.int32)
    with pytest.raises(DataError, match=r"2\^53"):
        integer_linear(torch.ones(1, 2**10, dtype=torch.int32), weight)


@pytest.mark.parametrize(
    ("x", "w", "arguments", "message"),
    [
        (torch.ones(1, 2), torch.ones(1, 2, dtype=torch.int8), {}, "integer tensors"),
        (torch.ones(1, 2, dtype=torch.int8), torch.ones(1, 2), {}, "integer tensors"),
        (torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.int8), {}, "integer tensors"),
        (torch.ones(1, 3, dtype=torch.int8), torch.ones(1, 2, dtype=torch.int8), {}, "a product needs"),
        (torch.tensor(1), torch.ones(1, 2, dtype=torch.int8), {}, "a product needs"),
        (torch.tensor([[1, 2]]), torch.tensor([[1, 2]]), {"weight_zero": torch.zeros(2)}, "weight_zero"),
        (torch.tensor([[1, 2]]), torch.tensor([[1, 2]]), {"bias": torch.zeros(1)}, "integer tensors"),
        (torch.tensor([[1, 2]]), torch.tensor([[1, 2]]), {"bias": torch.tensor([1, 2])}, "bias must have shape"),
    ],
)
def test_what_does_not_fit_is_refused(x, w, arguments, message):
    with pytest.raises(UsageError, match=message):
        integer_linear(x, w, **arguments)


@pytest.mark.parametrize("shape", [(3, 5, 5), (1, 4, 5, 5)])
def test_a_convolution_of_another_shape_is_refused(shape):
    with pytest.raises(UsageError, match="a convolution needs"):
        integer_conv2d(torch.ones(shape, dtype=torch.int8), torch.ones(1, 3, 3, 3, dtype=torch.int8))


@pytest.mark.parametrize("limit_bytes", [1, 1000, 10_000])
def test_a_batch_in_parts_gives_the_same(generator, monkeypatch, limit_bytes):
    x = torch.randint(0, 256, (7, 4, 6, 6), generator=generator).to(torch.uint8)
    w = torch.randint(-128, 128, (6, 2, 3, 3), generator=generator).to(torch.int8)
    arguments = {"x_zero": 9, "weight_zero": torch.arange(6), "window": Window(groups=2, dilation=(2, 1))}
    whole = integer_conv2d(x, w, **arguments)
    monkeypatch.setattr(integer, "_UNFOLDED_BYTES", limit_bytes)
    assert torch.equal(integer_conv2d(x, w, **arguments), whole)


def test_an_empty_batch_is_convolved():
    x, w = torch.ones(0, 3, 5, 5, dtype=torch.int8), torch.ones(2, 3, 3, 3, dtype=torch.int8)
    assert integer_conv2d(x, w, x_zero=1, weight_zero=1).shape == (0, 2, 3, 3)


def gemmlowp(a, m):
    """fixedpoint.h in Python's integers: SaturatingRoundingDoublingHighMul, then RoundingDivideByPOT."""
    mantissa, shift = m.mantissa.item(), m.shift.item()
    a = max(INT32.min, min(INT32.max, a))
    if shift < 0:
        a, shift = max(INT32.min, min(INT32.max, a * 2**-shift)), 0
    product = a * mantissa
    nudge = 2**30 if product >= 0 else 1 - 2**30
    high = int(Fraction(product + nudge, 2**31))  # toward zero, as C divides
    mask = 2**shift - 1
    remainder, threshold = high & mask, (mask >> 1) + (1 if high < 0 else 0)
    return (high >> shift) + (1 if remainder > threshold else 0)


factors = st.floats(1e-20, 2.0**29) | st.floats(1e-4, 1.0)


@given(factors)
def test_a_multiplier_stands_for_its_factor(factor):
    m = multiplier_for(factor)
    if factor < 2.0**-54:
        assert m.mantissa.item() == 0
        return
    assert 2**30 <= m.mantissa.item() < 2**31
    real = Fraction(m.mantissa.item()) / Fraction(2) ** (31 + m.shift.item())
    assert abs(real - Fraction(factor)) <= Fraction(factor) / 2**31


@given(st.lists(st.integers(INT32.min, INT32.max), min_size=1, max_size=20), factors)
def test_rescaling_equals_gemmlowp(values, factor):
    m = multiplier_for(factor)
    assert rescale(torch.tensor(values), m).tolist() == [gemmlowp(v, m) for v in values]


@given(st.integers(-(2**53), 2**53) | st.integers(-(2**20), 2**20), factors)
def test_rescaling_is_near_the_real_product(value, factor):
    found = rescale(torch.tensor([value]), multiplier_for(factor)).item()
    real = Fraction(value) * Fraction(factor)
    if abs(real) < 2**30:
        assert abs(found - real) <= Fraction(3, 4) + abs(real) / 2**31
    else:
        assert 2**30 - 1 <= (found if real > 0 else -found) <= 2**31


@given(
    st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-(2**52), 2**52), min_size=1, max_size=20),
    factors,
    st.sampled_from([(0, 255), (-128, 127), (0, 65535), (-2, 1)]),
    st.data(),
)
def test_both_ways_of_requantizing_differ_by_at_most_one(values, factor, ends, data):
    zero = data.draw(st.integers(*ends))
    arguments = {"zero_point": zero, "lowest": ends[0], "highest": ends[1]}
    total = torch.tensor(values)
    real = requantize(total, torch.tensor(factor, dtype=torch.float64), **arguments)
    whole = requantize(total, multiplier_for(factor), **arguments)
    assert (real - whole).abs().max() <= 1
    exact = [max(ends[0], min(ends[1], round(Fraction(v) * Fraction(factor)) + zero)) for v in values]
    assert all(abs(a - b) <= 1 for a, b in zip(real.tolist(), exact, strict=True))


def test_multipliers_go_by_channel():
    m = multiplier_for(torch.tensor([0.5, 0.001, 3.0]))
    found = rescale(torch.tensor([[1000, 1000, 1000], [-7, 4999, 1]]), m)
    assert found.tolist() == [[500, 1, 3000], [-3, 5, 3]]


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf, 2.0**30])
def test_a_factor_that_is_none_is_refused(factor):
    with pytest.raises(DataError, match="rescaling factor"):
        multiplier_for(factor)


def test_the_mantissa_never_reaches_its_end():
    m = multiplier_for(1.0 - 2.0**-40)
    assert m.mantissa.item() == 2**30
    assert rescale(torch.tensor([12345]), m).item() == 12345
