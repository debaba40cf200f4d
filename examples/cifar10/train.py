"""Train the two small networks of this folder from scratch on `train.parquet`, on one thread of a CPU.

    python train.py depthwise      # about 20 minutes on a quiet machine
    python train.py squeeze        # about 10 minutes

SGD with Nesterov momentum under a one-cycle schedule (Smith and Topin, 2019), random crops and flips, seeded. Writes
`weights/NAME.safetensors`. Nothing is chosen here: one run, the last epoch, judged on `validation.parquet`.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import depthwise
import numpy as np
import pyarrow.parquet as pq
import safetensors.torch
import squeeze
import torch
import torch.nn.functional as F
from data import MEAN, STD, data_folder, decode_pixels, validation
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Plan:
    """How one network is trained. bfloat16: depthwise convolutions are slower in it on a CPU, dense ones faster."""

    build: Callable[[], nn.Module]
    epochs: int
    bfloat16: bool


PLANS = {
    "depthwise": Plan(depthwise.DepthwiseNet, epochs=10, bfloat16=False),
    "squeeze": Plan(squeeze.SqueezeNet, epochs=16, bfloat16=True),
}
BATCH = 128
RATE, MOMENTUM, DECAY = 0.2, 0.9, 5e-4
MARGIN = 4
SEED = 0


def main() -> None:
    """Train, tell how it goes, and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=PLANS)
    parser.add_argument("--output", type=Path, help="default: weights/NETWORK.safetensors beside this file")
    arguments = parser.parse_args()
    output = arguments.output or Path(__file__).resolve().parent / "weights" / f"{arguments.network}.safetensors"
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    plan = PLANS[arguments.network]
    model = plan.build()
    images, labels = load_pixels(data_folder() / "train.parquet")
    for epoch, loss in enumerate(train(model, images, labels, epochs=plan.epochs, bfloat16=plan.bfloat16), 1):
        print(f"{time.strftime('%H:%M:%S')}  epoch {epoch}  loss {loss:.4f}", flush=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({name: value.contiguous() for name, value in model.state_dict().items()}, output)
    print(f"accuracy on validation {measure_accuracy(model.eval()):.4f}, weights in {output}", flush=True)


def load_pixels(path: Path) -> tuple[Tensor, Tensor]:
    """Every image of a Parquet file decoded once: (n, 3, 32, 32) uint8 and labels (n,) int64."""
    table = pq.read_table(path, columns=["image", "label"])
    pixels = np.stack([decode_pixels(jpeg.as_py()) for jpeg in table["image"]])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(table["label"].to_numpy().astype(np.int64))


def train(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, bfloat16: bool) -> Iterator[float]:
    """Train the model in place; the mean loss of each epoch as it ends. Seeded by the global generator.

    images: (n, 3, 32, 32) uint8; labels: (n,) int64.
    """
    steps = math.ceil(len(images) / BATCH)
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=epochs * steps, pct_start=0.3)
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                logits = model(normalize(augment(images[rows])))
            loss = F.cross_entropy(logits.float(), labels[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        yield total / len(images)


def augment(images: Tensor) -> Tensor:
    """Each image (n, 3, 32, 32) moved by up to four pixels, zeros let in at the edges, and half of them mirrored."""
    count, _, height, width = images.shape
    padded = F.pad(images, (MARGIN,) * 4)
    top, left = torch.randint(2 * MARGIN + 1, (2, count, 1))
    columns = torch.arange(width).expand(count, -1)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns, columns.flip(1)) + left
    rows = torch.arange(height) + top
    # Indices on both sides of a slice put the indexed dimensions first: (n, height, width, 3), channels last already.
    moved = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def normalize(images: Tensor) -> Tensor:
    """As `data.decode` does it: uint8 pixels to float32, divided by 255, normalized by channel."""
    mean, std = (torch.from_numpy(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


@torch.inference_mode()
def measure_accuracy(model: nn.Module) -> float:
    """The share of validation images given their label."""
    hits = [model(images).argmax(dim=1) == labels for images, labels in validation()]
    return float(torch.cat(hits).float().mean())


if __name__ == "__main__":
    main()
