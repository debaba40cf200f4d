"""ResNet-20 and ResNet-56 for CIFAR-10 (He, Zhang, Ren, Sun: Deep Residual Learning, 2015, section 4.2)."""

from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from data import data_folder
from torch import Tensor, nn

CLASSES = 10


def build() -> nn.Module:
    """The trained ResNet-20, in evaluation mode."""
    return load(ResNet(blocks=3), data_folder() / "resnet20.safetensors")


def build_resnet56() -> nn.Module:
    """The trained ResNet-56, in evaluation mode."""
    return load(ResNet(blocks=9), data_folder() / "resnet56.safetensors")


def example() -> tuple[Tensor]:
    """One batch of two images: torch.export would take a batch of one as a constant."""
    return (torch.zeros(2, 3, 32, 32),)


def load(model: nn.Module, weights: Path) -> nn.Module:
    """The model with these weights; a name too many or too few is an error."""
    model.load_state_dict(safetensors.torch.load_file(weights), strict=True)
    return model.eval()


class ResNet(nn.Module):
    """Three stages of `blocks` residual blocks at 16, 32 and 64 channels: 6 · blocks + 2 layers with weights.

    Images (batch, 3, 32, 32), float32 and normalized, to logits (batch, 10).
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        # One module for every activation of the network, as much code in the wild has it.
        self.relu = nn.ReLU()
        self.layer1 = stage(16, 16, blocks=blocks, relu=self.relu)
        self.layer2 = stage(16, 32, blocks=blocks, relu=self.relu)
        self.layer3 = stage(32, 64, blocks=blocks, relu=self.relu)
        self.linear = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        return self.linear(F.adaptive_avg_pool2d(features, 1).flatten(1))


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut without weights (option A of the paper)."""

    def __init__(self, inputs: int, outputs: int, *, relu: nn.Module) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = relu
        self.padding = (outputs - inputs) // 2

    def forward(self, features: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(features)))))
        return self.relu(residual + self.shortcut(features))

    def shortcut(self, features: Tensor) -> Tensor:
        """The input itself, or every second pixel of it with empty channels half before and half after."""
        if self.stride == 1:
            return features
        return F.pad(features[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))


def stage(inputs: int, outputs: int, *, blocks: int, relu: nn.Module) -> nn.Sequential:
    """Blocks at one width; the first changes the width and halves the resolution where they differ."""
    widths = [inputs] + [outputs] * (blocks - 1)
    return nn.Sequential(*(Block(width, outputs, relu=relu) for width in widths))
