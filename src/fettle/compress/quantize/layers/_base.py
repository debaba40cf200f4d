"""What the quantized layers share: the ranges they follow, the simulation, and the integers they run on."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn

from fettle.compress.quantize.numerics.grid import Grid, all_finite, grid_for, grid_for_range
from fettle.compress.quantize.numerics.integer import multiplier_for, requantize, scale_with_room
from fettle.compress.quantize.numerics.scheme import Scheme
from fettle.core.errors import DataError, InvalidInput, UsageError

Rescaling = Literal["float", "integer"]
WEIGHT = Scheme(bits=8, signed=True, symmetric=True, axis=0)
ACTIVATION = Scheme(bits=8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How one layer is quantized.

    weight: per tensor, or per output channel (axis 0). activation, output: per tensor; output None leaves it float.
    momentum: the share of each batch in the moving average of a range.
    rescaling: how accumulators become output integers, by a real number or by an integer and a shift.
    """

    weight: Scheme = WEIGHT
    activation: Scheme = ACTIVATION
    output: Scheme | None = None
    momentum: float = 0.01
    rescaling: Rescaling = "float"

    def __post_init__(self) -> None:
        if self.weight.axis not in (None, 0) or self.weight.group is not None:
            raise UsageError(
                "a layer's weight must be quantized per tensor or along axis 0: scales that change within a sum "
                f"cannot be taken out of an integer accumulator, got {self.weight}"
            )
        for scheme in (self.activation, self.output):
            if scheme is not None and (scheme.axis is not None or scheme.group is not None):
                raise UsageError(f"a layer's activations must be quantized per tensor, got {scheme}")
        if not 0 < self.momentum <= 1:
            raise UsageError(f"momentum must lie in (0, 1], got {self.momentum}")
        if self.rescaling not in ("float", "integer"):
            raise UsageError(f'rescaling must be "float" or "integer", got {self.rescaling!r}')


class MovingRange(nn.Module):
    """The range of an activation: r ← r + momentum · (r_batch − r) for both ends; the first batch sets them.

    Its state (ends, batches seen, whether frozen) is made of buffers, so it is saved with the model.
    """

    low: torch.Tensor
    high: torch.Tensor
    batches: torch.Tensor
    frozen: torch.Tensor

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(0.0))
        self.register_buffer("batches", torch.tensor(0))
        self.register_buffer("frozen", torch.tensor(False))

    def update(self, x: torch.Tensor) -> None:
        """Follow one batch; nothing where frozen or where the batch is empty.

        Raises DataError for NaN or infinity; then the range stays as it was.
        """
        if bool(self.frozen) or not x.numel():
            return
        seen = torch.stack(torch.aminmax(x.detach())).double()
        if not bool((seen.abs() <= torch.finfo(torch.float32).max).all()):  # false for NaN too
            raise DataError(f"a range must be finite in float32, got {seen.tolist()}: look for weights that diverge")
        # In float64, for the difference of two float32 ends may overflow.
        held = torch.stack([self.low, self.high]).double()
        share = self.momentum if bool(self.batches) else 1.0
        low, high = held + share * (seen - held)
        self.low.copy_(low)
        self.high.copy_(high)
        self.batches.add_(1)

    def grid(self, scheme: Scheme) -> Grid:
        """The grid for the range so far. Raises UsageError where no batch was seen."""
        if not bool(self.batches):
            raise UsageError(
                "a quantized layer must see data before it can quantize: call it in training mode on some batches, "
                "or load a calibrated state"
            )
        return grid_for_range(self.low, self.high, scheme)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Operands:
    """Everything a layer's integer arithmetic needs.

    weight: integers; weight_zero: (O,) or (); bias: int64 (O,) in steps of `step`, or None.
    step: s_x · s_w in float64, (O,) or (), the real value of 1 in the accumulator.
    """

    input: Grid
    weight: torch.Tensor
    weight_zero: torch.Tensor
    bias: torch.Tensor | None
    step: torch.Tensor
    output: Grid | None


