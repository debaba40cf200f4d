"""How numbers are quantized, as a value: how many levels, around what, and which entries share a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fettle.core.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """Uniform quantization to the integers [lowest, highest], described without any data.

    bits: 2 to 16.
    signed: [-2^(b-1), 2^(b-1) - 1], else [0, 2^b - 1].
    symmetric: the zero point is `middle`, 0 if signed and 2^(b-1) if not, so that x and -x are alike; else the zero
        point is found with the range.
    narrow: drop the lowest level, so that a symmetric range has as many levels below its middle as above it. None
        means yes for a signed symmetric scheme, no for any other.
    axis: one step size for each index along this axis (per channel); None for one in all (per tensor).
    group: one step size for each run of this many entries along `axis`, or along the last axis where `axis` is None,
        at every index of the other axes. Where the size is no multiple, the last group is shorter. This is the
        blocked quantization of ONNX's QuantizeLinear, opset 21.

    Raises UsageError for values that cannot mean anything.

    >>> Scheme(bits=8, signed=True, symmetric=True, axis=0)
    Scheme(bits=8, signed=True, symmetric=True, narrow=True, axis=0, group=None)
    >>> weights = Scheme(bits=4, signed=True, symmetric=True, group=32)
    >>> weights.lowest, weights.highest, weights.levels, weights.dtype
    (-7, 7, 15, torch.int8)
    >>> weights.parameter_shape((64, 100))
    (64, 4)
    """

    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    narrow: bool | None = None
    axis: int | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 16:
            raise UsageError(f"a scheme must have 2 to 16 bits, got {self.bits!r}")
        if self.narrow is None:
            object.__setattr__(self, "narrow", self.signed and self.symmetric)
        if self.narrow and not self.symmetric:
            raise UsageError("only a symmetric scheme can be narrow, got narrow=True with symmetric=False")
        if self.group is not None and self.group < 1:
            raise UsageError(f"a group must hold at least 1 entry, got {self.group}")

    @property
    def lowest(self) -> int:
        """The smallest integer."""
        bottom = -(1 << self.bits - 1) if self.signed else 0
        return bottom + 1 if self.narrow else bottom

    @property
    def highest(self) -> int:
        """The largest integer."""
        return (1 << self.bits - 1) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def levels(self) -> int:
        """How many integers there are."""
        return self.highest - self.lowest + 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric scheme."""
        return 0 if self.signed else 1 << self.bits - 1

    @property
    def dtype(self) -> torch.dtype:
        """The smallest integer type of torch that holds every level."""
        if self.bits <= 8:
            return torch.int8 if self.signed else torch.uint8
        return torch.int16 if self.signed else torch.uint16

    def parameter_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of scale and zero point for a tensor of this shape.

        () per tensor; (C,) per channel; per group, `shape` with ceil(size / group) in place of the size along the
        grouped axis. Raises UsageError where the tensor has no such axis.
        """
        if self.axis is None and self.group is None:
            return ()
        axis = self._axis_in(shape)
        if self.group is None:
            return (shape[axis],)
        return (*shape[:axis], math.ceil(shape[axis] / self.group), *shape[axis + 1 :])

    def _axis_in(self, shape: Sequence[int]) -> int:
        axis = -1 if self.axis is None else self.axis
        if not -len(shape) <= axis < len(shape):
            raise UsageError(f"the scheme's axis {axis} must be one of the tensor's, got shape {list(shape)}")
        return axis % len(shape)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """`x` as (parameters, entries that share one), in the order of `parameter_shape` flattened.

        A short last group is filled with zeros: every range holds zero and zero is exact, so they change neither a
        range nor an error sum.

        >>> Scheme(group=2).rows(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[1., 2.],
                [3., 0.]])
        """
        if self.axis is None and self.group is None:
            return x.reshape(1, -1)
        axis = self._axis_in(x.shape)
        if self.group is None:
            return x.movedim(axis, 0).reshape(x.shape[axis], x.numel() // max(x.shape[axis], 1))
        last = x.movedim(axis, -1)
        filled: torch.Tensor = torch.nn.functional.pad(last, (0, -x.shape[axis] % self.group))
        # Groups are moved back to their axis first, so that the rows' order is that of the parameters.
        grouped = filled.reshape(*filled.shape[:-1], filled.shape[-1] // self.group, self.group).movedim(-2, axis)
        return grouped.reshape(math.prod(grouped.shape[:-1]), self.group)

    def spread(self, parameter: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """A scale or zero point, of shape `parameter_shape(x.shape)`, in a shape that broadcasts against `x`.

        Raises UsageError where it has another shape.

        >>> Scheme(group=2).spread(torch.tensor([[0.1, 0.5]]), torch.zeros(1, 3))
        tensor([[0.1000, 0.1000, 0.5000]])
        """
        expected = self.parameter_shape(x.shape)
        if tuple(parameter.shape) != expected:
            raise UsageError(
                f"a tensor of shape {list(x.shape)} needs scales of shape {list(expected)} under {self}, "
                f"got {list(parameter.shape)}"
            )
        if not expected:
            return parameter
        axis = self._axis_in(x.shape)
        if self.group is None:
            return parameter.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        return parameter.repeat_interleave(self.group, dim=axis).narrow(axis, 0, x.shape[axis])
