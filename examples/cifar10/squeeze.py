"""A small residual network with squeeze-and-excitation gates for CIFAR-10 (Hu, Shen, Sun, 2018)."""

from pathlib import Path

from model import CLASSES, load
from torch import Tensor, nn

WEIGHTS = Path(__file__).resolve().parent / "weights" / "squeeze.safetensors"


def build() -> nn.Module:
    """The trained network, in evaluation mode."""
    return load(SqueezeNet(), WEIGHTS)


class SqueezeNet(nn.Module):
    """A stem, three residual blocks at 16, 32 and 64 channels, each with a gate; average pooling and a linear layer.

    Images (batch, 3, 32, 32), float32 and normalized, to logits (batch, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(GatedBlock(16, 16), GatedBlock(16, 32, stride=2), GatedBlock(32, 64, stride=2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.pool(self.blocks(self.stem(images))).flatten(1))


class GatedBlock(nn.Module):
    """Two 3×3 convolutions and a gate beside a shortcut: the input itself, or a 1×1 convolution of it."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            Gate(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.relu = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        return self.relu(self.residual(features) + self.shortcut(features))


class Gate(nn.Module):
    """Scale each channel by a number in (0, 1) computed from the means of all of them."""

    def __init__(self, channels: int, *, reduction: int = 4) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // reduction, 1),
            nn.ReLU(),
            nn.Conv2d(channels // reduction, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, features: Tensor) -> Tensor:
        return features * self.squeeze(features)
