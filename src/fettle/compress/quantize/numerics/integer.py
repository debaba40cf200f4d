"""Arithmetic on quantized tensors in integers alone: products, zero-point terms, and the way back to few bits.

For real x ≈ s_x (q_x − z_x) and w ≈ s_w (q_w − z_w), a product over K entries is s_x s_w · A with the accumulator

    A = Σ q_x q_w − z_w Σ q_x − z_x Σ q_w + K z_x z_w + q_b            (q_b: bias in steps of s_x s_w)

an exact integer (Jacob et al. 2018, section 2.3). The output is q_y = z_y + M A with M = s_x s_w / s_y, where M is a
real number, or an integer and a shift (section 2.2, rounding as in gemmlowp's fixedpoint.h).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fettle.core.errors import DataError, UsageError

_INT32 = torch.iinfo(torch.int32)
_EXACT_FLOAT64 = 2**53
_UNFOLDED_BYTES = 2**26
_LARGEST_BIAS = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """How a convolution slides: pairs (vertical, horizontal), and padding as (left, right, top, bottom)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def integer_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    x_zero: int = 0,
    weight_zero: torch.Tensor | int = 0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The accumulator A of a linear layer, exact.

    x: integers (..., K). weight: integers (O, K). weight_zero: one number, or (O,) per channel. bias: whole numbers
    (O,). Returns int32 (..., O); int64 where `accumulator` finds that int32 could overflow for some x of this type.
    Raises UsageError for types that are no integers and shapes that do not fit, DataError beyond 2^53.

    >>> x, w = torch.tensor([[200, 3]], dtype=torch.uint8), torch.tensor([[100, -7]], dtype=torch.int8)
    >>> integer_linear(x, w, x_zero=128), (200 - 128) * 100 + (3 - 128) * -7
    (tensor([[8075]], dtype=torch.int32), 8075)
    """
    _check_integers(x, weight)
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise UsageError(f"a product needs x (..., K) and weight (O, K), got {list(x.shape)} and {list(weight.shape)}")
    zero = _per_channel(weight_zero, weight)
    bias = _whole_bias(bias, weight)
    wide = accumulator(x.dtype, weight, x_zero=x_zero, weight_zero=zero, bias=bias)
    carrier = _carrier(wide, x.device)
    # Flattened, because torch multiplies integers fast in two dimensions only.
    rows = x.reshape(-1, x.shape[-1]).to(carrier)
    total = _whole(rows @ weight.to(carrier).t(), wide)
    constant = weight.shape[1] * x_zero * zero - x_zero * weight.to(torch.int64).sum(dim=1) + bias
    total += constant.to(wide)
    if bool(zero.any()):
        total -= rows.sum(dim=1)[:, None].to(wide) * zero.to(wide)
    return total.reshape(*x.shape[:-1], weight.shape[0])


def integer_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    x_zero: int = 0,
    weight_zero: torch.Tensor | int = 0,
    bias: torch.Tensor | None = None,
    window: Window = Window(),
) -> torch.Tensor:
    """The accumulator A of a convolution, exact.

    x: integers (N, C, H, W). weight: integers (O, C / groups, kh, kw). weight_zero: one number, or (O,) per channel.
    bias: whole numbers (O,). The border is padded with `x_zero`, the integer that stands for zero. Returns int32
    (N, O, H', W'), or int64 as `integer_linear`; raises as it does. On a CPU a 64 MiB buffer, or that of one image,
    is used besides the operands and the result.

    >>> x, w = torch.full((1, 1, 2, 2), 9, dtype=torch.uint8), torch.ones(1, 1, 3, 3, dtype=torch.int8)
    >>> integer_conv2d(x, w, x_zero=4, window=Window(padding=(1, 1, 1, 1))).flatten()
    tensor([20, 20, 20, 20], dtype=torch.int32)
    """
    _check_integers(x, weight)
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1] * window.groups:
        raise UsageError(
            "a convolution needs x (N, C, H, W) and weight (O, C / groups, kh, kw), "
            f"got {list(x.shape)} and {list(weight.shape)} with groups={window.groups}"
        )
    zero = _per_channel(weight_zero, weight)
    bias = _whole_bias(bias, weight)
    wide = accumulator(x.dtype, weight, x_zero=x_zero, weight_zero=zero, bias=bias)
    padded = F.pad(x.to(_carrier(wide, x.device)), window.padding, value=x_zero)
    total = _whole(_slide(padded, weight.to(padded.dtype), window), wide)
    fan_in = math.prod(weight.shape[1:])
    constant = fan_in * x_zero * zero - x_zero * weight.to(torch.int64).sum(dim=(1, 2, 3)) + bias
    total += constant.to(wide)[:, None, None]
    if bool(zero.any()):
        ones = padded.new_ones(window.groups, *weight.shape[1:])
        sums = _whole(_slide(padded, ones, window), wide)  # (N, groups, H', W')
        total -= sums.repeat_interleave(weight.shape[0] // window.groups, dim=1) * zero.to(wide)[:, None, None]
    return total


def accumulator(
    dtype: torch.dtype,
    weight: torch.Tensor,
    *,
    x_zero: int = 0,
    weight_zero: torch.Tensor | int = 0,
    bias: torch.Tensor | None = None,
) -> torch.dtype:
    """The integer type in which no sum can overflow, whatever the inputs of type `dtype` are: int32, or else int64.

    The bound on every partial sum of every term, with X = max |q_x| of the type and K entries per output channel:
    B = X Σ|q_w| + |z_w| K X + |z_x| Σ|q_w| + K |z_x z_w| + |q_b|. For 8-bit operands B < 2^31 up to K of about
    16 000 at worst. Raises DataError where B reaches 2^53, which float64 (used on devices that do not multiply
    integers) could not hold.

    >>> accumulator(torch.uint8, torch.full((1, 4608), 127)), accumulator(torch.int16, torch.full((1, 4608), 127))
    (torch.int32, torch.int64)
    """
    limits = torch.iinfo(dtype)
    reach = max(-limits.min, limits.max)
    magnitudes = weight.to(torch.int64).abs().flatten(1).sum(dim=1)
    zeros = _per_channel(weight_zero, weight).abs()
    fan_in = math.prod(weight.shape[1:])
    # In floating point, for the bound itself may exceed int64; a relative error of 2^-50 cannot mislead.
    bounds = magnitudes.double() * (reach + abs(x_zero)) + zeros.double() * fan_in * (reach + abs(x_zero))
    if bias is not None:
        bounds = bounds + bias.abs().double()
    bound = float(bounds.max()) if bounds.numel() else 0.0
    if bound >= _EXACT_FLOAT64:
        raise DataError(
            f"an accumulator may reach {bound:.3g}, and only below 2^53 is it exact: use fewer bits or fewer inputs"
        )
    return torch.int32 if bound <= _INT32.max else torch.int64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Multiplier:
    """A positive real number M ≈ mantissa · 2^(−31 − shift), one per output channel or one in all.

    mantissa: int64 in [2^30, 2^31), or 0 for an M too small to matter. shift: int64; negative shifts left.
    """

    mantissa: torch.Tensor
    shift: torch.Tensor


def multiplier_for(factor: float | torch.Tensor) -> Multiplier:
    """M as an integer and a shift, within a relative error of 2^-31 (Jacob et al. 2018, equation 6).

    factor: M, any shape. Below 2^-54 every accumulator times M rounds to zero, and the mantissa is 0. Raises
    DataError for zero, negative or not finite factors and for 2^30 and above, where all but zero saturate.

    >>> multiplier = multiplier_for(0.75)
    >>> multiplier.mantissa.item() == 3 * 2**29, multiplier.shift.item()
    (True, 0)
    """
    real = torch.as_tensor(factor, dtype=torch.float64)
    if not bool(((real > 0) & (real < 2.0**30)).all()):  # false for NaN too
        raise DataError(f"a rescaling factor must lie in (0, 2^30), got {real.flatten()[:4].tolist()}")
    fraction, exponent = torch.frexp(real)
    mantissa = torch.round(fraction * 2.0**31).to(torch.int64)
    shift = -exponent.to(torch.int64)
    # Rounding may reach 2^31, which the field of 31 bits does not hold.
    full = mantissa == 2**31
    mantissa, shift = torch.where(full, 2**30, mantissa), torch.where(full, shift - 1, shift)
    tiny = shift > 53
    return Multiplier(mantissa=torch.where(tiny, 0, mantissa), shift=torch.where(tiny, 0, shift))


def rescale(total: torch.Tensor, multiplier: Multiplier) -> torch.Tensor:
    """total · M in integers: saturating left shift, rounding doubling high multiplication, rounding right shift.

    total: integers below 2^53 that broadcast against the multiplier. Returns int64 within int32's range, at most 0.75
    (plus 2^-31 of the result) from the real product: the high product rounds half up, the shift half away from zero.
    For an int32 the result is that of gemmlowp's SaturatingRoundingDoublingHighMul and RoundingDivideByPOT; wider
    ones are multiplied in two halves by the same rule. Where M >= 1, a product of 2^30 and more may saturate anywhere
    from there up.

    >>> rescale(torch.tensor([100, -100, 3]), multiplier_for(0.25))
    tensor([ 25, -25,   1])
    """
    left, right = (-multiplier.shift).clamp_min(0), multiplier.shift.clamp_min(0)
    shifted = (total.to(torch.int64).clamp(_INT32.min, _INT32.max) << left).clamp(_INT32.min, _INT32.max)
    wide = torch.where(left > 0, shifted, total.to(torch.int64))
    # floor((wide · mantissa + 2^30) / 2^31), in halves of 31 bits because the product may exceed int64.
    low = (wide & (2**31 - 1)) * multiplier.mantissa
    high = (wide >> 31) * multiplier.mantissa + ((low + 2**30) >> 31)
    mask = (1 << right) - 1
    remainder, threshold = high & mask, (mask >> 1) + (high < 0)
    return ((high >> right) + (remainder > threshold)).clamp(_INT32.min, _INT32.max)


def requantize(
    total: torch.Tensor, factor: torch.Tensor | Multiplier, *, zero_point: int, lowest: int, highest: int
) -> torch.Tensor:
    """The output's integers q_y = clamp(z_y + round(M · total), lowest, highest), as int32.

    factor: M as a real number per channel (float64, ties to even), or as a `Multiplier` for arithmetic in integers
    alone. The two differ by at most one.

    >>> requantize(torch.tensor([-900, 90, 900]), torch.tensor(0.1), zero_point=3, lowest=-8, highest=7)
    tensor([-8,  7,  7], dtype=torch.int32)
    """
    if isinstance(factor, Multiplier):
        steps = rescale(total, factor) + zero_point
        return steps.clamp(lowest, highest).to(torch.int32)
    real = torch.round(total.to(torch.float64) * factor.to(torch.float64)) + zero_point
    return real.clamp(lowest, highest).to(torch.int32)


def _check_integers(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise UsageError(f"integer arithmetic needs integer tensors, got {tensor.dtype}: quantize first")


def _per_channel(zero: torch.Tensor | int, weight: torch.Tensor) -> torch.Tensor:
    value = torch.as_tensor(zero, dtype=torch.int64, device=weight.device)
    if tuple(value.shape) not in ((), (weight.shape[0],)):
        raise UsageError(f"weight_zero must be one number or {weight.shape[0]}, got shape {list(value.shape)}")
    return value.expand(weight.shape[0])


def _whole_bias(bias: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    if bias is None:
        return torch.zeros(weight.shape[0], dtype=torch.int64, device=weight.device)
    _check_integers(bias)
    if tuple(bias.shape) != (weight.shape[0],):
        raise UsageError(f"bias must have shape {[weight.shape[0]]}, got {list(bias.shape)}")
    return bias.to(torch.int64)


def _carrier(wide: torch.dtype, device: torch.device) -> torch.dtype:
    """The type to multiply in: integers where torch can, else float64, in which sums below 2^53 are exact."""
    return wide if device.type == "cpu" else torch.float64


def _whole(product: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    # Rounded, because a device may choose a transform with rounding errors far below a half.
    return product.round().to(wide) if product.is_floating_point() else product


def _slide(x: torch.Tensor, weight: torch.Tensor, window: Window) -> torch.Tensor:
    down, right = window.dilation
    if window.dilation != (1, 1):
        # torch has no dilated convolution of integers: spread the kernel with zeros instead.
        height, width = (weight.shape[2] - 1) * down + 1, (weight.shape[3] - 1) * right + 1
        spread = weight.new_zeros(*weight.shape[:2], height, width)
        spread[:, :, ::down, ::right] = weight
        weight = spread
    # On a CPU torch unfolds a whole batch at once, kh · kw copies of it.
    copies_bytes = x[:1].numel() * weight[0, 0].numel() * x.element_size()
    rows_at_once = max(1, _UNFOLDED_BYTES // max(copies_bytes, 1))
    parts = [
        F.conv2d(part, weight, stride=window.stride, groups=window.groups) for part in torch.split(x, rows_at_once)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def scale_with_room(scale: torch.Tensor, bias: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """Weight scales, coarser where |b| / (s_x s_w) would pass 2^30: half of int32, so that the products find room.

    A channel whose weights have all but vanished, as weight decay leaves them, has steps too fine for its bias; beside
    it, its weights do not matter. scale: (O,) or (); bias: (O,); input_scale: (). Returns float64 shaped like `scale`.

    >>> scale_with_room(torch.tensor([1e-12, 0.5]), torch.tensor([1.0, 1.0]), torch.tensor(1.0)).tolist()
    [9.313225746154785e-10, 0.5]
    """
    needed = bias.detach().double().abs() / (input_scale.double() * _LARGEST_BIAS)
    return torch.maximum(scale.double(), needed if scale.ndim else needed.max())
