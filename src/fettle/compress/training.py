"""Train a model that a step prepared: epochs, best by validation, progress, and on after a kill.

The loop knows nothing of quantization, pruning or distillation: a step gives it a `Trainee`, which says what to change,
what to minimize and what to do between batches and epochs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fettle.compress.batches import checked_batches
from fettle.compress.checkpoints import Progress, checkpoint_path, digest_state, read_checkpoint, write_checkpoint
from fettle.compress.plan import Group, Plan, forward_precision, make_optimizer
from fettle.compress.step import Context, Tensors
from fettle.core import codec
from fettle.core.errors import DataError, UsageError
from fettle.core.recipe import StepSpec

# (the model's outputs, the inputs, the targets) -> () tensor to minimize.
Loss = Callable[[Any, Tensors, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trainee:
    """A model with what a step wants done to it.

    model: on its device already (`choose_device`). groups: what is changed; loss: what is minimized.
    begin_epoch: called with 0, 1, ... before each epoch, also before the first after a kill.
    after_batch: called after each change of the weights.
    finished: of the model, what is to be scored: the form in which it will leave the step.
    """

    model: nn.Module
    groups: list[Group]
    loss: Loss
    begin_epoch: Callable[[int], None] = lambda epoch: None
    after_batch: Callable[[], None] = lambda: None
    finished: Callable[[nn.Module], nn.Module] = lambda model: model

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.groups[0].tensors[0].device


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a training came to. scores: before it and after each epoch, or empty; best: the epoch kept, 0 for none."""

    best: int
    scores: tuple[float, ...]

    def sentence(self, what: str) -> str:
        """For the report.

        >>> Outcome(best=1, scores=(0.5, 0.75)).sentence("training")
        'training: epoch 1 of 1 was kept, score 0.7500 (0.5000 before training)'
        """
        if not self.scores:
            return f"{what}: the last of {self.best} epochs was kept, for want of a validation score"
        kept = f"epoch {self.best} of {len(self.scores) - 1} was kept" if self.best else "no epoch beat the start"
        return f"{what}: {kept}, score {self.scores[self.best]:.4f} ({self.scores[0]:.4f} before training)"


def train(trainee: Trainee, plan: Plan, context: Context, *, spec: StepSpec) -> Outcome:
    """Train in place and leave the model at its best epoch, in evaluation mode, where it is.

    The best epoch is the first with the highest `context.score`, the start counting as epoch 0; without a score, the
    last. spec: the step, for telling one work from another.

    Where `context.checkpoint` is a folder, the state is written there after each epoch, and a training with the same
    step, model, data, seed, versions and device goes on from it, to the same weights where the loader
    repeats itself. Raises UsageError without training data, DataError for an epoch without batches, a batch that does
    not fit, a loss or a score that is not finite, CorruptArtifact for a checkpoint that cannot be used.
    """
    if context.train is None:
        raise UsageError(
            f"{spec.name} trains and needs labelled batches: give Context(train=...), a callable that returns an "
            "iterable of (inputs, targets)"
        )
    device = trainee.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        run = _Run(trainee, plan, context)
        # Without a place for checkpoints nobody asks which work it is, and the pass over the data can be spared.
        run.resume("" if context.checkpoint is None else _digest(run, spec))
        while run.progress.epochs < plan.epochs:
            trainee.begin_epoch(run.progress.epochs)
            run.train_epoch()
            run.finish_epoch()
    trainee.model.load_state_dict(run.best)
    trainee.model.eval()
    context.progress(1.0)
    return Outcome(best=run.progress.best, scores=run.progress.scores)


