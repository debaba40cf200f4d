"""What is served: ResNet-20 quantized by fettle, sealed for ONNX Runtime and for OpenVINO; and JPEGs to ask about."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from harness import ROOT
from PIL import Image
from serve_peers.payloads import Payload

from fettle.compress.capture import export_program
from fettle.compress.quantize import PostTraining
from fettle.compress.step import Context
from fettle.core import plugins
from fettle.core.artifact import Artifact, Manifest
from fettle.core.project import Project
from fettle.core.recipe import Recipe
from fettle.core.runner import RuntimeBase
from fettle.core.signature import Array, Signature, TensorSpec
from fettle.serve.images import preprocess

CALIBRATION_IMAGES = 512
GOLDEN_ROWS = 4
MAX_PIXELS = 25_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model and images for it. jpegs: what is sent; note: where both come from."""

    project: Project
    model: torch.nn.Module
    calibration: Sequence[torch.Tensor]
    jpegs: Sequence[bytes]
    note: str


@dataclass(frozen=True, slots=True)
class Expected:
    """The right answers, float64 of shape (images, classes)."""

    logits: Array
    probabilities: Array

    def of(self, payload: Payload) -> Array:
        """What answers to this kind of request hold."""
        return self.logits if payload.logits else self.probabilities


def find_subject(*, images: int) -> Subject:
    """The trained ResNet-20 and test images, or, without the data, a random one and noise: as much work, no sense."""
    project = Project.open(ROOT / "examples" / "cifar10" / "fettle.toml")
    try:
        folder = project.resolve("data", "data:data_folder")()
    except FileNotFoundError:
        return invent_subject(project, images=images)
    loader = project.call("data.train", project.file.data.train or "")
    batches: list[torch.Tensor] = []
    for batch, _ in loader:
        batches.append(batch)
        if sum(map(len, batches)) >= CALIBRATION_IMAGES:
            break
    with pq.ParquetFile(folder / "test.parquet") as file:
        rows = next(file.iter_batches(batch_size=images, columns=["image"]))
    model = project.call("model.build", project.file.model.build)
    return Subject(
        project=project,
        model=model,
        calibration=batches,
        jpegs=rows["image"].to_pylist(),
        note="test images of CIFAR-10",
    )


def invent_subject(project: Project, *, images: int) -> Subject:
    """Random weights and JPEGs of noise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = project.resolve("model.build", "model:ResNet")(blocks=3).eval()
    rng = np.random.default_rng(0)
    jpegs = [encode_jpeg(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(images)]
    image = project.file.preprocess.image
    assert image is not None
    batch = np.concatenate([preprocess(jpeg, image, max_pixels=MAX_PIXELS) for jpeg in jpegs])
    note = "JPEGs of noise to a ResNet-20 with random weights, for want of the data"
    return Subject(project=project, model=model, calibration=[torch.from_numpy(batch)], jpegs=jpegs, note=note)


def encode_jpeg(pixels: Array) -> bytes:
    """(height, width, 3) uint8 to a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def seal(subject: Subject, folder: Path, *, runtime: str, quantized: torch.nn.Module) -> Artifact:
    """Export into the folder for this runtime, with golden rows from its own runner."""
    task, image = subject.project.file.task, subject.project.file.preprocess.image
    assert image is not None
    signature = Signature(
        inputs=(TensorSpec(name="images", dtype="float32", shape=("batch", *image.shape)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", len(task.classes))),),
        classes=tuple(task.classes),
        activation="softmax",
        image=image,
    )
    folder.mkdir(parents=True)
    engine = plugins.load("fettle.runtime", runtime, RuntimeBase)()
    engine.export(export_program(quantized, example(subject)), folder, signature)
    recipe = Recipe(name="post-training", steps=(PostTraining().spec(),))
    manifest = Manifest(runtime=runtime, precision="int8", signature=signature, files=(), recipe=recipe, tolerance=0.05)
    rows = subject.calibration[0][:GOLDEN_ROWS].numpy()
    # Opened without golden rows first: only the engine that will answer can say what it answers.
    draft = Artifact.seal(folder, manifest, golden={"input:images": rows})
    return Artifact.seal(folder, manifest, golden={"input:images": rows, "output:logits": draft.load()(rows)})


def quantize(subject: Subject) -> torch.nn.Module:
    """int8 weights and activations, as `fettle optimize` would make them."""
    context = Context(example=example(subject), calibration=[(batch,) for batch in subject.calibration])
    return PostTraining().apply(subject.model, context)


def example(subject: Subject) -> tuple[torch.Tensor, ...]:
    """Example inputs as the project gives them."""
    found: tuple[torch.Tensor, ...] = subject.project.call("model.example", subject.project.file.model.example)
    return found


def describe_task(artifact: Artifact) -> dict[str, Any]:
    """What a peer must know besides `model.onnx`, for `task.json`."""
    signature = artifact.manifest.signature
    assert signature.image is not None
    return {
        "classes": list(signature.classes),
        "mean": list(signature.image.mean),
        "std": list(signature.image.std),
        "input": signature.inputs[0].name,
    }


def save_float(subject: Subject, path: Path) -> None:
    """The model before quantization, for a peer that runs it operator by operator."""
    torch.export.save(export_program(subject.model, example(subject)), path)


def preprocess_all(artifact: Artifact, jpegs: Sequence[bytes]) -> Array:
    """The rows of the images, float32 of shape (images, 3, 32, 32)."""
    image = artifact.manifest.signature.image
    assert image is not None
    return np.concatenate([preprocess(jpeg, image, max_pixels=MAX_PIXELS) for jpeg in jpegs])


def answer_all(artifact: Artifact, rows: Array) -> Expected:
    """What the artifact's own runner gives, asked row by row."""
    runner = artifact.load()
    logits = np.concatenate([runner(row[None]) for row in rows])
    return expect(artifact.manifest.signature, logits)


def answer_all_in_float(subject: Subject, artifact: Artifact, rows: Array) -> Expected:
    """What the model gives before quantization, row by row."""
    with torch.inference_mode():
        logits = np.concatenate([subject.model(torch.from_numpy(row[None])).numpy() for row in rows])
    return expect(artifact.manifest.signature, logits)


def expect(signature: Signature, logits: Array) -> Expected:
    """Logits with the probabilities that follow from them."""
    return Expected(logits=logits.astype(np.float64), probabilities=signature.probabilities(logits))
