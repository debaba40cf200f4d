"""The two parts of simulated quantization: a layer that rounds its weight, and a quantizer that rounds a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fettle.compress.quantize.numerics.grid import Grid, best_grid, learned_fake_quantize
from fettle.compress.quantize.numerics.scheme import Scheme


def weight_scheme(bits: int) -> Scheme:
    """How weights are rounded: symmetric around zero, a scale for each output channel."""
    return Scheme(bits=bits, signed=True, symmetric=True, axis=0)


class ActivationQuantizer(nn.Module):
    """Rounds to the grid of one tensor, uint8 unless told otherwise; gradients pass where it does not clip.

    scale: () float32; zero_point: () int32. layer: the layer that computed the tensor, for words.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, grid: Grid, *, layer: str) -> None:
        super().__init__()
        self.layer, self.scheme = layer, grid.scheme
        # Copies: what follows or learns changes them in place.
        self.register_buffer("scale", grid.scale.detach().clone())
        self.register_buffer("zero_point", grid.zero_point.clone())

    @property
    def grid(self) -> Grid:
        """The grid as it is now."""
        return Grid(scale=self.scale.detach(), zero_point=self.zero_point, scheme=self.scheme)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()  # autocast may hand over half precision, too coarse to choose among 256 steps
        # On a CPU a number is several times faster to clamp with; on a GPU reading it would wait for all work so far.
        zero = int(self.zero_point) if self.zero_point.device.type == "cpu" else self.zero_point
        return learned_fake_quantize(
            x, self.scale, zero, lowest=self.scheme.lowest, highest=self.scheme.highest, count=x[:1].numel()
        )


class SimulatedLayer(nn.Module):
    """A convolution or linear layer whose weight is rounded, symmetric per output channel, each time it runs.

    weight: (C, ...) float32, before rounding; bias: (C,) float32 or None; scales: (C,) float32.
    layer: its name in the model; operation: the ATen operation; settings: its arguments after the bias.
    integers: (C, ...) int32 where a step has chosen the rounding, else None: to nearest.
    shift: (C,) float32 that a correction adds to the bias, or None.
    """

    bias: nn.Parameter | None
    scales: torch.Tensor
    integers: torch.Tensor | None
    shift: torch.Tensor | None

    def __init__(
        self, *, layer: str, operation: Any, settings: tuple[Any, ...], weight: nn.Parameter, bias: nn.Parameter | None
    ) -> None:
        super().__init__()
        self.layer, self.operation, self.settings = layer, operation, settings
        self.weight = weight
        self.register_parameter("bias", bias)
        self.scheme = weight_scheme(8)
        self.register_buffer("scales", torch.ones(weight.shape[0]))
        self.register_buffer("integers", None)
        self.register_buffer("shift", None)

    def set_bits(self, bits: int) -> None:
        """Choose how finely the weight is rounded, with the scales of least squared error."""
        self.scheme = weight_scheme(bits)
        self.scales = best_grid(self.weight, self.scheme).scale

    @property
    def highest(self) -> int:
        """The largest integer of the weight; the smallest is its negative."""
        return self.scheme.highest

    @property
    def grid(self) -> Grid:
        """The grid of the weight as it is now."""
        scales = self.scales.detach()
        return Grid(scale=scales, zero_point=torch.zeros_like(scales, dtype=torch.int32), scheme=self.scheme)

    def channels(self, rank: int) -> list[int]:
        """The shape that lays (C,) along the channels of an output of this rank."""
        axis = rank - 1 if self.operation == torch.ops.aten.linear.default else 1
        return [self.weight.shape[0] if index == axis else 1 for index in range(rank)]

    def shift_bias(self, amount: torch.Tensor) -> None:
        """Add (C,) to what corrects the bias; a layer without a bias gets one by it."""
        self.shift = amount.detach().clone() if self.shift is None else self.shift + amount

    def shifted_bias(self) -> torch.Tensor | None:
        """The bias as it will be deployed, (C,) or None."""
        if self.bias is None or self.shift is None:
            return self.shift if self.bias is None else self.bias
        return self.bias + self.shift

    def deployed(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight in integers, (C, ...) int8 of step `scales`, and the bias in float."""
        bias = self.shifted_bias()
        whole = self.integers
        if whole is None:
            whole = self.grid.quantize(self.weight)
        return whole.to(torch.int8), None if bias is None else bias.detach()

    def rounded_weight(self) -> torch.Tensor:
        """The weight as it will be deployed, float; gradients pass where it does not clip."""
        if self.integers is not None:
            return self.integers * self.scales.reshape(-1, *[1] * (self.weight.ndim - 1))
        return self.round_weight(self.weight, self.scales)

    def round_weight(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """A weight (C, ...) rounded to these scales (C,), with gradients for it, and for them where they learn."""
        return learned_fake_quantize(weight, scales, 0, lowest=self.scheme.lowest, highest=self.scheme.highest, axis=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(x, self.rounded_weight(), self.shifted_bias())

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer's operation with this weight and bias."""
        return self.operation(x, weight, bias, *self.settings)  # type: ignore[no-any-return]