class _Run:
    """The mutable side of one training."""

    def __init__(self, trainee: Trainee, plan: Plan, context: Context) -> None:
        self.trainee, self.plan, self.context = trainee, plan, context
        self.model, self.device = trainee.model, trainee.device
        self.optimizer = make_optimizer(plan, trainee.groups)
        self.autocast = forward_precision(plan.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast is torch.float16)
        self.progress = Progress(work="")
        self.best: dict[str, torch.Tensor] = {}

    def resume(self, work: str) -> None:
        """Go on from a checkpoint of this work, or score the start."""
        path = None if self.context.checkpoint is None else checkpoint_path(self.context.checkpoint, work)
        found = None if path is None else read_checkpoint(path, work)
        if found is None:
            scores = () if self.context.score is None else (self._score(),)
            self.progress = Progress(work=work, scores=scores)
            self.best = _copied(self.model)
            return
        self.progress, tensors = found
        self.model.load_state_dict(_under("model/", tensors))
        self.best = _under("best/", tensors)
        _restore(self.optimizer, _under("optimizer/", tensors))
        if self.progress.scaler:
            self.scaler.load_state_dict(dict(self.progress.scaler))
        self.context.note(f"training went on after epoch {self.progress.epochs} of {self.plan.epochs}, from {path}")

    def train_epoch(self) -> None:
        """One pass over the data."""
        epoch = self.progress.epochs
        torch.manual_seed(_seed(self.context.seed, epoch))
        self.model.train()
        source, length = self._open(epoch)
        expected = length or self.progress.batches
        count = 0
        for inputs, targets in source:
            share = (epoch + (min(count / expected, 1.0) if expected else 0.0)) / self.plan.epochs
            for group, settings in zip(self.trainee.groups, self.optimizer.param_groups, strict=True):
                settings["lr"] = self.plan.rate(share) * group.pace
            self._train_batch(inputs, targets, where=f"epoch {epoch + 1}, batch {count}")
            self.trainee.after_batch()
            count += 1
            self.context.progress(share)
        if count == 0:
            again = " after an epoch with batches: `train` must return a fresh iterable each time" if epoch else ""
            raise DataError(f"training data must yield at least one batch in each epoch, got none{again}")
        self.progress = replace(self.progress, batches=count)

    def finish_epoch(self) -> None:
        """Score, keep the best, write the checkpoint."""
        epoch = self.progress.epochs + 1
        for name, value in self.model.state_dict().items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise DataError(f"epoch {epoch}: {name} must stay finite, got NaN or infinity{self._advice()}")
        scores = self.progress.scores if self.context.score is None else (*self.progress.scores, self._score())
        best = scores.index(max(scores)) if scores else epoch
        if best == epoch:
            self.best = _copied(self.model)
        scaler = self.scaler.state_dict()
        self.progress = replace(self.progress, epochs=epoch, scores=scores, best=best, scaler=scaler)
        self.context.progress(epoch / self.plan.epochs)
        if self.context.checkpoint is not None:
            tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
            tensors |= {f"best/{name}": value for name, value in self.best.items()}
            tensors |= {f"optimizer/{name}": value for name, value in _saved(self.optimizer).items()}
            write_checkpoint(checkpoint_path(self.context.checkpoint, self.progress.work), self.progress, tensors)

    def _open(self, epoch: int) -> tuple[Iterator[tuple[Tensors, torch.Tensor]], int]:
        """The checked batches of an epoch on the device, and how many there are, 0 where nobody knows."""
        assert self.context.train is not None
        batches = self.context.train()
        if not hasattr(batches, "__iter__"):
            raise DataError(f"`train` must return an iterable of (inputs, targets), got {type(batches).__name__}")
        length = len(batches) if isinstance(batches, Sized) else 0
        return checked_batches(batches, self.context.example, self.device, where=f"epoch {epoch + 1}"), length

    def data_digest(self) -> str:
        """Digest of one pass over the data, by which to tell other data: taken anew by every run of this work.

        Inputs and targets of every batch, so that a checkpoint of training on other rows is never gone on with.
        """
        torch.manual_seed(_seed(self.context.seed, -1))
        batches, _ = self._open(0)
        seen, empty = hashlib.sha256(), True
        for inputs, targets in batches:
            empty = False
            for tensor in (*inputs, targets):
                plain = tensor.cpu().contiguous()
                seen.update(f"{plain.dtype} {list(plain.shape)};".encode())
                seen.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        if not empty:
            return seen.hexdigest()
        raise DataError("training data must yield at least one batch (inputs, targets), got none")

    def _train_batch(self, inputs: Tensors, targets: torch.Tensor, *, where: str) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        half: AbstractContextManager[Any] = nullcontext()
        if self.autocast is not torch.float32:
            half = torch.autocast(self.device.type, dtype=self.autocast)
        try:
            with half:
                loss = self.trainee.loss(self.model(*inputs), inputs, targets)
        except DataError as problem:
            raise DataError(f"{where}: {problem}") from problem
        if not torch.isfinite(loss):
            raise DataError(f"{where}: the loss must stay finite, got {float(loss.detach())}{self._advice()}")
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @torch.no_grad()
    def _score(self) -> float:
        assert self.context.score is not None
        self.model.eval()
        model = self.trainee.finished(self.model)
        score = float(self.context.score(model if self.device.type == "cpu" else _Remote(model, self.device)))
        if not math.isfinite(score):
            raise DataError(f"the validation score must be a finite number, got {score}")
        return score

    def _advice(self) -> str:
        kept = ""
        if self.context.checkpoint is not None and self.progress.epochs:
            path = checkpoint_path(self.context.checkpoint, self.progress.work)
            kept = f"; the best so far, epoch {self.progress.best}, is kept in {path}"
        return f": try a learning rate below {self.plan.learning_rate:g}{kept}"


class _Remote(nn.Module):
    """A model on another device that takes and gives tensors on the CPU."""

    def __init__(self, inner: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.inner, self._device = inner, device

    def forward(self, *inputs: torch.Tensor) -> Any:
        answer = self.inner(*(value.to(self._device) for value in inputs))
        return tuple(value.cpu() for value in answer) if isinstance(answer, tuple | list) else answer.cpu()


def _saved(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's tensors by "position/name"; its settings are the plan's."""
    found = optimizer.state_dict()["state"]
    return {
        f"{position}/{name}": value
        for position, values in found.items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }


def _restore(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        position, _, name = key.partition("/")
        state.setdefault(int(position), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _seed(seed: int, epoch: int) -> int:
    """A seed for one epoch, so that a training which goes on needs no generator's state."""
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:8], "big") >> 1


def _digest(run: _Run, spec: StepSpec) -> str:
    return codec.digest(
        {
            "step": codec.to_json(spec),
            "plan": codec.to_json(run.plan),
            "seed": run.context.seed,
            "start": digest_state(run.model),
            "data": run.data_digest(),
            "scored": run.context.score is not None,
            "torch": str(torch.__version__),
            "device": str(run.device),
        }
    )
