from __future__ import annotations

import pytest
import torch

from fettle.compress.quantize.calibrate.histogram_mse import HistogramMSE
from fettle.compress.quantize.calibrate.min_max import MinMax


def quantization_error(values, low, high, levels=256):
    """The definition, on all values at once: mean square of x - q(x)."""
    scale = (high - low) / (levels - 1)
    zero = torch.round(torch.tensor(-low / scale, dtype=torch.float64))
    steps = (torch.round(values.double() / scale) + zero).clamp(0, levels - 1)
    return ((steps - zero) * scale - values.double()).square().mean().item()


def best_error(values, levels=256, shares=None):
    """Brute force over both ends."""
    low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
    shares = shares or torch.linspace(0.3, 1.0, 36).tolist()
    lows = [low * share for share in shares] if low < 0 else [0.0]
    highs = [high * share for share in shares] if high > 0 else [0.0]
    return min(quantization_error(values, left, right, levels) for left in lows for right in highs)


def full_error(values, levels=256):
    return quantization_error(values, min(values.min().item(), 0), max(values.max().item(), 0), levels)


DRAWS = {
    "normal": lambda g: torch.randn(4000, generator=g),
    "relu": lambda g: torch.randn(4000, generator=g).relu(),
    "negative": lambda g: -torch.randn(4000, generator=g).abs() - 1,
    "heavy tail": lambda g: torch.randn(4000, generator=g) ** 5,
    "outlier": lambda g: torch.cat([torch.randn(4000, generator=g), torch.tensor([100.0])]),
    "uniform": lambda g: torch.rand(4000, generator=g) * 7 - 2,
    "two values": lambda g: torch.randint(0, 2, (4000,), generator=g) * 3.0 - 1,
}
drawn = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


@drawn
def test_it_is_as_good_as_brute_force(see, draw, generator):
    values = draw(generator)
    low, high = see(HistogramMSE(), *values.split(100)).range()
    slack = full_error(values) * 1e-3
    assert quantization_error(values, low, high) <= max(best_error(values) * 1.1, 1e-12) + slack


@drawn
@pytest.mark.parametrize("levels", [4, 16, 64])
def test_with_few_levels_too(see, draw, levels, generator):
    values = draw(generator)
    low, high = see(HistogramMSE(levels), *values.split(100)).range()
    shares = torch.linspace(0.02, 1.0, 25).tolist()
    slack = full_error(values, levels) * 1e-2
    assert quantization_error(values, low, high, levels) <= best_error(values, levels, shares) * 1.15 + slack


@pytest.mark.parametrize(("levels", "clip"), [(4, 1.49), (8, 2.05), (16, 2.58)])
def test_a_normal_distribution_is_clipped_where_theory_says(see, levels, clip, generator):
    """Half the spread of the best uniform quantizer of N(0, 1), from Max 1960, table II: (L - 1) / 2 · Δ."""
    values = torch.randn(200_000, generator=generator)
    low, high = see(HistogramMSE(levels), values).range()
    # The grid must hold zero, so an even number of levels is shifted by half a step.
    step = 2 * clip / (levels - 1)
    assert (high - low) / 2 == pytest.approx(clip, abs=step * 0.6)


@drawn
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_split_into_batches_hardly_matters(see, draw, size, generator):
    values = draw(generator)[:1500]
    low, high = see(HistogramMSE(), values).range()
    found = see(HistogramMSE(), *values.split(size)).range()
    width = values.max() - values.min()
    # Neighboring candidates lie 2 percent of an end apart, and a bin is a 2048th of up to 4 times the range.
    assert abs(found[0] - low) <= abs(low) * 0.08 + width / 256
    assert abs(found[1] - high) <= abs(high) * 0.08 + width / 256


def test_more_levels_clip_less(see, generator):
    values = torch.randn(50_000, generator=generator)
    highs = [see(HistogramMSE(levels), values).range()[1] for levels in (4, 16, 64, 256, 65536)]
    assert highs == sorted(highs)


def test_one_outlier_is_clipped_only_by_the_histogram(see, generator):
    values = torch.cat([torch.randn(20_000, generator=generator), torch.tensor([40.0])])
    assert see(MinMax(), values).range()[1] == 40.0
    assert see(HistogramMSE(), values).range()[1] < 39.5
