"""A linear layer in simulated, then in true integer arithmetic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fettle.compress.quantize.layers._base import Operands, QuantizedLayer
from fettle.compress.quantize.numerics.integer import integer_linear
from fettle.core.errors import InvalidInput


class QuantizedLinear(QuantizedLayer):
    """y = x Wᵀ + b, with x (..., in) and W (out, in), 2 to 16 bits for each of input, weight and output.

    With a quantized output, evaluation differs from `simulate` by at most one step of the output grid, whichever the
    rescaling: both round the same real number, the simulation after a sum in float32. That holds while the sum's own
    error is below 0.7 steps; at 8 bits only terms that cancel to a ten-thousandth of their size come near. A float
    output differs by that float32 error alone.

    >>> from fettle.compress.quantize.numerics.scheme import Scheme
    >>> layer = QuantizedLinear.from_float(nn.Linear(4, 2), output=Scheme(bits=8))
    >>> x = torch.linspace(-1, 1, 32).reshape(8, 4)
    >>> simulated = layer(x).detach()
    >>> step = float(layer.operands().output.scale)
    >>> bool(((layer.eval()(x) - simulated).abs() <= 1.001 * step).all())
    True
    """

    source = nn.Linear

    def _check_shape(self, x: torch.Tensor) -> None:
        if x.ndim < 1 or x.shape[-1] != self.weight.shape[1]:
            raise InvalidInput(f"the input must have shape [..., {self.weight.shape[1]}], got {list(x.shape)}")

    def _multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight, bias)

    def _accumulate(self, q: torch.Tensor, operands: Operands) -> torch.Tensor:
        return integer_linear(
            q,
            operands.weight,
            x_zero=int(operands.input.zero_point),
            weight_zero=operands.weight_zero,
            bias=operands.bias,
        )

    def _along_channels(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter
