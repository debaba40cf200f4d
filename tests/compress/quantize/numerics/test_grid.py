from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fettle.compress.quantize.numerics.grid import (
    Grid,
    all_finite,
    best_grid,
    fake_quantize,
    grid_for,
    grid_for_range,
    initial_scale,
    learned_fake_quantize,
    least_squares_scale,
)
from fettle.compress.quantize.numerics.scheme import Scheme
from fettle.core.errors import DataError, UsageError

LARGEST = torch.finfo(torch.float32).max
SMALLEST = torch.finfo(torch.float32).tiny
KINDS = [(False, False), (True, False), (True, True), (False, True)]  # signed, symmetric
anything = st.floats(width=32, allow_nan=False, allow_infinity=False)
tame = st.floats(-1e6, 1e6, width=32)
schemes = st.builds(
    lambda bits, kind: Scheme(bits=bits, signed=kind[0], symmetric=kind[1]), st.integers(2, 16), st.sampled_from(KINDS)
)


def slow_quantize(value, scale, zero, scheme):
    """In numpy's float32, one number at a time, with Python's integers."""
    steps = np.float32(value) / np.float32(scale)
    if math.isinf(steps):
        return scheme.highest if steps > 0 else scheme.lowest
    return max(scheme.lowest, min(round(float(steps)) + zero, scheme.highest))


@given(st.lists(anything, min_size=1, max_size=20), schemes)
def test_any_finite_tensor_has_a_grid_with_exact_zero(values, scheme):
    x = torch.tensor(values)
    grid = grid_for(x, scheme)
    assert SMALLEST <= grid.scale.item() <= LARGEST
    assert scheme.lowest <= grid.zero_point.item() <= scheme.highest
    assert grid.fake(torch.zeros(1)).item() == 0.0
    every = grid.dequantize(torch.arange(scheme.lowest, scheme.highest + 1))
    assert torch.isfinite(every).all()
    if scheme.symmetric:
        assert grid.zero_point.item() == scheme.middle


@given(st.lists(anything, min_size=1, max_size=20), schemes)
def test_no_entry_moves_further_than_half_a_step(values, scheme):
    x = torch.tensor(values)
    grid = grid_for(x, scheme)
    # A whole zero point may push one end of the range out by half a step, where entries are clipped.
    steps = 0.5 if scheme.symmetric or min(values) >= 0 or max(values) <= 0 else 1.0
    worst = (grid.fake(x).double() - x.double()).abs().max().item()
    rounding = x.double().abs().max().item() * 2.0**-22
    overflow = grid.scale.item() if x.abs().max() > LARGEST / 2 else 0.0
    assert worst <= grid.scale.item() * steps * (1 + 1e-3) + rounding + overflow


@given(st.lists(anything, min_size=1, max_size=20), st.lists(anything, min_size=1, max_size=20), schemes)
def test_quantize_equals_python(seen, values, scheme):
    grid = grid_for(torch.tensor(seen), scheme)
    with np.errstate(over="ignore", under="ignore"):
        expected = [slow_quantize(v, grid.scale.item(), grid.zero_point.item(), scheme) for v in values]
    found = grid.quantize(torch.tensor(values))
    assert found.dtype == scheme.dtype
    assert found.tolist() == expected
    real = [float(np.float32(q - grid.zero_point.item()) * np.float32(grid.scale.item())) for q in expected]
    assert grid.dequantize(found).tolist() == real


@given(st.lists(anything, min_size=1, max_size=20), st.lists(anything, min_size=1, max_size=20), schemes)
def test_fake_is_the_way_there_and_back(seen, values, scheme):
    grid, x = grid_for(torch.tensor(seen), scheme), torch.tensor(values)
    there_and_back = grid.dequantize(grid.quantize(x))
    assert torch.equal(grid.fake(x), there_and_back)
    # Gradients change nothing in the value, and a second time changes nothing at all.
    assert torch.equal(grid.fake(x.clone().requires_grad_()).detach(), there_and_back)
    assert torch.equal(grid.quantize(there_and_back), grid.quantize(x))


