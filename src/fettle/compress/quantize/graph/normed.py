"""A simulated layer that keeps the batch-norm after it while it trains.

What is deployed is the layer with the norm folded into it: weight g W and bias (b − μ) g + β, g = γ / √(σ² + ε), from
the running statistics. Training needs the statistics of the batch instead, or the norm stops doing its work; but then
a weight folded with them, and its rounding, would jump from batch to batch. So the literature folds with the running
statistics and corrects the output by σ_running / σ_batch (Jacob et al. 2018, "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference", section 3.2; Krishnamoorthi 2018, "Quantizing Deep
Convolutional Networks for Efficient Inference", section 3.2.2).

Here each output channel has a grid of its own, symmetric around zero, so rounding commutes with the fold:

    Q(g W; |g| t) = g Q(W; t)

The integers do not depend on the statistics at all. So the unfolded weight is rounded with t, batch-norm follows as it
ever did, and nothing needs correcting; a γ of zero does no harm, because nothing is divided by it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from fettle.compress.quantize.graph.fold import FoldedNorm
from fettle.compress.quantize.graph.modules import SimulatedLayer

_MOMENTUM = 0.1


class NormedLayer(SimulatedLayer):
    """Rounded layer and batch-norm; in evaluation, and in training once frozen, exactly the folded layer.

    weight, bias: unfolded; scales: t, of the unfolded weight; gamma, beta: (C,) parameters; mean, variance: (C,)
    running statistics. frozen: training uses the running statistics and leaves them as they are. It is
    settled before it is lowered.
    """

    mean: torch.Tensor
    variance: torch.Tensor

    def __init__(self, layer: SimulatedLayer, norm: FoldedNorm) -> None:
        super().__init__(
            layer=layer.layer,
            operation=layer.operation,
            settings=layer.settings,
            weight=nn.Parameter(norm.weight.clone()),
            bias=None if norm.bias is None else nn.Parameter(norm.bias.clone()),
        )
        self.gamma = nn.Parameter(norm.gamma.clone())
        self.beta = nn.Parameter(norm.beta.clone())
        self.register_buffer("mean", norm.mean.clone())
        self.register_buffer("variance", norm.variance.clone())
        self.epsilon = norm.epsilon
        self.frozen = False
        self.set_bits(layer.scheme.bits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and not self.frozen:
            y = self.compute(x, self.round_weight(self.weight, self.scales), self.bias).float()
            if y[:, 0].numel() > 1:  # one value has no variance
                return functional.batch_norm(
                    y, self.mean, self.variance, self.gamma, self.beta, True, _MOMENTUM, self.epsilon
                )
        weight, bias, scales = self._folded()
        return self.compute(x, self.round_weight(weight, scales), bias)

    def rounded_weight(self) -> torch.Tensor:
        """The folded weight as it will be deployed."""
        weight, _, scales = self._folded()
        return self.round_weight(weight, scales)

    def settled(self) -> SimulatedLayer:
        """The folded layer without a norm, which answers bit for bit as this one does in evaluation."""
        weight, bias, scales = (value.detach().clone() for value in self._folded())
        settled = SimulatedLayer(
            layer=self.layer,
            operation=self.operation,
            settings=self.settings,
            weight=nn.Parameter(weight, requires_grad=False),
            bias=nn.Parameter(bias, requires_grad=False),
        )
        settled.scheme, settled.scales = self.scheme, scales
        return settled

    def _folded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weight, bias, scales."""
        gain = self.gamma / torch.sqrt(self.variance + self.epsilon)
        weight = self.weight * gain.reshape(-1, *[1] * (self.weight.ndim - 1))
        start = -self.mean if self.bias is None else self.bias - self.mean
        scales = self.scales * gain.detach().abs()
        # A dead channel: all its integers are zero, on any grid.
        scales = torch.where(scales >= torch.finfo(torch.float32).tiny, scales, torch.ones_like(scales))
        return weight, start * gain + self.beta, scales
