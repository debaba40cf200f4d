"""The grid of representable numbers: q = clamp(round(x / s) + z, lowest, highest), x' = (q − z) · s.

s is the scale (step size) and z the zero point, an integer of the range, so that zero is exact. Ties are rounded to
even, as every runtime does.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".
Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons" (straight-through estimator).
Esser et al. 2020, "Learned Step Size Quantization" (LSQ).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from fettle.compress.quantize.numerics.scheme import Scheme
from fettle.core.errors import DataError, UsageError

_LARGEST = torch.finfo(torch.float32).max
# A denormal scale would be flushed to zero by engines that run with denormals off.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """A scheme with its parameters.

    scale: float32, positive and finite, of shape `scheme.parameter_shape(x.shape)` for the tensors x it is for:
        () per tensor, (C,) per channel, one per group.
    zero_point: int32, same shape, within [lowest, highest].

    Raises UsageError for parameters that break these rules.

    >>> grid = grid_for(torch.tensor([-1.0, 0.0, 2.0]), Scheme(bits=2))
    >>> grid.quantize(torch.tensor([-1.0, 0.0, 0.4, 9.0]))
    tensor([0, 1, 1, 3], dtype=torch.uint8)
    >>> grid.fake(torch.tensor([-1.0, 0.0, 0.4, 9.0]))
    tensor([-1.,  0.,  0.,  2.])
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    scheme: Scheme

    def __post_init__(self) -> None:
        scale, zero = self.scale.detach(), self.zero_point
        if scale.dtype != torch.float32 or zero.dtype != torch.int32 or scale.shape != zero.shape:
            raise UsageError(
                "a grid needs scales in float32 and zero points in int32 of one shape, "
                f"got {scale.dtype} {list(scale.shape)} and {zero.dtype} {list(zero.shape)}"
            )
        if not bool(((scale > 0) & (scale <= _LARGEST)).all()):
            raise UsageError(f"a grid needs positive finite scales, got {scale.min().item()} to {scale.max().item()}")
        if not bool(((zero >= self.scheme.lowest) & (zero <= self.scheme.highest)).all()):
            raise UsageError(
                f"zero points must lie in [{self.scheme.lowest}, {self.scheme.highest}], "
                f"got {zero.min().item()} to {zero.max().item()}"
            )

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest number of a grid per tensor. Raises UsageError for another."""
        if self.scale.ndim:
            raise UsageError(
                f"only a grid per tensor has one pair of ends, got scales of shape {list(self.scale.shape)}"
            )
        scale, zero = float(self.scale), int(self.zero_point)
        return (self.scheme.lowest - zero) * scale, (self.scheme.highest - zero) * scale

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Integers of `scheme.dtype`, in the shape of `x`. What lies outside the range, infinity too, saturates.

        Raises DataError for NaN, which has no integer.
        """
        scale, zero = self._against(x)
        wide = x.detach().to(torch.promote_types(x.dtype, scale.dtype))
        # In place on the quotient: on large tensors each fresh result costs more than the arithmetic.
        steps = (wide / scale.detach()).round_().add_(zero).clamp_(self.scheme.lowest, self.scheme.highest)
        # The steps are bounded, so their sum is NaN only where one of them is: one pass without a mask.
        if math.isnan(float(steps.sum())):
            raise DataError("NaN cannot be quantized: find where it comes from, or replace it (torch.nan_to_num)")
        return steps.to(self.scheme.dtype)

    def dequantize(self, q: torch.Tensor) -> torch.Tensor:
        """Back to float32. `q`: any integer type."""
        scale, zero = self._against(q)
        return (q.to(torch.int32) - zero).to(torch.float32) * scale.detach()

    def fake(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize and dequantize in the type of `x`, differentiable: see `fake_quantize`. NaN stays NaN."""
        scale, zero = self._against(x)
        return fake_quantize(x, scale, zero, lowest=self.scheme.lowest, highest=self.scheme.highest)

    def to(self, device: torch.device | str) -> Grid:
        """The same grid with its tensors on a device."""
        return Grid(scale=self.scale.to(device), zero_point=self.zero_point.to(device), scheme=self.scheme)

    def _against(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | int]:
        """Scale and zero point in shapes that broadcast against `x`."""
        scale = self.scheme.spread(self.scale, x)
        if self.scheme.symmetric:
            return scale, self.scheme.middle
        # A number instead of a tensor of one entry: clamping to numbers is several times faster.
        return scale, int(self.zero_point) if scale.ndim == 0 else self.scheme.spread(self.zero_point, x)


def grid_for(x: torch.Tensor, scheme: Scheme) -> Grid:
    """The grid whose range just holds the smallest and the largest entry, and zero.

    Constants and zeros: see `grid_for_range`. Raises DataError for a tensor without entries, which has no range, for
    NaN and infinity, and for a tensor that is not floating point; UsageError where it lacks the scheme's axis.

    >>> grid_for(torch.tensor([[1.27, -0.5], [0.0, 0.0]]), Scheme(signed=True, symmetric=True, axis=0)).scale
    tensor([0.0100, 1.0000])
    """
    rows = _finite_rows(x, scheme)
    low, high = torch.aminmax(rows, dim=1)
    shape = scheme.parameter_shape(x.shape)
    return grid_for_range(low.reshape(shape), high.reshape(shape), scheme)


def grid_for_range(low: float | torch.Tensor, high: float | torch.Tensor, scheme: Scheme) -> Grid:
    """The grid that covers [low, high], extended to hold zero.

    s = (high − low) / (levels − 1) and z = lowest − round(low / s), or for a symmetric scheme
    s = max(−low, high) / (highest − middle) and z = middle.

    low, high: numbers, or tensors of the shape of the parameters. As z is whole, the ends of an affine range may each
    move by half a step. A range of zero width at zero gets scale 1. A range too small for a normal float32 scale is
    widened to the smallest one. A range so wide that its outermost level would overflow float32 is shrunk until that
    level is finite, by one step at most. Raises DataError for NaN, infinity and low > high; UsageError for shapes
    that cannot be the scheme's.

    >>> grid_for_range(-1.0, 1.0, Scheme()).zero_point.item()
    128
    >>> grid_for_range(0.0, 0.0, Scheme()).scale.item()
    1.0
    """
    low, high = (torch.as_tensor(end).detach().to(torch.float64) for end in (low, high))
    if low.shape != high.shape or (low.ndim == 0) != (scheme.axis is None and scheme.group is None):
        raise UsageError(
            f"low and high must have the shape of the parameters under {scheme}, "
            f"got {list(low.shape)} and {list(high.shape)}"
        )
    if not bool(((low >= -_LARGEST) & (low <= high) & (high <= _LARGEST)).all()):  # false for NaN too
        raise DataError(
            "a quantization range must be finite in float32 with low <= high, "
            f"got {low.flatten()[:4].tolist()} to {high.flatten()[:4].tolist()}"
        )
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    width, steps = high - low, scheme.levels - 1
    if scheme.symmetric:
        width, steps = torch.maximum(-low, high), scheme.highest - scheme.middle
    scale = (width / steps).clamp_min(_SMALLEST_SCALE)
    zero = torch.full_like(low, scheme.middle)
    if not scheme.symmetric:
        zero = (scheme.lowest - torch.round(low / scale)).clamp(scheme.lowest, scheme.highest)
        zero = torch.where(width == 0, 0.0, zero)
    scale = _rounded_up(torch.where(width == 0, 1.0, scale))
    zero = zero.to(torch.int32)
    return Grid(scale=_without_overflow(scale, zero, scheme), zero_point=zero, scheme=scheme)


def best_grid(x: torch.Tensor, scheme: Scheme, *, smallest_share: float = 0.8, tries: int = 21) -> Grid:
    """The grid with the smallest squared error among the min-max range and ranges shrunk toward zero.

    For every parameter alone, E(c) = Σ (x − x'(c · low, c · high))² is compared for `tries` shares c from 1 down to
    `smallest_share`: clipping a few outliers pays for finer steps. Raises as `grid_for`.

    >>> x = torch.cat([torch.linspace(-1, 1, 1000), torch.tensor([1.2])])
    >>> float(best_grid(x, Scheme(bits=4, signed=True, symmetric=True)).scale) < 1.2 / 7
    True
    """
    if tries < 1 or not 0 < smallest_share <= 1:
        raise UsageError(f"best_grid needs tries >= 1 and 0 < smallest_share <= 1, got {tries=}, {smallest_share=}")
    rows = _finite_rows(x, scheme)  # (p, n)
    ends = torch.stack(torch.aminmax(rows, dim=1))  # (2, p)
    shares = torch.linspace(1.0, smallest_share, tries, dtype=ends.dtype, device=ends.device)
    low, high = (ends[:, None, :] * shares[:, None]).flatten(1)  # (tries · p,)
    flat = replace(scheme, axis=0, group=None)
    tried = grid_for_range(low, high, flat)
    scales, zeros = tried.scale.reshape(tries, -1), tried.zero_point.reshape(tries, -1)
    # Relative to the largest entry, so that no square overflows in float32.
    unit = 1.0 / ends.abs().amax(dim=0).clamp_min(_SMALLEST_SCALE)
    errors = torch.stack(
        [
            _relative_errors(rows, Grid(scale=scale, zero_point=zero, scheme=flat), unit)
            for scale, zero in zip(scales, zeros, strict=True)
        ]
    )
    best = errors.argmin(dim=0, keepdim=True)  # (1, p)
    shape = scheme.parameter_shape(x.shape)
    return Grid(
        scale=scales.gather(0, best).reshape(shape), zero_point=zeros.gather(0, best).reshape(shape), scheme=scheme
    )


def least_squares_scale(rows: torch.Tensor, whole: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """The scale s that minimizes Σ (w − s q)² for given integers q: s = Σ w q / Σ q².

    rows: w, (..., K); whole: q, whole numbers in a floating type, same shape. Returns (...,): `otherwise`, of that
    shape, where all integers are zero. Zhang et al. 2018, "LQ-Nets", section 3.2.

    >>> least_squares_scale(torch.tensor([0.9, 2.2]), torch.tensor([1.0, 2.0]), torch.tensor(1.0))
    tensor(1.0600)
    """
    square = whole.square().sum(dim=-1)
    return torch.where(square > 0, (rows * whole).sum(dim=-1) / square.clamp_min(1.0), otherwise)


def refit_scales(weight: torch.Tensor, scales: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """For each channel the scale of least squared error with the integers as they are, (C,).

    One half-step of the alternation that fits integers and scale to each other: repeated while the weights move, it
    follows the optimum. A channel whose integers are all zero keeps its scale. weight: (C, ...); scales: (C,);
    scheme: symmetric and signed, along axis 0. See `least_squares_scale`.

    >>> two = torch.tensor([[0.9, 2.2], [0.0, 0.0]])
    >>> refit_scales(two, torch.tensor([1.0, 1.0]), Scheme(bits=4, signed=True, symmetric=True, axis=0))
    tensor([1.0600, 1.0000])
    """
    rows, held = weight.detach().flatten(1), scales.detach()  # (C, K)
    whole = (rows / held[:, None]).round_().clamp_(scheme.lowest, scheme.highest)
    fitted = least_squares_scale(rows, whole, held)
    return torch.where(fitted >= _SMALLEST_SCALE, fitted, held)


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | int,
    *,
    lowest: int,
    highest: int,
    axis: int | None = None,
) -> torch.Tensor:
    """Quantize and dequantize in ordinary tensor operations, with gradients for `x` and for `scale`.

    With v = x / s, bounds l = lowest − z and h = highest − z, and c = clamp(v, l, h):

        x'      = round(c) · s
        ∂x'/∂x  = 1 where l <= v <= h, else 0                        (straight-through)
        ∂x'/∂s  = round(v) − v where l <= v <= h, else l or h        (LSQ, equation 3)

    x: any shape and floating type; the result has both. scale: positive, of a shape that broadcasts against `x`, or
    (C,) along `axis`. zero_point: whole numbers, shaped like `scale`, or one number, which is faster. Keep a learned
    scale positive: clamp it after each step of the optimizer. The forward value equals `Grid.dequantize(quantize(x))`
    bit for bit in float32. Infinity saturates; NaN stays NaN with gradient 0.

    >>> x, s = torch.tensor([-9.0, 0.3, 0.9]).requires_grad_(), torch.tensor(0.5).requires_grad_()
    >>> y = fake_quantize(x, s, 0, lowest=-2, highest=1)
    >>> y.sum().backward()
    >>> y.detach(), x.grad, s.grad
    (tensor([-1.0000,  0.5000,  0.5000]), tensor([0., 1., 0.]), tensor(-0.6000))
    """
    if axis is not None:
        shape = [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
        scale = scale.reshape(shape)
        zero_point = zero_point.reshape(shape) if isinstance(zero_point, torch.Tensor) else zero_point
    step = scale.detach()
    steps = x.detach().to(torch.promote_types(x.dtype, step.dtype)) / step
    low, high = lowest - zero_point, highest - zero_point
    if not torch.is_grad_enabled() or not (x.requires_grad or scale.requires_grad):
        return steps.clamp_(low, high).round_().mul_(step).to(x.dtype)  # type: ignore[arg-type]  # both of one kind
    clipped = steps.clamp(low, high)  # type: ignore[arg-type]
    rounded = torch.round(clipped)
    result = (rounded * step).to(x.dtype)
    # Each gradient rides on a term that is zero going forward, so the value stays exact and nothing that overflowed
    # (x / s may) is multiplied by zero on the way back.
    if x.requires_grad:
        passed = torch.where(clipped == steps, x, 0.0)
        result = result + (passed - passed.detach())
    if scale.requires_grad:
        slope = rounded - torch.where(clipped == steps, clipped, 0.0)
        result = result + (slope * (scale - step)).to(x.dtype)
    return result


def learned_fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | int,
    *,
    lowest: int,
    highest: int,
    axis: int | None = None,
    count: int | None = None,
) -> torch.Tensor:
    """`fake_quantize` whose scale learns at the pace of the weights: its gradient is times 1 / √(n · highest).

    n is `count`: the weights that share a scale (the default, entries of `x` per entry of `scale`), or for an
    activation its features, that is its entries without the batch. A scale that requires no gradient is simply not
    learned. Esser et al. 2020, section 2.2.
    """
    n = count if count is not None else x.numel() // max(scale.numel(), 1)
    if scale.requires_grad and torch.is_grad_enabled():
        fixed = scale.detach()
        scale = fixed + (scale - fixed) * (1.0 / math.sqrt(max(n, 1) * highest))
    return fake_quantize(x, scale, zero_point, lowest=lowest, highest=highest, axis=axis)


def initial_scale(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Where LSQ starts to learn: 2 · mean|x| / √highest for each parameter; 1 where all entries are zero.

    Raises as `grid_for`. Esser et al. 2020, section 2.1.

    >>> initial_scale(torch.tensor([[3.0, -3.0], [0.0, 0.0]]), Scheme(bits=4, signed=True, symmetric=True, axis=0))
    tensor([2.2678, 1.0000])
    """
    mean = _finite_rows(x, scheme).double().abs().mean(dim=1)
    scale = (2.0 * mean / math.sqrt(scheme.highest)).to(torch.float32)
    scale = torch.where(scale > 0, scale.clamp(_SMALLEST_SCALE, _LARGEST), 1.0)
    return scale.reshape(scheme.parameter_shape(x.shape))


def all_finite(x: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity; one pass without a mask where that is so.

    >>> all_finite(torch.tensor([3e38, 3e38])), all_finite(torch.tensor([0.0, torch.nan]))
    (True, False)
    """
    # A finite sum rules both out. An infinite one may be mere overflow, so look again.
    return math.isfinite(float(x.detach().sum())) or bool(torch.isfinite(x).all())


def _finite_rows(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    if not x.is_floating_point():
        raise DataError(f"a tensor to be quantized must be floating point, got {x.dtype}")
    scheme.parameter_shape(x.shape)
    if not x.numel():
        raise DataError(f"a tensor without entries has no range to quantize, got shape {list(x.shape)}")
    if not all_finite(x):
        raise DataError("a tensor to be quantized must be finite, got NaN or infinity")
    return scheme.rows(x.detach())


def _relative_errors(rows: torch.Tensor, grid: Grid, unit: torch.Tensor) -> torch.Tensor:
    """The norm of each row's error, (p,), in units of 1 / `unit`."""
    error = grid.fake(rows).sub_(rows).mul_(unit[:, None])
    norm: torch.Tensor = torch.linalg.vector_norm(error, dim=1)
    return norm


def _rounded_up(scale: torch.Tensor) -> torch.Tensor:
    """To float32, never down: else the largest entry would lie outside its own range and get no gradient."""
    near = scale.to(torch.float32)
    return torch.where(near.double() < scale, torch.nextafter(near, torch.full_like(near, torch.inf)), near)


def _without_overflow(scale: torch.Tensor, zero: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Lower the scales whose outermost level would round to infinity."""
    reach = torch.maximum(scheme.highest - zero, zero - scheme.lowest).to(torch.float32)
    limit = torch.full_like(reach, _LARGEST) / reach
    limit = torch.where(limit * reach <= _LARGEST, limit, torch.nextafter(limit, torch.zeros_like(limit)))
    return torch.minimum(scale, limit)