@given(st.lists(tame, min_size=2, max_size=20), schemes)
def test_order_is_kept(values, scheme):
    x = torch.tensor(sorted(values))
    steps = grid_for(x, scheme).quantize(x).to(torch.int32)
    assert (steps.diff() >= 0).all()


@given(st.integers(0, 2**16 - 1), schemes)
def test_every_level_stands_for_itself(step, scheme):
    level = scheme.lowest + step % scheme.levels
    grid = grid_for_range(-0.7, 1.3, scheme)
    assert grid.quantize(grid.dequantize(torch.tensor([level]))).item() == level


@pytest.mark.parametrize(("value", "step"), [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (-2.5, -2)])
def test_ties_go_to_even(value, step):
    scheme = Scheme(bits=4, signed=True, symmetric=True)
    grid = Grid(scale=torch.tensor(1.0), zero_point=torch.tensor(0, dtype=torch.int32), scheme=scheme)
    assert grid.quantize(torch.tensor([value])).item() == step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [3.0, -3.0, 1e-3, -1e30, 1e30, 1e-37, -3.4e38, 3.4e38])
def test_a_constant_keeps_its_value(kind, value):
    x = torch.full((2, 3), value)
    fake = grid_for(x, Scheme(signed=kind[0], symmetric=kind[1])).fake(x)
    # Around the middle of an unsigned range there is one more level below: at the end of float32 it must be finite too.
    shrunk = abs(value) > LARGEST / 2 and kind == (False, True)
    assert fake.flatten().tolist() == pytest.approx([value] * 6, rel=1 / 127 if shrunk else 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_all_zeros_have_scale_one(bits, kind):
    scheme = Scheme(bits=bits, signed=kind[0], symmetric=kind[1])
    for zeros in (torch.zeros(3), -torch.zeros(3)):
        grid = grid_for(zeros, scheme)
        assert grid.scale.item() == 1.0
        assert grid.zero_point.item() == (scheme.middle if scheme.symmetric else 0)
        assert grid.fake(zeros).tolist() == [0.0] * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [1e-45, 1e-40, 5e-39, -1e-42])
def test_denormals_keep_a_normal_scale(kind, value):
    scheme = Scheme(signed=kind[0], symmetric=kind[1])
    grid = grid_for(torch.tensor([value]), scheme)
    assert grid.scale.item() == SMALLEST
    assert grid.fake(torch.tensor([value])).abs().item() <= SMALLEST


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 8, 16])
@pytest.mark.parametrize("ends", [(-LARGEST, LARGEST), (0.0, LARGEST), (-LARGEST, 0.0), (-LARGEST, LARGEST / 3)])
def test_the_whole_of_float32_has_a_grid(kind, bits, ends):
    scheme = Scheme(bits=bits, signed=kind[0], symmetric=kind[1])
    grid = grid_for_range(*ends, scheme)
    levels = grid.dequantize(torch.arange(scheme.lowest, scheme.highest + 1))
    assert torch.isfinite(levels).all()
    assert levels.max() <= LARGEST
    reach = max(abs(ends[0]), ends[1])
    assert levels.abs().max().item() >= reach - 0.51 * grid.scale.item()


@pytest.mark.parametrize(
    ("low", "high"), [(math.nan, 1.0), (0.0, math.nan), (0.0, math.inf), (-math.inf, 0.0), (1.0, -1.0), (-1e300, 1.0)]
)
def test_a_range_that_is_none_is_refused(low, high):
    with pytest.raises(DataError, match="finite in float32 with low <= high"):
        grid_for_range(low, high, Scheme())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scheme", [Scheme(), Scheme(axis=0), Scheme(group=2)])
@pytest.mark.parametrize("make", [grid_for, best_grid, initial_scale])
def test_data_that_is_not_finite_is_refused(value, scheme, make):
    with pytest.raises(DataError, match="NaN or infinity"):
        make(torch.tensor([[1.0, value], [2.0, 3.0]]), scheme)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("scheme", [Scheme(), Scheme(axis=0), Scheme(group=2)])
