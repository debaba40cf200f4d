"""The answer of `/predict`, as a worker makes it: classes with probabilities.

Apart from `predict.py`, which brings along what only the front needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from fettle.core.signature import ImagePreprocess
from fettle.serve.answer import Answer
from fettle.serve.model import ModelFault, Served
from fettle.serve.refusal import Refusal

_encoder = msgspec.json.Encoder()


def image_spec(model: Served) -> ImagePreprocess:
    """How this model wants its images. Raises Refusal 422 where it takes none."""
    spec = model.signature.image
    if spec is None or not model.classifies:
        raise Refusal(422, f"this model does not classify images: send tensors to /v2/models/{model.name}/infer")
    return spec


class _Prediction(msgspec.Struct, rename={"label": "class"}):
    model: str
    version: int
    request_id: str
    label: str | None
    index: int
    confidence: float
    probabilities: list[float]


def format_predictions(answer: Answer, *, model: Served, request_ids: Sequence[str]) -> list[bytes | ModelFault]:
    """For each row the JSON that names its most probable class, or why there is none, so that each row fails alone.

    `class` is null where the artifact names no classes.
    """
    if answer.probabilities is None:
        return [ModelFault("the model gave no class scores") for _ in request_ids]
    # All rows at once: one call of NumPy for each row would take as long as writing its JSON.
    finite = np.logical_and.reduce(np.isfinite(answer.probabilities), axis=1).tolist()
    best = answer.probabilities.argmax(axis=1).tolist()
    rows = answer.probabilities.tolist()
    classes = model.signature.classes
    found: list[bytes | ModelFault] = []
    for request_id, sound, index, row in zip(request_ids, finite, best, rows, strict=True):
        if not sound:
            found.append(ModelFault("the model answered NaN or infinity, which is no probability"))
            continue
        label = classes[index] if index < len(classes) else None
        prediction = _Prediction(model.name, model.version, request_id, label, index, row[index], row)
        found.append(_encoder.encode(prediction))
    return found
