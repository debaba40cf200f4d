from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fettle.compress.quantize.numerics.errors import (
    DeviationSum,
    model_errors,
    output_errors,
    tensor_error,
)
from fettle.compress.quantize.numerics.grid import best_grid, grid_for
from fettle.compress.quantize.numerics.scheme import Scheme
from fettle.core.errors import DataError, UsageError

numbers = st.floats(-1e6, 1e6, width=32)
pairs = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=30)
INT8 = Scheme(signed=True, symmetric=True, axis=0)


def slow(pairs):
    """mse, sqnr_db, max_abs, mean_abs in Python's numbers."""
    errors = [y - x for x, y in pairs]
    signal, noise = math.fsum(x * x for x, _ in pairs), math.fsum(e * e for e in errors)
    ratio = math.inf if noise == 0 else -math.inf if signal == 0 else 10 * math.log10(signal / noise)
    return noise / len(pairs), ratio, max(map(abs, errors)), math.fsum(map(abs, errors)) / len(pairs)


def figures(deviation):
    return deviation.mse, deviation.sqnr_db, deviation.max_abs, deviation.mean_abs


def near(expected):
    """Decibels near 0 are the logarithm of a number near 1: there only their absolute difference says something."""
    mse, sqnr_db, max_abs, mean_abs = expected
    others = (pytest.approx(number, rel=1e-9, abs=1e-300) for number in (mse, max_abs, mean_abs))
    first, *rest = others
    return (first, pytest.approx(sqnr_db, rel=1e-9, abs=1e-9), *rest)


@given(pairs)
def test_the_figures_equal_a_slow_sum(values):
    x, y = torch.tensor(values).unbind(1)
    found = tensor_error(x, y)
    assert figures(found) == near(slow(values))
    assert found.count == len(values)


@given(pairs, st.data())
def test_batches_and_parts_add_up(values, data):
    x, y = torch.tensor(values).unbind(1)
    first, second = DeviationSum(), DeviationSum()
    cut = data.draw(st.integers(0, len(values)))
    for sum_, part in ((first, slice(0, cut)), (second, slice(cut, None))):
        for a, b in zip(x[part].split(3), y[part].split(3), strict=True):
            sum_.update(a, b)
    first.merge(second)
    assert figures(first.result()) == near(figures(tensor_error(x, y)))
    assert first.result().count == len(values)


def test_the_state_does_not_grow():
    total = DeviationSum()
    for _ in range(100):
        total.update(torch.zeros(1000), torch.zeros(1000))
    assert all(isinstance(value, int | float) for value in vars(total).values())
    assert total.result().count == 100_000


@pytest.mark.parametrize(
    ("x", "y", "ratio"),
    [([1.0], [1.0], math.inf), ([0.0], [0.0], math.inf), ([0.0], [1.0], -math.inf), ([3.0], [0.0], 0.0)],
)
def test_the_ends_of_the_ratio(x, y, ratio):
    assert tensor_error(torch.tensor(x), torch.tensor(y)).sqnr_db == ratio


@pytest.mark.parametrize("bits", range(2, 17))
def test_a_bit_is_worth_six_decibels(bits):
    """A uniform signal over the full range: 20 log10(2^b) = 6.02 b, the textbook's formula."""
    x = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    steps = 2**bits - 1
    found = tensor_error(x, grid_for(x, Scheme(bits=bits)).fake(x)).sqnr_db
    assert found == pytest.approx(20 * math.log10(steps), abs=1.8 if bits < 4 else 0.3)


def test_huge_values_do_not_overflow():
    found = tensor_error(torch.tensor([3e38, 3e38]), torch.tensor([-3e38, 3e38]))
    assert figures(found) == pytest.approx((1.8e77, 10 * math.log10(0.5), 6e38, 3e38), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8])
def test_any_type_is_compared(dtype):
    assert tensor_error(torch.ones(2, dtype=dtype), torch.zeros(2)).mse == 1.0


def test_nothing_is_no_error():
    total = DeviationSum()
    total.update(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(DataError, match="at least one entry"):
        total.result()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_not_finite_is_refused_and_not_added(value, first):
    total = DeviationSum()
    total.update(torch.ones(2), torch.zeros(2))
    before = total.result()
    bad, good = torch.tensor([1.0, value]), torch.ones(2)
    with pytest.raises(DataError, match="finite"):
        total.update(*((bad, good) if first else (good, bad)))
    with pytest.raises(UsageError, match="one shape"):
        total.update(torch.ones(2), torch.ones(1, 2))
    assert total.result() == before


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 5)
    )


