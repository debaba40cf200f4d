"""How a training is to go: epochs, rates, precision, and the device it runs on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from fettle.core.errors import UsageError

Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to train.

    learning_rate: at the start; it falls to zero along half a cosine, batch by batch where the length of an epoch is
        known (the loader has a length, or an epoch has passed), else epoch by epoch.
    optimizer: "adamw", or "sgd" with Nesterov momentum 0.9.
    weight_decay: of the groups that ask for it.
    precision: of the forward pass. "auto" is float32 on a CPU, bfloat16 or else float16 on a GPU. Losses, weights and
        validation are float32 in any case.

    Raises UsageError for values that cannot mean anything.
    """

    epochs: int
    learning_rate: float
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise UsageError(f"epochs must be at least 1, got {self.epochs}: leave the step out to train nothing")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UsageError(f"learning_rate must be a positive number, got {self.learning_rate}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UsageError(f"weight_decay must be zero or a positive number, got {self.weight_decay}")
        if self.optimizer not in ("adamw", "sgd"):
            raise UsageError(f'optimizer must be "adamw" or "sgd", got {self.optimizer!r}')
        if self.precision not in ("auto", "float32", "bfloat16", "float16"):
            raise UsageError(f'precision must be "auto", "float32", "bfloat16" or "float16", got {self.precision!r}')

    def rate(self, share: float) -> float:
        """The learning rate when this share of the training, 0 to 1, is done.

        >>> [round(Plan(epochs=1, learning_rate=0.1).rate(share), 3) for share in (0.0, 0.5, 1.0)]
        [0.1, 0.05, 0.0]
        """
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Tensors that are trained alike. pace: times the learning rate; decay: whether weight decay applies."""

    tensors: list[torch.Tensor]
    pace: float = 1.0
    decay: bool = False


def choose_device(name: str) -> torch.device:
    """The device of `Context.device`. Raises UsageError for one that torch does not know or this machine lacks.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f'device must be "auto", "cpu", "cuda" or "cuda:1", got "{name}"') from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f'device must be "auto", "cpu" or "cuda", got "{name}"')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UsageError(f'device "{name}" was asked for, and this machine has {found} GPUs that torch can use')
    return device


def forward_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """What the forward pass runs at: see `Plan.precision`.

    >>> forward_precision("auto", torch.device("cpu"))
    torch.float32
    """
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def make_optimizer(plan: Plan, groups: list[Group]) -> torch.optim.Optimizer:
    """The plan's optimizer over these groups, each at its pace."""
    settings = [
        {
            "params": group.tensors,
            "lr": plan.learning_rate * group.pace,
            "weight_decay": plan.weight_decay if group.decay else 0.0,
        }
        for group in groups
    ]
    if plan.optimizer == "sgd":
        return torch.optim.SGD(settings, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(settings)
