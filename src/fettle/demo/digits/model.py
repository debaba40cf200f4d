"""A small residual network, trained in seconds when it is built."""
# mypy: ignore-errors

import torch
from torch import nn


class Block(nn.Module):
    """Two convolutions and a shortcut; one ReLU module serves twice, as in most real code."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, c, h, w) to the same."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


class Net(nn.Module):
    """Digits of 8×8 to ten scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(Block(32), nn.MaxPool2d(2), Block(32))
        self.head = nn.Linear(32 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 1, 8, 8) to (n, 10)."""
        return self.head(self.blocks(self.stem(x)).flatten(1))


def example() -> tuple[torch.Tensor]:
    """One blank image."""
    return (torch.zeros(1, 1, 8, 8),)


def build() -> nn.Module:
    """Train for 12 passes over 797 images, each time shifted by up to one pixel."""
    from data import train  # beside this file; here, so that the model's code can be read without the data

    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().train()
    batches = train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12 * len(batches))
    for _ in range(12):
        for x, y in batches:
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            loss = nn.functional.cross_entropy(model(torch.roll(x, shift, dims=(2, 3))), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()
