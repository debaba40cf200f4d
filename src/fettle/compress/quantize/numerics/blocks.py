"""Weights in blocks along their rows, each block with a scale of its own: w ≈ (code − 2^(bits−1)) · scale."""

from __future__ import annotations

import torch

from fettle.compress.quantize.numerics.grid import least_squares_scale
from fettle.core.errors import DataError

# Shares of the scale that just holds a block's largest weight: with few steps it pays to cut that weight off.
_SHARES = {4: (0.65, 1.1), 7: (0.94, 1.02), 8: (0.97, 1.01)}
_TRIALS = 12


def largest_block(inputs: int, limit: int) -> int:
    """The largest power of two that divides a row of `inputs` weights and is at most `limit`.

    >>> largest_block(768, 512), largest_block(192, 128), largest_block(33, 128)
    (256, 64, 1)
    """
    return min(inputs & -inputs, limit)


def quantize_blocks(weight: torch.Tensor, *, bits: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and scales of the least squared error that was found: w ≈ (code − 2^(bits−1)) · scale.

    For each block, scales s between the two shares of max|w| / 2^(bits−1) are tried with both signs: the integers
    reach one step farther below zero than above, so the sign says which end of the block that step serves. Each trial
    rounds, takes the scale that fits the rounded integers best, s = Σ wq / Σ q², and rounds again.

    weight: (N, K) float32, K a multiple of `block`. Returns codes (N, K / block, block) uint8 and scales
    (N, K / block) float32. A block of zeros has the middle code and scale 1. Raises DataError for NaN or infinity.

    >>> codes, scales = quantize_blocks(torch.tensor([[-4.0, 2.0, 0.0, 3.5]]), bits=4, block=4)
    >>> codes.tolist(), scales.tolist()
    ([[[0, 12, 8, 15]]], [[0.5]])
    """
    if not torch.isfinite(weight).all():
        raise DataError("a weight to be quantized must be finite, got NaN or infinity")
    half = 2 ** (bits - 1)
    blocks = weight.detach().to(torch.float32).reshape(weight.shape[0], -1, block)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    unit = blocks / torch.where(largest > 0, largest, torch.ones_like(largest))  # (N, K / B, B), no square overflows
    best = torch.full_like(largest, 1 / half)
    best_error = torch.full_like(largest, torch.inf)
    for share in torch.linspace(*_SHARES[bits], _TRIALS).tolist():
        for start in (share / half, -share / half):
            scale = _fitted(unit, torch.full_like(largest, start), half)
            error = (_rounded(unit, scale, half) * scale - unit).square().sum(dim=-1, keepdim=True)
            better = error < best_error
            best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    codes = (_rounded(unit, best, half) + half).to(torch.uint8)
    scales = torch.where(largest > 0, best * largest, torch.ones_like(largest))
    return codes, scales.squeeze(-1)


def quantize_rows(weight: torch.Tensor, *, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One block a row, as integers around zero: w ≈ code · scale. Returns codes (K, N) int8 and scales (N,) float32.

    >>> codes, scales = quantize_rows(torch.tensor([[-4.0, 2.0, 0.0, 3.5]]), bits=4)
    >>> codes.T.tolist(), scales.tolist()
    ([[-8, 4, 0, 7]], [0.5])
    """
    codes, scales = quantize_blocks(weight, bits=bits, block=weight.shape[1])
    whole = (codes.squeeze(1).to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    return whole.t().contiguous(), scales.squeeze(1)


def _rounded(unit: torch.Tensor, scale: torch.Tensor, half: int) -> torch.Tensor:
    return torch.round(unit / scale).clamp(-half, half - 1)


def _fitted(unit: torch.Tensor, scale: torch.Tensor, half: int) -> torch.Tensor:
    return least_squares_scale(unit, _rounded(unit, scale, half), scale.squeeze(-1)).unsqueeze(-1)
