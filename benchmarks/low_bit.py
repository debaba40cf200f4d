"""Four-bit weights on ResNet-20: rounded to nearest, rounded adaptively, and trained with rounding.

Weights have four bits per output channel, activations eight. Every form is exported and answers in ONNX Runtime. The
training reads a fifth of `data:train_all` of `examples/cifar10`, and keeps the best epoch by validation; test images
are read for the figures alone. No peer trains four-bit weights of convolutions for a CPU engine: NNCF's and torchao's
four bits are for linear layers.

Claimed: trained, four-bit weights lose at most 1.5 points.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines import load_onnxruntime, predict_all
from harness import ROOT, Claim, Options, Result, Table, finish, parse_options

from fettle.compress.capture import export_program
from fettle.compress.quantize import AdaRound, PostTraining, QuantizationAware
from fettle.compress.step import Context, Step
from fettle.core.project import Project
from fettle.runtime._onnx import write_onnx

BITS = 4
MAX_DROP = 0.015
CALIBRATION_BATCHES = 8
TRAIN_BATCHES = 80  # of 128 images: a fifth of the training data, twice, is minutes on one core
TRAINED = QuantizationAware(epochs=2, weight_bits=BITS, batches=CALIBRATION_BATCHES)


@dataclass(frozen=True, slots=True)
class Row:
    """One form of the network. accuracy, drop, agreement: shares of the test images; seconds: to make it."""

    name: str
    accuracy: float
    drop: float
    agreement: float
    seconds: float


def main(options: Options) -> int:
    """Make each form, judge it, report."""
    torch.set_num_threads(1)
    project = Project.open(ROOT / "examples" / "cifar10" / "fettle.toml")
    model = project.call("model.build", project.file.model.build)
    images, labels = collect(
        project.call("data.test", project.file.data.test or ""), limit=500 if options.quick else None
    )
    rows = [judge("float", model, images, labels, classes=None, seconds=0.0)]
    with torch.inference_mode():
        classes = np.concatenate([model(part).argmax(1).numpy() for part in images.split(250)])
    coarse = PostTraining(weight_bits=BITS, batches=CALIBRATION_BATCHES)
    forms: dict[str, tuple[Step, ...]] = {
        "rounded to nearest": (coarse,),
        "adaptive rounding": (coarse, AdaRound()),
        "trained, quantize.qat": (TRAINED,),
    }
    for name, steps in forms.items():
        start = time.perf_counter()
        found = carry_out(project, model, steps, quick=options.quick)
        seconds = time.perf_counter() - start
        rows.append(
            judge(name, found, images, labels, classes=classes, seconds=seconds, float_accuracy=rows[0].accuracy)
        )
        print(rows[-1], file=sys.stderr)
    result = Result(
        benchmark="low_bit",
        tables=(tabulate(rows, images=len(images)),),
        claims=(claim(rows[-1]),),
        details={"rows": [asdict(row) for row in rows], "steps": {name: str(steps) for name, steps in forms.items()}},
    )
    return finish(result, options)


def carry_out(project: Project, model: torch.nn.Module, steps: tuple[Step, ...], *, quick: bool) -> torch.nn.Module:
    """The steps in order, each in a context of its own."""
    example = project.call("model.example", project.file.model.example)
    train = project.call("data.train", "data:train_all")
    validation = collect(project.call("data.validation", project.file.data.validation), limit=500 if quick else None)
    for step in steps:
        context = Context(
            example=example,
            calibration=((batch,) for batch, _ in project.call("data.train", project.file.data.train or "")),
            train=partial(labelled, train, limit=4 if quick else TRAIN_BATCHES),
            score=partial(accuracy, images=validation[0], labels=validation[1]),
            device="cpu",
            note=partial(print, file=sys.stderr),
        )
        model = step.apply(model, context)
    return model


def labelled(loader: Any, *, limit: int | None) -> Any:
    """Batches as a training step takes them, at most `limit`."""
    for index, (images, labels) in enumerate(loader):
        if index == limit:
            return
        yield (images,), labels


def accuracy(model: torch.nn.Module, *, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images given their label."""
    with torch.inference_mode():
        found = torch.cat([model(part).argmax(1) for part in images.split(250)])
    return float((found == labels).float().mean())


def judge(
    name: str,
    model: torch.nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    classes: Any,
    seconds: float,
    float_accuracy: float | None = None,
) -> Row:
    """Export the model, answer the test images in ONNX Runtime, compare with labels and with the float model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(export_program(model, (images[:2],)), path, inputs=["images"], outputs=["logits"])
        found = predict_all(load_onnxruntime(path), images.numpy()).argmax(axis=1)
    share = float(np.mean(found == labels.numpy()))
    agreement = 1.0 if classes is None else float(np.mean(found == classes))
    return Row(name, share, (share if float_accuracy is None else float_accuracy) - share, agreement, seconds)


def claim(trained: Row) -> Claim:
    """The trained form beside float."""
    return Claim(
        f"trained, {BITS}-bit weights lose at most {100 * MAX_DROP:.1f} points",
        holds=trained.drop <= MAX_DROP + 1e-4,
        figures=f"ResNet-20, {BITS} bits: drop {100 * trained.drop:+.2f} points, agreement {trained.agreement:.2%}",
    )


def tabulate(rows: list[Row], *, images: int) -> Table:
    """One line for each form."""
    cells = tuple(
        (row.name, f"{row.accuracy:.4f}", f"{100 * row.drop:+.2f}", f"{row.agreement:.4f}", f"{row.seconds:.0f}")
        for row in rows
    )
    columns = ("weights", "accuracy", "drop, points", "agreement", "made in, s")
    return Table(f"ResNet-20 with {BITS}-bit weights on {images} test images of CIFAR-10 (JPEG)", columns, cells)


def collect(loader: Any, *, limit: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `limit` images and labels of a loader, or all."""
    images, labels = (torch.cat(parts)[:limit] for parts in zip(*loader, strict=True))
    return images, labels


if __name__ == "__main__":
    raise SystemExit(main(parse_options(__doc__)))
