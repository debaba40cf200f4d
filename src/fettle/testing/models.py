"""Tiny models, each with one trait that quantizers and exporters trip over, and data with some structure for them.

They are untrained, but their batch-norm statistics are those of the data: no activation dies or explodes, so that
agreement with float means something.

>>> case = CASES["shared_relu"]
>>> case.build()(*case.data(rows=5)).shape
torch.Size([5, 4])
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Tensors = tuple[torch.Tensor, ...]
_IMAGE = (3, 8, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model. `shapes`: of one row of each input; `outputs`: how many; `anchors`: layers that can run in int8."""

    name: str
    trait: str
    factory: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = (_IMAGE,)
    outputs: int = 1
    anchors: int = 1

    def build(self, *, seed: int = 0) -> nn.Module:
        """A new model in evaluation mode, the same under the same seed. The global generator is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.factory()
            model.train()
            with torch.no_grad():
                for batch in range(10):
                    model(*self.data(rows=32, seed=1000 + batch))
        return model.eval()

    def data(self, *, rows: int, seed: int = 0) -> Tensors:
        """One batch of inputs: smooth waves of random direction and height, with some noise; float32."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(_waves((rows, *shape), generator) for shape in self.shapes)


def _waves(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    rows = shape[0]
    phase = 2 * math.pi * torch.rand(rows, generator=generator).reshape(rows, *[1] * (len(shape) - 1))
    for axis, size in enumerate(shape[1:], start=1):
        speed = 3 * torch.rand(rows, generator=generator).reshape(rows, *[1] * (len(shape) - 1))
        place = torch.linspace(0, 2, size).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        phase = phase + speed * place
    height = 0.5 + torch.rand(rows, generator=generator).reshape(rows, *[1] * (len(shape) - 1))
    return height * torch.sin(phase) + 0.3 * torch.randn(shape, generator=generator)


class _Block(nn.Module):
    """Convolution, batch-norm, and an activation that may belong to other blocks too."""

    def __init__(self, inputs: int, outputs: int, activation: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **settings)
        self.norm = nn.BatchNorm2d(outputs)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.norm(self.conv(x)))  # type: ignore[no-any-return]


