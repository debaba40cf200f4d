"""Uniform affine quantization: q = clamp(round(x / s) + z, lowest, highest), x' = (q − z) · s.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fettle.core.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """The parameters of one tensor. `zero_point` lies in the range, so zero is exact.

    >>> Affine(scale=0.5, zero_point=2, lowest=0, highest=255).fake(torch.tensor([-2.0, 0.0, 0.6, 200.0]))
    tensor([ -1.0000,   0.0000,   0.5000, 126.5000])
    """

    scale: float
    zero_point: int
    lowest: int
    highest: int

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Integers as int32, of any shape. Ties round to even, as every runtime does."""
        steps = torch.round(x / self.scale) + self.zero_point
        return steps.clamp(self.lowest, self.highest).to(torch.int32)

    def dequantize(self, q: torch.Tensor) -> torch.Tensor:
        """Back to float32."""
        return (q - self.zero_point).to(torch.float32) * self.scale

    def fake(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize and dequantize."""
        return self.dequantize(self.quantize(x))


def affine_for_range(low: float, high: float, *, lowest: int = 0, highest: int = 255) -> Affine:
    """Parameters that cover [low, high] extended to hold zero.

    A range of zero width at zero gives scale 1. A width too small for float32 is widened to the smallest normal
    scale. Raises DataError for NaN, low > high, and what float32 cannot hold.

    >>> affine_for_range(-1.0, 1.0)
    Affine(scale=0.00784313725490196, zero_point=128, lowest=0, highest=255)
    >>> affine_for_range(0.0, 0.0).scale
    1.0
    """
    largest = torch.finfo(torch.float32).max
    if not -largest <= low <= high <= largest:  # false for NaN too
        raise DataError(f"a quantization range must be finite in float32 with low <= high, got {low=} and {high=}")
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return Affine(scale=1.0, zero_point=max(lowest, min(0, highest)), lowest=lowest, highest=highest)
    # Dividing before subtracting: high - low itself may overflow.
    scale = high / (highest - lowest) - low / (highest - lowest)
    scale = max(scale, torch.finfo(torch.float32).tiny)
    zero_point = lowest - round(low / scale)
    return Affine(scale=scale, zero_point=max(lowest, min(zero_point, highest)), lowest=lowest, highest=highest)


def channel_scales(weight: torch.Tensor, *, axis: int, highest: int = 127) -> torch.Tensor:
    """Symmetric scales per channel that minimize each channel's squared error.

    weight: any shape with C entries along `axis`; returns (C,) float32. Scales from 0.8 to 1 times the one that
    just holds the largest value are tried; a channel of zeros gets scale 1. Raises DataError for NaN or infinity.

    >>> channel_scales(torch.tensor([[1.27, -0.5], [0.0, 0.0]]), axis=0)
    tensor([0.0100, 1.0000])
    """
    if not torch.isfinite(weight).all():
        raise DataError("a weight to be quantized must be finite, got NaN or infinity")
    rows = weight.detach().movedim(axis, 0).reshape(weight.shape[axis], -1).to(torch.float32)  # (C, K)
    largest = rows.abs().amax(dim=1) / highest  # (C,)
    full = torch.where(largest > 0, largest.clamp_min(torch.finfo(torch.float32).tiny), torch.ones_like(largest))
    best, best_error = full.clone(), torch.full_like(full, torch.inf)
    for share in torch.linspace(1.0, 0.8, 21).tolist():
        scales = full * share
        steps = torch.round(rows / scales[:, None]).clamp(-highest, highest)
        error = (steps * scales[:, None] - rows).square().sum(dim=1)  # (C,)
        better = error < best_error
        best = torch.where(better, scales, best)
        best_error = torch.where(better, error, best_error)
    return best


def quantize_channels(weight: torch.Tensor, scales: torch.Tensor, *, axis: int, highest: int = 127) -> torch.Tensor:
    """Symmetric int8 values of `weight`, same shape; `scales`: (C,) along `axis`."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    steps = torch.round(weight.detach().to(torch.float32) / scales.reshape(shape))
    return steps.clamp(-highest, highest).to(torch.int8)
