"""A small transformer encoder that classifies signals; `build` trains it once and keeps the weights."""

import hashlib
import os
import tempfile
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from data import CLASSES, FRAMES, WIDTH, Signals
from torch import Tensor, nn

CHANNELS, HEADS, LAYERS = 64, 4, 2
STEPS, RATE = 900, 2e-3


def build() -> nn.Module:
    """The trained encoder, in evaluation mode. The first call trains it for about a minute, later ones load it."""
    model = Encoder()
    path = weights_path()
    if not path.is_file():
        save(train(), path)
    model.load_state_dict(safetensors.torch.load_file(path), strict=True)
    return model.eval()


def example() -> tuple[Tensor]:
    """One batch of two signals: torch.export would take a batch of one as a constant."""
    return (torch.zeros(2, FRAMES, WIDTH),)


class Encoder(nn.Module):
    """Signals (batch, 24, 16) float32 to logits (batch, 8): embed frames, add positions, attend, average, classify."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, CHANNELS)
        self.positions = nn.Parameter(torch.randn(FRAMES, CHANNELS) * 0.1)
        layer = nn.TransformerEncoderLayer(
            CHANNELS, HEADS, 2 * CHANNELS, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(CHANNELS)
        self.classify = nn.Linear(CHANNELS, CLASSES)

    def forward(self, signals: Tensor) -> Tensor:
        features = self.encoder(self.embed(signals) + self.positions)
        return self.classify(self.norm(features).mean(dim=1))


@torch.enable_grad()
def train(*, steps: int = STEPS) -> Encoder:
    """A fresh encoder after `steps` batches of new signals, AdamW with a one-cycle schedule, seeded throughout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Encoder().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=steps)
    for signals, classes in Signals(batches=steps, seed=0):
        optimizer.zero_grad()
        F.cross_entropy(model(signals), classes).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def weights_path() -> Path:
    """In `$FETTLE_HOME`, else in `.fettle` beside this file. The name changes with the code that makes the weights."""
    here = Path(__file__).resolve().parent
    sources = b"".join((here / name).read_bytes() for name in ("data.py", "model.py"))
    home = Path(os.environ.get("FETTLE_HOME") or here / ".fettle")
    return home / "examples" / f"encoder-{hashlib.sha256(sources).hexdigest()[:12]}.safetensors"


def save(model: nn.Module, path: Path) -> None:
    """Write the weights whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        aside = Path(folder) / path.name
        safetensors.torch.save_file(model.state_dict(), aside)
        os.replace(aside, path)