class QuantizedLayer(nn.Module, ABC):
    """A layer with float weights that trains in simulation and evaluates in integers.

    Training: input, weight, bias and, where asked, output are rounded to their grids with straight-through
    gradients, while the ranges of input and output follow the batches until `freeze_ranges`. Evaluation: the input
    is quantized, multiplied and summed in integers (int32; int64 where the bit widths could overflow it), and the
    sum is rescaled to the output's integers, or to float where the output is not quantized.

    A channel whose bias would not fit into the accumulator beside its products gets coarser weight steps, in
    training and evaluation alike.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    source: ClassVar[type[nn.Module]]

    def __init__(self, module: Any, precision: Precision) -> None:
        super().__init__()
        weight, bias = module.weight, module.bias
        if weight.dtype not in (torch.float32, torch.float64):
            raise UsageError(f"a layer to be quantized must hold float32 or float64 weights, got {weight.dtype}")
        if not weight.numel():
            raise UsageError(f"a layer to be quantized must have weights, got shape {list(weight.shape)}")
        self.precision = precision
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self.input_range = MovingRange(precision.momentum).to(weight.device)
        self.output_range = None if precision.output is None else MovingRange(precision.momentum).to(weight.device)

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        *,
        weight: Scheme = WEIGHT,
        activation: Scheme = ACTIVATION,
        output: Scheme | None = None,
        momentum: float = 0.01,
        rescaling: Rescaling = "float",
    ) -> Self:
        """A quantized copy of a `source` in training mode, not calibrated yet; it stays as it is. See `Precision`.

        Raises UsageError for another kind of module, for a convolution's padding mode other than "zeros", for weights
        in half precision, and for schemes that integer accumulators rule out.
        """
        if not isinstance(module, cls.source):
            raise UsageError(f"{cls.__name__} is made from an nn.{cls.source.__name__}, got {type(module).__name__}")
        precision = Precision(
            weight=weight, activation=activation, output=output, momentum=momentum, rescaling=rescaling
        )
        return cls(module, precision)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Simulated in training mode, in integers otherwise.

        Raises InvalidInput for a shape or type that does not fit and for NaN or infinity, UsageError where there is
        no range yet.
        """
        x = self._checked(x)
        if self.training:
            self.input_range.update(x)
            return self._simulate(x)
        operands = self.operands()
        return self._real(self._integers(operands.input.quantize(x), operands), operands, x.dtype)

    def simulate(self, x: torch.Tensor) -> torch.Tensor:
        """The fake-quantized result in float, in either mode; the input's range stays as it is.

        Raises as `forward`, and UsageError where there is no range of the output yet.
        """
        return self._simulate(self._checked(x), observe=False)

    def forward_integers(self, q: torch.Tensor) -> torch.Tensor:
        """From the input's integers to the output's, without a float: what an integer-only device computes.

        q: integers of the input grid, shaped like the input. Returns the output grid's integers as int32, or the
        accumulators where the output is not quantized. With rescaling "float" one multiplication is in float64.
        """
        self._check_shape(q)
        return self._integers(q, self.operands())

    def freeze_ranges(self, frozen: bool = True) -> None:
        """Hold the ranges of input and output where they are, or with False let them follow the batches again."""
        for following in (self.input_range, self.output_range):
            if following is not None:
                following.frozen.fill_(frozen)

    def operands(self) -> Operands:
        """The integers of weight and bias and every grid, from the weights and ranges as they are now.

        Raises UsageError where there is no range yet, DataError for weights that are not finite.
        """
        entry = self.input_range.grid(self.precision.activation)
        grid = self._weight_grid(entry)
        step = entry.scale.double() * grid.scale.double()
        bias = None if self.bias is None else torch.round(self.bias.detach().double() / step).to(torch.int64)
        return Operands(
            input=entry,
            weight=grid.quantize(self.weight),
            weight_zero=grid.zero_point,
            bias=bias,
            step=step,
            output=self._output_grid(),
        )

    def extra_repr(self) -> str:
        shape = "×".join(str(size) for size in self.weight.shape)
        return f"{shape}, bias={self.bias is not None}, {self.precision}"

    def _simulate(self, x: torch.Tensor, *, observe: bool = True) -> torch.Tensor:
        entry = self.input_range.grid(self.precision.activation)
        grid = self._weight_grid(entry)
        bias: torch.Tensor | None = None
        if self.bias is not None:
            step = entry.scale.double() * grid.scale.double()
            rounded = (torch.round(self.bias.detach().double() / step) * step).to(self.bias.dtype)
            # Straight through; the bias never saturates.
            bias = rounded + (self.bias - self.bias.detach())
        y = self._multiply(entry.fake(x), grid.fake(self.weight), bias)
        if self.output_range is None:
            return y
        if observe:
            self.output_range.update(y)
        leaving = self._output_grid()
        return y if leaving is None else leaving.fake(y)

    def _integers(self, q: torch.Tensor, operands: Operands) -> torch.Tensor:
        total = self._accumulate(q, operands)
        leaving = operands.output
        if leaving is None:
            return total
        # An output has at most 16 bits: from 2^29 on every sum but zero saturates it anyway.
        factor = self._along_channels((operands.step / leaving.scale.double()).clamp(max=2.0**29))
        return requantize(
            total,
            multiplier_for(factor) if self.precision.rescaling == "integer" else factor,
            zero_point=int(leaving.zero_point),
            lowest=leaving.scheme.lowest,
            highest=leaving.scheme.highest,
        )

    def _real(self, whole: torch.Tensor, operands: Operands, dtype: torch.dtype) -> torch.Tensor:
        if operands.output is not None:
            return operands.output.dequantize(whole).to(dtype)
        return (whole.double() * self._along_channels(operands.step)).to(dtype)

    def _output_grid(self) -> Grid | None:
        if self.output_range is None or self.precision.output is None:
            return None
        return self.output_range.grid(self.precision.output)

    def _weight_grid(self, entry: Grid) -> Grid:
        """Min-max, coarser where the bias needs it: |b| / (s_x s_w) must stay below 2^30."""
        grid = grid_for(self.weight, self.precision.weight)
        if self.bias is None:
            return grid
        if not all_finite(self.bias):
            raise DataError("a bias to be quantized must be finite, got NaN or infinity")
        scale = scale_with_room(grid.scale, self.bias, entry.scale)
        if not bool((scale > grid.scale).any()):
            return grid
        if float(scale.max()) * grid.scheme.levels > torch.finfo(torch.float32).max:
            raise DataError(
                f"a bias of {float(self.bias.detach().abs().max()):.3g} cannot be added to products of an input with "
                f"step {float(entry.scale):.3g}: calibrate on data of the size the layer will see"
            )
        return Grid(scale=scale.to(torch.float32), zero_point=grid.zero_point, scheme=grid.scheme)

    def _checked(self, x: torch.Tensor) -> torch.Tensor:
        """In the weights' type: half precision, as autocast leaves it, is widened."""
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.to(self.weight.dtype)
        if x.dtype != self.weight.dtype:
            raise InvalidInput(f"the input of a quantized layer must be {self.weight.dtype}, got {x.dtype}")
        self._check_shape(x)
        if not all_finite(x):
            raise InvalidInput("the input of a quantized layer must be finite, got NaN or infinity")
        return x

    @abstractmethod
    def _check_shape(self, x: torch.Tensor) -> None:
        """Raise InvalidInput unless the input has a shape that fits."""

    @abstractmethod
    def _multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer in float."""

    @abstractmethod
    def _accumulate(self, q: torch.Tensor, operands: Operands) -> torch.Tensor:
        """The layer in integers, before rescaling."""

    @abstractmethod
    def _along_channels(self, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter of shape (O,) or () in a shape that broadcasts against the output."""


def same_padding(kernel: int, dilation: int) -> tuple[int, int]:
    """What padding="same" puts before and after, as torch does: the odd one after.

    >>> same_padding(4, 1)
    (1, 2)
    """
    total = dilation * (kernel - 1)
    return math.floor(total / 2), total - math.floor(total / 2)
