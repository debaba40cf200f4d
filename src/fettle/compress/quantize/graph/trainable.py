"""Turn a simulated model into the form it trains in, and back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from fettle.compress.quantize.calibrate._base import extremes
from fettle.compress.quantize.graph.fold import FoldedNorm
from fettle.compress.quantize.graph.modules import ActivationQuantizer, SimulatedLayer
from fettle.compress.quantize.graph.normed import NormedLayer
from fettle.compress.quantize.graph.simulate import Simulated
from fettle.compress.quantize.numerics.grid import grid_for_range, refit_scales
from fettle.core.errors import DataError

_SHARE = 0.01


class FollowingQuantizer(ActivationQuantizer):
    """A quantizer whose range follows the batches while it trains: end ← end + 0.01 · (the batch's end − end).

    It starts from the range that calibration found. frozen: the range stays as it is. low, high: () float64.
    """

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        grid = quantizer.grid
        super().__init__(grid, layer=quantizer.layer)
        for name, end in zip(("low", "high"), grid.ends, strict=True):
            self.register_buffer(name, torch.tensor(end, dtype=torch.float64, device=grid.scale.device))
        self.frozen = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and not self.frozen:
            self._follow(x)
        return super().forward(x)

    def settled(self) -> ActivationQuantizer:
        """A quantizer with this grid that stays as it is."""
        return ActivationQuantizer(self.grid, layer=self.layer)

    def _follow(self, x: torch.Tensor) -> None:
        try:
            ends = extremes(x)
        except DataError:
            raise DataError(f"{self.layer}: its values must stay finite while it trains, got NaN or infinity") from None
        if ends is None:
            return
        self.low += _SHARE * (ends[0] - self.low)
        self.high += _SHARE * (ends[1] - self.high)
        grid = grid_for_range(self.low, self.high, self.scheme)
        self.scale.copy_(grid.scale)
        self.zero_point.copy_(grid.zero_point)


def make_trainable(simulated: Simulated, norms: Mapping[str, FoldedNorm], *, follow: bool) -> None:
    """In place: layers get back the batch-norm that `norms` holds under their path; quantizers follow if `follow`.

    What earlier steps chose for a layer stays where training starts: a bias takes in its correction, and a weight whose
    rounding was chosen moves just so far that rounding to nearest gives the same integers.
    """
    for path, module in _parts(simulated):
        if isinstance(module, SimulatedLayer) and path in norms:
            simulated.body.set_submodule(path, NormedLayer(module, norms[path]))
        elif isinstance(module, SimulatedLayer):
            _absorb(module)
        elif isinstance(module, ActivationQuantizer) and follow:
            simulated.body.set_submodule(path, FollowingQuantizer(module))


def settle(simulated: Simulated) -> None:
    """In place: plain layers and quantizers again, that answer bit for bit as before; nothing requires a gradient."""
    simulated.zero_grad(set_to_none=True)
    for path, module in _parts(simulated):
        if isinstance(module, NormedLayer | FollowingQuantizer):
            simulated.body.set_submodule(path, module.settled())
    for tensor in (*simulated.parameters(), *simulated.buffers()):
        tensor.requires_grad_(False)
    simulated.eval()


def freeze_norms(simulated: Simulated, frozen: bool) -> None:
    """Whether training uses the running statistics and leaves them as they are."""
    for _, module in _parts(simulated):
        if isinstance(module, NormedLayer):
            module.frozen = frozen


def freeze_ranges(simulated: Simulated, frozen: bool) -> None:
    """Whether the activations' ranges stay as they are."""
    for _, module in _parts(simulated):
        if isinstance(module, FollowingQuantizer):
            module.frozen = frozen


@torch.no_grad()
def refit_weights(simulated: Simulated) -> None:
    """Let each layer's scales follow its weight, one half-step of the least-squares fit."""
    for _, layer in _parts(simulated):
        if isinstance(layer, SimulatedLayer):
            layer.scales.copy_(refit_scales(layer.weight, layer.scales, layer.scheme))


def scales_of(simulated: Simulated) -> list[torch.Tensor]:
    """The scales of all layers and quantizers, (C,) and (), in order of execution: the buffers themselves."""
    parts = [module for _, module in _parts(simulated)]
    layers = [module.scales for module in parts if isinstance(module, SimulatedLayer)]
    return layers + [module.scale for module in parts if isinstance(module, ActivationQuantizer)]


def unrounded(simulated: Simulated, *, activations: bool = True) -> nn.Module:
    """A copy that computes the same with nothing rounded: the float model behind it, norms folded.

    activations: False leaves their quantizers in, so that they alone round.
    """
    twin = copy.deepcopy(simulated)
    for path, module in _parts(twin):
        if isinstance(module, ActivationQuantizer) and activations:
            twin.body.set_submodule(path, nn.Identity())
        elif isinstance(module, SimulatedLayer):
            twin.body.set_submodule(path, _Unrounded(module))
    return twin.requires_grad_(False).eval()


class _Unrounded(nn.Module):
    """A simulated layer with its weight as it is before rounding."""

    def __init__(self, layer: SimulatedLayer) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.compute(x, self.inner.weight, self.inner.bias)


def _absorb(layer: SimulatedLayer) -> None:
    """Corrections into bias and weight."""
    bias = layer.shifted_bias()
    if layer.shift is not None and bias is not None:
        layer.bias, layer.shift = nn.Parameter(bias.detach(), requires_grad=False), None
    if layer.integers is not None:
        along = layer.scales.reshape(-1, *[1] * (layer.weight.ndim - 1))
        whole = layer.integers.to(layer.weight.dtype)
        # In place: layers that share the weight go on sharing it.
        layer.weight.data.copy_(torch.clamp(layer.weight.data / along, whole - 0.49, whole + 0.49) * along)
        layer.integers = None


def _parts(simulated: Simulated) -> Iterator[tuple[str, nn.Module]]:
    """The modules that the graph calls, each once, by path; it may be changed on the way."""
    for path in dict.fromkeys(str(node.target) for node in simulated.graph.nodes if node.op == "call_module"):
        yield path, simulated.body.get_submodule(path)