class _Head(nn.Module):
    """Global average pool and a linear classifier."""

    def __init__(self, channels: int, classes: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


def _chain(activation: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(_Block(3, 8, activation()), _Block(8, 16, activation()), _Head(16))


def _shared_relu() -> nn.Module:
    relu = nn.ReLU()
    return nn.Sequential(_Block(3, 8, relu), _Block(8, 16, relu), _Head(16))


class _Residual(nn.Module):
    """`F.relu` and `+=` in place, as in most ResNet code."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = _Head(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        y = functional.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        y += x
        return self.head(functional.relu(y))  # type: ignore[no-any-return]


class _PadShortcut(nn.Module):
    """ResNet's option A: the shortcut drops every second pixel and pads channels with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Block(3, 8, nn.ReLU())
        self.conv1, self.norm1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = _Head(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        y = y + functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head(functional.relu(y))  # type: ignore[no-any-return]


class _Concatenation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = (
            _Block(3, 8, nn.ReLU()),
            _Block(8, 8, nn.ReLU()),
            nn.Conv2d(8, 8, 1),
        )
        self.merge, self.head = _Block(24, 8, nn.ReLU()), _Head(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(self.merge(torch.cat([x, self.left(x), self.right(x)], dim=1)))  # type: ignore[no-any-return]


class _SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shrink, self.grow = _Block(3, 16, nn.ReLU()), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.last, self.head = _Block(16, 8, nn.ReLU()), _Head(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        gate = torch.sigmoid(self.grow(functional.relu(self.shrink(functional.adaptive_avg_pool2d(x, 1)))))
        return self.head(self.last(x * gate))  # type: ignore[no-any-return]


class _Encoder(nn.Module):
    """A transformer encoder layer over 6 tokens of width 16, mean over tokens, linear classifier."""

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=norm_first)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(x)).mean(dim=1))  # type: ignore[no-any-return]


class _CrossAttention(nn.Module):
    """A transformer decoder layer: 6 tokens of width 16 attend to themselves, then to 4 others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 16)
        self.layer = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(tokens), self.embed(others)).mean(dim=1))  # type: ignore[no-any-return]


class _Parametrized(nn.Module):
    """Layers whose weights are computed from parameters, and products that no layer stands for."""

    def __init__(self) -> None:
        super().__init__()
        norms = nn.utils.parametrizations
        self.body = nn.Sequential(
            norms.weight_norm(nn.Conv2d(3, 8, 3, padding=1)), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.mix, self.shift = nn.Parameter(0.2 * torch.randn(32, 12)), nn.Parameter(0.2 * torch.randn(12))
        self.last = norms.spectral_norm(nn.Linear(12, 12))
        self.head, self.start = nn.Parameter(0.2 * torch.randn(12, 4)), nn.Parameter(0.2 * torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.last(functional.relu(self.body(x) @ self.mix + self.shift)))
        return torch.addmm(self.start, x, self.head)


class _TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.table, self.head = _Block(3, 8, nn.ReLU()), nn.Linear(5, 8), nn.Linear(16, 4)

    def forward(self, image: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        pooled = functional.adaptive_avg_pool2d(self.image(image), 1).flatten(1)
        return self.head(torch.cat([pooled, functional.relu(self.table(table))], dim=1))  # type: ignore[no-any-return]


class _TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.second = _Block(3, 8, nn.ReLU()), _Head(8, 4), _Head(8, 2)

    def forward(self, x: torch.Tensor) -> Tensors:
        x = self.body(x)
        return self.first(x), self.second(x)


class _TiedWeights(nn.Module):
    """An auto-encoder whose decoder is the transposed encoder, and one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.twice = nn.Linear(12, 8), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.zeros(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.encoder(x))
        x = functional.relu(self.twice(self.twice(x)))
        return functional.linear(x, self.encoder.weight.t(), self.bias)


class _UnusedBranch(nn.Module):
    """A layer whose result nobody reads, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.unused, self.never, self.head = (
            _Block(3, 8, nn.ReLU()),
            nn.Conv2d(8, 8, 1),
            nn.Linear(2, 2),
            _Head(8),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        self.unused(x)
        return self.head(x)  # type: ignore[no-any-return]


class _SamePadding(nn.Module):
    """`padding="same"`, a clamp for an activation, and channels that are split and shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same")
        self.left, self.right = nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 1)
        self.last, self.head = nn.Conv2d(8, 8, 1), _Head(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.stem(x).clamp(0.0, 2.0).chunk(2, dim=1)
        x = torch.cat([functional.relu(self.left(left)), functional.relu(self.right(right))], dim=1)
        x = x.view(x.shape[0], 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.head(functional.relu(self.last(x)))  # type: ignore[no-any-return]


class FixedBatch(nn.Module):
    """Not in CASES: a reshape that holds the number of rows, so that no free batch dimension can be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.reshape(2, 8))  # type: ignore[no-any-return]


class BranchOnValue(nn.Module):
    """Not in CASES: Python control flow on a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.sum() > 0 else self.linear(-x)  # type: ignore[no-any-return]


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def _large_linear() -> nn.Module:
    tokens = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64))
    return nn.Sequential(tokens, nn.Flatten(), nn.Linear(384, 128), nn.ReLU(), nn.Linear(128, 4))


def _conv1d() -> nn.Module:
    first, second = nn.Conv1d(2, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1, stride=2)
    return nn.Sequential(
        first, nn.BatchNorm1d(8), nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4)
    )