def test_an_empty_tensor_has_no_range(shape, scheme):
    with pytest.raises(DataError, match="without entries"):
        grid_for(torch.zeros(shape), scheme)


def test_an_empty_tensor_is_quantized_to_an_empty_one():
    grid = grid_for_range(-1.0, 1.0, Scheme())
    assert grid.quantize(torch.empty(0, 3)).shape == (0, 3)
    assert grid.dequantize(torch.empty(0, 3, dtype=torch.uint8)).shape == (0, 3)
    assert grid.fake(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_only_floating_point_is_quantized(dtype):
    with pytest.raises(DataError, match="floating point"):
        grid_for(torch.ones(3, dtype=dtype), Scheme())


def test_infinity_saturates_and_nan_is_refused():
    grid = grid_for_range(-1.0, 1.0, Scheme())
    assert grid.quantize(torch.tensor([-math.inf, math.inf, -9.0, 9.0])).tolist() == [0, 255, 0, 255]
    with pytest.raises(DataError, match="NaN"):
        grid.quantize(torch.tensor([0.0, math.nan]))
    fake = grid.fake(torch.tensor([0.0, math.nan, math.inf]))
    assert fake[:2].isnan().tolist() == [False, True]
    assert math.isfinite(fake[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fake_keeps_the_type(dtype):
    x = torch.linspace(-1, 1, 9, dtype=dtype)
    grid = grid_for(x, Scheme())
    assert grid.fake(x).dtype == dtype
    # Half precision is quantized with float32 steps, not with the scale rounded to half precision.
    assert torch.equal(grid.quantize(x), grid.quantize(x.float()))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_sixteen_bits_work_in_every_signedness(bits):
    x = torch.linspace(-1, 1, 1001)
    for signed, symmetric in KINDS:
        grid = grid_for(x, Scheme(bits=bits, signed=signed, symmetric=symmetric))
        assert (grid.fake(x) - x).abs().max() <= grid.scale * 1.01


@st.composite
def blocks(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    kind = draw(st.sampled_from(KINDS))
    scheme = Scheme(
        bits=draw(st.integers(2, 16)),
        signed=kind[0],
        symmetric=kind[1],
        axis=draw(st.none() | st.integers(-len(shape), len(shape) - 1)),
        group=draw(st.none() | st.integers(1, 5)),
    )
    values = draw(st.lists(anything, min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(values).reshape(shape), scheme


def slow_parts(x, scheme):
    """Yield (place of the parameter, indices of the entries that share it)."""
    axis = (-1 if scheme.axis is None else scheme.axis) % x.ndim
    parts = {}
    for index in itertools.product(*map(range, x.shape)):
        if scheme.axis is None and scheme.group is None:
            place = ()
        elif scheme.group is None:
            place = (index[axis],)
        else:
            place = tuple(i // scheme.group if a == axis else i for a, i in enumerate(index))
        parts.setdefault(place, []).append(index)
    return parts.items()


@given(blocks())
def test_each_part_is_quantized_as_if_it_were_alone(case):
    x, scheme = case
    grid = grid_for(x, scheme)
    alone_scheme = Scheme(bits=scheme.bits, signed=scheme.signed, symmetric=scheme.symmetric)
    whole, fake = grid.quantize(x), grid.fake(x)
    assert torch.equal(fake, grid.dequantize(whole))
    for place, indices in slow_parts(x, scheme):
        part = torch.tensor([x[index].item() for index in indices])
        alone = grid_for(part, alone_scheme)
        assert grid.scale[place] == alone.scale
        assert grid.zero_point[place] == alone.zero_point
        assert [whole[index].item() for index in indices] == alone.quantize(part).tolist()
        assert [fake[index].item() for index in indices] == alone.fake(part).tolist()


@given(st.lists(tame, min_size=1, max_size=12), schemes)
def test_best_grid_equals_a_slow_search(values, scheme):
    x = torch.tensor(values)
    errors = []
    for share in torch.linspace(1.0, 0.8, 21).tolist():
        grid = grid_for_range(x.min() * share, x.max() * share, scheme)
        errors.append(sum((grid.fake(x[i : i + 1]).double().item() - v) ** 2 for i, v in enumerate(x.tolist())))
    found = sum((best_grid(x, scheme).fake(x).double() - x.double()).square().tolist())
    assert found == pytest.approx(min(errors), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("scheme", [Scheme(axis=0, bits=4), Scheme(bits=4, group=16, signed=True, symmetric=True)])
def test_best_grid_is_best_for_each_part(generator, scheme):
    x = torch.randn(4, 40, generator=generator) ** 3
    best, plain = best_grid(x, scheme), grid_for(x, scheme)
    assert best.scale.shape == plain.scale.shape
    better = (best.fake(x) - x).square().reshape(4, -1).sum(1) <= (plain.fake(x) - x).square().reshape(4, -1).sum(1)
    assert better.all()
    assert (best.scale < plain.scale).any()


@pytest.mark.parametrize("size", [1e-34, 1e-20, 1.0, 1e20, 1e35])
def test_the_best_grid_does_not_depend_on_the_unit(generator, size):
    x, scheme = torch.randn(3, 200, generator=generator) ** 3, Scheme(bits=4, signed=True, symmetric=True, axis=0)
    found, wanted = best_grid(x * size, scheme).scale.double(), best_grid(x, scheme).scale.double() * size
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2, 2)])
def test_best_grids_per_channel_equal_a_slow_search(generator, shape, axis):
    weight = torch.randn(shape, generator=generator) ** 3
    found = best_grid(weight, Scheme(signed=True, symmetric=True, axis=axis)).scale
    for channel in range(shape[axis]):
        values = weight.select(axis, channel).flatten().tolist()
        full = max(map(abs, values)) / 127
        tried = [full * share for share in torch.linspace(1.0, 0.8, 21).tolist()]
        errors = [
            sum((max(-127, min(127, round(v / s))) * s - v) ** 2 for v in values)
            for s in (*tried, float(found[channel]))
        ]
        assert errors[-1] == pytest.approx(min(errors[:-1]), rel=1e-3)


def test_channels_do_not_share_a_scale():
    weight = torch.tensor([[1000.0, -500.0], [0.001, 0.0005], [0.0, 0.0]])
    grid = best_grid(weight, Scheme(signed=True, symmetric=True, axis=0))
    assert grid.scale[2] == 1.0
    assert grid.quantize(weight).dtype == torch.int8
    assert ((grid.fake(weight) - weight).abs() <= grid.scale[:, None] * 0.50001).all()


@given(st.lists(st.tuples(tame, st.integers(-8, 7)), min_size=1, max_size=12))
def test_the_least_squares_scale_is_that_of_the_sums(pairs):
    rows, whole = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))
    square = sum(q * q for _, q in pairs)
    wanted = sum(w * q for w, q in pairs) / square if square else 3.0
    assert float(least_squares_scale(rows, whole, torch.tensor(3.0).double())) == pytest.approx(
        wanted, rel=1e-9, abs=1e-6
    )


@pytest.mark.parametrize("wrong", [{"tries": 0}, {"smallest_share": 0.0}, {"smallest_share": 1.5}])
def test_a_search_that_searches_nothing_is_refused(wrong):
    with pytest.raises(UsageError, match="best_grid"):
        best_grid(torch.ones(3), Scheme(), **wrong)


@pytest.mark.parametrize(
    ("scale", "zero", "message"),
    [
        (torch.tensor(0.0), torch.tensor(0), "positive finite"),
        (torch.tensor(-1.0), torch.tensor(0), "positive finite"),
        (torch.tensor(math.nan), torch.tensor(0), "positive finite"),
        (torch.tensor(math.inf), torch.tensor(0), "positive finite"),
        (torch.tensor(1.0), torch.tensor(-1), "zero points must lie"),
        (torch.tensor(1.0), torch.tensor(256), "zero points must lie"),
        (torch.ones(2), torch.tensor(0), "one shape"),
        (torch.tensor(1.0, dtype=torch.float64), torch.tensor(0), "float32"),
    ],
)
def test_parameters_that_cannot_be_are_refused(scale, zero, message):
    with pytest.raises(UsageError, match=message):
        Grid(scale=scale, zero_point=zero.to(torch.int32), scheme=Scheme())


@pytest.mark.parametrize(
    ("low", "high", "scheme"),
    [
        (torch.zeros(2), torch.ones(3), Scheme(axis=0)),
        (torch.zeros(2), torch.ones(2), Scheme()),
        (0.0, 1.0, Scheme(axis=0)),
        (0.0, 1.0, Scheme(group=4)),
    ],
)
def test_ranges_of_another_shape_are_refused(low, high, scheme):
    with pytest.raises(UsageError, match="shape"):
        grid_for_range(low, high, scheme)


def slow_gradients(x, scale, zero, lowest, highest):
    """∂x'/∂x and ∂x'/∂s of one entry, from the two papers."""
    v = float(np.float32(x) / np.float32(scale))
    if v < lowest - zero:
        return 0.0, float(lowest - zero)
    if v > highest - zero:
        return 0.0, float(highest - zero)
    return 1.0, round(v) - v


@given(st.lists(tame, min_size=1, max_size=10), st.floats(2**-10, 2**10, width=32), st.data())
def test_gradients_are_those_of_the_papers(values, scale, data):
    lowest, highest = data.draw(st.sampled_from([(0, 255), (-7, 7), (0, 15), (-128, 127), (0, 65535)]))
    zero = data.draw(st.integers(lowest, highest))
    x, s = torch.tensor(values).requires_grad_(), torch.tensor(scale).requires_grad_()
    y = fake_quantize(x, s, zero, lowest=lowest, highest=highest)
    weights = torch.linspace(1, 2, len(values))
    (y * weights).sum().backward()
    expected = [slow_gradients(v, scale, zero, lowest, highest) for v in x.tolist()]
    assert x.grad.tolist() == [dx * w for (dx, _), w in zip(expected, weights.tolist(), strict=True)]
    slopes = [ds * w for (_, ds), w in zip(expected, weights.tolist(), strict=True)]
    assert s.grad.item() == pytest.approx(sum(slopes), rel=1e-4, abs=1e-4 * sum(map(abs, slopes)) + 1e-6)


def test_gradients_of_scales_per_channel_do_not_mix():
    x = torch.tensor([[0.3, 9.0], [-9.0, 0.9]])
    scale, zero = torch.tensor([0.5, 0.25]).requires_grad_(), torch.tensor([0, 1])
    fake_quantize(x, scale, zero, lowest=-2, highest=3, axis=0).sum().backward()
    expected = [
        sum(slow_gradients(v, s, z, -2, 3)[1] for v in row)
        for row, s, z in zip(x.tolist(), [0.5, 0.25], [0, 1], strict=True)
    ]
    assert scale.grad.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_an_axis_means_one_scale_for_each_index(generator, axis):
    x = torch.randn(3, 3, generator=generator)
    scale, zero = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2])
    found = fake_quantize(x, scale, zero, lowest=-8, highest=7, axis=axis)
    for i in range(3):
        alone = fake_quantize(x.select(axis, i), scale[i], int(zero[i]), lowest=-8, highest=7)
        assert torch.equal(found.select(axis, i), alone)


@pytest.mark.parametrize("value", [3e38, -3e38, math.inf, -math.inf, 1e-45, 0.0])
@pytest.mark.parametrize("scale", [SMALLEST, 1e-10, 1.0, 1e36])
def test_extreme_values_have_finite_gradients(value, scale):
    x, s = torch.tensor([value]).requires_grad_(), torch.tensor(scale).requires_grad_()
    y = fake_quantize(x, s, 0, lowest=-127, highest=127)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(s.grad).all()


def test_gradients_need_no_scale_of_a_tiny_size():
    x = torch.tensor([SMALLEST * 3]).requires_grad_()
    (fake_quantize(x, torch.tensor(SMALLEST), 0, lowest=-7, highest=7) * 1e-3).sum().backward()
    assert x.grad.item() == pytest.approx(1e-3)


@pytest.mark.parametrize(("count", "n"), [(None, 12), (5, 5)])
def test_a_learned_scale_moves_at_the_pace_of_the_paper(generator, count, n):
    x = torch.randn(3, 4, generator=generator)
    one, other = torch.tensor(0.1).requires_grad_(), torch.tensor(0.1).requires_grad_()
    plain = fake_quantize(x, one, 0, lowest=-7, highest=7)
    learned = learned_fake_quantize(x, other, 0, lowest=-7, highest=7, count=count)
    assert torch.equal(plain, learned)
    plain.square().sum().backward()
    learned.square().sum().backward()
    assert other.grad.item() == pytest.approx(one.grad.item() / math.sqrt(n * 7), rel=1e-5)


def test_learning_the_scale_lowers_the_error(generator):
    """From a scale four times too wide, LSQ finds one about as good as the best of a search."""
    x = torch.randn(4096, generator=generator)
    scale = torch.tensor(float(grid_for(x, Scheme(bits=4, signed=True, symmetric=True)).scale) * 4).requires_grad_()
    optimizer = torch.optim.Adam([scale], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        error = (learned_fake_quantize(x, scale, 0, lowest=-7, highest=7) - x).square().mean()
        error.backward()
        optimizer.step()
    best = best_grid(x, Scheme(bits=4, signed=True, symmetric=True), smallest_share=0.3, tries=71)
    assert error.item() <= (best.fake(x) - x).square().mean().item() * 1.05


def test_the_initial_scale_is_that_of_the_paper(generator):
    x = torch.randn(4, 8, generator=generator)
    found = initial_scale(x, Scheme(bits=4, signed=True, symmetric=True, axis=0))
    for row, scale in zip(x.tolist(), found.tolist(), strict=True):
        assert scale == pytest.approx(2 * sum(map(abs, row)) / 8 / math.sqrt(7), rel=1e-5)


def test_fake_quantize_survives_export(generator):
    class Fake(torch.nn.Module):
        def forward(self, x, scale):
            return fake_quantize(x, scale, 3, lowest=0, highest=15)

    x, scale = torch.randn(4, 5, generator=generator), torch.tensor(0.2)
    exported = torch.export.export(Fake(), (x, scale)).module()
    assert torch.equal(exported(x, scale), Fake()(x, scale))


@given(st.lists(st.floats(width=32), max_size=10))
def test_all_finite_equals_python(values):
    assert all_finite(torch.tensor(values)) == all(map(math.isfinite, values))


def test_a_grid_moves_between_devices():
    grid = grid_for_range(-1.0, 1.0, Scheme())
    moved = grid.to("cpu")
    assert moved.scale == grid.scale
    assert moved.scheme == grid.scheme


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 5)])
def test_a_grid_of_another_shape_is_refused(shape):
    grid = grid_for(torch.ones(5, 4), Scheme(axis=0))
    for method in (grid.quantize, grid.fake):
        with pytest.raises(UsageError, match="needs scales of shape"):
            method(torch.zeros(shape))


def test_the_ends_of_a_grid_are_its_outermost_levels():
    grid = grid_for_range(-1.0, 2.0, Scheme(bits=4))
    levels = grid.dequantize(torch.arange(16))
    assert grid.ends == pytest.approx((float(levels.min()), float(levels.max())))
    with pytest.raises(UsageError, match="per tensor"):
        _ = grid_for(torch.ones(2, 2), Scheme(axis=0)).ends


def test_a_narrow_range_is_kept(generator):
    x = torch.randn(100, generator=generator)
    narrow = grid_for(x, Scheme(bits=2, signed=True, symmetric=True))
    assert narrow.quantize(x * 100).unique().tolist() == [-1, 0, 1]
    wide = grid_for(x, Scheme(bits=2, signed=True, symmetric=True, narrow=False))
    assert wide.quantize(torch.tensor([-99.0, 99.0])).tolist() == [-2, 1]
