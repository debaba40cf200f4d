"""Signals made on the spot: eight classes, told apart by which two motifs hide in the noise and in which order."""

from collections.abc import Iterator

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]

FRAMES, WIDTH, MOTIFS = 24, 16, 4
AMPLITUDE = 1.1
BATCH = 128
# Class 2i: motif i, later motif i + 1; class 2i + 1: the same two the other way round.
ORDERS = torch.tensor([pair for i in range(MOTIFS) for pair in ((i, (i + 1) % MOTIFS), ((i + 1) % MOTIFS, i))])
CLASSES = len(ORDERS)


class Signals:
    """`batches` batches of signals (n, 24, 16) float32 and classes (n,) int64; the same again on each iteration."""

    def __init__(self, *, batches: int, seed: int) -> None:
        self.batches, self.seed = batches, seed

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.batches):
            yield draw(BATCH, generator)

    def __len__(self) -> int:
        return self.batches


def train() -> Signals:
    """2048 signals for calibration."""
    return Signals(batches=16, seed=1)


def validation() -> Signals:
    """2048 signals for every choice."""
    return Signals(batches=16, seed=2)


def test() -> Signals:
    """4096 signals, to be touched once."""
    return Signals(batches=32, seed=3)


def draw(count: int, generator: torch.Generator) -> Batch:
    """`count` signals: unit Gaussian noise in every frame, and a motif added to two frames of it."""
    classes = torch.randint(CLASSES, (count,), generator=generator)
    signals = torch.randn(count, FRAMES, WIDTH, generator=generator)
    places = torch.rand(count, FRAMES, generator=generator).argsort(dim=1)[:, :2].sort(dim=1).values
    rows = torch.arange(count)
    for which in range(2):
        signals[rows, places[:, which]] += AMPLITUDE * motifs()[ORDERS[classes, which]]
    return signals, classes


def motifs() -> Tensor:
    """Four orthogonal waveforms (4, 16) of mean square 1: cosines of different frequency."""
    time = (torch.arange(WIDTH) + 0.5) / WIDTH
    return torch.stack([2**0.5 * torch.cos(torch.pi * frequency * time) for frequency in range(1, MOTIFS + 1)])
