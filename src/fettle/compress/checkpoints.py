"""The state of a training in one file: whole or absent, refused by any other work, and never a pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from fettle.core import codec
from fettle.core.errors import CorruptArtifact, FettleError
from fettle.core.files import write_atomic

_HEADER = "training"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a training is.

    work: digest of everything that decides its result. epochs: done. batches: in one epoch. scores: of the model
    before training and after each epoch, empty where nobody scores. best: the epoch kept, 0 for none trained.
    scaler: state of the loss scaling of float16.
    """

    work: str
    epochs: int = 0
    batches: int = 0
    scores: tuple[float, ...] = ()
    best: int = 0
    scaler: dict[str, int | float] = field(default_factory=dict)


def checkpoint_path(folder: Path, work: str) -> Path:
    """Where this work's checkpoint lies: other work in the same folder has a file of its own."""
    return folder / f"training-{work[:16]}.safetensors"


def write_checkpoint(path: Path, progress: Progress, tensors: Mapping[str, torch.Tensor]) -> None:
    """One safetensors file with the progress as JSON in its header, so that a kill cannot part the two."""
    # safetensors refuses tensors that share memory, as tied weights do.
    whole = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    header = {_HEADER: codec.canonical(progress).decode()}
    write_atomic(path, safetensors.torch.save(whole, metadata=header))


def read_checkpoint(path: Path, work: str) -> tuple[Progress, dict[str, torch.Tensor]] | None:
    """What the file holds, or None where there is none.

    Raises CorruptArtifact for a file that cannot be read, and for one of other work.
    """
    if not path.is_file():
        return None
    advice = "delete it to train from the start"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            progress = codec.from_json(Progress, header, where=path.name)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, FettleError) as problem:
        raise CorruptArtifact(f"the checkpoint {path} cannot be read: {problem}: {advice}") from None
    if progress.work != work:
        raise CorruptArtifact(f"the checkpoint {path} is of other work, {progress.work[:12]}…: {advice}")
    return progress, tensors


def digest_state(model: torch.nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of a model's parameters and buffers.

    >>> one, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    >>> _ = other.load_state_dict(one.state_dict())
    >>> digest_state(one) == digest_state(other)
    True
    """
    whole = hashlib.sha256()
    for name, value in model.state_dict().items():
        plain = value.detach().cpu().contiguous()
        whole.update(f"{name} {plain.dtype} {list(plain.shape)};".encode())
        whole.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()
