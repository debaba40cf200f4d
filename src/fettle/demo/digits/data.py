"""scikit-learn's handwritten digits: 1797 gray images of 8×8, in three parts that never mix."""
# mypy: ignore-errors

import numpy as np
import torch
from sklearn.datasets import load_digits

MEAN, STD = 0.3, 0.36  # as in fettle.toml


def pixels() -> tuple[np.ndarray, np.ndarray]:
    """All images, shuffled once and for all: (1797, 8, 8) uint8, and their labels (1797,)."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return images[order], digits.target[order].astype(np.int64)


def part(start: int, stop: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of 64 normalized rows: inputs (64, 1, 8, 8) float32, labels (64,)."""
    images, labels = pixels()
    x = torch.from_numpy((images[start:stop, None].astype(np.float32) / 255 - MEAN) / STD)
    y = torch.from_numpy(labels[start:stop])
    return list(zip(x.split(64), y.split(64), strict=True))


def train() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The first 797 images."""
    return part(0, 797)


def validation() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The next 500: for every choice, and what the monitor compares with."""
    return part(797, 1297)


def test() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The last 500: for the final figures, and as the traffic of the demonstration."""
    return part(1297, 1797)
