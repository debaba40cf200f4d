"""A small network of depthwise-separable convolutions for CIFAR-10, after MobileNetV2 (Sandler et al., 2018)."""

from pathlib import Path

from model import CLASSES, load
from torch import Tensor, nn

WEIGHTS = Path(__file__).resolve().parent / "weights" / "depthwise.safetensors"


def build() -> nn.Module:
    """The trained network, in evaluation mode."""
    return load(DepthwiseNet(), WEIGHTS)


class DepthwiseNet(nn.Module):
    """A stem, seven inverted bottlenecks at 24, 32 and 64 channels, average pooling and a linear layer; ReLU6.

    Images (batch, 3, 32, 32), float32 and normalized, to logits (batch, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolve(3, 24, size=3)
        self.blocks = nn.Sequential(
            Bottleneck(24, 24, expansion=1),
            Bottleneck(24, 32, expansion=3, stride=2),
            Bottleneck(32, 32, expansion=3),
            Bottleneck(32, 32, expansion=3),
            Bottleneck(32, 64, expansion=4, stride=2),
            Bottleneck(64, 64, expansion=4),
            Bottleneck(64, 64, expansion=4),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.pool(self.blocks(self.stem(images))).flatten(1))


class Bottleneck(nn.Module):
    """Widen by `expansion`, filter each channel alone, narrow without an activation; a shortcut where shapes agree."""

    def __init__(self, inputs: int, outputs: int, *, expansion: int, stride: int = 1) -> None:
        super().__init__()
        width = inputs * expansion
        widen = [convolve(inputs, width, size=1)] if expansion > 1 else []
        filters = convolve(width, width, size=3, stride=stride, groups=width)
        narrow = convolve(width, outputs, size=1, activate=False)
        self.residual = nn.Sequential(*widen, filters, narrow)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, features: Tensor) -> Tensor:
        residual: Tensor = self.residual(features)
        return features + residual if self.adds else residual


def convolve(
    inputs: int, outputs: int, *, size: int, stride: int = 1, groups: int = 1, activate: bool = True
) -> nn.Sequential:
    """A convolution that keeps the resolution (but for its stride), batch normalization, and ReLU6 where wanted."""
    layers = [
        nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([nn.ReLU6()] if activate else []))
