"""What training minimizes: distance from the labels, or from a teacher's answers."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from fettle.core.errors import DataError


def outputs_of(answer: Any) -> tuple[torch.Tensor, ...]:
    """A model's outputs as a tuple, whether it has one or several."""
    return tuple(answer) if isinstance(answer, tuple | list) else (answer,)


def label_loss(answer: Any, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the first output with integer targets; mean squared error where targets are real numbers.

    Integer targets are class numbers: one for each row of logits (rows, classes), or for each place of logits
    (rows, classes, ...) or (rows, ..., classes). Real targets have the output's shape. Returns () float32. Raises
    DataError for a shape that does not fit, a class that the model does not have, a target that is not finite.

    >>> label_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor(0.6931)
    >>> label_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([2]))
    Traceback (most recent call last):
    fettle.core.errors.DataError: targets must be class numbers 0 to 1, got 2
    """
    output = outputs_of(answer)[0].float()
    if targets.is_floating_point():
        return _squared(output, targets)
    if targets.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise DataError(f"targets must be class numbers or real numbers, got {targets.dtype}")
    logits = _classes_second(output, targets)
    low, high = (int(end) for end in torch.aminmax(targets))
    if low < 0 or high >= logits.shape[1]:
        got = low if low < 0 else high
        raise DataError(f"targets must be class numbers 0 to {logits.shape[1] - 1}, got {got}")
    return functional.cross_entropy(logits, targets.long())


def teacher_loss(answer: Any, wanted: Any, targets: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of the first output from the teacher's, and the relative error of every other one.

    First output: Σ_k p_k (log p_k − log q_k), p the teacher's softmax and q the model's over the classes, averaged over
    rows and places. Other outputs, and the first where targets are real numbers: mean (y − ŷ)² / mean y².

    answer, wanted: outputs of model and teacher, alike in number and shape. targets: as for `label_loss`; only their
    type and shape are used, to tell where the classes are. Returns () float32. Raises DataError as `label_loss`. Hinton
    et al. 2015, "Distilling the Knowledge in a Neural Network", at temperature 1: the model shall be no softer.

    >>> same = torch.tensor([[1.0, 2.0]])
    >>> float(teacher_loss(same, same, torch.tensor([0])))
    0.0
    """
    found, right = outputs_of(answer), outputs_of(wanted)
    loss = _relative(found[0], right[0])
    if not targets.is_floating_point():
        loss = _divergence(_classes_second(found[0], targets), _classes_second(right[0], targets))
    for output, expected in zip(found[1:], right[1:], strict=True):
        loss = loss + _relative(output, expected)
    return loss


def _divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    found, right = (functional.log_softmax(values.float(), dim=1) for values in (logits, wanted))
    return functional.kl_div(found, right, reduction="none", log_target=True).sum(dim=1).mean()


def _relative(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    size = wanted.float().square().mean().clamp_min(1e-12)
    return (output.float() - wanted.float()).square().mean() / size


def _squared(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if targets.shape != output.shape:
        raise DataError(f"real targets must have the output's shape {list(output.shape)}, got {list(targets.shape)}")
    if not torch.isfinite(targets).all():
        raise DataError("targets must be finite, got NaN or infinity: drop or repair such rows in the loader")
    return functional.mse_loss(output, targets.float())


def _classes_second(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Logits with their classes in dimension 1, as torch wants them."""
    if output.ndim >= 2:
        if targets.shape == (output.shape[0], *output.shape[2:]):
            return output
        if targets.shape == output.shape[:-1]:
            return output.movedim(-1, 1)
    raise DataError(
        f"targets must hold one class number for each row of the output {list(output.shape)}, "
        f"got shape {list(targets.shape)}"
    )