def test_every_weight_is_measured(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = model_errors(model, INT8)
    assert list(found) == ["0", "2", "4"]
    for name, error in found.items():
        weight = model.get_submodule(name).weight.detach()
        rows = []
        for channel in weight:
            scale = channel.abs().max().item() / 127
            for value in channel.flatten().tolist():
                rows.append((value, max(-127, min(127, round(value / scale))) * scale))
        assert figures(error)[:2] == pytest.approx(slow(rows)[:2], rel=1e-3)
        assert error.count == weight.numel()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_caller_chooses_layers_and_fit(model):
    assert list(model_errors(model, INT8, layers=(nn.Linear,))) == ["4"]
    four = Scheme(bits=4, signed=True, symmetric=True, axis=0)
    plain, best = model_errors(model, four), model_errors(model, four, fit=best_grid)
    assert all(best[name].mse <= plain[name].mse for name in plain)
    assert model_errors(nn.ReLU(), INT8) == {}


def test_more_bits_are_better_everywhere(model):
    ratios = [
        [e.sqnr_db for e in model_errors(model, Scheme(bits=bits, signed=True, symmetric=True, axis=0)).values()]
        for bits in (2, 4, 8, 16)
    ]
    for fewer, more in itertools.pairwise(ratios):
        assert all(a < b for a, b in zip(fewer, more, strict=True))


def test_a_bad_weight_is_named(model):
    model[2].weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(DataError, match=r"layer '2'.*NaN"):
        model_errors(model, INT8)


def test_a_scheme_that_does_not_fit_is_named(model):
    with pytest.raises(UsageError, match=r"layer '4'.*axis 3"):
        model_errors(model, Scheme(axis=3))


def test_outputs_are_compared_layer_by_layer(model, generator):
    other = nn.Sequential(*model)  # the same layers
    changed = nn.Linear(16, 5)
    other[4] = changed
    batches = [(torch.randn(n, 3, 6, 6, generator=generator),) for n in (2, 5)]
    found = output_errors(model, other, batches)
    assert list(found) == ["0", "1", "2", "3", "4"]
    assert [found[name].mse for name in "0123"] == [0.0] * 4
    with torch.no_grad():
        expected = [(model(*b), other(*b)) for b in batches]
    rows = [pair for a, b in expected for pair in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)]
    assert figures(found["4"]) == pytest.approx(slow(rows), rel=1e-5)
    # An in-place ReLU after it changed the convolution's output; what is compared is what the layer gave.
    assert found["0"].sqnr_db == math.inf
    assert not any(m._forward_hooks for m in (*model.modules(), *other.modules()))


def test_outputs_of_chosen_layers_and_shared_ones(generator):
    class Twice(nn.Module):
        def __init__(self, calls):
            super().__init__()
            self.act, self.calls = nn.Tanh(), calls

        def forward(self, x):
            for _ in range(self.calls):
                x = self.act(x)
            return x

    x = torch.randn(3, generator=generator)
    found = output_errors(Twice(2), Twice(2), [(x,)], names=["act"])
    assert found["act"].count == 6
    with pytest.raises(UsageError, match=r"'act'.*2 and 1 calls"):
        output_errors(Twice(2), Twice(1), [(x,)])


def test_outputs_need_batches_and_names(model):
    with pytest.raises(DataError, match="no layer was compared"):
        output_errors(model, model, [])
    with pytest.raises(UsageError, match="'nine'"):
        output_errors(model, model, [(torch.zeros(1, 3, 6, 6),)], names=["nine"])


def test_a_bad_output_is_named_and_the_hooks_are_gone(model):
    with pytest.raises(DataError, match=r"layer '0'.*finite"):
        output_errors(model, model, [(torch.full((1, 3, 6, 6), math.nan),)])
    with pytest.raises(RuntimeError):
        output_errors(model, model, [(torch.zeros(1, 2, 6, 6),)])
    assert not any(m._forward_hooks for m in model.modules())
