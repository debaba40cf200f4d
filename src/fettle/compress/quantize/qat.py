"""Quantization-aware training: the weights learn to answer well once they are rounded."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fettle.compress.losses import label_loss, teacher_loss
from fettle.compress.plan import Group, Plan, choose_device
from fettle.compress.quantize.graph.fold import FoldedNorm
from fettle.compress.quantize.graph.simulate import Simulated
from fettle.compress.quantize.graph.trainable import (
    freeze_norms,
    freeze_ranges,
    make_trainable,
    refit_weights,
    scales_of,
    settle,
    unrounded,
)
from fettle.compress.quantize.post_training import PostTraining
from fettle.compress.step import Context, Step, Tensors
from fettle.compress.training import Loss, Trainee, train
from fettle.core.errors import UsageError

# Of the step's progress; calibration reads a few batches once.
_CALIBRATION_SHARE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationAware(Step):
    """Train with rounding simulated in the same graph that PostTraining makes, so the result runs where its does.

    A float model is captured, folded and calibrated first, exactly as by PostTraining; layers that had a batch-norm
    train with it. A model that is quantized already goes on from where it is, its norms folded. Each weight and
    activation is rounded in the forward pass, and the gradient passes straight through.

    epochs, learning_rate, optimizer, weight_decay: see `fettle.compress.plan.Plan`.
    weight_bits: 2 to 8; None for 8, or for what a quantized model has. A layer that has as many already keeps its
        scales and the rounding that was chosen for it.
    learn_scales: the steps of weights and activations are trained too (LSQ, Esser et al. 2020). Otherwise those of the
        weights follow the least squared error, and activation ranges a moving average of smallest and largest values.
    follow_epochs: after so many, scales and ranges that are not learned stay as they are.
    norm_epochs: after so many, batch-norm uses its running statistics, as the deployed model does. Zero is best for a
        model that is nearly right to begin with; fewer bits may need some.
    loss: "labels" for cross-entropy (squared error for real targets), "teacher" for the divergence from the float
        model's answers, "both" for their mean. The teacher knows more than the label, and brings the trained model
        nearest to the float one; labels are for training on beyond it.
    observer, batches, keep_float: of the calibration, as in PostTraining; not used for a quantized model.

    Validation after each epoch, the best one kept, and resuming: see `fettle.compress.training.train`. Raises what that
    and PostTraining raise. Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference".

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> batches = [((x,), (x[:, 0] > 0).long())]
    >>> context = Context(example=(x[:2],), calibration=[(x,)], train=lambda: batches, device="cpu")
    >>> trained = QuantizationAware(epochs=2, weight_bits=4).apply(model, context)
    >>> trained(x).shape
    torch.Size([64, 2])
    """

    precision: ClassVar[str] = "int8"

    epochs: int = 3
    learning_rate: float = 3e-4
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    weight_bits: int | None = None
    learn_scales: bool = False
    follow_epochs: int = 1
    norm_epochs: int = 0
    loss: Literal["labels", "teacher", "both"] = "teacher"
    observer: str = "histogram_mse"
    batches: int = 100
    keep_float: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._plan()
        self._calibration()
        for name in ("follow_epochs", "norm_epochs"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must be zero or more, got {getattr(self, name)}")
        if self.loss not in ("labels", "teacher", "both"):
            raise UsageError(f'loss must be "labels", "teacher" or "both", got {self.loss!r}')

    def apply(self, model: nn.Module, context: Context) -> Simulated:
        if context.train is None:
            raise UsageError(
                f"{self.step_name()} trains and needs labelled batches: give Context(train=...), a callable that "
                "returns an iterable of (inputs, targets), or use quantize.post_training, which needs none"
            )
        device = choose_device(context.device)
        simulated, norms = self._start(model, context)
        if not simulated.layers():
            context.progress(1.0)
            return simulated
        teacher = unrounded(simulated).to(device)
        make_trainable(simulated, norms, follow=not self.learn_scales)
        simulated.to(device)
        schedule = _Schedule(self, simulated)
        trainee = Trainee(
            model=simulated,
            groups=self._groups(simulated),
            loss=_loss(self.loss, teacher),
            begin_epoch=schedule.begin_epoch,
            after_batch=schedule.after_batch,
            finished=_settled_copy,
        )
        rest = 1 - _CALIBRATION_SHARE
        later = replace(context, progress=lambda share: context.progress(_CALIBRATION_SHARE + rest * share))
        outcome = train(trainee, self._plan(), later, spec=self.spec())
        settle(simulated)
        context.note(outcome.sentence("quantization-aware training"))
        return simulated.to("cpu")

    def _plan(self) -> Plan:
        return Plan(
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
        )

    def _calibration(self) -> PostTraining:
        return PostTraining(
            observer=self.observer,
            batches=self.batches,
            weight_bits=8 if self.weight_bits is None else self.weight_bits,
            keep_float=self.keep_float,
        )

    def _start(self, model: nn.Module, context: Context) -> tuple[Simulated, dict[str, FoldedNorm]]:
        """The simulated model to train, all its own, and by a layer's path the norm that was folded into it."""
        if isinstance(model, Simulated):
            simulated = copy.deepcopy(model)
            for layer in simulated.layers().values():
                # One that has these bits already keeps its scales, and the rounding that a step chose for it.
                if self.weight_bits is not None and self.weight_bits != layer.scheme.bits:
                    layer.integers = None
                    layer.set_bits(self.weight_bits)
            return simulated, {}
        early = replace(context, progress=lambda share: context.progress(_CALIBRATION_SHARE * share))
        quantized, folded = self._calibration().quantize(model, early)
        # After simulation the node that was the layer calls it by its path.
        norms = {str(node.target): norm for node, norm in folded.items() if node.op == "call_module"}
        # Parameters of float layers are the given model's own until here.
        return copy.deepcopy(quantized), norms

    def _groups(self, simulated: Simulated) -> list[Group]:
        scales = scales_of(simulated) if self.learn_scales else []
        trained = [value for value in simulated.parameters() if value.is_floating_point()]
        for value in (*trained, *scales):
            value.requires_grad_(True)
        groups = [
            Group(tensors=[value for value in trained if value.ndim > 1], decay=True),
            Group(tensors=[value for value in trained if value.ndim <= 1]),
        ]
        # Adam moves everything by the learning rate, and for a scale only a move relative to its size makes sense.
        relative = self.optimizer == "adamw"
        groups += [Group(tensors=[value], pace=float(value.detach().median()) if relative else 1.0) for value in scales]
        return [group for group in groups if group.tensors]