def _pooled() -> nn.Module:
    return nn.Sequential(
        _Block(3, 8, nn.ReLU()),
        nn.MaxPool2d(2),
        _Block(8, 8, nn.ReLU()),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def _grouped() -> nn.Module:
    depthwise = _Block(8, 8, nn.ReLU(), groups=8)
    return nn.Sequential(_Block(3, 8, nn.ReLU()), _Block(8, 8, nn.ReLU(), groups=2), depthwise, _Head(8))


_FOUND = (
    Case(name="shared_relu", trait="blocks that share one ReLU module", factory=_shared_relu, anchors=3),
    Case(name="residual", trait="F.relu and an in-place += residual", factory=_Residual, anchors=4),
    Case(name="pad_shortcut", trait="a strided shortcut padded with zeros", factory=_PadShortcut, anchors=4),
    Case(name="concatenation", trait="three branches concatenated", factory=_Concatenation, anchors=5),
    Case(name="grouped", trait="grouped and depthwise convolution", factory=_grouped, anchors=4),
    Case(name="squeeze_excite", trait="sigmoid gate times features", factory=_SqueezeExcite, anchors=5),
    Case(name="relu6", trait="ReLU6", factory=lambda: _chain(nn.ReLU6), anchors=3),
    Case(name="hardswish", trait="hardswish", factory=lambda: _chain(nn.Hardswish), anchors=3),
    Case(name="silu", trait="SiLU", factory=lambda: _chain(nn.SiLU), anchors=3),
    Case(name="gelu", trait="GELU", factory=lambda: _chain(nn.GELU), anchors=3),
    Case(name="leaky_relu", trait="leaky ReLU", factory=lambda: _chain(nn.LeakyReLU), anchors=3),
    Case(name="pooled", trait="max and average pooling, flatten", factory=_pooled, anchors=3),
    Case(
        name="norm_first",
        trait="attention, norm first",
        factory=lambda: _Encoder(norm_first=True),
        shapes=((6, 5),),
        anchors=6,
    ),
    Case(
        name="norm_last",
        trait="attention, norm last",
        factory=lambda: _Encoder(norm_first=False),
        shapes=((6, 5),),
        anchors=6,
    ),
    Case(name="cross_attention", trait="two sequences", factory=_CrossAttention, shapes=((6, 5), (4, 5)), anchors=10),
    Case(name="parametrized", trait="weight norm, spectral norm, constant products", factory=_Parametrized, anchors=4),
    Case(name="mlp", trait="linear layers only", factory=_mlp, shapes=((12,),), anchors=3),
    Case(name="two_inputs", trait="two inputs", factory=_TwoInputs, shapes=(_IMAGE, (5,)), anchors=3),
    Case(name="two_outputs", trait="two outputs", factory=_TwoOutputs, outputs=2, anchors=3),
    Case(name="conv1d", trait="one-dimensional convolution", factory=_conv1d, shapes=((2, 16),), anchors=3),
    Case(
        name="norm_at_start",
        trait="a batch-norm with nothing to fold into",
        factory=lambda: nn.Sequential(nn.BatchNorm2d(3), _Block(3, 8, nn.ReLU()), _Head(8)),
        anchors=2,
    ),
    Case(name="tied_weights", trait="a weight used transposed", factory=_TiedWeights, shapes=((12,),), anchors=4),
    Case(
        name="dropout",
        trait="dropout between layers",
        factory=lambda: nn.Sequential(
            _Block(3, 8, nn.ReLU()), nn.Dropout2d(0.5), _Block(8, 8, nn.ReLU()), nn.Dropout(0.5), _Head(8)
        ),
        anchors=3,
    ),
    Case(name="same_padding", trait="padding by name, clamp, split and shuffle", factory=_SamePadding, anchors=5),
    Case(name="unused_branch", trait="a layer nobody reads, and one never called", factory=_UnusedBranch, anchors=2),
)
CASES: dict[str, Case] = {case.name: case for case in _FOUND}

# Large enough that its weights, not its graph, decide the size of its file; by the kind of layer that holds them.
LARGE = {
    "convolution": Case(
        name="large_convolution",
        trait="large weights in convolutions",
        factory=lambda: nn.Sequential(_Block(3, 64, nn.ReLU()), _Block(64, 128, nn.ReLU()), _Head(128)),
        anchors=3,
    ),
    "linear": Case(
        name="large_linear",
        trait="large weights in linear layers, which read three dimensions and two",
        factory=_large_linear,
        shapes=((6, 64),),
        anchors=4,
    ),
}
