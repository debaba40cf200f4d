"""How far a quantized tensor is from the original: measured in one pass, batch by batch, and layer by layer.

Every figure comes from four sums and a maximum in float64, so memory does not depend on how much is measured, and
parts measured apart can be merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fettle.compress.quantize.numerics.grid import Grid, all_finite, grid_for
from fettle.compress.quantize.numerics.scheme import Scheme
from fettle.core.errors import DataError, UsageError

# A transposed convolution has its output channels along axis 1: name it in `layers` with a scheme that says so.
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """The difference e = y − x of a quantized tensor y from its original x, over n entries.

    mse: Σ e² / n, in the tensor's unit squared. max_abs: max |e|. mean_abs: Σ |e| / n.
    sqnr_db: 10 · log10(Σ x² / Σ e²), the signal-to-quantization-noise ratio in decibels, about 6 for each bit;
        infinite where nothing differs, and minus infinity where the original is all zero and the other is not.
    count: n.
    """

    mse: float
    sqnr_db: float
    max_abs: float
    mean_abs: float
    count: int


class DeviationSum:
    """A `Deviation` in the making: `update` with each batch, `merge` what was measured elsewhere.

    State: five numbers.

    >>> total = DeviationSum()
    >>> total.update(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    >>> total.update(torch.tensor([2.0]), torch.tensor([2.5]))
    >>> result = total.result()
    >>> round(result.mse, 4), result.max_abs, result.mean_abs, round(result.sqnr_db, 2), result.count
    (0.4167, 1.0, 0.5, 8.57, 3)
    """

    def __init__(self) -> None:
        self._signal = self._noise = self._absolute = self._largest = 0.0
        self._count = 0

    def update(self, original: torch.Tensor, quantized: torch.Tensor) -> None:
        """Add tensors of one shape; an empty one adds nothing.

        Raises UsageError for two shapes, DataError for NaN or infinity; then nothing was added.
        """
        if original.shape != quantized.shape:
            raise UsageError(
                f"two tensors to compare must have one shape, got {list(original.shape)} and {list(quantized.shape)}"
            )
        if not original.numel():
            return
        if not (all_finite(original) and all_finite(quantized)):
            raise DataError("tensors to compare must be finite, got NaN or infinity")
        wide = original.detach().to(torch.float64)
        error = quantized.detach().to(wide) - wide
        self._signal += float(wide.square().sum())
        self._noise += float(error.square().sum())
        self._absolute += float(error.abs_().sum())
        self._largest = max(self._largest, float(error.max()))
        self._count += original.numel()

    def merge(self, other: DeviationSum) -> None:
        """Add everything the other one has seen."""
        self._signal += other._signal
        self._noise += other._noise
        self._absolute += other._absolute
        self._largest = max(self._largest, other._largest)
        self._count += other._count

    def result(self) -> Deviation:
        """What was seen so far. Raises DataError where that is nothing."""
        if not self._count:
            raise DataError("an error needs at least one entry to be measured on, got none")
        return Deviation(
            mse=self._noise / self._count,
            sqnr_db=_decibels(self._signal, self._noise),
            max_abs=self._largest,
            mean_abs=self._absolute / self._count,
            count=self._count,
        )


def tensor_error(original: torch.Tensor, quantized: torch.Tensor) -> Deviation:
    """The deviation of one tensor from another. Raises as `DeviationSum`.

    >>> x = torch.linspace(-1, 1, 1000)
    >>> round(tensor_error(x, grid_for(x, Scheme(bits=8)).fake(x)).sqnr_db)
    48
    """
    total = DeviationSum()
    total.update(original, quantized)
    return total.result()


def model_errors(
    model: nn.Module,
    scheme: Scheme,
    *,
    layers: tuple[type[nn.Module], ...] = WEIGHTED,
    fit: Callable[[torch.Tensor, Scheme], Grid] = grid_for,
) -> dict[str, Deviation]:
    """What quantizing would do to the weight of each layer, by the layer's name in `model.named_modules()`.

    layers: the module types that are looked at; each has a `weight`. fit: how the grid is found, such as `best_grid`.
    The model is not changed. Raises DataError, naming the layer, for a weight that is not finite or is empty, and
    UsageError where the scheme does not fit a weight's shape.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> _ = nn.init.constant_(model[0].weight, 0.5)
    >>> {name: error.max_abs for name, error in model_errors(model, Scheme()).items()}
    {'0': 0.0}
    """
    errors = {}
    for name, module in model.named_modules():
        if isinstance(module, layers):
            weight = module.weight
            assert isinstance(weight, torch.Tensor)
            try:
                with torch.no_grad():
                    errors[name] = tensor_error(weight, fit(weight, scheme).fake(weight))
            except (DataError, UsageError) as problem:
                raise type(problem)(f"the weight of layer '{name}': {problem}") from None
    return errors


def output_errors(
    original: nn.Module,
    quantized: nn.Module,
    batches: Iterable[tuple[torch.Tensor, ...]],
    *,
    names: Iterable[str] | None = None,
) -> dict[str, Deviation]:
    """How far the outputs of same-named layers of two models are apart, over batches of inputs.

    names: layers to compare; None for all with a tensor output and no children, in the original's order. Memory: the
    compared layers' outputs for one batch. A layer called several times in a batch is compared call by call. The
    modes of the models (training or not) are left as they are. Raises UsageError for a name that one of them lacks
    or a layer called more often in one than in the other, DataError for no batch, NaN or infinity.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> list(output_errors(model, model, [(torch.ones(1, 2),)]))
    ['0', '1']
    """
    there, here = dict(original.named_modules()), dict(quantized.named_modules())
    if names is None:
        chosen = [name for name, module in there.items() if name in here and not any(module.children())]
    else:
        chosen = list(names)
    for name in chosen:
        if name not in there or name not in here:
            raise UsageError(f"a layer to compare must be in both models, got '{name}'")
    totals = {name: DeviationSum() for name in chosen}
    for batch in batches:
        before, after = _outputs(original, batch, chosen), _outputs(quantized, batch, chosen)
        for name in chosen:
            _compare(name, totals[name], before[name], after[name])
    reached = {name: total for name, total in totals.items() if total._count}
    if not reached:
        raise DataError("no layer was compared: the batches are none, or reach no layer that both models have")
    return {name: total.result() for name, total in reached.items()}


def _compare(name: str, total: DeviationSum, before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    if len(before) != len(after):
        raise UsageError(
            f"layer '{name}' must be called as often in both models, got {len(before)} and {len(after)} calls"
        )
    for first, second in zip(before, after, strict=True):
        try:
            total.update(first, second)
        except (DataError, UsageError) as problem:
            raise type(problem)(f"the output of layer '{name}': {problem}") from None


def _outputs(model: nn.Module, batch: tuple[torch.Tensor, ...], names: list[str]) -> dict[str, list[torch.Tensor]]:
    """What the named layers give for one batch, call by call."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                # A copy, for an in-place activation may come next.
                seen[name].append(output.detach().clone())

        return hook

    modules = dict(model.named_modules())
    with ExitStack() as stack, torch.no_grad():
        for name in names:
            handle = modules[name].register_forward_hook(keep(name))
            stack.callback(handle.remove)
        model(*batch)
    return seen


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 and signal / noise > 0.0 else -math.inf
