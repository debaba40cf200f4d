"""The answer of `/predict`, as a worker makes it: classes with probabilities.

Apart from `predict.py`, which brings along what only the front needs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fettle.core.signature import ImagePreprocess
from fettle.serve.answer import Answer
from fettle.serve.model import ModelFault, Served
from fettle.serve.refusal import Refusal


def image_spec(model: Served) -> ImagePreprocess:
    """How this model wants its images. Raises Refusal 422 where it takes none."""
    spec = model.signature.image
    if spec is None or not model.classifies:
        raise Refusal(422, f"this model does not classify images: send tensors to /v2/models/{model.name}/infer")
    return spec


def format_prediction(answer: Answer, *, model: Served, request_id: str) -> dict[str, Any]:
    """The most probable class of a one-row answer. `class` is null where the artifact names no classes."""
    if answer.probabilities is None:
        raise ModelFault("the model gave no class scores")
    row = answer.probabilities[0]
    if not np.isfinite(row).all():
        raise ModelFault("the model answered NaN or infinity, which is no probability")
    index = int(row.argmax())
    classes = model.signature.classes
    return {
        "model": model.name,
        "version": model.version,
        "request_id": request_id,
        "class": classes[index] if index < len(classes) else None,
        "index": index,
        "confidence": float(row[index]),
        "probabilities": row.tolist(),
    }
