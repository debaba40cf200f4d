"""Weights of linear layers in 4 or 8 bits, by row or in blocks along it: for models that wait for memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fettle.compress.quantize.graph.linear import Form, replace_linear_layers
from fettle.compress.quantize.numerics.blocks import largest_block, quantize_blocks, quantize_rows
from fettle.compress.step import Context, Step
from fettle.core.errors import UsageError
from fettle.runtime._operations import LINEAR_BLOCKS, LINEAR_ROWS, pack

# Smaller blocks make the kernels slower than float.
_SMALLEST_BLOCK = 32
_LARGEST_BLOCK = 256
# Of 4 bits. With 8 a scale a row is near enough, and faster: an encoder of four layers of width 512 took OpenVINO, on a
# CPU with VNNI, 3.2 ms at batch 1 and 62 at batch 16, in blocks of 256 it took 4.0 and 73. Without VNNI both are alike.
_DEFAULT_GROUP = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightOnly(Step):
    """Linear layers keep their weights in few bits, symmetric, with one scale for each row or block of a row.

    bits: 8 or 4, really so in the file.
    group: weights that share a scale, a power of two from 32 to 256; None for the whole row with 8 bits, whose error is
    small already, and for 128 with 4. A layer whose row is no multiple of `group` takes the largest power of two that
    divides it.
    smallest: layers of fewer weights stay float.
    keep_float: layers that stay float, by name; a module's name stands for all layers in it.

    Needs no data. What the engines do with x is theirs: ONNX Runtime rounds it to int8 by the weights' own blocks,
    OpenVINO by groups of at most 128, without which neither is faster than float at larger batches. Layers of fewer
    than about 128 × 128 weights take longer than in float at batch 1 and are still a quarter of the size; the gain in
    time starts at about 256 × 256. Raises CaptureError, UsageError for a layer name that the model does not have,
    DataError for NaN or infinity in a weight.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)).eval()
    >>> x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    >>> small = WeightOnly(bits=8).apply(model, Context(example=(x[:2],)))
    >>> bool((small(x) - model(x)).abs().max() < 0.02)
    True
    """

    bits: Literal[4, 8] = 8
    group: int | None = None
    smallest: int = 4096
    keep_float: tuple[str, ...] = ()

    shrinks: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UsageError(f"bits must be 4 or 8, got {self.bits}")
        if self.group is not None and not (_SMALLEST_BLOCK <= self.group <= _LARGEST_BLOCK and _is_power(self.group)):
            raise UsageError(f"group must be 32, 64, 128, 256 or None, got {self.group}")
        if self.smallest < 0:
            raise UsageError(f"smallest must be 0 or more weights, got {self.smallest}")

    @property
    def precision(self) -> str:  # type: ignore[override]  # it follows from a field
        """ "int8-weights" or "int4-weights"."""
        return f"int{self.bits}-weights"

    def apply(self, model: torch.nn.Module, context: Context) -> torch.nn.Module:
        if self.bits == 8 and self.group is None:
            form = Form(operation=LINEAR_ROWS, store=_store_rows, reason_against=self._reason_against)
        else:
            form = Form(
                operation=LINEAR_BLOCKS,
                store=self._store_blocks,
                reason_against=self._reason_against,
                settings=(self.bits,),
            )
        return replace_linear_layers(model, context, form, keep_float=self.keep_float)

    def _store_blocks(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        block = largest_block(weight.shape[1], self.group or _DEFAULT_GROUP)
        codes, scales = quantize_blocks(weight, bits=self.bits, block=block)
        return {f"int{self.bits}": pack(codes, bits=self.bits), "scales": scales}

    def _reason_against(self, weight: torch.Tensor) -> str | None:
        if weight.numel() < self.smallest:
            return f"{weight.numel()} weights are too few to gain, {self.smallest} are wanted"
        if largest_block(weight.shape[1], _SMALLEST_BLOCK) < _SMALLEST_BLOCK:
            return f"its {weight.shape[1]} inputs are no multiple of {_SMALLEST_BLOCK}"
        return None


def _store_rows(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, scales = quantize_rows(weight, bits=8)
    return {"int8": codes, "scales": scales}


def _is_power(value: int) -> bool:
    return value & (value - 1) == 0
