"""Linear layers in int8 without calibration: each call rounds what they read, over the range it has just then."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch

from fettle.compress.quantize.graph.linear import Form, replace_linear_layers
from fettle.compress.quantize.numerics.blocks import quantize_rows
from fettle.compress.step import Context, Step
from fettle.core.errors import UsageError
from fettle.runtime._operations import LINEAR_DYNAMIC


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamic(Step):
    """Weights int8, symmetric per output channel; activations 8 bits, their range measured while the model runs.

    weight_bits: 8, or 7 for kernels that add two products in 16 bits, as x86 without VNNI does.
    smallest: layers of fewer weights stay float.
    keep_float: layers that stay float, by name; a module's name stands for all layers in it.

    Needs no data, and no range can be exceeded in production; finding it costs a pass over the activations. ONNX
    Runtime and Inductor take one range for a whole batch, so a row's answer moves by a rounding step with the rows
    beside it; OpenVINO takes one for each group of up to 128 values of a row, so there it does not. Raises
    CaptureError, UsageError for a layer name that the model does not have, DataError for NaN or infinity in a weight.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)).eval()
    >>> x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    >>> small = Dynamic().apply(model, Context(example=(x[:2],)))
    >>> bool((small(x) - model(x)).abs().max() < 0.05)
    True
    """

    precision: ClassVar[str] = "int8-dynamic"
    shrinks: ClassVar[frozenset[str]] = frozenset({"linear"})

    weight_bits: int = 8
    smallest: int = 4096
    keep_float: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.weight_bits not in (7, 8):
            raise UsageError(f"weight_bits must be 7 or 8, got {self.weight_bits}")
        if self.smallest < 0:
            raise UsageError(f"smallest must be 0 or more weights, got {self.smallest}")

    def apply(self, model: torch.nn.Module, context: Context) -> torch.nn.Module:
        form = Form(
            operation=LINEAR_DYNAMIC,
            store=functools.partial(_store, bits=self.weight_bits),
            reason_against=self._reason_against,
        )
        return replace_linear_layers(model, context, form, keep_float=self.keep_float)

    def _reason_against(self, weight: torch.Tensor) -> str | None:
        if weight.numel() < self.smallest:
            return f"{weight.numel()} weights are too few to gain, {self.smallest} are wanted"
        return None


def _store(weight: torch.Tensor, *, bits: int) -> dict[str, torch.Tensor]:
    codes, scales = quantize_rows(weight, bits=bits)
    return {"int8": codes, "scales": scales}
