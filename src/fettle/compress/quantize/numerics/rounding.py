"""Round the weights of one output together, so that their errors cancel on the data instead of adding up."""

from __future__ import annotations

import torch

from fettle.core.errors import UsageError


def round_jointly(
    weight: torch.Tensor, scales: torch.Tensor, moments: torch.Tensor, *, highest: int = 127
) -> torch.Tensor:
    """Integers q that keep E‖(s q − w) x‖² small, each the floor or the ceiling of w / s.

    Row by row this is a quadratic problem in binary unknowns (Nagel et al. 2020, "Up or Down? Adaptive Rounding for
    Post-Training Quantization", equation 11). The paper relaxes it and descends on data; with the second moments of x
    in hand one weight's effect is known exactly, so here single weights are turned over, the best first, from
    rounding to nearest until none helps. The error never exceeds that of rounding to nearest.

    weight: (C, K) float; scales: (C,); moments: (G, K, K) with the mean of x xᵀ for each of G groups of C / G rows.
    highest: integers lie in [-highest, highest]. Returns (C, K) int32. Raises UsageError for shapes that do not fit.

    >>> correlated = torch.ones(1, 2, 2)
    >>> round_jointly(torch.tensor([[0.4, 0.4]]), torch.ones(1), correlated)  # 0 + 1 is nearer to 0.8 than 0 + 0
    tensor([[1, 0]], dtype=torch.int32)
    """
    groups, width = moments.shape[0], moments.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != width or weight.shape[0] % groups or moments.shape[1] != width:
        raise UsageError(f"weight {list(weight.shape)} and moments {list(moments.shape)} do not fit together")
    shape = (groups, weight.shape[0] // groups, width)
    step = scales.double().reshape(groups, -1, 1)  # (G, R, 1)
    exact = weight.double().reshape(shape) / step
    whole = torch.round(exact).clamp(-highest, highest)
    other = whole + torch.sign(exact - whole)
    turn = torch.where(other.abs() <= highest, other - whole, torch.zeros_like(whole)) * step  # (G, R, K), signed
    second = moments.double()
    diagonal = second.diagonal(dim1=1, dim2=2)[:, None, :]  # (G, 1, K)
    error = whole * step - weight.double().reshape(shape)
    slope = error @ second  # (G, R, K)
    smallest = 1e-9 * (error * slope).sum(dim=2).abs()  # (G, R): what is less is rounding error of this sum
    group = torch.arange(groups)[:, None]
    for _ in range(4 * width):
        gain = -(2 * turn * slope + turn.square() * diagonal)
        best, index = gain.max(dim=2)  # (G, R)
        helps = best > smallest
        if not helps.any():
            break
        change = torch.where(helps, turn.gather(2, index[..., None])[..., 0], torch.zeros_like(best))
        slope += change[..., None] * second[group, index]
        whole.scatter_add_(2, index[..., None], torch.round(change / step[..., 0])[..., None])
        turn.scatter_add_(2, index[..., None], -2 * change[..., None])  # next time it turns back
    return whole.reshape(weight.shape).to(torch.int32)
