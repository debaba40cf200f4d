"""Joint rounding against an exhaustive search and against rounding to nearest."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fettle.compress.quantize.numerics.rounding import round_jointly
from fettle.core.errors import UsageError


def problem(seed, *, rows=3, width=5, groups=1, rank=2):
    """A weight, its scales, and the moments of inputs that are correlated where `rank` is less than `width`."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows * groups, width, generator=generator)
    scales = 0.2 + torch.rand(rows * groups, generator=generator)
    mixed = torch.randn(groups, rank, width, generator=generator)
    inputs = torch.randn(groups, 64, rank, generator=generator) @ mixed
    return weight, scales, inputs.transpose(1, 2) @ inputs / 64


def cost(whole, weight, scales, moments):
    """The error by its definition, row by row in numpy."""
    each = len(weight) // len(moments)
    total = []
    for row in range(len(weight)):
        error = (whole[row].double() * scales[row].double() - weight[row].double()).numpy()
        total.append(float(error @ moments[row // each].double().numpy() @ error))
    return np.array(total)


def nearest(weight, scales, highest):
    return torch.round(weight / scales[:, None]).clamp(-highest, highest)


@given(
    seed=st.integers(0, 10_000), width=st.integers(1, 8), groups=st.integers(1, 3), highest=st.sampled_from([1, 7, 127])
)
@settings(max_examples=60, deadline=None)
def test_it_never_loses_to_nearest_and_no_single_turn_helps(seed, width, groups, highest):
    weight, scales, moments = problem(seed, width=width, groups=groups, rank=max(1, width // 2))
    whole = round_jointly(weight, scales, moments, highest=highest)
    found = cost(whole, weight, scales, moments)
    assert (found <= cost(nearest(weight, scales, highest), weight, scales, moments) * (1 + 1e-6) + 1e-9).all()
    exact = weight / scales[:, None]
    low, high = torch.floor(exact), torch.ceil(exact)
    clipped = exact.abs() > highest
    inside = (whole == low) | (whole == high) | clipped
    assert inside.all()
    assert whole.abs().max() <= highest
    for column in range(width):
        turned = whole.clone().to(torch.float32)
        turned[:, column] = torch.where(whole[:, column] == low[:, column], high[:, column], low[:, column])
        allowed = (turned.abs() <= highest).all(dim=1) & ~clipped[:, column]
        better = cost(turned, weight, scales, moments) < found * (1 - 1e-5) - 1e-7
        assert not (better & allowed.numpy()).any()


def test_on_average_it_finds_most_of_what_an_exhaustive_search_would():
    won = most = 0.0
    for seed in range(20):
        weight, scales, moments = problem(seed, rows=4, width=8, rank=3)
        naive = cost(nearest(weight, scales, 127), weight, scales, moments)
        won += (naive - cost(round_jointly(weight, scales, moments), weight, scales, moments)).sum()
        low = torch.floor(weight / scales[:, None])
        best = naive
        for choice in itertools.product((0.0, 1.0), repeat=weight.shape[1]):
            best = np.minimum(best, cost(low + torch.tensor(choice), weight, scales, moments))
        most += (naive - best).sum()
    assert won >= 0.6 * most  # a descent by single turns ends in a local optimum


def test_independent_inputs_round_to_nearest():
    weight, scales, _ = problem(1)
    whole = round_jointly(weight, scales, torch.eye(weight.shape[1])[None])
    assert torch.equal(whole, nearest(weight, scales, 127).to(torch.int32))


def test_inputs_that_are_always_zero_round_to_nearest():
    weight, scales, moments = problem(2)
    assert torch.equal(
        round_jointly(weight, scales, torch.zeros_like(moments)), nearest(weight, scales, 127).to(torch.int32)
    )


def test_weights_on_the_grid_stay():
    whole = torch.tensor([[3.0, -2.0, 0.0]])
    assert round_jointly(whole * 0.5, torch.tensor([0.5]), torch.ones(1, 3, 3)).tolist() == [[3, -2, 0]]


@pytest.mark.parametrize(
    ("weight", "moments"), [((2, 3), (1, 4, 4)), ((3, 4), (2, 4, 4)), ((2, 2, 2), (1, 4, 4)), ((2, 3), (1, 3, 4))]
)
def test_shapes_that_do_not_fit_are_an_error(weight, moments):
    with pytest.raises(UsageError, match="do not fit together"):
        round_jointly(torch.zeros(weight), torch.ones(weight[0]), torch.zeros(moments))
