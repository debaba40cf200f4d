"""A two-dimensional convolution in simulated, then in true integer arithmetic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fettle.compress.quantize.layers._base import Operands, Precision, QuantizedLayer, same_padding
from fettle.compress.quantize.numerics.integer import Window, integer_conv2d
from fettle.core.errors import InvalidInput, UsageError


class QuantizedConv2d(QuantizedLayer):
    """A convolution of x (N, C, H, W) or (C, H, W) with W (O, C / groups, kh, kw), zeros around.

    Any stride, padding ("same" and "valid" too), dilation and groups; 2 to 16 bits for each of input, weight and
    output. Evaluation differs from `simulate` by at most one step of the output grid: see `QuantizedLinear`.

    >>> from fettle.compress.quantize.numerics.scheme import Scheme
    >>> layer = QuantizedConv2d.from_float(nn.Conv2d(2, 4, 3, padding=1, groups=2), output=Scheme(bits=8))
    >>> x = torch.linspace(-1, 1, 50).reshape(1, 2, 5, 5)
    >>> simulated = layer(x).detach()
    >>> step = float(layer.operands().output.scale)
    >>> bool(((layer.eval()(x) - simulated).abs() <= 1.001 * step).all())
    True
    """

    source = nn.Conv2d

    def __init__(self, module: nn.Conv2d, precision: Precision) -> None:
        if module.padding_mode != "zeros":
            raise UsageError(
                f'QuantizedConv2d pads with zeros, got padding_mode="{module.padding_mode}": '
                "put a padding layer before the convolution"
            )
        super().__init__(module, precision)
        self.window = _window(module)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.window}"

    def _check_shape(self, x: torch.Tensor) -> None:
        channels = self.weight.shape[1] * self.window.groups
        if x.ndim not in (3, 4) or x.shape[-3] != channels:
            raise InvalidInput(f"the input must have shape [N, {channels}, H, W], got {list(x.shape)}")
        left, right, top, bottom = self.window.padding
        room = (x.shape[-2] + top + bottom, x.shape[-1] + left + right)
        for have, size, dilation in zip(room, self.weight.shape[2:], self.window.dilation, strict=True):
            if have < dilation * (size - 1) + 1:
                raise InvalidInput(
                    f"the padded input must be at least as large as the kernel, got input {list(x.shape)}, "
                    f"kernel {list(self.weight.shape[2:])}, {self.window}"
                )

    def _multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        window = self.window
        return F.conv2d(
            F.pad(x, window.padding), weight, bias, stride=window.stride, dilation=window.dilation, groups=window.groups
        )

    def _accumulate(self, q: torch.Tensor, operands: Operands) -> torch.Tensor:
        total = integer_conv2d(
            q if q.ndim == 4 else q[None],
            operands.weight,
            x_zero=int(operands.input.zero_point),
            weight_zero=operands.weight_zero,
            bias=operands.bias,
            window=self.window,
        )
        return total if q.ndim == 4 else total[0]

    def _along_channels(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.reshape(-1, 1, 1) if parameter.ndim else parameter


def _window(module: nn.Conv2d) -> Window:
    """The geometry with every padding spelled out."""
    rows, columns = module.dilation
    if module.padding == "same":
        top, bottom = same_padding(module.kernel_size[0], rows)
        left, right = same_padding(module.kernel_size[1], columns)
    elif isinstance(module.padding, str):  # "valid"
        left = right = top = bottom = 0
    else:
        top = bottom = module.padding[0]
        left = right = module.padding[1]
    stride = module.stride
    return Window(
        stride=(stride[0], stride[1]),
        padding=(left, right, top, bottom),
        dilation=(rows, columns),
        groups=module.groups,
    )
