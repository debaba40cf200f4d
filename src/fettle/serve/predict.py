"""`POST /predict`: images in, classes with probabilities out, for people and programs that speak no tensor protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np

from fettle.core.signature import Array, ImagePreprocess
from fettle.serve.batching import Answer
from fettle.serve.images import decode_base64, preprocess
from fettle.serve.model import LoadedModel, ModelFault
from fettle.serve.multipart import boundary_of, files_in
from fettle.serve.protocol import decode
from fettle.serve.refusal import Refusal, quote

# The bytes of one image; calling it may raise Refusal 400, so base64 is decoded in a worker.
ImageBytes = Callable[[], bytes]


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    image: str | None = None
    images: list[str] | None = None


def images_in(body: bytes, content_type: str) -> tuple[list[ImageBytes], bool]:
    """The images of a request body, and whether the answer is a list. Raises Refusal 400, 413 or 415."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/json":
        request: _Body = decode(body, _Body)
        if (request.image is None) == (request.images is None):
            raise Refusal(400, 'the body must be {"image": base64 text} or {"images": [base64 text, ...]}')
        texts = [request.image] if request.image is not None else request.images or []
        if not texts:
            raise Refusal(400, "images must hold at least one image, got none")
        return [_later(text) for text in texts], request.images is not None
    if kind == "multipart/form-data":
        files = files_in(body, boundary_of(content_type))
        if not files:
            raise Refusal(400, "the form must hold at least one image file, got none")
        return [_given(content) for content in files], len(files) > 1
    if kind.startswith("image/"):
        return [_given(body)], False
    raise Refusal(415, f"Content-Type must be application/json, multipart/form-data or image/*, got {quote(kind)}")


def _later(text: str) -> ImageBytes:
    return lambda: decode_base64(text)


def _given(content: bytes) -> ImageBytes:
    return lambda: content


def image_spec(model: LoadedModel) -> ImagePreprocess:
    """How this model wants its images. Raises Refusal 422 where it takes none."""
    spec = model.signature.image
    if spec is None or not model.classifies:
        raise Refusal(422, f"this model does not classify images: send tensors to /v2/models/{model.name}/infer")
    return spec


def prepare_image(image: ImageBytes, *, model: LoadedModel, max_pixels: int) -> Mapping[str, Array]:
    """One row for the model's input. Raises Refusal 400 or 413."""
    return {model.signature.inputs[0].name: preprocess(image(), image_spec(model), max_pixels=max_pixels)}


def format_prediction(answer: Answer, *, model: LoadedModel, request_id: str) -> dict[str, Any]:
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
