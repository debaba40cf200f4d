"""CIFAR-10 stored as JPEG in Parquet: lazy batches of normalized images and labels."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

Batch = tuple[Tensor, Tensor]

BATCH = 128
CALIBRATION_IMAGES = 2048
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


class Batches:
    """The first `limit` images of a Parquet file, decoded while they are read; iterate as often as you like.

    Each batch is images (n, 3, 32, 32) float32, normalized, and labels (n,) int64.
    """

    def __init__(self, path: Path, *, limit: int, size: int = BATCH) -> None:
        self.path, self.limit, self.size = path, limit, size

    def __iter__(self) -> Iterator[Batch]:
        left = self.limit
        with pq.ParquetFile(self.path) as file:
            for rows in file.iter_batches(batch_size=self.size, columns=["image", "label"]):
                if left <= 0:
                    return
                rows = rows.slice(0, left)
                left -= len(rows)
                images = np.stack([decode(jpeg) for jpeg in rows["image"].to_pylist()])
                labels = np.array(rows["label"].to_pylist(), np.int64)
                yield torch.from_numpy(images), torch.from_numpy(labels)

    def __len__(self) -> int:
        """How many batches there are."""
        with pq.ParquetFile(self.path) as file:
            images = min(self.limit, file.metadata.num_rows)
        return -(-images // self.size)


def train() -> Batches:
    """2048 of the 50 000 training images: plenty to calibrate on, and the file is shuffled."""
    return Batches(data_folder() / "train.parquet", limit=CALIBRATION_IMAGES)


def train_all() -> Batches:
    """All 50 000 training images, for pruning, distillation and quantization-aware training."""
    return Batches(data_folder() / "train.parquet", limit=50_000)


def validation() -> Batches:
    """2000 images for every choice."""
    return Batches(data_folder() / "validation.parquet", limit=2_000)


def test() -> Batches:
    """5000 images, to be touched once."""
    return Batches(data_folder() / "test.parquet", limit=5_000)


def decode(jpeg: bytes) -> np.ndarray:
    """One image (3, 32, 32) as the weights expect it: RGB, divided by 255, normalized."""
    pixels = decode_pixels(jpeg).astype(np.float32) / 255
    return np.ascontiguousarray(((pixels - MEAN) / STD).transpose(2, 0, 1))


def decode_pixels(jpeg: bytes) -> np.ndarray:
    """One image (32, 32, 3) as it is stored: RGB, uint8."""
    with Image.open(io.BytesIO(jpeg)) as image:
        return np.array(image.convert("RGB"))


def data_folder() -> Path:
    """The folder of `train.parquet` and the weights: `$FETTLE_DATA`, else `../shared/data/cifar10-jpeg`."""
    repository = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("FETTLE_DATA") or repository.parent / "shared" / "data" / "cifar10-jpeg")
    wanted = ("train.parquet", "validation.parquet", "test.parquet", "resnet20.safetensors", "resnet56.safetensors")
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the CIFAR-10 example needs {', '.join(missing)} in {folder}: "
            "set FETTLE_DATA to the folder that holds them (README.md says how they are made)"
        )
    return folder