class _Schedule:
    """What follows the weights, and until when."""

    def __init__(self, step: QuantizationAware, simulated: Simulated) -> None:
        self._step, self._simulated = step, simulated
        self._following = False
        self._floors = [(scale, scale.detach() / 64) for scale in scales_of(simulated)] if step.learn_scales else []

    def begin_epoch(self, epoch: int) -> None:
        freeze_norms(self._simulated, epoch >= self._step.norm_epochs)
        self._following = epoch < self._step.follow_epochs and not self._step.learn_scales
        freeze_ranges(self._simulated, not self._following)

    def after_batch(self) -> None:
        if self._following:
            refit_weights(self._simulated)
        with torch.no_grad():
            for scale, floor in self._floors:  # a learned scale may step past zero
                torch.maximum(scale, floor, out=scale)


def _loss(kind: str, teacher: nn.Module) -> Loss:
    def measure(answer: Any, inputs: Tensors, targets: torch.Tensor) -> torch.Tensor:
        if kind == "labels":
            return label_loss(answer, targets)
        with torch.no_grad():
            wanted = teacher(*inputs)
        divergence = teacher_loss(answer, wanted, targets)
        return divergence if kind == "teacher" else (divergence + label_loss(answer, targets)) / 2

    return measure


def _settled_copy(model: nn.Module) -> nn.Module:
    assert isinstance(model, Simulated)
    copied = copy.deepcopy(model)
    settle(copied)
    return copied
